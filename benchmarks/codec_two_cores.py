"""Whether two threads code twice as much as one, for codec_speed.py.

Each has chunks of its own, as in a daemon with two codec threads. Wall time, one thread and two in
turn, beside a loop that multiplies what lies in L1: what two cores give to anybody, this minute, is
its speed-up. So a codec's is quoted as 2 times its share of that; on a machine that has other work
the loop loses as much.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from benchmarks.common import Figure, Row, interleave, median_of, significant
from kvd.codecs.base import Bytes, Codec, Span
from kvd.layout import KVLayout

THREADS = 2
# Chunks a thread codes in a round.
CHUNKS = 6
TARGET = 1.8
# Numbers of the loop, and how often it goes over them: about as long as a chunk.
_NUMBERS, _TURNS = 4096, 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A codec at a chunk, and what is asked of it."""

    codec: str
    coder: Codec
    layout: KVLayout
    chunk: Bytes
    span: Span
    operations: tuple[str, ...]


def two_cores(tasks: list[Task], rounds: int) -> tuple[list[Row], list[Figure]]:
    """A row and a figure for each task's operation."""
    work = {"loop": _loop()}
    for task in tasks:
        for operation in task.operations:
            work[f"{task.codec}_{operation}"] = _work_of(task, operation)
    with ThreadPoolExecutor(THREADS) as pool:
        measures = [
            _seconds(pool, function, count) for function in work.values() for count in (1, THREADS)
        ]
        times = interleave(measures, rounds)
    speed_ups = {
        name: [THREADS * one / two for one, two in zip(*times[2 * at : 2 * at + 2], strict=True)]
        for at, name in enumerate(work)
    }
    loop = speed_ups.pop("loop")
    load = os.getloadavg()[0]
    rows: list[Row] = [_row("loop", loop, loop, load)]
    figures = []
    for name, found in speed_ups.items():
        rows.append(_row(name, found, loop, load))
        shares = [THREADS * mine / best for mine, best in zip(found, loop, strict=True)]
        figures.append(
            Figure.of(f"{name}_two_cores", median_of(shares), target=TARGET, at_least=True)
        )
    return rows, figures


def _row(name: str, found: list[float], loop: list[float], load: float) -> Row:
    return {
        "work": name,
        "two_threads_speed_up": significant(median_of(found).value, 3),
        "loop_speed_up": significant(median_of(loop).value, 3),
        "load_average": significant(load, 2),
        "samples": len(found),
    }


def _seconds(
    pool: ThreadPoolExecutor, function: Callable[[int], None], count: int
) -> Callable[[], float]:
    """Wall time of so many threads, each with its own chunks."""

    def work(thread: int) -> None:
        for _ in range(CHUNKS):
            function(thread)

    def measure() -> float:
        before = time.perf_counter()
        for done in [pool.submit(work, thread) for thread in range(count)]:
            done.result()
        return time.perf_counter() - before

    return measure


def _work_of(task: Task, operation: str) -> Callable[[int], None]:
    """Codes one chunk of a thread."""
    coder, layout, span = task.coder, task.layout, task.span
    room = coder.size_bytes_max(layout, span.num_tokens)
    outs = [np.empty(room, np.uint8) for _ in range(THREADS)]
    chunks = [task.chunk.copy() for _ in range(THREADS)]
    size = coder.encode(task.chunk, layout, span, outs[0])
    bitstreams = [outs[0][:size].copy() for _ in range(THREADS)]

    def encode(thread: int) -> None:
        coder.encode(chunks[thread], layout, span, outs[thread])

    def decode(thread: int) -> None:
        coder.decode(bitstreams[thread], layout, span, chunks[thread])

    function = encode if operation == "encode" else decode
    function(0)
    return function


def _loop() -> Callable[[int], None]:
    numbers = [np.ones(_NUMBERS, np.uint64) for _ in range(THREADS)]
    _multiply(numbers[0], 1)
    return lambda thread: _multiply(numbers[thread], _TURNS)


@njit(nogil=True)
def _multiply(numbers: Any, turns: int) -> None:
    for _ in range(turns):
        for index in range(len(numbers)):
            numbers[index] = numbers[index] * np.uint64(3) + np.uint64(1)
