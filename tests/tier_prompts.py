"""Prompts for a whole daemon with a disk: what is stored is a pattern of its key, and every byte
that is loaded is looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

import kvd
from kvd.errors import TierFailed
from kvd.keys import ChunkKey
from tests.crash_client import pattern

LAYOUT = kvd.KVLayout(
    model="tiers",
    revision="1",
    dtype="uint8",
    num_layers=8,
    num_kv_heads=8,
    head_dim=128,
    chunk_tokens=64,
)
SIZE = LAYOUT.size(LAYOUT.chunk_tokens)
PATIENCE_S = 30.0


def keys_of(prompt: int, count: int = 8, layout: kvd.KVLayout = LAYOUT) -> list[ChunkKey]:
    tokens = np.full(count * layout.chunk_tokens, prompt)
    return kvd.chain_keys(layout.fingerprint, tokens, chunk_tokens=layout.chunk_tokens)


def store(client: kvd.Client, prompt: int, count: int = 8, layout: kvd.KVLayout = LAYOUT) -> None:
    keys = keys_of(prompt, count, layout)
    chunks = [pattern(key, SIZE).reshape(layout.shape(layout.chunk_tokens)) for key in keys]
    # However slow the machine is: nothing is lost for want of a disk.
    states = client.store(layout, keys, chunks, wait_s=10, timeout_s=PATIENCE_S)
    assert set(states) <= {"granted", "exists"}


def load(client: kvd.Client, prompt: int, count: int = 8, layout: kvd.KVLayout = LAYOUT) -> int:
    """How many chunks came back; every byte of them is looked at."""
    keys = keys_of(prompt, count, layout)
    outs = [np.empty(SIZE, dtype=np.uint8) for _ in keys]
    found = client.load(layout, keys, outs, wait_s=10, timeout_s=PATIENCE_S)
    for key, out in zip(keys[:found], outs, strict=False):
        assert np.array_equal(out, pattern(key, SIZE))
    return found


def until(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.01)


def damage_payloads(folder: Path, *, count: int) -> None:
    """Flip a bit in the payload of the first records of the first segment."""
    with sorted(folder.glob("segment-*"))[0].open("r+b") as file:
        for record in range(count):
            # Behind the segment's header, and the record's own.
            at = 4096 + record * (4096 + SIZE) + 4096 + 70_000 * (record + 1)
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))


def load_right(client: kvd.Client, prompts: Iterable[int]) -> int:
    """How many chunks of the prompts came back, all of them right."""
    return sum(load(client, prompt) for prompt in prompts)


def assert_serves(client: kvd.Client, first: int) -> None:
    """Stores and loads go on, and no invariant is broken."""
    for prompt in range(first, first + 3):
        store(client, prompt)
        assert load(client, prompt) == 8
    status = client.status(audit=True)
    assert status.counters["internal_errors"] == 0


def persist_in_time(client: kvd.Client, keys: list[ChunkKey] | None = None) -> int:
    """The device rests after a failure: ask until it has worked again."""
    give_up = time.monotonic() + 30
    while True:
        try:
            return client.persist(keys, timeout_s=30)
        except TierFailed:
            assert time.monotonic() < give_up, "writes do not resume"
            time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]
