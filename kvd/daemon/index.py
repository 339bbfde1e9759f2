"""ChunkIndex: which record of the segment log holds which chunk, kept across restarts.

    put, delete ─► queued ── commit ─► one transaction in the process of the index ─► durable
    any failure ─► `failure` says why, whoever waits gets TierFailed ── reset ─► begun anew

The one idea: LMDB maps its file, and a bad page or disk ends whoever maps it. So it lives in a
process of its own (index_process.py), and its end is an error here and nothing more. The log holds
the truth: an index that fails costs a rebuild from it, never a chunk.

Use it from one event loop. Records must be durable in the log before they are `put`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, starmap
from pathlib import Path
from typing import NamedTuple

from kvd.daemon import index_frames as frames
from kvd.daemon.index_channel import IndexChannel, ProcessLost
from kvd.daemon.index_format import (
    LAYOUT_KIND,
    IndexRecord,
    pack_layout,
    pack_record,
    parse_layout,
    parse_record,
    record_name,
)
from kvd.daemon.index_queue import ChangeQueue
from kvd.errors import Corrupt, TierFailed
from kvd.keys import ChunkKey

__all__ = ["ChunkIndex", "FoundIndex", "IndexRecord"]

LOGGER = logging.getLogger(__name__)

# No step of the process takes so long unless its disk does not answer: a step is a megabyte, or a
# sync of 64. The wait for another process's lock (10 s) is within it.
PATIENCE_S = 60.0

# So many changes are sent though nobody asks for a commit.
SEND_COUNT = 2048
# A process that takes nothing while a quarter of a million records come in has failed.
QUEUE_SIZE_MAX = 64 << 20


class FoundIndex(NamedTuple):
    """What an index held when it was opened. `layouts` are encoded messages by fingerprint.

    `reason` is empty if that is all that was durable. Else it begins with one word (missing,
    damaged, version, other log, incomplete, unusable): then this is what could be saved, nothing
    of it wrong, and the index must be rebuilt from the log and `reset`.
    """

    records: list[IndexRecord]
    layouts: dict[bytes, bytes]
    reason: str


class ChunkIndex:
    """The index in `folder`/index, of the segment log `log_id`. `open` makes one."""

    def __init__(self, folder: Path, log_id: bytes) -> None:
        # Why it keeps nothing any more; empty while it works.
        self.failure = ""
        self._folder = folder / "index"
        self._log_id = log_id
        self._channel: IndexChannel | None = None
        self._listener: asyncio.Task[None] | None = None
        # Changes are taken: the index works, or is being begun anew.
        self._is_open = False
        self._is_closed = False
        # Held while a process is begun anew, or ended for good.
        self._beginning = asyncio.Lock()
        self._queue = ChangeQueue()
        # What flies must land before this rings.
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def open(
        cls,
        folder: Path,
        log_id: bytes,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> tuple[ChunkIndex, FoundIndex]:
        """Open the index, and say what it held. Raises nothing that a disk or a file can cause:
        then `failure` is set, or there is a reason to rebuild, or both.

        While there is a reason, the index takes changes, but every later opening gives a reason
        again until a `reset` has ended. `on_progress` hears how many records were read so far.
        Cancellation ends the process and leaves the index of before or an equal copy.
        """
        index = cls(folder, log_id)
        walk = _Walk(on_progress)
        try:
            await index._look(walk)
        except ProcessLost as error:
            if not walk.has_ended:
                walk.reason = f"damaged: {error}"
                await index._begin_incomplete(walk)
            else:
                index._fail(str(error))
        except TierFailed as error:
            if not walk.has_ended:
                walk.reason = f"unusable: {error}"
            index._fail(str(error))
        except BaseException:
            index._fail("the opening did not end")
            await index._end_process()
            raise
        return index, FoundIndex(walk.records, walk.layouts, walk.reason)

    def put(self, record: IndexRecord) -> None:
        """Queue a record; it replaces the one of the same key. Durable after `commit`, maybe
        before. Forgotten where the index has failed. Raises `InvalidRequest` for a record that the
        segment log cannot hold.
        """
        self._queue_change(frames.pack_put(pack_record(record)))

    def delete(self, key: ChunkKey, offset: int) -> None:
        """Queue the end of the key's record at `offset`. A newer copy at another place stays."""
        self._queue_change(frames.pack_delete(record_name(key), offset))

    def put_layout(self, fingerprint: bytes, encoded: bytes) -> None:
        """Queue a layout. Raises `InvalidRequest` for one of more than 64 KiB."""
        self._queue_change(frames.pack_put(pack_layout(fingerprint, encoded)))

    async def commit(self, *, is_final: bool = False) -> None:
        """Return when all that was queued before the call is durable, and what the index was begun
        anew with. Those who wait share transactions. A power cut may still take the last
        transaction as a whole, until the next one or a second of quiet, unless this one `is_final`.

        Raises `TierFailed` where the index fails before that: what was committed before stays.
        Cancellation leaves the changes queued.
        """
        if self._beginning.locked():
            async with self._beginning:
                pass
        await self._commit(is_final=is_final)

    async def _commit(self, *, is_final: bool) -> None:
        if not self._is_open:
            raise TierFailed(f"the index keeps nothing: {self.failure}")
        if is_final:
            self._queue_change(frames.pack_sync())
        self._send()
        await self._queue.wait()

    async def reset(self, records: Iterable[IndexRecord], layouts: Mapping[bytes, bytes]) -> None:
        """Begin anew, in a new process, with exactly these. What is queued at the call is
        forgotten, what is queued during it comes on top.

        Raises `TierFailed` where that cannot be; the index has failed then, as after cancellation,
        and what was on the disk before is still there.
        """
        async with self._beginning:
            if self._is_closed:
                raise TierFailed("the index is closed")
            self._forget("it is begun anew")
            # From here on: what is put while the old process ends is part of the new index.
            self._is_open = True
            try:
                await self._end_process()
                if not self._is_open:
                    raise TierFailed(self.failure)
                await self._begin(layouts, map(pack_record, records), is_complete=True)
            except BaseException as error:
                self._fail(str(error) or "the reset did not end")
                raise

    async def close(self) -> None:
        """Commit what is queued, end the process and wait for it. Takes no longer than a step of
        the process and its end may. What could not be committed is logged.
        """
        async with self._beginning:
            try:
                if self._is_open:
                    async with asyncio.timeout(PATIENCE_S):
                        await self._commit(is_final=True)
            except (TierFailed, TimeoutError) as error:
                LOGGER.warning("event=index_not_committed reason=%s", error or "too slow")
            finally:
                patience_s = PATIENCE_S if self._is_open else 0
                self._is_closed = True
                self._forget("it is closed")
                await self._end_process(patience_s=patience_s)

    async def _look(self, walk: _Walk) -> None:
        """Hear what the index on the disk holds; its copy is the index from then on."""
        channel = await self._start()
        channel.send(frames.LOOK)
        while not walk.has_ended:
            walk.hear(*await channel.receive(PATIENCE_S))
        await channel.hear_done(PATIENCE_S)
        self._serve(channel)

    async def _begin_incomplete(self, walk: _Walk) -> None:
        await self._end_process()
        try:
            # The layouts are all that cannot be had from the log again.
            await self._begin(walk.layouts, (), is_complete=False)
        except TierFailed as error:
            self._fail(str(error))

    async def _begin(
        self, layouts: Mapping[bytes, bytes], records: Iterable[bytes], *, is_complete: bool
    ) -> None:
        """An index of these layouts and entries of records, made in a new process."""
        channel = await self._start()
        await channel.ask(frames.BEGIN, patience_s=PATIENCE_S)
        entries = chain(starmap(pack_layout, layouts.items()), records)
        for body in _bodies(entries):
            await channel.ask(frames.WRITE, body, patience_s=PATIENCE_S)
        place = b"\1" if is_complete else b"\0"
        await channel.ask(frames.PLACE, place, patience_s=PATIENCE_S)
        self._serve(channel)

    async def _start(self) -> IndexChannel:
        self._channel = await IndexChannel.start(self._folder, self._log_id)
        return self._channel

    def _serve(self, channel: IndexChannel) -> None:
        self.failure = ""
        self._is_open = True
        self._listener = asyncio.create_task(self._listen(channel))
        self._send()

    async def _listen(self, channel: IndexChannel) -> None:
        """Until the process ends, which it does not unless it fails."""
        try:
            while True:
                await channel.hear_done(None)
                if self._timer is not None:
                    self._timer.cancel()
                self._queue.landed()
                self._send()
        except TierFailed as error:
            self._fail(str(error))

    def _queue_change(self, change: bytes) -> None:
        if not self._is_open:
            return
        self._queue.add(change)
        if self._queue.size > QUEUE_SIZE_MAX:
            self._fail(f"more than {QUEUE_SIZE_MAX} bytes wait for its process")
        elif len(self._queue) == SEND_COUNT:
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        if self._listener is None or self._channel is None:
            return
        body = self._queue.take()
        if body:
            self._channel.send(frames.WRITE, body)
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(
                PATIENCE_S, self._fail, f"no answer within {PATIENCE_S:g} s"
            )

    def _fail(self, reason: str) -> None:
        LOGGER.warning("event=index_process_failed reason=%s", reason)
        self._forget(reason)
        if self._channel is not None:
            self._channel.kill()

    def _forget(self, reason: str) -> None:
        """Take no more changes; whoever waits hears why."""
        self._is_open = False
        self.failure = reason
        self._queue.fail(reason)
        if self._timer is not None:
            self._timer.cancel()
        if self._listener is not None and self._listener is not asyncio.current_task():
            self._listener.cancel()
        self._listener = None

    async def _end_process(self, *, patience_s: float = 0) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.end(patience_s=patience_s)


class _Walk:
    """What comes in while the process walks through the index on the disk."""

    def __init__(self, on_progress: Callable[[int], None] | None) -> None:
        self.records: list[IndexRecord] = []
        self.layouts: dict[bytes, bytes] = {}
        self.reason = ""
        self.has_ended = False
        self._on_progress = on_progress

    def hear(self, kind: bytes, body: bytes) -> None:
        """Raises `ProcessLost` for what no sound process says."""
        if kind == frames.WALKED:
            self.reason = body.decode(errors="replace")
            self.has_ended = True
            return
        if kind != frames.ENTRIES:
            raise ProcessLost(f"a frame of kind {kind!r} was not expected now")
        try:
            self._take(body)
        except Corrupt as error:
            raise ProcessLost(str(error)) from error
        if self._on_progress is not None:
            self._on_progress(len(self.records))

    def _take(self, body: bytes) -> None:
        append = self.records.append
        for _, entry in frames.changes(body):
            if entry.startswith(LAYOUT_KIND):
                fingerprint, encoded = parse_layout(entry)
                self.layouts[fingerprint] = encoded
            else:
                append(parse_record(entry))


def _bodies(entries: Iterable[bytes]) -> Iterator[bytes]:
    """The entries as changes, each body about as large as a frame carries."""
    changes: list[bytes] = []
    size = 0
    for entry in entries:
        changes.append(frames.pack_put(entry))
        size += len(entry)
        if size >= frames.BODY_SIZE:
            yield b"".join(changes)
            changes, size = [], 0
    if changes:
        yield b"".join(changes)
