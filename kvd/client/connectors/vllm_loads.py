"""Loads on their way from the daemon into one rank's caches.

    start ─► pinned, read as it comes into the request's blocks ─► results: ended, or bad
    of a step ─► the same layer by layer; wait_for_layer, where the engine reads it

Whatever goes wrong ends as a load that failed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from kvd.client.connectors.late_client import LateClient
from kvd.client.connectors.vllm_identity import Engine, Group
from kvd.client.connectors.vllm_options import Options
from kvd.client.connectors.vllm_pages import Pages
from kvd.client.connectors.vllm_plan import Load, Piece, key_of
from kvd.client.connectors.vllm_stats import Tally
from kvd.client.connectors.vllm_step import Progress, StepLoads
from kvd.client.connectors.vllm_streams import Ready, Streams
from kvd.client.lease import Lease
from kvd.errors import Corrupt, DeadlineExceeded, KvdError

log = logging.getLogger("kvd.vllm")

# Loads side by side: one waits for a disk while another copies.
LOAD_THREADS = 2

# In a step without a forward the engine would only ask again: it may as well wait for a load.
IDLE_WAIT_S = 0.005

# A load that a step waits for has to find its chunks within this: everybody waits with it.
STEP_PIN_S = 0.05


class Results(NamedTuple):
    """Loads that have ended, those of them that failed, and blocks that hold nothing. Loads of the
    step itself are told apart: nobody waits for those.
    """

    ended: set[str]
    failed: set[str]
    bad_blocks: set[int]
    in_step: set[str]

    @classmethod
    def none(cls) -> Results:
        """Nothing has ended."""
        return cls(set(), set(), set(), set())


class Loads:
    """One rank's. `pages` are its caches, by group."""

    def __init__(
        self,
        engine: Engine,
        client: LateClient,
        options: Options,
        tally: Tally,
        pages: Sequence[Pages],
        *,
        rank: int,
    ) -> None:
        self._engine = engine
        self._client = client
        self._options = options
        self._tally = tally
        self._pages = pages
        self._rank = rank
        self._streams = Streams(pages[0].device)
        self._threads = ThreadPoolExecutor(LOAD_THREADS, thread_name_prefix="kvd-load")
        # A step never waits behind a load that waits for a disk.
        self._thread_of_steps = ThreadPoolExecutor(1, thread_name_prefix="kvd-step")
        self._step = StepLoads(engine.groups[0].layer_names)
        self._step_loads: list[Load] = []
        self._results = Results.none()
        self._num_under_way = 0
        self._progress = threading.Condition()

    def start(self, loads: Sequence[Load], *, stops_at_layers: bool = True) -> None:
        """Begin to fill the blocks of requests. Where the engine does not stop at layers, those of
        the step are waited for here.
        """
        if not loads:
            return
        ready = self._streams.mark()
        with self._progress:
            self._num_under_way += len(loads)
        give_up = time.monotonic() + self._options.load_s
        for load in loads:
            if load.is_in_step:
                self._step_loads.append(load)
                progress = self._step.begin()
                self._thread_of_steps.submit(self._load_in_step, load, ready, progress)
            else:
                self._threads.submit(self._load, load, ready, give_up)
        if not stops_at_layers:
            self._step.wait_for_all()

    def wait_for_layer(self, name: str) -> None:
        """Before the engine reads a layer's caches: what this step loads into them is there."""
        for ready in self._step.wait_for_layer(name):
            self._streams.wait_for(ready)

    def results(self, *, is_idle: bool) -> Results:
        """What has ended since the last time, and all loads of the step. With `is_idle` and
        nothing to tell it waits for a moment.
        """
        was_waited_for = self._step.end()
        step_loads, self._step_loads = self._step_loads, []
        with self._progress:
            if is_idle and self._num_under_way and not self._results.ended:
                self._progress.wait(IDLE_WAIT_S)
            found, self._results = self._results, Results.none()
        if not was_waited_for:
            log.warning("event=load_not_waited_for meaning='the engine did not stop at each layer'")
            found.bad_blocks.update(*(load.all_filled for load in step_loads))
        return found

    def close(self) -> None:
        """What has not begun is given up."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._thread_of_steps.shutdown(wait=True)

    def _load_in_step(self, load: Load, ready: Ready, progress: Progress) -> None:
        try:
            self._load(load, ready, time.monotonic() + STEP_PIN_S, progress)
        finally:
            progress.end()

    def _load(
        self, load: Load, ready: Ready, give_up: float, progress: Progress | None = None
    ) -> None:
        started = time.monotonic()
        bad: set[int] = set()
        reason = ""
        try:
            self._streams.follow(ready)
            for group, pieces in zip(self._engine.groups, load.pieces, strict=True):
                num_good, why = self._load_group(group, pieces, load, give_up, progress)
                if num_good < len(pieces):
                    bad.update(load.filled(pieces[num_good:]))
                    reason = why
        except BaseException as error:
            # The engine waits for an answer, whatever it is.
            log.exception("event=load_failed request=%s", load.request)
            bad = load.all_filled
            reason = repr(error)
        size = 0
        if bad:
            self._tally.miss(
                "lost" if reason.startswith("gone") else "failed", load.request, reason
            )
        else:
            size = sum(
                group.layout(self._rank).size(piece.num_tokens)
                for group, pieces in zip(self._engine.groups, load.pieces, strict=True)
                for piece in pieces
            )
        self._tally.add(loads=1, loaded_bytes=size, load_seconds=time.monotonic() - started)
        with self._progress:
            self._num_under_way -= 1
            ended = self._results.in_step if load.is_in_step else self._results.ended
            ended.add(load.request)
            if bad:
                self._results.failed.add(load.request)
                self._results.bad_blocks.update(bad)
            self._progress.notify_all()

    def _load_group(
        self,
        group: Group,
        pieces: Sequence[Piece],
        load: Load,
        give_up: float,
        progress: Progress | None,
    ) -> tuple[int, str]:
        """Fill the blocks of one group; the first piece that failed, and why."""
        good, reason = 0, ""
        try:
            with self._pin(group, pieces, give_up) as lease:
                if progress is not None:
                    good = self._load_by_layer(lease, group, pieces, load, progress)
                for index, piece in enumerate(pieces[: len(lease)] if progress is None else ()):
                    skip = load.num_skipped(piece) * group.block_size
                    self._load_piece(lease, index, group, piece, skip, give_up)
                    good = index + 1
        except Corrupt as error:
            reason = f"gone: {error}"
        except (KvdError, TimeoutError) as error:
            reason = repr(error)
        if good < len(pieces) and not reason:
            reason = "gone"
        return good, reason

    def _pin(self, group: Group, pieces: Sequence[Piece], give_up: float) -> Lease:
        layout = group.layout(self._rank)
        left_s = max(give_up - time.monotonic(), 0.001)
        return self._client.pin(
            layout,
            [key_of(layout, piece.name) for piece in pieces],
            standalone=True,
            exact=self._options.exact_only,
            wait=False,
            wait_s=0.0,
            lease_s=left_s + 1.0,
            timeout_s=left_s,
        )

    def _load_piece(
        self,
        lease: Lease,
        index: int,
        group: Group,
        piece: Piece,
        skip: int,
        give_up: float,
    ) -> None:
        self._check_piece(lease, index, group, piece)
        left_s = give_up - time.monotonic()
        if left_s <= 0 or not lease.wait(index, timeout_s=left_s):
            raise DeadlineExceeded("it did not come in time") if left_s <= 0 else Corrupt("lost")
        self._pages[group.index].scatter(lease.tensor(index), piece.blocks, skip=skip)
        if self._options.verify:
            lease.verify(index)
        self._streams.finish()
        lease.check()

    def _load_by_layer(
        self,
        lease: Lease,
        group: Group,
        pieces: Sequence[Piece],
        load: Load,
        progress: Progress,
    ) -> int:
        """Fill the blocks of a group's leading pieces that are in memory, all of them layer by
        layer; how many those are.
        """
        moves = []
        for index, piece in enumerate(pieces[: len(lease)]):
            self._check_piece(lease, index, group, piece)
            if not lease.is_ready(index):
                break
            skip = load.num_skipped(piece) * group.block_size
            moves.append((lease.tensor(index), piece.blocks, skip))
        if not moves:
            return 0
        for _ in self._pages[group.index].scatter_by_layer(moves):
            progress.layer_written(self._streams.mark())
        self._streams.finish()
        if self._options.verify:
            for index in range(len(moves)):
                lease.verify(index)
        lease.check()
        return len(moves)

    def _check_piece(self, lease: Lease, index: int, group: Group, piece: Piece) -> None:
        layout = group.layout(self._rank)
        if lease.keys[index] != key_of(layout, piece.name):
            raise Corrupt("a piece before it is gone")
        if lease.shape(index) != layout.shape(piece.num_tokens):
            raise Corrupt(f"{piece.num_tokens} tokens expected, found {lease.chunk_tokens(index)}")
