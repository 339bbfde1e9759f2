"""Engines that do everything at once, in every order, with a daemon that comes and goes: what they
compute on is right in every step, and what the daemon has is right in the end.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from kvd.client import client as client_module
from kvd.client.connectors import (
    late_answers,
    late_client,
    vllm_finder,
    vllm_loads,
    vllm_names,
    vllm_saves,
    vllm_scheduler,
)
from tests.daemon_in_thread import DaemonInThread
from tests.vllm_bench import MODELS, Bench, prompt
from tests.vllm_daemon import SPACE
from tests.vllm_engine import SmallEngine

# Times as many examples, for a search that may take an hour.
EFFORT = int(os.environ.get("KVD_TEST_EFFORT", "1"))

ENGINES = st.integers(0, 1)


@pytest.fixture(scope="module", autouse=True)
def _quick_rests() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_names, "hash_space", lambda _: SPACE)
        patch.setattr(vllm_scheduler, "INLINE_S", 0.002)
        patch.setattr(vllm_saves, "SAVE_WAIT_S", 0.002)
        patch.setattr(vllm_loads, "IDLE_WAIT_S", 0.002)
        patch.setattr(late_answers, "REST_S", 0.01)
        patch.setattr(vllm_finder, "MISS_S", 0.01)
        patch.setattr(late_client, "RETRY_EVERY_S", 0.01)
        patch.setattr(client_module, "RETRY_EVERY_S", 0.01)
        yield


class EnginesMachine(RuleBasedStateMachine):
    """Two engines of one model: one plans a step ahead, the other has drafts, or loads in a step
    what it can.
    """

    @initialize(
        model=st.sampled_from(list(MODELS.values())),
        num_blocks=st.sampled_from([48, 70]),
        budget=st.sampled_from([6, 25, 100]),
        has_prefix_cache=st.booleans(),
        loads_in_step=st.booleans(),
    )
    def start(
        self,
        model: Any,
        num_blocks: int,
        budget: int,
        has_prefix_cache: bool,
        loads_in_step: bool,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvd-vllm-"))
        self.daemon = DaemonInThread(self.folder, cpu_size=4 << 20)
        self.bench = Bench(self.daemon.local, model, lookup_s=0.2, load_s=0.5, store_s=0.5)
        ways: dict[str, Any] = {
            "num_blocks": num_blocks,
            "has_prefix_cache": has_prefix_cache,
            "loads_in_step": loads_in_step,
        }
        self.engines: list[SmallEngine] = [
            self.bench.engine(budget=budget, is_ahead=True, **ways),
            self.bench.engine(budget=100, num_drafts=2, **ways),
        ]

    @rule(
        engine=ENGINES,
        seed=st.integers(0, 2),
        count=st.integers(1, 30),
        more=st.integers(0, 14),
        max_tokens=st.integers(1, 9),
    )
    def add(self, engine: int, seed: int, count: int, more: int, max_tokens: int) -> None:
        """A prompt that begins as others do, and may go on otherwise."""
        tokens = prompt(30, seed)[:count] + prompt(more, count % 2)
        self.engines[engine].add(tokens, max_tokens=max_tokens)

    @rule(engine=ENGINES, count=st.sampled_from([1, 1, 3, 12]))
    def step(self, engine: int, count: int) -> None:
        for _ in range(count):
            self.engines[engine].step()

    @rule(engine=ENGINES)
    def finish(self, engine: int) -> None:
        self.bench.gate.open()
        self.engines[engine].finish_all()

    @rule(engine=ENGINES, index=st.integers(0, 5))
    def abort(self, engine: int, index: int) -> None:
        # No precondition: which rules there are must not depend on how threads took turns.
        requests = list(self.engines[engine].requests.values())
        if requests:
            self.engines[engine].abort(requests[index % len(requests)])

    @rule(engine=ENGINES)
    def preempt(self, engine: int) -> None:
        self.engines[engine].preempt()

    @rule(pins=st.booleans(), reservations=st.booleans(), is_failing=st.booleans())
    def shut(self, pins: bool, reservations: bool, is_failing: bool) -> None:
        self.bench.gate.open()
        if pins:
            self.bench.gate.pins.clear()
        if reservations:
            self.bench.gate.reservations.clear()
        self.bench.gate.is_failing = is_failing

    @rule(gone=st.sets(st.integers(0, 3)))
    def lose(self, gone: set[int]) -> None:
        """From now on chunks are gone when they are to be loaded."""
        self.bench.gate.gone = gone

    @rule()
    def evict(self) -> None:
        self.bench.clear()

    @rule()
    def restart(self) -> None:
        self.daemon.stop()
        self.daemon.start()

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        try:
            self.bench.gate.open()
            for engine in self.engines:
                engine.finish_all()
            self.bench.check()
        finally:
            self.bench.close()
            self.daemon.stop()
            shutil.rmtree(self.folder)


TestEngines = EnginesMachine.TestCase
TestEngines.settings = settings(
    max_examples=25 * EFFORT,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    # Threads take turns as they like: a shorter example is not the same run any more.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    print_blob=False,
)
