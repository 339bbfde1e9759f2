"""The connector's two sides and a daemon in a process of its own that stops, dies or comes late:
the engine goes on computing, and computes what is right.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.client.connectors import late_answers, late_client, vllm_finder, vllm_names
from tests.conftest import DaemonProcess
from tests.vllm_bench import FULL, HYBRID, Bench, is_known, prompt, settle, step_until, until
from tests.vllm_daemon import SPACE

# What a step may take at most, with all that a test machine under load adds to the bounds.
STEP_S_MAX = 1.0


@pytest.fixture(autouse=True)
def _quick_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_names, "hash_space", lambda _: SPACE)
    monkeypatch.setattr(vllm_finder, "MISS_S", 0.0)
    monkeypatch.setattr(late_client, "RETRY_EVERY_S", 0.0)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("vllm")) as running:
        yield running


@pytest.fixture
def stopped(process: DaemonProcess) -> Iterator[DaemonProcess]:
    """A daemon that a test may stop; it goes on after it."""
    yield process
    process.process.send_signal(signal.SIGCONT)


def test_the_scheduler_does_not_wait_for_a_daemon_that_is_stopped(stopped: DaemonProcess) -> None:
    with Bench(stopped.socket, lookup_s=3.0) as bench:
        bench.store(prompt(40), prompt(40, 1))
        engine = bench.engine()
        found, asked = engine.add(prompt(40)), engine.add(prompt(40, 1))
        until(lambda: is_known(engine, found))
        stopped.process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        assert not is_known(engine, asked)
        # A question is under way on the connection that pins have to be given back on.
        engine.abort(found)
        engine.step()
        engine.abort(asked)
        assert time.monotonic() - started < STEP_S_MAX
        stopped.process.send_signal(signal.SIGCONT)
        until(lambda: not bench.status().num_pinned)


def test_what_a_stopped_daemon_grants_later_is_given_back(stopped: DaemonProcess) -> None:
    with Bench(stopped.socket, lookup_s=0.1) as bench:
        bench.store(prompt(40))
        engine = bench.engine()
        engine.run(prompt(8, 1))
        stopped.process.send_signal(signal.SIGSTOP)
        request = engine.add(prompt(40))
        step_until(engine, lambda: request.status == "finished")
        assert engine.num_loaded == 0
        stopped.process.send_signal(signal.SIGCONT)
        # The late answer is read with the next one.
        time.sleep(late_answers.REST_S)
        engine.run(prompt(40, 2))
        until(lambda: not bench.status().num_pinned)


def test_an_engine_goes_on_beside_a_stopped_daemon(stopped: DaemonProcess) -> None:
    with Bench(stopped.socket, HYBRID, lookup_s=0.1, load_s=0.2, store_s=0.2) as bench:
        bench.store(prompt(40))
        engine = bench.engine(num_blocks=60)
        request = engine.add(prompt(40))
        until(lambda: is_known(engine, request))
        stopped.process.send_signal(signal.SIGSTOP)
        for seed in range(1, 6):
            engine.add(prompt(40, seed), max_tokens=4)
        while engine.requests:
            started = time.monotonic()
            engine.step()
            assert time.monotonic() - started < STEP_S_MAX
        assert (engine.num_loaded, engine.num_failed) == (1, 1)
        stopped.process.send_signal(signal.SIGCONT)


def test_a_daemon_may_die_in_the_middle_of_everything(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon, Bench(daemon.socket, HYBRID) as bench:
        bench.store(prompt(40))
        engine = bench.engine(budget=20)
        loading, found, asking = (engine.add(prompt(40), max_tokens=9) for _ in range(3))
        until(lambda: is_known(engine, loading) and is_known(engine, found))
        bench.gate.pins.clear()
        engine.step()
        assert (loading.status, asking.status) == ("loading", "waiting")
        daemon.kill()
        bench.gate.open()
        engine.finish_all()
        engine.run(prompt(40, 1))
        settle(engine)
        assert engine.num_failed >= 1
        assert engine.tally.take()["miss_unavailable"] >= 1
        daemon.restart()
        # The same engines go on with the daemon that came back, which has nothing.
        engine.run(prompt(40, 2))
        settle(engine)
        num_loaded = engine.num_loaded
        engine.run(prompt(40, 2))
        assert engine.num_loaded == num_loaded + 1


def test_a_daemon_may_come_late(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "kvd.sock", FULL)
    try:
        engine = bench.engine()
        engine.run(prompt(40))
        assert engine.tally.take()["miss_unavailable"] == 1
        with DaemonProcess(tmp_path):
            engine.run(prompt(40))
            settle(engine)
            engine.run(prompt(40))
            assert engine.num_loaded == 1
            bench.check()
    finally:
        bench.close()
