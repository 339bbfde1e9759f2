"""A client that stores and loads at random until it is killed, and knows what every byte must be.

    python -m tests.crash_client SOCKET SEED PROGRESS_FILE

Every chunk's bytes are a function of its key, so any byte of another chunk, or half of a write, is
seen. It counts operations into PROGRESS_FILE (two uint64: operations, chunks verified) and prints
`WRONG ...` if it ever reads one.
"""

from __future__ import annotations

import random
import sys
import time

import numpy as np

import kvd
from kvd.errors import KvdError
from kvd.keys import ChunkKey

# Two shapes that do not divide each other, so that extents of one are reused by the other.
LAYOUTS = [
    kvd.KVLayout(
        model=f"crash-{heads}",
        revision="1",
        dtype="uint8",
        num_layers=4,
        num_kv_heads=heads,
        head_dim=64,
        chunk_tokens=64,
    )
    for heads in (3, 8)
]
PROMPTS = 24
CHUNKS_MAX = 8


def pattern(key: ChunkKey, size: int) -> np.ndarray:
    """`uint8 [size]`: what the chunk called `key` must hold."""
    row = np.frombuffer(key * 8, dtype=np.uint8)
    rows = -(-size // row.size)
    marks = (np.arange(rows, dtype=np.uint32) * 167).astype(np.uint8)[:, None]
    return (row[None, :] ^ marks).reshape(-1)[:size]


def prompt_keys(layout: kvd.KVLayout, prompt: int) -> list[ChunkKey]:
    tokens = np.full(CHUNKS_MAX * layout.chunk_tokens, prompt)
    return kvd.chain_keys(layout.fingerprint, tokens, chunk_tokens=layout.chunk_tokens)


def step(client: kvd.Client, chance: random.Random) -> int:
    """One operation; how many chunks it verified."""
    layout = chance.choice(LAYOUTS)
    keys = prompt_keys(layout, chance.randrange(PROMPTS))[: chance.randint(1, CHUNKS_MAX)]
    size = layout.size(layout.chunk_tokens)
    if chance.random() < 0.5:
        with client.reserve(layout, keys) as reservation:
            for index in reservation:
                reservation.write(index, pattern(keys[index], size))
            if chance.random() < 0.9:
                reservation.commit()
        return 0
    with client.pin(layout, keys) as lease:
        for index in range(len(lease)):
            out = np.empty(size, dtype=np.uint8)
            lease.load(index, out)
            if not np.array_equal(out, pattern(keys[index], size)):
                print(f"WRONG chunk {keys[index].hex()}", flush=True)
        return len(lease)


def main() -> None:
    socket, seed, progress_file = sys.argv[1:]
    chance = random.Random(int(seed))
    progress = np.memmap(progress_file, dtype=np.uint64, mode="r+", shape=(2,))
    client: kvd.Client | None = None
    while True:
        try:
            client = client or kvd.connect(socket, timeout_s=5)
            verified = step(client, chance)
        except KvdError:
            # The daemon was killed; it comes back.
            time.sleep(0.01)
        else:
            progress[:] = (progress[0] + 1, progress[1] + verified)


if __name__ == "__main__":
    main()
