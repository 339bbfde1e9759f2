"""Whatever happens to the daemon, a request ends in time and with the right tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvd.keys import ChunkKey
from tests.vllm.counts import Since, num_pieces
from tests.vllm.daemon import PATIENCE_S, Daemon
from tests.vllm.harness import Answer, Engine, Request, prompt
from tests.vllm.holds import SETTING, held
from tests.vllm.reference import Reference

NEW_TOKENS = 16
NUM_TOKENS = 600
NUM_PIECES = num_pieces(NUM_TOKENS)

# For the wait for a load, and for computing everything, on a busy machine. Saves may take longer:
# no request waits for one.
ANSWER_S_MAX = 15.0
LOOKUP_S = 0.25
LOAD_S = 2.0
STORE_S = 30.0

# With an older one loads are whole, whatever is asked for.
IN_STEP = {"since": "0.30", "why": "nothing can be taken out of the engine's own prefix cache"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An engine whose daemon has accidents. `holds` is the folder of `holds.py`."""

    daemon: Daemon
    engine: Engine
    holds: Path
    reference: Reference
    # What the engine said before there was a daemon, and to what.
    first_request: Request
    first_answer: Answer
    # Whether loads are part of steps.
    is_in_step: bool

    def place(self, name: str) -> str:
        """Where a load is held."""
        return "layer" if name == "scatter" and self.is_in_step else name

    def ask_soon(self, request: Request) -> Answer:
        """The answer, which must be right and come in time."""
        with self.in_time():
            self.engine.ask({"generate": [request]})
            return self.answer(request)

    def answer(self, request: Request) -> Answer:
        """The answer to what was asked, which must be right."""
        (answer,) = self.engine.answers()
        self.reference.check(request, answer)
        return answer

    @contextmanager
    def in_time(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        assert time.monotonic() - begun < ANSWER_S_MAX

    def recovers(self, request: Request) -> None:
        """Assert that the request is stored and found again without anybody's doing; the daemon has
        nothing else then, and the engine has nothing itself.
        """
        self.daemon.clear()
        give_up = time.monotonic() + PATIENCE_S
        since = Since(self.engine)
        while not since()["hit_tokens"]:
            assert time.monotonic() < give_up, "the engine has not found its daemon again"
            self.engine.forget()
            self.ask_soon(request)
        self.daemon.until_stored(NUM_PIECES)
        self.engine.forget()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(False, id="whole"),
        pytest.param(True, id="layers", marks=pytest.mark.vllm(**IN_STEP)),
    ],
)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, reference: Reference
) -> Iterator[Site]:
    """An engine that starts without a daemon; then there is one. vLLM's own policy, under which a
    request fails with its load, is left as it is.
    """
    folder = tmp_path_factory.mktemp("site")
    daemon = Daemon(folder)
    transfer = daemon.transfer(
        verify=True,
        lookup_s=LOOKUP_S,
        load_s=LOAD_S,
        store_s=STORE_S,
        layer_by_layer=request.param,
    )
    with Engine(folder, "qwen3", settings={SETTING: str(folder)}, **transfer) as engine:
        first = request_of(0)
        (answer,) = engine.generate(first)
        with daemon:
            yield Site(
                daemon=daemon,
                engine=engine,
                holds=folder,
                reference=reference,
                first_request=first,
                first_answer=answer,
                is_in_step=request.param,
            )


def request_of(seed: int) -> Request:
    return {"prompt": prompt(100 + seed, NUM_TOKENS), "new_tokens": NEW_TOKENS}


def test_an_engine_starts_without_its_daemon_and_finds_it_later(site: Site) -> None:
    site.reference.check(site.first_request, site.first_answer)
    site.recovers(site.first_request)


def test_a_daemon_that_is_killed_before_the_lookup(site: Site) -> None:
    site.recovers(request_of(1))
    site.daemon.kill()
    since = Since(site.engine)
    site.ask_soon(request_of(1))
    assert since()["miss_unavailable"] == 1
    site.daemon.start()
    site.recovers(request_of(1))


@pytest.mark.parametrize("is_back", [False, True])
@pytest.mark.parametrize("place", ["load", "scatter"])
def test_a_daemon_that_is_killed_before_or_in_the_load(
    site: Site, place: str, is_back: bool
) -> None:
    request = request_of(2)
    site.recovers(request)
    since = Since(site.engine)
    with held(site.holds, site.place(place)) as hold:
        site.engine.ask({"generate": [request]})
        hold.until_reached()
        site.daemon.kill()
        if is_back:
            site.daemon.start()
    with site.in_time():
        site.answer(request)
    found = since()
    assert (found["hits"], found["loaded_bytes"]) == (1, 0)
    assert found["hits_in_step"] == site.is_in_step
    assert found["miss_failed"] + found["miss_lost"] == 1
    if not is_back:
        site.daemon.start()
    site.recovers(request)


@pytest.mark.parametrize("place", ["gather", "commit"])
def test_a_daemon_that_is_killed_in_the_save(site: Site, place: str) -> None:
    request = request_of(3 if place == "gather" else 4)
    site.recovers(request_of(0))
    since = Since(site.engine)
    with held(site.holds, place) as hold:
        site.ask_soon(request)
        hold.until_reached()
        site.daemon.restart()
    site.recovers(request)
    assert since()["saves_failed"] >= 1


def test_a_daemon_that_stands_still_for_the_whole_request(site: Site) -> None:
    site.recovers(request_of(5))
    since = Since(site.engine)
    with site.daemon.paused():
        site.ask_soon(request_of(5))
        # The one that is not stored, too: its save waits, and others do not wait for the save.
        site.ask_soon(request_of(6))
        site.ask_soon(request_of(7))
    assert since()["miss_slow"] == 3
    site.recovers(request_of(5))


@pytest.mark.parametrize("place", ["load", "scatter"])
def test_a_daemon_that_stands_still_before_or_in_the_load(site: Site, place: str) -> None:
    request = request_of(8)
    site.recovers(request)
    since = Since(site.engine)
    with ExitStack() as stack:
        with held(site.holds, site.place(place)) as hold:
            site.engine.ask({"generate": [request]})
            hold.until_reached()
            stack.enter_context(site.daemon.paused())
        with site.in_time():
            site.answer(request)
    # Once it is pinned, a load needs no daemon.
    assert since()["miss_failed"] == (place == "load")
    site.recovers(request)


def test_chunks_that_are_evicted_between_lookup_and_load(site: Site) -> None:
    request = request_of(9)
    site.recovers(request)
    since = Since(site.engine)
    with held(site.holds, "load") as hold:
        site.engine.ask({"generate": [request]})
        hold.until_reached()
        assert site.daemon.clear() == 0, "what the lookup has found is pinned"
        site.daemon.until(lambda: site.daemon.clear() == NUM_PIECES, "the pins never end")
    with site.in_time():
        site.answer(request)
    found = since()
    assert (found["hits"], found["miss_lost"], found["loaded_bytes"]) == (1, 1, 0)
    site.recovers(request)


@pytest.mark.parametrize("start", [0, 512])
def test_a_damaged_chunk_is_computed(site: Site, start: int) -> None:
    request = request_of(10)
    site.recovers(request)
    (key,) = [chunk.key for chunk in site.daemon.chunks() if chunk.start == start]
    site.daemon.overwrite([ChunkKey(key)], lambda chunk: chunk[-1, -1, -1, -1, -1:].neg_())
    since = Since(site.engine)
    # The damaged chunk is still there, and would be found again and again.
    site.ask_soon(request)
    found = since()
    assert (found["hits"], found["miss_lost"], found["loaded_bytes"]) == (1, 1, 0)


def test_an_aborted_load_gives_its_blocks_back(site: Site) -> None:
    request = request_of(11)
    site.recovers(request)
    if site.is_in_step:
        pytest.skip("nobody can abort what a step is computing")
    with held(site.holds, "scatter") as hold:
        site.engine.ask({"generate": [{**request, "abort_at": 200}]})
        hold.until_reached()
        (aborted,) = site.engine.answers()
    assert (aborted.finish, aborted.tokens) == ("abort", [])
    assert site.engine.settle()
    # This fails while any block is in use.
    site.engine.forget()
    site.daemon.until_idle()
    site.ask_soon(request)


def test_an_engine_that_is_killed_leaves_no_pin_and_no_write(node: Daemon, tmp_path: Path) -> None:
    transfer = node.transfer()
    with Engine(tmp_path, "qwen3", settings={SETTING: str(tmp_path)}, **transfer) as victim:
        node.new_keys(lambda: victim.generate(request_of(20)), NUM_PIECES)
        victim.forget()
        with held(tmp_path, "commit") as save, held(tmp_path, "scatter") as load:
            victim.ask({"generate": [request_of(21), request_of(20)]})
            save.until_reached()
            load.until_reached()
            status = node.status()
            assert status.num_pinned
            assert status.num_reserved
            victim.kill()
    before = node.status().num_chunks
    node.until_idle()
    assert node.status().num_chunks == before
