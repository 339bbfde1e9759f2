"""Reopen: the tier on disk at a daemon's start, with all that it still holds.

    lock the folder ─► the index says what is there      seconds for a million chunks
                   └─► or, if it is doubtful, every      as fast as headers can be read
                       record's header does

What the index names is believed only as far as the segment's life; each record is verified when it
is read.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from kvd.chunk import Extent, Fingerprint, Placement
from kvd.daemon.codec_rules import RAW
from kvd.daemon.coder import Coder
from kvd.daemon.config import Config
from kvd.daemon.expiries import expiry_of
from kvd.daemon.index import ChunkIndex, IndexRecord
from kvd.daemon.labels import Label, decode_label, parse_codec
from kvd.daemon.mover import Mover, MoverOptions
from kvd.daemon.store import ChunkStore
from kvd.errors import Corrupt, KvdError
from kvd.keys import ChunkKey
from kvd.proto import kvd_pb2 as pb
from kvd.proto.convert import layout_from_message
from kvd.tiers.file_ops import FILE_OPS
from kvd.tiers.log_directory import find_log_header
from kvd.tiers.nvme import NvmeTier
from kvd.tiers.segment import SEGMENT_SIZE_DEFAULT
from kvd.tiers.segment_log import NAME, SegmentLog

if TYPE_CHECKING:
    from kvd.tiers.cipher import Cipher

log = logging.getLogger("kvd.nvme")

# A log has at least this many segments, so that giving one back costs little of what is kept.
SEGMENTS_MIN = 16
SEGMENT_SIZE_MIN = 256 << 10

# Bytes of segments whose headers have been read, and of all.
Progress = Callable[[int, int], None]


async def reopen(
    config: Config, store: ChunkStore, coder: Coder, progress: Progress | None = None
) -> Mover:
    """Open the nvme tier of `config` and list in `store` what it holds; not started yet.

    Raises `ConfigError` where the folder cannot be used: taken, of another format, encrypted with
    another key.
    """
    path = Path(config.nvme_path)
    segment_log = await asyncio.to_thread(_open_log, config, path)
    try:
        started = time.monotonic()
        with _no_collection():
            index, found = await ChunkIndex.open(path, segment_log.log_id)
        options = MoverOptions(
            write=config.nvme_write,
            admit_hits=config.nvme_admit_hits,
            quota=config.nvme_quota,
            scrub_rate=config.nvme_scrub_rate,
        )
        tier = NvmeTier(segment_log)
    except BaseException:
        segment_log.close()
        raise
    mover = Mover(store, tier, index, coder, options)
    store.lower = mover
    store.is_prefetching = config.nvme_prefetch
    _declare(store, found.layouts)
    records: Iterable[IndexRecord] = found.records
    if found.reason:
        # A new folder has no index, and nothing to rebuild it from.
        is_new = not segment_log.segments()
        log.log(
            logging.INFO if is_new else logging.WARNING,
            "event=index_rebuilding reason=%r",
            found.reason,
        )
        records = await asyncio.to_thread(_scan, segment_log, progress)
    if config.nvme_quota:
        # Whoever is beyond its quota loses what is oldest.
        records = _by_age(segment_log, records)
    with _no_collection():
        count = _restore(store, mover, records)
    # Before a quota counts what is here, and before anybody asks for it.
    while store.expire_chunks(time.monotonic_ns()):
        continue
    mover.keep_quotas()
    if found.reason:
        await mover.feed.rebuild()
    log.info(
        "event=nvme_opened path=%s chunks=%d direct=%s seconds=%.2f",
        path,
        count,
        segment_log.is_direct,
        time.monotonic() - started,
    )
    return mover


@contextmanager
def _no_collection() -> Iterator[None]:
    """Millions of objects come, none of them garbage: looking through them takes a fifth longer."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def segment_size_for(size: int) -> int:
    """The size of segments of a new log that may have `size` bytes: a power of two."""
    segment_size = SEGMENT_SIZE_DEFAULT
    while segment_size > SEGMENT_SIZE_MIN and segment_size * SEGMENTS_MIN > size:
        segment_size //= 2
    return segment_size


def _open_log(config: Config, path: Path) -> SegmentLog:
    return SegmentLog(
        path,
        config.nvme_size,
        reserve=config.nvme_reserve,
        segment_size=_found_segment_size(path) or segment_size_for(config.nvme_size),
        cipher=_load_cipher(config),
    )


def _found_segment_size(path: Path) -> int:
    """That of the log which is there, whatever size it may have now; 0 for none."""
    try:
        header = find_log_header(path, FILE_OPS)
    except OSError:
        return 0
    return header.segment_size if header is not None else 0


def _load_cipher(config: Config) -> Cipher | None:
    if not config.nvme_key_file and not config.nvme_key_command:
        return None
    # The library is optional, and large.
    from kvd.tiers.cipher_key import load_cipher

    file = Path(config.nvme_key_file) if config.nvme_key_file else None
    return load_cipher(file, config.nvme_key_command or None)


def _declare(store: ChunkStore, layouts: dict[bytes, bytes]) -> None:
    for fingerprint, encoded in layouts.items():
        try:
            layout = layout_from_message(pb.Layout.FromString(encoded))
            if layout.fingerprint == fingerprint:
                store.declare(layout)
        except (KvdError, ValueError, DecodeError):
            # Its chunks are served all the same; `kvd ls` cannot describe them before it is
            # declared again.
            log.warning("event=layout_unreadable layout=%s", fingerprint[:4].hex())


def _scan(segment_log: SegmentLog, progress: Progress | None) -> list[IndexRecord]:
    """The newest record of each chunk, out of the records themselves."""
    newest: dict[ChunkKey, tuple[int, IndexRecord]] = {}
    for extent, header in segment_log.scan(progress):
        try:
            meta = decode_label(header.label).meta
        except Corrupt:
            continue
        known = newest.get(meta.key)
        if known is None or known[0] < header.sequence:
            record = IndexRecord(
                key=meta.key,
                offset=extent.offset,
                size=extent.size,
                life=header.life,
                checksum=header.payload_checksum,
                codec=header.codec,
                label=header.label,
            )
            newest[meta.key] = (header.sequence, record)
    return [record for _, record in newest.values()]


def _by_age(segment_log: SegmentLog, records: Iterable[IndexRecord]) -> list[IndexRecord]:
    """The records in the order they were written."""
    rank = {info.slot: info.sequence for info in segment_log.segments()}

    def age(record: IndexRecord) -> tuple[int, int]:
        return rank.get(record.offset // segment_log.segment_size, 0), record.offset

    return sorted(records, key=age)


def _restore(store: ChunkStore, mover: Mover, records: Iterable[IndexRecord]) -> int:
    """List what the records name; the count. The index forgets those that cannot be used: another
    record may get the place of such a one, in the same life of the segment.
    """
    count = 0
    now_ns, wall_now_ns = time.monotonic_ns(), time.time_ns()
    for record in records:
        found = _parse(store, record)
        extent = Extent(NAME, record.offset, record.size)
        if found is None or not mover.tier.log.adopt(extent, life=record.life):
            mover.index.delete(record.key, record.offset)
            continue
        codec, is_exact = parse_codec(record.codec)
        placement = Placement(extent, codec, is_exact, record.checksum or None)
        # Also one that is over: what continues it goes with it.
        expiry = expiry_of(found.stamp, now_ns=now_ns, wall_now_ns=wall_now_ns)
        entry = store.restore(found.meta, placement, expiry)
        if entry is None:
            mover.tier.log.free(extent)
            continue
        mover.adopt(entry, found.tenant)
        count += 1
    return count


def _parse(store: ChunkStore, record: IndexRecord) -> Label | None:
    """The label of a record; None where the record contradicts itself."""
    try:
        label = decode_label(record.label)
    except Corrupt:
        return None
    meta = label.meta
    if meta.key != record.key:
        return None
    layout = store.layouts.get(Fingerprint(meta.layout))
    is_raw = parse_codec(record.codec)[0] == RAW
    if is_raw and layout is not None and layout.size(meta.num_tokens) != record.size:
        return None
    return label
