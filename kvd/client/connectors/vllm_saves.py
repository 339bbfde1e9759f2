"""Saves on their way from one rank's caches to the daemon.

    start ─► reserved, read from the blocks, committed

Nothing is held for them: blocks that are about to be written while a save still reads from them are
told, the save is waited for, a moment at most, and given up after that. Whatever goes wrong ends as
a chunk that is not stored.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvd.client.connectors.late_client import LateClient
from kvd.client.connectors.vllm_identity import Engine, Group
from kvd.client.connectors.vllm_options import Options
from kvd.client.connectors.vllm_pages import Pages
from kvd.client.connectors.vllm_plan import Piece, Save, key_of
from kvd.client.connectors.vllm_stats import Tally
from kvd.client.connectors.vllm_streams import Ready, Streams

log = logging.getLogger("kvd.vllm")

# A save that stands in the way of the next step is waited for this long, then given up.
SAVE_WAIT_S = 0.02

# Saves that wait for their turn. They hold nothing; with more of them the daemon cannot follow.
SAVES_MAX = 256

# At the end saves under way get this long.
SHUTDOWN_S = 10.0


class Saves:
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvd-save")
        self._under_way: set[_Job] = set()
        self._stored: list[bytes] = []
        self._lock = threading.Lock()
        self._thread.submit(client.attach)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        with self._lock:
            return not self._under_way

    def make_way(self, blocks: set[int]) -> None:
        """Before `blocks` are written: whoever reads from them has read, or gives up."""
        with self._lock:
            jobs = [job for job in self._under_way if not blocks.isdisjoint(job.blocks)]
        give_up = time.monotonic() + SAVE_WAIT_S
        for job in jobs:
            if not job.has_read.wait(max(give_up - time.monotonic(), 0.0)):
                # At most a piece is still being copied: that has to end.
                with job.lock:
                    job.is_given_up = True
                self._tally.add(saves_given_up=1)

    def start(self, saves: Sequence[Save]) -> None:
        """Begin to store what the step that has been launched computes."""
        if not saves:
            return
        ready = self._streams.mark()
        for save in saves:
            job = _Job(save)
            with self._lock:
                is_too_much = len(self._under_way) >= SAVES_MAX
                if not is_too_much:
                    self._under_way.add(job)
            if is_too_much:
                self._tally.add(saves_dropped=1)
            else:
                self._thread.submit(self._save, job, ready)

    def take_stored(self) -> list[bytes]:
        """Names of the first group's pieces that were committed since the last time."""
        with self._lock:
            stored, self._stored = self._stored, []
        return stored

    def close(self) -> None:
        """What is under way gets a moment."""
        give_up = time.monotonic() + SHUTDOWN_S
        with self._lock:
            jobs = list(self._under_way)
        for job in jobs:
            job.has_ended.wait(max(give_up - time.monotonic(), 0.0))
            job.is_given_up = True
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _save(self, job: _Job, ready: Ready) -> None:
        started = time.monotonic()
        try:
            self._streams.follow(ready)
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
                self._under_way.discard(job)
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
            # If the answer comes too late, nobody gives it back before this.
            lease_s=2 * self._options.store_s,
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
                self._streams.finish()
            if is_last:
                job.has_read.set()
            reservation.commit(timeout_s=self._options.store_s)
        self._tally.add(stored_chunks=len(reservation), stored_bytes=reservation.size)
        if group is self._engine.groups[0]:
            with self._lock:
                self._stored += [pieces[index].name for index in reservation]


class _Job:
    """A save under way. `lock` is held while a piece is read from the engine's blocks."""

    def __init__(self, save: Save) -> None:
        self.save = save
        self.blocks = {b for pieces in save.pieces for piece in pieces for b in piece.blocks}
        self.lock = threading.Lock()
        self.is_given_up = False
        self.has_read = threading.Event()
        self.has_ended = threading.Event()
