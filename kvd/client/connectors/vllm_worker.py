"""A worker's side of the connector: it moves what a plan says, on threads of its own.

    start_loads ─► pinned, read as it comes into the request's blocks ─► results: ended, or bad
    start_saves ─► reserved, read from the blocks, committed

The engine goes on meanwhile. Blocks that are about to be written while a save still reads from them
are told in the plan: the save is waited for, a moment at most, and given up after that. Whatever
goes wrong ends as a load that failed or as a chunk that is not stored.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from kvd.client.connectors.late_client import LateClient
from kvd.client.connectors.vllm_identity import Engine, Group
from kvd.client.connectors.vllm_options import Options
from kvd.client.connectors.vllm_pages import Pages
from kvd.client.connectors.vllm_plan import Load, Piece, Save, key_of
from kvd.client.connectors.vllm_stats import Tally
from kvd.client.lease import Lease
from kvd.errors import Corrupt, DeadlineExceeded, KvdError

log = logging.getLogger("kvd.vllm")

# A save that stands in the way of the next step is waited for this long, then given up.
SAVE_WAIT_S = 0.02

# Saves that wait for their turn. They hold nothing; with more of them the daemon cannot follow.
SAVES_MAX = 256

# Loads side by side: one waits for a disk while another copies.
LOAD_THREADS = 2

# In a step without a forward the engine would only ask again: it may as well wait for a load.
IDLE_WAIT_S = 0.005

# At the end saves under way get this long.
SHUTDOWN_S = 10.0


class Results(NamedTuple):
    """Loads that have ended, those of them that failed, and blocks that hold nothing."""

    ended: set[str]
    failed: set[str]
    bad_blocks: set[int]


class WorkerSide:
    """One rank's. `caches` are the engine's, by layer."""

    def __init__(
        self,
        engine: Engine,
        client: LateClient,
        options: Options,
        tally: Tally,
        caches: Mapping[str, torch.Tensor],
        *,
        rank: int,
    ) -> None:
        self._engine = engine
        self._client = client
        self._options = options
        self._tally = tally
        self._rank = rank
        self._pages = [Pages(group, caches, rank) for group in engine.groups]
        self._device = self._pages[0].device
        self._loading = ThreadPoolExecutor(LOAD_THREADS, thread_name_prefix="kvd-load")
        self._saving = ThreadPoolExecutor(1, thread_name_prefix="kvd-save")
        self._saves: set[_Job] = set()
        self._lock = threading.Lock()
        self._results = Results(set(), set(), set())
        self._num_loading = 0
        self._stored: list[bytes] = []
        self._progress = threading.Condition(self._lock)

    def make_way(self, blocks: set[int]) -> None:
        """Before `blocks` are written: whoever reads from them has read, or gives up."""
        with self._lock:
            jobs = [job for job in self._saves if not blocks.isdisjoint(job.blocks)]
        give_up = time.monotonic() + SAVE_WAIT_S
        for job in jobs:
            if not job.has_read.wait(max(give_up - time.monotonic(), 0.0)):
                # At most a piece is still being copied: that has to end.
                with job.lock:
                    job.is_given_up = True
                self._tally.add(saves_given_up=1)

    def start_loads(self, loads: Sequence[Load]) -> None:
        """Begin to fill the blocks of requests."""
        if not loads:
            return
        ready = self._mark()
        with self._lock:
            self._num_loading += len(loads)
        for load in loads:
            self._loading.submit(self._load, load, ready, time.monotonic() + self._options.load_s)

    def start_saves(self, saves: Sequence[Save]) -> None:
        """Begin to store what the step that has been launched computes."""
        if not saves:
            return
        ready = self._mark()
        for save in saves:
            job = _Job(save)
            with self._lock:
                is_too_much = len(self._saves) >= SAVES_MAX
                if not is_too_much:
                    self._saves.add(job)
            if is_too_much:
                self._tally.add(saves_dropped=1)
            else:
                self._saving.submit(self._save, job, ready)

    def results(self, *, is_idle: bool) -> Results:
        """What has ended since the last time. With `is_idle` and nothing to tell it waits for a
        moment.
        """
        with self._progress:
            if is_idle and self._num_loading and not self._results.ended:
                self._progress.wait(IDLE_WAIT_S)
            found, self._results = self._results, Results(set(), set(), set())
        return found

    def take_stored(self) -> list[bytes]:
        """Names of the first group's pieces that were committed since the last time."""
        with self._lock:
            stored, self._stored = self._stored, []
        return stored

    def close(self) -> None:
        """End: what is being saved gets a moment, loads are given up."""
        give_up = time.monotonic() + SHUTDOWN_S
        with self._lock:
            jobs = list(self._saves)
        for job in jobs:
            job.has_ended.wait(max(give_up - time.monotonic(), 0.0))
            job.is_given_up = True
        self._loading.shutdown(wait=True, cancel_futures=True)
        self._saving.shutdown(wait=True, cancel_futures=True)

    # Loading.

    def _load(self, load: Load, ready: Ready, give_up: float) -> None:
        started = time.monotonic()
        bad: set[int] = set()
        reason = ""
        try:
            self._after(ready)
            for group, pieces in zip(self._engine.groups, load.pieces, strict=True):
                num_good, why = self._load_group(group, pieces, load, give_up)
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
            self._num_loading -= 1
            self._results.ended.add(load.request)
            if bad:
                self._results.failed.add(load.request)
                self._results.bad_blocks.update(bad)
            self._progress.notify_all()

    def _load_group(
        self, group: Group, pieces: Sequence[Piece], load: Load, give_up: float
    ) -> tuple[int, str]:
        """Fill the blocks of one group; the first piece that failed, and why."""
        good, reason = 0, ""
        try:
            with self._pin(group, pieces, give_up) as lease:
                for index, piece in enumerate(pieces[: len(lease)]):
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
        layout = group.layout(self._rank)
        if lease.keys[index] != key_of(layout, piece.name):
            raise Corrupt("a piece before it is gone")
        if lease.shape(index) != layout.shape(piece.num_tokens):
            raise Corrupt(f"{piece.num_tokens} tokens expected, found {lease.chunk_tokens(index)}")
        left_s = give_up - time.monotonic()
        if left_s <= 0 or not lease.wait(index, timeout_s=left_s):
            raise DeadlineExceeded("it did not come in time") if left_s <= 0 else Corrupt("lost")
        self._pages[group.index].scatter(lease.tensor(index), piece.blocks, skip=skip)
        if self._options.verify:
            lease.verify(index)
        self._finish()
        lease.check()

    # Saving.

    def _save(self, job: _Job, ready: Ready) -> None:
        started = time.monotonic()
        try:
            self._after(ready)
            runs = list(self._runs(job.save))
            for number, (group, pieces, parent) in enumerate(runs, 1):
                if not job.is_given_up:
                    is_last = number == len(runs)
                    self._save_run(job, group, pieces, parent, is_last=is_last)
        except Exception as error:  # noqa: BLE001  A save that fails is a chunk less, never more.
            self._tally.add(saves_failed=1)
            log.warning("event=save_failed request=%s reason=%r", job.save.request, str(error))
        finally:
            job.has_read.set()
            job.has_ended.set()
            with self._lock:
                self._saves.discard(job)
        self._tally.add(saves=1, save_seconds=time.monotonic() - started)

    def _runs(self, save: Save) -> Iterator[tuple[Group, Sequence[Piece], bytes | None]]:
        """What one reservation takes each: a chain of chunks, or one piece that stands alone."""
        for group, pieces, parent in zip(
            self._engine.groups, save.pieces, save.parents, strict=True
        ):
            if not pieces or not group.stores(self._rank):
                continue
            if group.kind == "full":
                yield group, pieces, parent
            else:
                yield from ((group, [piece], None) for piece in pieces)

    def _save_run(
        self,
        job: _Job,
        group: Group,
        pieces: Sequence[Piece],
        parent: bytes | None,
        *,
        is_last: bool,
    ) -> None:
        layout, save = group.layout(self._rank), job.save
        reservation = self._client.reserve(
            layout,
            [key_of(layout, piece.name) for piece in pieces],
            parent=None if parent is None else key_of(layout, parent),
            start=pieces[0].start,
            num_tokens=[piece.num_tokens for piece in pieces],
            standalone=group.kind != "full",
            category=save.category,
            exact=save.is_exact,
            ttl_s=save.ttl_s,
            timeout_s=self._options.store_s,
        )
        with reservation:
            try:
                for index in reservation:
                    with job.lock:
                        if job.is_given_up:
                            return
                        blocks = pieces[index].blocks
                        self._pages[group.index].gather(blocks, reservation.tensor(index))
            finally:
                # Extents that are given back are others' at once: nothing may still write there.
                self._finish()
            if is_last:
                job.has_read.set()
            reservation.commit(timeout_s=self._options.store_s)
        self._tally.add(stored_chunks=len(reservation), stored_bytes=reservation.size)
        if group is self._engine.groups[0]:
            with self._lock:
                self._stored += [pieces[index].name for index in reservation]

    # Streams: on a GPU what the threads do is ordered against the engine's work.

    def _mark(self) -> Ready:
        """Now, in the order of the engine's work."""
        if self._device.type != "cuda":
            return None
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _after(self, ready: Ready) -> None:
        """What this thread does from here on comes after `ready`."""
        if ready is not None:
            stream = _stream_of_thread(self._device)
            torch.cuda.set_stream(stream)
            stream.wait_event(ready)

    def _finish(self) -> None:
        """What this thread has asked for is done."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


class _Job:
    """A save under way. `lock` is held while a piece is read from the engine's blocks."""

    def __init__(self, save: Save) -> None:
        self.save = save
        self.blocks = {b for pieces in save.pieces for piece in pieces for b in piece.blocks}
        self.lock = threading.Lock()
        self.is_given_up = False
        self.has_read = threading.Event()
        self.has_ended = threading.Event()


# An event of the engine's stream, or None where there are no streams.
Ready = Any

_local = threading.local()


def _stream_of_thread(device: torch.device) -> Any:
    if not hasattr(_local, "stream"):
        _local.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _local.stream
