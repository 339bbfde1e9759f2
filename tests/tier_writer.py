"""A client that stores prompts and has them persisted until it is killed.

    python -m tests.tier_writer SOCKET JOURNAL FIRST_PROMPT

The journal stands outside the daemon's disk and only the clients and daemons die, so a line is safe
as soon as it is written: `try N` before prompt N is stored, `done N` when `persist` has said that
all of it is durable. All else, layout, count of chunks, keys and bytes, follows from N. It prints
`WRONG ...` if it ever reads a byte that nobody stored.
"""

from __future__ import annotations

import os
import random
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np

import kvd
from kvd.errors import KvdError
from kvd.keys import ChunkKey
from tests.crash_client import pattern

# Two shapes: one of whole blocks, one that leaves a record's last block half empty.
LAYOUTS = [
    kvd.KVLayout(
        model=f"tiers-{head_dim}",
        revision="1",
        dtype="uint8",
        num_layers=4,
        num_kv_heads=3,
        head_dim=head_dim,
        chunk_tokens=16,
    )
    for head_dim in (16, 64)
]
CHUNKS_MAX = 6

# A prompt is known again for so long.
RECENT_MAX = 50

# What one request may take on a loaded machine.
PATIENCE_S = 30.0


def layout_of(prompt: int) -> kvd.KVLayout:
    return LAYOUTS[prompt % len(LAYOUTS)]


@cache
def keys_of(prompt: int) -> tuple[ChunkKey, ...]:
    layout = layout_of(prompt)
    tokens = np.full((1 + prompt // 2 % CHUNKS_MAX) * layout.chunk_tokens, prompt)
    return tuple(kvd.chain_keys(layout.fingerprint, tokens, chunk_tokens=layout.chunk_tokens))


def store(client: kvd.Client, prompt: int, **options: float) -> None:
    layout, keys = layout_of(prompt), keys_of(prompt)
    shape = layout.shape(layout.chunk_tokens)
    chunks = [pattern(key, layout.size(layout.chunk_tokens)).reshape(shape) for key in keys]
    client.store(layout, keys, chunks, timeout_s=PATIENCE_S, **options)


def load(client: kvd.Client, prompt: int) -> int:
    """How many leading chunks of the prompt came. Raises `AssertionError` for a wrong byte."""
    layout, keys = layout_of(prompt), keys_of(prompt)
    size = layout.size(layout.chunk_tokens)
    outs = [np.empty(size, dtype=np.uint8) for _ in keys]
    found = client.load(layout, keys, outs, timeout_s=PATIENCE_S)
    for key, out in zip(keys[:found], outs, strict=False):
        assert np.array_equal(out, pattern(key, size)), f"chunk {key.hex()}"
    return found


class Writer:
    """Stores new prompts from `first` on, and reads and stores some of the last ones again."""

    def __init__(self, journal: Path, first: int) -> None:
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._next = first
        self._recent: list[int] = []
        self._chance = random.Random(first)

    def step(self, client: kvd.Client) -> None:
        chance = self._chance.random()
        if chance < 0.15 and self._recent:
            load(client, self._chance.choice(self._recent))
        elif chance < 0.25 and self._recent:
            store(client, self._chance.choice(self._recent))
        else:
            self._store_new(client, is_persisted=chance < 0.95)

    def _store_new(self, client: kvd.Client, *, is_persisted: bool) -> None:
        prompt = self._next
        self._next += 1
        self._tell("try", prompt)
        store(client, prompt)
        keys = keys_of(prompt)
        if is_persisted and client.persist(keys, timeout_s=PATIENCE_S) == len(keys):
            self._tell("done", prompt)
            self._recent = [*self._recent[-RECENT_MAX:], prompt]

    def _tell(self, word: str, prompt: int) -> None:
        os.write(self._journal, f"{word} {prompt}\n".encode())


def main() -> None:
    socket, journal, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    writer = Writer(journal, first)
    client: kvd.Client | None = None
    while True:
        try:
            client = client or kvd.connect(socket, timeout_s=PATIENCE_S)
            writer.step(client)
        except AssertionError as error:
            print(f"WRONG {error}", flush=True)
        except KvdError:
            # The daemon was killed, or its index: it comes back.
            if client is not None:
                client.close()
            client = None
            time.sleep(0.005)


if __name__ == "__main__":
    main()
