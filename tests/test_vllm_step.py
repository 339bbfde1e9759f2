"""Loads within a step, driven by the small engine: it computes a layer when it is there, and what a
load that failed has spoilt is nobody's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvd.client.connectors import vllm_loads, vllm_names, vllm_saves, vllm_scheduler
from kvd.client.connectors.vllm_finder import Found
from kvd.client.connectors.vllm_pages import Pages
from kvd.client.connectors.vllm_step import StepLoads
from kvd.client.lease import Lease
from kvd.errors import LeaseExpired
from kvd.proto.limits import KEYS_MAX
from tests.daemon_in_thread import PATIENCE_S, DaemonInThread
from tests.vllm_bench import HYBRID, MLA, TP2, WINDOW, Bench, is_known, prompt, settle, until
from tests.vllm_daemon import SPACE
from tests.vllm_engine import SmallEngine
from tests.vllm_fakes import Model
from tests.vllm_request import Request

WANTS_NONE = {"kvd": {"load": False}}


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_names, "hash_space", lambda _: SPACE)
    monkeypatch.setattr(vllm_saves, "SAVE_WAIT_S", PATIENCE_S)
    monkeypatch.setattr(vllm_loads, "STEP_PIN_S", PATIENCE_S)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonInThread]:
    running = DaemonInThread(tmp_path_factory.mktemp("step"))
    yield running
    running.stop()


@pytest.fixture
def socket(daemon: DaemonInThread) -> Path:
    return daemon.local


def known(engine: SmallEngine, tokens: list[int], **more: Any) -> Request:
    """A request of which the engine knows what the daemon has."""
    request = engine.add(tokens, **more)
    until(lambda: is_known(engine, request))
    return request


# Models of one group without a window, the last with more layers than threads.
MODELS = {"full": Model(), "tp2": TP2, "mla": MLA, "deep": Model(layers_per_group=12)}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("count", [17, 40, 41, 61])
@pytest.mark.parametrize("budget", [3, 1000])
def test_a_step_loads_what_it_computes_on(
    socket: Path, model: Model, count: int, budget: int
) -> None:
    with Bench(socket, model) as bench:
        first = bench.store(prompt(40), prompt(61), max_tokens=5)
        engine = bench.engine(loads_in_step=True, has_prefix_cache=True, budget=budget)
        request = known(engine, prompt(count), max_tokens=5)
        engine.step()
        # The end of a prompt that is known as a whole would leave nothing to compute.
        is_whole = count == 40
        assert request.status == ("loading" if is_whole else "running")
        assert engine.num_loaded_in_step == 1 - is_whole
        engine.finish_all()
        assert engine.num_failed == 0
        counts = engine.tally.take()
        assert counts["hits"] == 1
        assert counts["hits_in_step"] == engine.num_loaded_in_step
        if count in (40, 61):
            assert request.tokens == first.ever[count == 61].tokens


@pytest.mark.parametrize("model", [HYBRID, WINDOW], ids=["hybrid", "window"])
def test_a_failure_that_cannot_be_told_by_blocks_is_not_risked(socket: Path, model: Model) -> None:
    with Bench(socket, model) as bench:
        bench.store(prompt(40))
        engine = bench.engine(loads_in_step=True)
        known(engine, prompt(41))
        engine.finish_all()
        assert (engine.num_loaded, engine.num_loaded_in_step) == (1, 0)


@pytest.mark.parametrize("why", ["plans ahead", "is not wanted"])
def test_an_engine_may_load_beside_its_steps_alone(socket: Path, why: str) -> None:
    with Bench(socket, layer_by_layer=why != "is not wanted") as bench:
        bench.store(prompt(40))
        engine = bench.engine(loads_in_step=True, is_ahead=why == "plans ahead")
        known(engine, prompt(41))
        engine.finish_all()
        assert (engine.num_loaded, engine.num_loaded_in_step) == (1, 0)


def test_nobody_else_waits_for_a_load(socket: Path) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40))
        engine = bench.engine(loads_in_step=True)
        other = engine.add(prompt(9, 1), max_tokens=300, kv_transfer_params=WANTS_NONE)
        engine.step()
        request = known(engine, prompt(41))
        engine.step()
        assert request.status == "loading"
        engine.abort(other)
        engine.finish_all()
        # Alone again.
        request = known(engine, prompt(41))
        engine.step()
        assert engine.num_loaded_in_step == 1
        engine.finish_all()


def test_of_two_that_come_together_one_is_loaded_in_the_step(socket: Path) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40), prompt(40, 1))
        engine = bench.engine(loads_in_step=True)
        requests = [known(engine, prompt(41, seed)) for seed in (0, 1)]
        engine.step()
        assert engine.num_loaded_in_step == 1
        assert [request.status for request in requests] == ["finished", "loading"]
        engine.finish_all()


@pytest.mark.parametrize("size_max", [0, 1 << 30])
def test_a_long_load_is_not_part_of_a_step(
    socket: Path, size_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_scheduler, "STEP_SIZE_MAX", size_max)
    with Bench(socket) as bench:
        bench.store(prompt(40))
        engine = bench.engine(loads_in_step=True)
        known(engine, prompt(41))
        engine.finish_all()
        assert engine.num_loaded_in_step == bool(size_max)


@pytest.mark.parametrize("ready", [[100, 99], [100, 100], []])
def test_what_is_still_on_a_disk_is_not_in_memory(ready: list[int]) -> None:
    def is_ready(at: int) -> bool:
        return not ready or ready[at] >= 100

    class TwoChunks(SimpleNamespace):
        def __len__(self) -> int:
            return 2

    found = Found(leases=[TwoChunks(is_ready=is_ready)])  # type: ignore[list-item]
    assert found.is_in_memory == (99 not in ready)


def test_what_is_not_in_memory_is_not_loaded_in_a_step(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40))
        engine = bench.engine(loads_in_step=True)
        monkeypatch.setattr(Found, "is_in_memory", False)
        known(engine, prompt(41))
        engine.finish_all()
        assert (engine.num_loaded, engine.num_loaded_in_step) == (1, 0)


def test_what_such_a_step_computes_is_stored_by_the_next(socket: Path) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(24))
        engine = bench.engine(loads_in_step=True)
        # It ends with the step that loads it.
        known(engine, prompt(61))
        engine.finish_all()
        engine.step()
        settle(engine)
        other = bench.engine()
        assert known(other, prompt(61)).request_id
        other.finish_all()
        assert other.tally.take()["hit_tokens"] == 60


def test_blocks_that_the_next_step_writes_are_not_stored_late(socket: Path) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(24))
        engine = bench.engine(loads_in_step=True, num_blocks=20)
        known(engine, prompt(61))
        engine.finish_all()
        # It takes blocks of the one before; the bench looks at what is stored in the end.
        engine.run(prompt(70, 1), kv_transfer_params=WANTS_NONE)
        settle(engine)
        other = bench.engine()
        known(other, prompt(61))
        other.finish_all()
        assert other.tally.take()["hit_tokens"] == 24


# Loads that fail.


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("gone", [range(KEYS_MAX), range(3, KEYS_MAX), [0]], ids=str)
@pytest.mark.parametrize("budget", [7, 1000])
def test_a_step_whose_load_fails_is_computed_anew(
    socket: Path, model: Model, gone: Any, budget: int
) -> None:
    with Bench(socket, model) as bench:
        first = bench.store(prompt(61), max_tokens=5)
        engine = bench.engine(loads_in_step=True, has_prefix_cache=True, budget=budget)
        request = known(engine, prompt(61), max_tokens=5)
        bench.gate.gone = gone
        engine.step()
        assert (engine.num_loaded_in_step, engine.num_failed) == (1, 1)
        bench.gate.open()
        engine.finish_all()
        assert request.tokens == first.ever[0].tokens
        # It is asked for once.
        assert engine.num_loaded == 1
        assert engine.tally.take()["miss_lost"] == model.num_ranks


def test_what_has_left_memory_since_is_not_waited_for(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40))
        engine = bench.engine(loads_in_step=True)
        request = known(engine, prompt(61))
        found = engine.scheduler._requests[request.request_id].found
        assert found is not None
        ours = set(found.leases)
        # The scheduler's pin says that all is there, the worker's that two chunks are.
        monkeypatch.setattr(Lease, "is_ready", lambda lease, at: lease in ours or at < 2)
        engine.step()
        assert (engine.num_loaded_in_step, engine.num_failed) == (1, 1)
        assert request.num_computed_tokens == 16
        engine.finish_all()


def test_what_was_read_when_the_session_ended_does_not_count(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40))
        engine = bench.engine(loads_in_step=True)
        known(engine, prompt(61))
        are_read: list[bool] = []

        def read(pages: Pages, moves: Any) -> Iterator[int]:
            yield from scatter(pages, moves)
            are_read.append(True)

        def check(lease: Lease) -> None:
            if are_read:
                raise LeaseExpired("as the test wants it")

        scatter = Pages.scatter_by_layer
        monkeypatch.setattr(Pages, "scatter_by_layer", read)
        monkeypatch.setattr(Lease, "check", check)
        engine.step()
        assert (engine.num_loaded_in_step, engine.num_failed) == (1, 1)
        monkeypatch.undo()
        monkeypatch.setattr(vllm_names, "hash_space", lambda _: SPACE)
        engine.finish_all()


@pytest.mark.parametrize("gone", [range(KEYS_MAX), range(3, KEYS_MAX)], ids=str)
@pytest.mark.parametrize("is_aborted", [False, True])
@pytest.mark.parametrize("budget", [5, 30])
def test_who_shares_a_block_that_holds_nothing_does_not_go_on_behind_it(
    socket: Path, gone: Any, is_aborted: bool, budget: int
) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40))
        engine = bench.engine(loads_in_step=True, has_prefix_cache=True, budget=2 * budget)
        first = known(engine, prompt(40) + prompt(budget, 1), max_tokens=9)
        second = known(engine, prompt(40) + prompt(9, 2), max_tokens=9)
        third = known(engine, prompt(40) + prompt(7, 3), max_tokens=9)
        bench.gate.gone = gone
        engine.step()
        assert second.tables[0][:10] == first.tables[0][:10]
        bench.gate.open()
        engine.budget = 4
        if is_aborted:
            # Nobody computes for the others what it was to compute.
            engine.abort(first)
        engine.finish_all()
        assert third.status == "finished"


@pytest.mark.parametrize("when", ["meanwhile", "afterwards"])
def test_nobody_finds_what_was_computed_on_nothing(socket: Path, when: str) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40))
        engine = bench.engine(loads_in_step=True, has_prefix_cache=True)
        request = known(engine, prompt(61))
        bench.gate.gone = range(3, KEYS_MAX)
        if when == "meanwhile":
            engine.meanwhile.append(lambda: engine.abort(request))
        engine.step()
        engine.abort(request)
        # The engine looks at what it finds. The first prompt fills the gap before what was behind.
        engine.run(prompt(29), kv_transfer_params=WANTS_NONE)
        engine.run(prompt(61) + prompt(9, 1), max_tokens=3, kv_transfer_params=WANTS_NONE)


def test_a_step_whose_load_fails_stores_nothing(socket: Path) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(24))
        engine = bench.engine(loads_in_step=True)
        request = known(engine, prompt(61))
        bench.gate.gone = range(KEYS_MAX)
        engine.meanwhile.append(lambda: engine.abort(request))
        engine.step()
        bench.gate.open()
        engine.step()
        settle(engine)
        # Else the bench finds others' KV in the daemon; this looks that there is nothing at all.
        with bench.connect() as client:
            layout = engine.engine.groups[0].layouts[0]
            assert len(client.list_chunks(layout=layout.fingerprint, limit=100).chunks) == 3


@pytest.mark.parametrize("is_good", [False, True])
def test_steps_load_no_more_where_it_fails_again_and_again(socket: Path, is_good: bool) -> None:
    with Bench(socket) as bench:
        bench.store(prompt(40))
        engine = bench.engine(loads_in_step=True)
        for number in range(4):
            # One that goes well in between makes it mere bad luck.
            bench.gate.gone = () if is_good and number == 2 else range(KEYS_MAX)
            known(engine, prompt(41))
            engine.step()
            assert engine.num_loaded_in_step == number + 1 - (number == 3 and not is_good)
            bench.gate.open()
            engine.finish_all()
        assert engine.num_failed == 4 - is_good


def test_a_daemon_that_is_silent_holds_a_step_up_for_a_moment(
    daemon: DaemonInThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_loads, "STEP_PIN_S", 0.05)
    with Bench(daemon.local) as bench:
        bench.store(prompt(40))
        engine = bench.engine(loads_in_step=True)
        # The worker knows the daemon.
        engine.run(prompt(40))
        request = known(engine, prompt(41))
        let_go = threading.Event()
        silence = threading.Thread(target=lambda: daemon.loop.call(let_go.wait, PATIENCE_S))
        silence.start()
        try:
            engine.step()
            # The daemon has not said a word: else this would be no test.
            assert silence.is_alive()
        finally:
            let_go.set()
            silence.join()
        assert engine.num_failed == 1
        engine.finish_all()
        assert request.status == "finished"
        assert engine.tally.take()["miss_failed"] == 1


# The worker's part by itself.


def test_an_engine_that_does_not_stop_at_each_layer_is_noticed(socket: Path) -> None:
    with Bench(socket, Model(layers_per_group=3)) as bench:
        bench.store(prompt(40))
        for stops, waits, is_bad in (
            (True, [0, 1, 2], False),
            (True, [0, 2], True),
            (True, [], True),
            (False, [], False),
        ):
            engine = bench.engine(loads_in_step=True)
            known(engine, prompt(41))
            engine._schedule()
            plan, (worker,) = engine.scheduler.plan(engine.output), engine.workers
            worker.loads.start(plan.loads, stops_at_layers=stops)
            for number in waits:
                worker.loads.wait_for_layer(engine.engine.groups[0].layer_names[number])
            found = worker.loads.results(is_idle=False)
            engine.scheduler.loaded_in_step(found.in_step, found.bad_blocks)
            assert found.in_step == {plan.loads[0].request}
            assert bool(found.bad_blocks) == is_bad
            # The next step is another.
            assert not worker.loads.results(is_idle=False).bad_blocks
            worker.loads.start(plan.loads)
            assert worker.loads.results(is_idle=False).bad_blocks


def test_a_layer_is_waited_for_until_it_is_there() -> None:
    step = StepLoads(["a", "b", "c"])
    progress = [step.begin(), step.begin()]
    progress[0].layer_written("a of 0")
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(step.wait_for_layer("a")))
    reader.start()
    reader.join(0.05)
    assert reader.is_alive()
    progress[1].layer_written(None)
    reader.join(PATIENCE_S)
    assert found == [["a of 0"]]
    assert step.wait_for_layer("of another model") == []
    # One that ends early has nothing more to wait for.
    progress[0].end()
    progress[1].end()
    assert step.wait_for_layer("b") == step.wait_for_layer("c") == []
    assert step.end()
    # No loads, nothing to wait for.
    assert step.wait_for_layer("a") == []
    assert step.end()
