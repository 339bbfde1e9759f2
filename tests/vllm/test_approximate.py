"""What a lossy codec gave back, and what was computed on top of it, is never taken for exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvd.keys import ChunkKey, chain_keys
from kvd.layout import KVLayout
from tests.vllm.counts import Since, counts, num_pieces
from tests.vllm.daemon import Daemon
from tests.vllm.harness import Engine, Request, prompt
from tests.vllm.reference import Reference

BEGINNING = prompt(700, 600)
NUM_PIECES = num_pieces(600)


def test_what_is_computed_on_approximate_kv_is_approximate(
    reference: Reference, tmp_path: Path
) -> None:
    first: Request = {"prompt": BEGINNING, "new_tokens": 4}
    # A quarter of it is for raw chunks, and holds eight.
    with Daemon(tmp_path, "--codec", "cpu=int8", size="64MiB") as daemon:
        with Engine(tmp_path, "qwen3", **daemon.transfer()) as engine:
            keys = daemon.new_keys(lambda: engine.generate(first), NUM_PIECES)
            assert all(chunk.is_exact for chunk in daemon.chunks())
            _leave_bitstreams(daemon, keys)

            engine.forget()
            since = Since(engine)
            longer: Request = {"prompt": BEGINNING + prompt(701, 300), "new_tokens": 4}
            grown = daemon.new_keys(lambda: engine.generate(longer), 2)
            assert since()["hit_tokens"] == 576
            # The beginning is in the engine's own cache now, and as approximate there.
            other: Request = {"prompt": BEGINNING + prompt(702, 300), "new_tokens": 4}
            grown += daemon.new_keys(lambda: engine.generate(other), 2)
            # What does not begin like this is exact.
            plain: Request = {"prompt": prompt(703, 600), "new_tokens": 4}
            exact = daemon.new_keys(lambda: engine.generate(plain), NUM_PIECES)
            is_exact = {chunk.key: chunk.is_exact for chunk in daemon.chunks()}
            assert [is_exact[key] for key in grown] == [False] * 4
            assert [is_exact[key] for key in exact] == [True] * NUM_PIECES
        with Engine(tmp_path, "qwen3", **daemon.transfer(exact_only=True)) as strict:
            (answer,) = strict.generate(longer)
            reference.check(longer, answer)
            assert counts(strict)["hits"] == 0
            (answer,) = strict.generate(plain)
            reference.check(plain, answer)


def _leave_bitstreams(daemon: Daemon, keys: list[ChunkKey]) -> None:
    """Push chunks out of the memory where they are raw, once they are encoded."""
    layout = KVLayout(
        model="filler",
        revision="",
        dtype="float32",
        num_layers=8,
        num_kv_heads=2,
        head_dim=64,
    )
    tokens = iter(range(10**6))
    chunk = np.zeros(layout.shape(layout.chunk_tokens), dtype=np.float32)

    def is_so() -> bool:
        (key,) = chain_keys(layout.fingerprint, [next(tokens)] * 256, chunk_tokens=256)
        with daemon.connect() as client:
            client.store(layout, [key], [chunk])
        tiers = {chunk.key: chunk.tier for chunk in daemon.chunks()}
        return all(tiers[key] == "packed" for key in keys)

    daemon.until(is_so, "raw chunks never leave")
