"""Small engines that share a daemon, and an end that checks all that they have stored."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import kvd
from kvd.client.connectors.vllm_options import Options
from tests.daemon_in_thread import PATIENCE_S
from tests.vllm_daemon import Gate, GatedClient, assert_stored_right
from tests.vllm_engine import SmallEngine
from tests.vllm_fakes import Model
from tests.vllm_request import Request

FULL = Model()
# Windows shorter and longer than a chunk, and one that ends where a block does.
HYBRID = Model(windows=(5, 0, 21), num_kv_heads=1)
WINDOW = Model(windows=(9,))
LONG_WINDOW = Model(windows=(20,))
MLA = Model(is_mla=True, num_ranks=2, num_kv_heads=1)
TP2 = Model(num_ranks=2, num_kv_heads=1)
MODELS = {
    "full": FULL,
    "hybrid": HYBRID,
    "window": WINDOW,
    "long_window": LONG_WINDOW,
    "mla": MLA,
    "tp2": TP2,
}


class Bench:
    """Engines that share a daemon, and a name of their weights that nobody else has. Its end checks
    all that they have stored.
    """

    def __init__(self, socket: Path, model: Model = FULL, **options: Any) -> None:
        self.socket, self.model = socket, model
        self.gate = Gate()
        settings: dict[str, Any] = {"chunk_tokens": 8, "revision": os.urandom(8).hex()}
        # A test machine may be slow; where slowness matters a test says so.
        settings |= {"lookup_s": PATIENCE_S, "load_s": PATIENCE_S, "store_s": PATIENCE_S}
        self.options = Options(**settings | options)
        self.engines: list[SmallEngine] = []
        self.num_stored = 0

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self.close()

    def check(self) -> None:
        """What is stored is right, and nothing is pinned or reserved any more."""
        self.gate.open()
        for engine in self.engines:
            settle(engine)
        until(lambda: not (self.status().num_pinned or self.status().num_reserved))
        with self.connect() as client:
            client.status(audit=True)
            self.num_stored = assert_stored_right(client, *self.engines)

    def close(self) -> None:
        self.gate.open()
        for engine in self.engines:
            engine.close()

    def connect(self, **options: Any) -> kvd.Client:
        return kvd.connect(self.socket, **{"timeout_s": PATIENCE_S, **options})

    def status(self) -> Any:
        with self.connect() as client:
            return client.status()

    def engine(self, **more: Any) -> SmallEngine:
        def attach() -> kvd.Client:
            return self.connect(timeout_s=self.options.lookup_s)

        def clients() -> GatedClient:
            return GatedClient(attach, self.gate)

        self.engines.append(SmallEngine(self.model, clients, self.options, **more))
        return self.engines[-1]

    def store(self, *prompts: list[int], **more: Any) -> SmallEngine:
        """An engine that has computed these and stored what it has of them."""
        engine = self.engine()
        for each in prompts:
            engine.run(each, **more)
        settle(engine)
        return engine

    def clear(self) -> int:
        """Evict everything of these engines; how many chunks."""
        groups = self.engines[0].engine.groups
        layouts = [layout.fingerprint for group in groups for layout in group.layouts]
        with self.connect() as client:
            return sum(client.clear(layout=layout)[0] for layout in layouts)


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, "the condition never came true"
        time.sleep(0.002)


def is_known(engine: SmallEngine, request: Request, num_own: int = 0) -> bool:
    return engine.scheduler.matched(request, num_own) is not None


def step_until(engine: SmallEngine, condition: Callable[[], bool]) -> None:
    def stepped() -> bool:
        engine.step()
        return condition()

    until(stepped)


def settle(engine: SmallEngine) -> None:
    """Return when all that is to be saved is stored."""
    for worker in engine.workers:
        until(lambda worker=worker: worker.saves.is_idle)


def prompt(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 50, count).tolist()
