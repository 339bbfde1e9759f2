"""IndexFeed: tells the index what is on disk, lets it commit now and then, and begins it anew when
it has failed.

    a copy is durable ─► remember ─┐
    a copy is dropped ─► forget   ─┴─► committed together, a second later at most
    the index failed  ─► rebuilt out of the directory, again and again until that works
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress

from kvd.chunk import Fingerprint
from kvd.daemon.directory import Entry
from kvd.daemon.index import ChunkIndex, IndexRecord
from kvd.daemon.labels import codec_text
from kvd.daemon.store import ChunkStore
from kvd.errors import TierFailed
from kvd.proto.convert import layout_to_message
from kvd.tiers.segment_log import SegmentLog

log = logging.getLogger("kvd.nvme")

# An index that has failed is begun anew after this long.
INDEX_REST_S = 5.0

# The index is committed at most so often, unless somebody waits for it.
COMMIT_EVERY_S = 1.0


class IndexFeed:
    """Keeps `index` in step with what of `store` is in `segment_log`."""

    def __init__(self, store: ChunkStore, segment_log: SegmentLog, index: ChunkIndex) -> None:
        self._store = store
        self._log = segment_log
        self._index = index
        self._known_layouts: set[Fingerprint] = set()
        self._to_commit = asyncio.Event()

    def remember(self, entry: Entry) -> None:
        """Queue the entry's copy for the index."""
        layout = entry.meta.layout
        if layout not in self._known_layouts and layout in self._store.layouts:
            self._known_layouts.add(layout)
            message = layout_to_message(self._store.layouts[layout])
            self._index.put_layout(layout, message.SerializeToString())
        self._index.put(self.record(entry))
        self._to_commit.set()

    def forget(self, entry: Entry) -> None:
        """The entry's copy is about to be nobody's."""
        assert entry.on_disk is not None
        self._index.delete(entry.meta.key, entry.on_disk.extent.offset)
        self._to_commit.set()

    def look(self) -> None:
        """The index may have failed while there was nothing to commit, and nobody has noticed."""
        if self._index.failure:
            self._to_commit.set()

    def record(self, entry: Entry) -> IndexRecord:
        """What the index keeps of the entry's copy."""
        assert entry.on_disk is not None
        extent = entry.on_disk.extent
        return IndexRecord(
            key=entry.meta.key,
            offset=extent.offset,
            size=extent.size,
            life=self._log.life(extent),
            checksum=entry.on_disk.checksum or 0,
            codec=codec_text(entry.on_disk.codec, is_exact=entry.on_disk.is_exact),
            label=self._store.label_of(entry),
        )

    async def commit_forever(self) -> None:
        """Commit what is queued, and begin an index anew that has failed."""
        while True:
            await self._to_commit.wait()
            await asyncio.sleep(COMMIT_EVERY_S)
            self._to_commit.clear()
            if self._index.failure:
                await self.rebuild()
                if self._index.failure:
                    await asyncio.sleep(INDEX_REST_S)
                    self._to_commit.set()
                continue
            with suppress(TierFailed):
                await self._index.commit()
            if self._index.failure:
                log.error("event=index_failed reason=%r", self._index.failure)
                self._store.counters["nvme_index_errors"] += 1
                await asyncio.sleep(INDEX_REST_S)
                self._to_commit.set()

    async def rebuild(self) -> None:
        """Write the index anew, out of what is known."""
        layouts = {
            bytes(fingerprint): layout_to_message(layout).SerializeToString()
            for fingerprint, layout in self._store.layouts.items()
        }
        count = 0

        def on_disk() -> Iterator[IndexRecord]:
            # Counted when the first is asked for, all at once.
            nonlocal count
            records = [self.record(entry) for entry in self._store.directory if entry.on_disk]
            count = len(records)
            yield from records

        try:
            # What changes before the new index is begun is not told to it, and counted then.
            await self._index.reset(on_disk(), layouts)
            log.info("event=index_rebuilt records=%d", count)
        except (TierFailed, OSError) as error:
            # OSError where no process can be started for want of descriptors or memory.
            log.error("event=index_rebuild_failed reason=%r", str(error))
