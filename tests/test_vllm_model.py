"""The vLLM connector's two sides, driven by a small engine with a real daemon behind them.

Every byte that the engine would compute on is checked against what belongs there, and in the end
every byte that the daemon has.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Container, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvd.client.connectors import vllm_names, vllm_saves, vllm_scheduler
from kvd.client.connectors.vllm_plan import key_of
from kvd.keys import ChunkKey
from kvd.proto.limits import KEYS_MAX
from tests.daemon_in_thread import PATIENCE_S, DaemonInThread
from tests.vllm_bench import HYBRID, MODELS, Bench, is_known, prompt, settle, step_until, until
from tests.vllm_daemon import SPACE, GatedClient, assert_stored_right
from tests.vllm_engine import SmallEngine
from tests.vllm_fakes import Model
from tests.vllm_request import Request


@pytest.fixture(autouse=True)
def _hashes_mean_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_names, "hash_space", lambda _: SPACE)
    # On a machine under load a save would be given up that should be there.
    monkeypatch.setattr(vllm_saves, "SAVE_WAIT_S", PATIENCE_S)


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A daemon's."""
    running = DaemonInThread(tmp_path_factory.mktemp("vllm"))
    yield running.local
    running.stop()


models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@models
@pytest.mark.parametrize("count", [13, 16, 17, 40, 41])
def test_a_prompt_is_loaded_by_another_engine(socket: Path, model: Model, count: int) -> None:
    with Bench(socket, model) as bench:
        first = bench.store(prompt(count), max_tokens=5)
        second = bench.engine()
        request = second.run(prompt(count), max_tokens=5)
        assert request.tokens == first.ever[0].tokens
        assert (second.num_loaded, second.num_failed) == (1, 0)
    assert bench.num_stored >= len(model.windows) * count // 8


@models
@pytest.mark.parametrize(
    "ways",
    [{"budget": 5}, {"budget": 7, "is_ahead": True}, {"num_drafts": 4}, {"has_prefix_cache": True}],
    ids=str,
)
def test_what_engines_of_all_ways_store_is_right(
    socket: Path, model: Model, ways: dict[str, Any]
) -> None:
    with Bench(socket, model) as bench:
        engine = bench.engine(**ways)
        for seed in (0, 1, 0):
            engine.add(prompt(37, seed), max_tokens=9)
            engine.finish_all()
        settle(engine)
        other = bench.engine(**ways)
        other.add(prompt(37, 1), max_tokens=20)
        other.add(prompt(37, 0) + prompt(9, 2))
        other.finish_all()
        assert other.num_loaded == 2
    assert bench.num_stored >= 8 * len(model.windows)


def test_a_prompt_that_is_found_as_a_whole_is_loaded_as_a_whole(socket: Path) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(16))
        engine = bench.engine()
        request = engine.add(prompt(16))
        until(partial(is_known, engine, request))
        engine.step()
        assert request.num_computed_tokens == 16
        engine.finish_all()


def test_the_last_token_is_computed_on_all_that_it_sees(socket: Path) -> None:
    """A window that begins with a block: the last token of a prompt sees one before it."""
    with Bench(socket, Model(windows=(9,))) as bench:
        bench.store(prompt(16))
        engine = bench.engine()
        engine.run(prompt(16))
        assert engine.num_loaded == 1


def test_a_tail_is_found_behind_the_last_chunk(socket: Path) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(23))
        engine = bench.engine()
        request = engine.add(prompt(22) + prompt(1, 1))
        until(lambda: engine.scheduler.matched(request, 0) == 20)
        engine.finish_all()


@pytest.mark.parametrize(("index", "num_found"), [(4, 32), (1, 8)])
def test_a_hit_is_what_every_rank_has(socket: Path, index: int, num_found: int) -> None:
    with Bench(socket, MODELS["tp2"]) as bench:
        first = bench.store(prompt(44))
        with bench.connect() as client:
            assert client.clear([names(first, first.ever[0], rank=1)[index]])[0]
        engine = bench.engine()
        request = engine.add(prompt(44))
        until(partial(is_known, engine, request))
        assert engine.scheduler.matched(request, 0) == num_found
        engine.finish_all()
        assert engine.num_failed == 0


def test_a_prompt_of_more_chunks_than_a_request_may_name_is_loaded(socket: Path) -> None:
    with Bench(socket) as bench:
        engine = bench.engine(num_blocks=2 * KEYS_MAX + 8)
        engine.run(prompt(8 * KEYS_MAX + 5))
        settle(engine)
        other = bench.engine(num_blocks=2 * KEYS_MAX + 8)
        other.run(prompt(8 * KEYS_MAX + 5))
        assert (other.num_loaded, other.num_failed) == (1, 0)


# What is asked while a prompt waits.


def test_a_prompt_that_waits_for_room_is_asked_for_once(socket: Path) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40))
        engine = bench.engine(num_blocks=45)
        engine.add(prompt(141, 1), max_tokens=25)
        engine.step()
        # Nobody stored its tail.
        request = engine.add(prompt(40) + prompt(5, 2))
        until(lambda: engine.scheduler.matched(request, 0) == 40)
        num_pins = bench.gate.num_pins
        for _ in range(10):
            engine.step()
        assert request.status == "waiting"
        assert bench.gate.num_pins == num_pins
        engine.finish_all()
        assert engine.num_loaded == 1


def test_the_engines_own_hit_may_change_while_a_prompt_waits(socket: Path) -> None:
    with Bench(socket, HYBRID) as bench:
        bench.store(*(prompt(40, seed) for seed in range(3)))
        engine = bench.engine(has_prefix_cache=True)
        for seed, asked in enumerate(([0, 16, 8], [24, 0], [40, 32, 0])):
            request = engine.add(prompt(40, seed))
            for num_own in asked:
                until(partial(is_known, engine, request, num_own))
            engine.finish_all()


@models
def test_what_the_engine_has_itself_is_not_written(socket: Path, model: Model) -> None:
    with Bench(socket, model) as bench:
        bench.store(prompt(61))
        engine = bench.engine(has_prefix_cache=True, num_blocks=100)
        # The block behind 12 tokens is in the middle of a chunk.
        for count in (13, 61):
            engine.run(prompt(count))
        assert engine.num_loaded == 2


def test_a_slow_answer_is_not_waited_for(socket: Path) -> None:
    with Bench(socket, lookup_s=0.1) as bench:
        bench.store(prompt(40))
        engine = bench.engine()
        bench.gate.pins.clear()
        request = engine.add(prompt(40))
        engine.step()
        assert request.status == "waiting"
        step_until(engine, lambda: request.status == "finished")
        assert engine.num_loaded == 0
        assert engine.tally.take()["miss_slow"] == 1
        bench.gate.open()


def test_an_answer_that_nobody_wants_any_more_pins_nothing(socket: Path) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40))
        engine = bench.engine()
        bench.gate.pins.clear()
        request = engine.add(prompt(40))
        engine.step()
        engine.abort(request)
        num_pins = bench.status().counters["pin_hits"]
        bench.gate.open()
        until(lambda: bench.status().counters["pin_hits"] == num_pins + 5)
        until(lambda: not bench.status().num_pinned)


def test_an_answer_that_is_not_taken_is_let_go(socket: Path) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40))
        engine = bench.engine()
        request = engine.add(prompt(40), max_tokens=50, skip_reading_prefix_cache=True)
        step_until(engine, lambda: request.status == "running")
        until(lambda: not bench.status().num_pinned)
        engine.abort(request)


def test_what_goes_wrong_in_a_lookup_is_a_miss(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40))
        engine = bench.engine()
        monkeypatch.setattr(GatedClient, "pin", lambda *_, **__: 1 // 0)
        engine.run(prompt(40))
        assert engine.tally.take()["miss_unavailable"] == 1


# Loads.


@models
@pytest.mark.parametrize(
    "gone", [range(KEYS_MAX), range(1, KEYS_MAX), [0]], ids=["all", "most", "one"]
)
def test_what_is_gone_when_it_is_loaded_is_computed(
    socket: Path, model: Model, gone: Container[int]
) -> None:
    with Bench(socket, model) as bench:
        first = bench.store(prompt(45))
        engine = bench.engine(has_prefix_cache=True)
        request = engine.add(prompt(45))
        until(lambda: engine.scheduler.matched(request, 0) is not None)
        bench.gate.gone = gone
        step_until(engine, lambda: engine.num_failed == 1)
        bench.gate.open()
        engine.finish_all()
        assert request.tokens == first.ever[0].tokens
        # It is asked for once.
        assert engine.num_loaded == 1
        counts = engine.tally.take()
        assert counts["miss_lost"] == model.num_ranks


def test_what_was_loaded_before_a_failure_is_kept(socket: Path) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40))
        engine = bench.engine()
        request = engine.add(prompt(40))
        until(lambda: engine.scheduler.matched(request, 0) is not None)
        bench.gate.gone = range(3, KEYS_MAX)
        step_until(engine, lambda: engine.num_failed == 1)
        assert request.num_computed_tokens == 24
        engine.finish_all()


def test_blocks_that_others_read_too_are_neither_new_nor_bad(socket: Path) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40))
        engine = bench.engine(has_prefix_cache=True)
        wants_none = {"kvd": {"load": False}}
        other = engine.add(prompt(13), max_tokens=300, kv_transfer_params=wants_none)
        engine.step()
        request = engine.add(prompt(40))
        until(lambda: engine.scheduler.matched(request, 12) is not None)
        # The first piece that is gone begins in what the engine has.
        bench.gate.gone = [0]
        # The engine asserts that only the load's own blocks are called bad.
        step_until(engine, lambda: engine.num_failed == 1)
        assert other.tables[0][:3] == request.tables[0][:3]
        assert request.num_computed_tokens == 12
        engine.abort(other)
        engine.finish_all()


@models
def test_an_aborted_load_writes_into_nobodys_blocks(socket: Path, model: Model) -> None:
    with Bench(socket, model) as bench:
        bench.store(prompt(40))
        engine = bench.engine(num_blocks=45)
        request = engine.add(prompt(40))
        until(lambda: engine.scheduler.matched(request, 0) is not None)
        bench.gate.pins.clear()
        engine.step()
        assert request.status == "loading"
        engine.abort(request)
        bench.gate.reservations.wait()
        wants_none = {"kvd": {"load": False}}
        for seed in (1, 2, 3):
            request = engine.add(prompt(40, seed), max_tokens=20, kv_transfer_params=wants_none)
            engine.step()
        bench.gate.open()
        engine.finish_all()
        assert len(engine.pool.free) == 44


def test_a_load_that_takes_too_long_ends(socket: Path) -> None:
    with Bench(socket, load_s=0.05) as bench:
        bench.store(prompt(40))
        engine = bench.engine()
        request = engine.add(prompt(40))
        until(lambda: engine.scheduler.matched(request, 0) is not None)
        bench.gate.pins.clear()
        engine.step()
        time.sleep(0.06)
        bench.gate.pins.set()
        engine.finish_all()
        assert engine.num_failed == 1


# Saves.


def test_blocks_are_not_written_while_a_save_copies_them(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_saves, "SAVE_WAIT_S", 0.01)
    with Bench(socket) as bench:
        engine = bench.engine(num_blocks=4)
        bench.gate.copies.clear()
        engine.run(prompt(8))
        until(bench.gate.is_copying.is_set)
        # All blocks are used again in the next step: it has to wait for the copy under way.
        later = threading.Timer(0.1, bench.gate.copies.set)
        later.start()
        engine.run(prompt(12, 1))
        later.join()
        settle(engine)
        assert engine.tally.take()["saves_given_up"] == 1
    assert bench.num_stored == 3


def test_a_save_that_has_not_begun_is_given_up_for_the_next_step(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_saves, "SAVE_WAIT_S", 0.01)
    with Bench(socket) as bench:
        engine = bench.engine(num_blocks=12)
        bench.gate.reservations.clear()
        engine.run(prompt(40))
        engine.run(prompt(40, 1))
        bench.gate.open()
        settle(engine)
        assert engine.tally.take()["saves_given_up"] == 1
        with bench.connect() as client:
            # Those of the second prompt.
            assert assert_stored_right(client, engine) == 5


@models
@pytest.mark.parametrize("count", [5, 21, 31])
def test_a_longer_prompt_goes_on_behind_the_end_of_a_shorter_one(
    socket: Path, model: Model, count: int
) -> None:
    with Bench(socket, model) as bench:
        bench.store(prompt(count))
        second = bench.engine()
        second.run(prompt(count + 40))
        known = count // model.block_size * model.block_size
        assert (second.num_loaded, second.num_failed) == (1, 0)
        hits = second.tally.take()["hit_tokens"]
        assert hits == known


@models
@pytest.mark.parametrize("count", [8, 23, 80])
@pytest.mark.parametrize("more", [9, 100, 700])
def test_a_short_beginning_of_a_long_prompt_is_found(
    socket: Path, model: Model, count: int, more: int
) -> None:
    with Bench(socket, model) as bench:
        bench.store(prompt(count))
        engine = bench.engine(num_blocks=800)
        engine.run(prompt(count) + prompt(more, 1))
        assert engine.tally.take()["hit_tokens"] == count // 4 * 4
        assert (engine.num_loaded, engine.num_failed) == (1, 0)


@pytest.mark.parametrize("name", ["hybrid", "window", "long_window"])
def test_what_a_lookup_does_not_need_it_does_not_pin(socket: Path, name: str) -> None:
    with Bench(socket, MODELS[name]) as bench:
        bench.store(prompt(72))
        with bench.connect() as client:
            engine = bench.engine(num_blocks=400)
            stored = engine.run(prompt(72), kv_transfer_params={"kvd": {"load": False}})
            settle(engine)
            # Of the longest end a part is gone; the ones before it are all there.
            for group, window in enumerate(bench.model.windows):
                gone = names(engine, stored, group=group)[-1:] if window else []
                assert client.clear(gone)[0] == len(gone)
            request = engine.add(prompt(72) + prompt(9, 1))
            until(partial(is_known, engine, request))
            needed = sum(
                len(group.ends_needed(64)) if group.window else 9 for group in engine.engine.groups
            )
            assert engine.scheduler.matched(request, 0) == 64
            found = engine.scheduler._requests[request.request_id].found
            assert found is not None
            assert sum(len(lease) for lease in found.leases) == needed
            # Others were let go.
            until(lambda: client.status().num_pinned == len(found.leases))
            engine.finish_all()


def test_what_has_left_a_window_is_not_saved_later(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step saves so many chunks at most; with a window the others' blocks are used again."""
    monkeypatch.setattr(vllm_scheduler, "KEYS_MAX", 2)
    with Bench(socket, HYBRID) as bench:
        engine = bench.engine(num_blocks=49)
        wants_none = {"kvd": {"load": False}}
        engine.add(prompt(61), max_tokens=9, kv_transfer_params=wants_none)
        engine.step()
        # It begins in what the other's windows have left behind.
        engine.add(prompt(28, 1), kv_transfer_params=wants_none)
        engine.step()
        assert engine.ever[1].status == "finished"
        engine.finish_all()
        settle(engine)
        with bench.connect() as client:
            assert client.lookup(names(engine, engine.ever[0], group=1)) == 8


def test_saves_that_nobody_can_follow_are_dropped(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_saves, "SAVES_MAX", 2)
    with Bench(socket) as bench:
        engine = bench.engine()
        bench.gate.reservations.clear()
        for seed in range(4):
            engine.run(prompt(8, seed))
        assert engine.tally.take()["saves_dropped"] == 2
        bench.gate.open()
        settle(engine)
        with bench.connect() as client:
            assert assert_stored_right(client, engine) == 2


def test_a_preempted_request_gives_its_blocks_away_at_once(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_saves, "SAVE_WAIT_S", 0.0)
    with Bench(socket) as bench:
        engine = bench.engine(num_blocks=24, budget=30)
        for seed in range(6):
            engine.add(prompt(40, seed), max_tokens=20)
        for _ in range(30):
            engine.step()
            engine.preempt()
        engine.finish_all()


# What requests and operators say.


def test_a_request_may_want_neither(socket: Path) -> None:
    with Bench(socket) as bench:
        engine = bench.engine()
        engine.run(prompt(40), kv_transfer_params={"kvd": {"store": False}})
        assert bench.clear() == 0
        engine.run(prompt(40))
        settle(engine)
        engine.run(prompt(40), kv_transfer_params={"kvd": {"load": False}})
        assert engine.num_loaded == 0
        engine.run(prompt(40))
        assert engine.num_loaded == 1


def test_a_mode_narrows_what_is_done(socket: Path) -> None:
    revision = os.urandom(8).hex()
    with Bench(socket, mode="load", revision=revision) as bench:
        bench.store(prompt(40))
    assert bench.num_stored == 0
    with Bench(socket, mode="store", revision=revision) as bench:
        bench.store(prompt(40), prompt(40))
        assert bench.engines[0].num_loaded == 0
    assert bench.num_stored == 5
    with Bench(socket, mode="load", revision=revision) as bench:
        bench.store(prompt(40))
        assert bench.engines[0].num_loaded == 1


def test_a_hit_that_is_not_worth_it_is_not_loaded(socket: Path) -> None:
    with Bench(socket, min_hit_tokens=24) as bench:
        bench.store(prompt(17), prompt(25, 1))
        engine = bench.engine()
        engine.run(prompt(17))
        assert engine.num_loaded == 0
        engine.run(prompt(25, 1))
        assert engine.num_loaded == 1


def test_generated_tokens_and_tails_are_stored_only_as_wanted(socket: Path) -> None:
    revision = os.urandom(8).hex()
    for generated, tails, count in ((False, False, 1), (False, True, 2), (True, False, 3)):
        more: dict[str, Any] = {"store_generated": generated, "store_tails": tails}
        with Bench(socket, revision=revision, **more) as bench:
            bench.store(prompt(13), max_tokens=13)
        assert bench.num_stored == count
        bench.clear()


def test_a_category_and_a_time_to_live_reach_the_daemon(socket: Path) -> None:
    with Bench(socket, category="chat") as bench:
        engine = bench.engine()
        engine.run(prompt(8), kv_transfer_params={"kvd": {"category": "tools", "ttl_s": 500}})
        engine.run(prompt(8, 1))
        settle(engine)
        layout = engine.engine.groups[0].layouts[0]
        with bench.connect() as client:
            found = client.list_chunks(layout=layout.fingerprint).chunks
        ends = {chunk.category: chunk.expires_in_ns for chunk in found}
        assert ends["chat"] == 0
        assert 0 < ends["tools"] <= 500 * 10**9


def test_what_is_computed_on_approximate_kv_is_approximate(socket: Path) -> None:
    revision = os.urandom(8).hex()
    with Bench(socket, revision=revision) as bench:
        engine = bench.engine()
        engine.run(prompt(16))
        engine.run(prompt(16, 1))
        settle(engine)
        make_approximate(bench, engine, 0)
        other = bench.engine(has_prefix_cache=True)
        # One loads it, the next finds that in the engine, and one has nothing to do with it.
        other.run(prompt(16) + prompt(16, 2))
        other.run(prompt(16) + prompt(16, 3))
        other.run(prompt(16, 1) + prompt(16, 4))
        settle(other)
        assert [exactness(bench, request) for request in other.ever] == [
            [False] * 4,
            [False] * 4,
            [True] * 4,
        ]
    with Bench(socket, revision=revision, exact_only=True) as bench:
        engine = bench.engine()
        engine.run(prompt(16))
        assert engine.num_loaded == 0
        engine.run(prompt(16, 1))
        assert engine.num_loaded == 1
        # These are there from before.
        engine.ever += other.ever


def names(
    engine: SmallEngine, request: Request, *, group: int = 0, rank: int = 0
) -> list[ChunkKey]:
    """Keys of a request's whole chunks, in order."""
    layout, size = engine.engine.groups[group].layouts[rank], engine.engine.chunk_tokens
    ends = range(size, request.num_tokens + 1, size)
    hashes = [request.block_hashes[end // engine.model.block_size - 1] for end in ends]
    return [key_of(layout, blake2b(SPACE + each, digest_size=32).digest()) for each in hashes]


def make_approximate(bench: Bench, engine: SmallEngine, index: int) -> None:
    """Store a request's chunks once more, as what a lossy codec gave back."""
    keys, layout = names(engine, engine.ever[index]), engine.engine.groups[0].layouts[0]
    with bench.connect() as client:
        with client.pin(layout, keys) as lease:
            chunks = [lease.array(at).copy() for at in range(len(lease))]
        client.clear(keys)
        client.store(layout, keys, chunks, exact=False)


def exactness(bench: Bench, request: Request) -> list[bool]:
    engine = bench.engines[-1]
    keys, layout = names(engine, request), engine.engine.groups[0].layouts[0]
    with bench.connect() as client, client.pin(layout, keys) as lease:
        return [lease.is_exact(index) for index in range(len(lease))]


# What a hash stands for.


def test_a_session_that_goes_on_is_named_anew(socket: Path) -> None:
    with Bench(socket) as bench:
        engine = bench.engine()
        request = engine.add(prompt(16))
        until(lambda: engine.scheduler.matched(request, 0) is not None)
        request.go_on(prompt(9, 1))
        engine.finish_all()
    assert bench.num_stored == 3


def test_hashes_of_another_size_name_nothing(socket: Path) -> None:
    with Bench(socket) as bench:
        engine = bench.engine()
        # As with an engine that hashes every eight tokens, or every two.
        for change in (
            lambda hashes: hashes[1::2],
            lambda hashes: [h for h in hashes for _ in "12"],
        ):
            request = engine.add(prompt(40))
            request.block_hashes = change(request.block_hashes)
            engine.finish_all()
            engine.ever.remove(request)
    assert bench.num_stored == 0


def test_an_adapter_is_part_of_the_name(socket: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.bin"
    with Bench(socket) as bench:
        lora = SimpleNamespace(lora_path=str(tmp_path), lora_name="a")
        engine = bench.engine()
        for content, num_loaded in ((b"one", 0), (b"one", 1), (b"other", 1)):
            file.write_bytes(content)
            engine.run(prompt(16), lora_request=lora)
            settle(engine)
            assert engine.num_loaded == num_loaded
        # One that cannot be read neither finds nor stores.
        (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
        engine.run(prompt(24), lora_request=lora)
        settle(engine)
        assert engine.num_loaded == 1
        assert bench.clear() == 4


def test_nothing_is_found_once_the_weights_have_changed(socket: Path) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40), prompt(40, 1))
        engine = bench.engine()
        found, asked = engine.add(prompt(40)), engine.add(prompt(40, 1))
        until(lambda: engine.scheduler.matched(found, 0) == 40)
        bench.gate.pins.clear()
        assert engine.scheduler.matched(asked, 0) is None
        engine.scheduler.forget_everything(b"other weights")
        bench.gate.open()
        engine.finish_all()
        assert engine.num_loaded == 0
        # What is stored from now on has other names, which nobody here knows.
        settle(engine)
        bench.engines.remove(engine)
        engine.close()
        assert bench.clear() == 20


@pytest.mark.parametrize("max_tokens", [1, 30])
@pytest.mark.parametrize("loads_in_step", [False, True])
def test_what_was_begun_with_other_weights_is_not_stored(
    socket: Path, loads_in_step: bool, max_tokens: int
) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(24))
        engine = bench.engine(loads_in_step=loads_in_step)
        request = engine.add(prompt(41), max_tokens=max_tokens)
        until(partial(is_known, engine, request))
        step_until(engine, lambda: request.num_computed_tokens >= 41)
        settle(engine)
        with bench.connect() as client:
            before = client.status().num_chunks
            engine.scheduler.forget_everything(b"other weights")
            engine.finish_all()
            engine.step()
            settle(engine)
            assert client.status().num_chunks == before
            # One that begins with them is.
            engine.run(prompt(24))
            settle(engine)
            assert client.status().num_chunks == before + 3
        bench.engines.remove(engine)
        engine.close()
        bench.clear()
