"""The trace of nvme.py: prompts of coding agents as lists of chunk keys, in the order of time.

A line of the file is a session: `id`, `tool` and `sys` (tokens of tool definitions and system
prompt), `model`, `r`: requests [seconds, prompt tokens, output tokens, blocks shared with the
request before, [[first id, run length], ...] of the new blocks, depth]. A block is 64 tokens; ids
are the session's own, and say nothing of another's. (callanjfox/kv-cache-tester, Apache-2.0.)

Sessions carry no absolute time: they are superposed at random starts, drawn with a fixed seed.
Sessions with the same model, tools and system prompt share the blocks of these; that is a choice of
the model, not a fact of the trace.
"""

from __future__ import annotations

import gzip
import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvd.keys import ChunkKey, chained_key

# Where the file is looked for if no other is named.
DEFAULT_PATH = Path(__file__).parent / "traces" / "agentic_sessions.jsonl.gz"

# Blocks of 64 tokens in a chunk of 256.
BLOCKS = 4
BLOCK_TOKENS = 64
CHUNK_TOKENS = BLOCKS * BLOCK_TOKENS

# Sessions begin within so many seconds. Most last an hour: most run beside most others.
SPREAD_S = 3600.0

# Names of a session's blocks are its number times this, plus the block's id.
_SESSION_STRIDE = 1 << 20


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: the keys of its whole chunks, in order."""

    at_s: float
    keys: Sequence[ChunkKey]


def read_prompts(path: Path, root: bytes, *, num_sessions: int, seed: int = 1) -> Iterator[Prompt]:
    """The prompts of `num_sessions` sessions (or all there are), chosen and superposed by `seed`.

    Keys are chained from `root`, a layout's fingerprint.
    """
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        sessions = [json.loads(line) for line in lines]
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(sessions))[:num_sessions]
    starts = random.uniform(0, SPREAD_S, len(chosen))
    stories = [
        _prompts(sessions[index], root, number=number, start_s=start)
        for number, (index, start) in enumerate(zip(chosen, starts, strict=True), start=1)
    ]
    return heapq.merge(*stories, key=lambda prompt: prompt.at_s)


def _prompts(
    session: dict[str, Any], root: bytes, *, number: int, start_s: float
) -> Iterator[Prompt]:
    prefix = json.dumps([session["model"], session["tool"], session["sys"]]).encode()
    num_common = (session["tool"] + session["sys"]) // BLOCK_TOKENS // BLOCKS
    # A name of its own for each prefix that sessions share, in the tokens of its first chunk.
    common = list(prefix)
    blocks: list[int] = []
    keys: list[ChunkKey] = []
    for at_s, _, _, num_shared, runs, _ in session["r"]:
        del blocks[num_shared:]
        for first, length in runs:
            blocks += range(first, first + length)
        keys = keys[: num_shared // BLOCKS]
        for index in range(len(keys), len(blocks) // BLOCKS):
            tokens = blocks[index * BLOCKS : (index + 1) * BLOCKS]
            if index < num_common:
                names = [*common, index]
            else:
                names = [number * _SESSION_STRIDE + token for token in tokens]
            keys.append(chained_key(keys[-1] if keys else root, names))
        yield Prompt(start_s + at_s, tuple(keys))
