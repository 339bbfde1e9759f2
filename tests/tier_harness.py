"""A whole two-tier daemon in this process, but for its sockets: it can be killed between any two
calls to the disk, and the disk then forgets what was not synced.

`Node` opens store, mover, segment log and index as a daemon does (`reopen`), over small segments.
`MortalOps` is the disk. `IndexFile` stands in for the index's process: what is committed stays.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import xxhash

from kvd.arena import HUGE_PAGE_SIZE, Arena
from kvd.chunk import ChunkMeta, Fingerprint
from kvd.daemon import index_feed as feed_module
from kvd.daemon import mover as mover_module
from kvd.daemon import reopen as reopen_module
from kvd.daemon import upkeep as upkeep_module
from kvd.daemon.coder import Coder
from kvd.daemon.config import Config
from kvd.daemon.directory import Entry
from kvd.daemon.eviction.lru import Lru
from kvd.daemon.expiries import expiry_after
from kvd.daemon.index import ChunkIndex, FoundIndex, IndexRecord
from kvd.daemon.leases import ReadLease
from kvd.daemon.packed import PackedMemory
from kvd.daemon.roles import PersistCount
from kvd.daemon.store import ChunkStore
from kvd.errors import TierFailed
from kvd.keys import ChunkKey
from kvd.layout import KVLayout
from kvd.tiers.allocator import Allocator
from kvd.tiers.cpu import CpuTier
from kvd.tiers.file_ops import FileOps, Vectors
from kvd.tiers.segment import BLOCK_SIZE
from kvd.tiers.segment_log import SegmentLog
from tests.crash_client import pattern
from tests.toy_codec import MASK

# 64 KiB a whole chunk: memory has room for 32 of them, a segment for three.
LAYOUT = KVLayout(
    model="m",
    revision="r",
    dtype="uint8",
    num_layers=4,
    num_kv_heads=16,
    head_dim=32,
    chunk_tokens=16,
)
TENANT_LAYOUT = KVLayout(
    model="m",
    revision="r",
    dtype="uint8",
    num_layers=4,
    num_kv_heads=16,
    head_dim=32,
    chunk_tokens=16,
    salt="another tenant",
)
ROOT = Fingerprint(LAYOUT.fingerprint)
MEMORY_SIZE = HUGE_PAGE_SIZE
SEGMENT_SIZE = 256 << 10
# For 24 chunks encoded by the toy codecs.
PACKED_SIZE = 96 << 10
S = 10**9

# What a step may take before it counts as hanging.
PATIENCE_S = 20.0

# Rests so short that a test sees their end.
QUICK: Mapping[ModuleType, Mapping[str, float]] = {
    mover_module: {"REST_S_MIN": 0.02, "REST_S_MAX": 0.05, "QUOTA_REST_S": 0.01},
    feed_module: {"INDEX_REST_S": 0.02, "COMMIT_EVERY_S": 0.005},
    upkeep_module: {"WATCH_EVERY_S": 0.01},
}


def key_of(path: Sequence[int]) -> ChunkKey:
    return ChunkKey(hashlib.blake2b(bytes(path), digest_size=32).digest())


def meta_of(path: Sequence[int], root: Fingerprint = ROOT) -> ChunkMeta:
    """The last chunk of the prompt `path`; a quarter of all keys are shorter chunks."""
    key = key_of(path)
    return ChunkMeta(
        key=key,
        parent=key_of(path[:-1]) if len(path) > 1 else root,
        layout=root,
        start=16 * (len(path) - 1),
        num_tokens=16 if key[0] % 4 else 7,
    )


def chain(path: Sequence[int], root: Fingerprint = ROOT) -> list[ChunkMeta]:
    return [meta_of(path[:end], root) for end in range(1, len(path) + 1)]


def keys_of(path: Sequence[int]) -> list[ChunkKey]:
    return [key_of(path[:end]) for end in range(1, len(path) + 1)]


class MortalOps(FileOps):
    """A disk that dies at a call: nothing reaches it any more. What was not synced by then may be
    lost, each block for itself. `fault` may raise for any call.
    """

    def __init__(self) -> None:
        self.is_dead = False
        self.fault: Callable[[str], None] = lambda _: None
        # Of each write, at most so many bytes arrive.
        self.write_size_max: int | None = None
        self.calls: Counter[str] = Counter()
        self._calls_left: int | None = None
        self._lock = threading.Lock()
        self._paths: dict[int, Path] = {}
        # What stood in a block before each write that is not synced yet.
        self._before: dict[tuple[Path, int], list[bytes]] = {}

    def die_after(self, calls: int) -> None:
        """The call behind `calls` more is the last, and a write ends in its middle."""
        with self._lock:
            self._calls_left = calls

    def die(self) -> None:
        with self._lock:
            self.is_dead = True

    def lose_unsynced(self, chance: random.Random) -> None:
        """A power cut: of every block that was not synced, any state since the last sync."""
        mode = chance.choice(["none", "all", "some", "some"])
        for (path, at), states in self._before.items():
            kept = {"none": len(states), "all": 0, "some": chance.randint(0, len(states))}[mode]
            if kept < len(states) and path.exists():
                with path.open("r+b") as file:
                    file.seek(at)
                    file.write(states[kept])
        self._before.clear()

    def open(self, path: Path, flags: int) -> int:
        self._step("open")
        fd = super().open(path, flags)
        with self._lock:
            self._paths[fd] = path
        return fd

    def pwritev(self, fd: int, vectors: Vectors, offset: int) -> int:
        self._step("pwritev", lambda: self._tear(fd, vectors, offset))
        if self.write_size_max is not None:
            whole = np.concatenate([np.asarray(vector) for vector in vectors])
            vectors = [whole[: self.write_size_max]]
        self._remember(fd, vectors, offset)
        return super().pwritev(fd, vectors, offset)

    def preadv(self, fd: int, vectors: Vectors, offset: int) -> int:
        self._step("preadv")
        return super().preadv(fd, vectors, offset)

    def fdatasync(self, fd: int) -> None:
        self._step("fdatasync")
        self._settle(self._paths[fd])

    def fsync(self, fd: int) -> None:
        self._step("fsync")
        self._settle(self._paths[fd])

    def fallocate(self, fd: int, size: int) -> bool:
        self._step("fallocate")
        return super().fallocate(fd, size)

    def ftruncate(self, fd: int, size: int) -> None:
        self._step("ftruncate")
        super().ftruncate(fd, size)

    def unlink(self, path: Path) -> None:
        self._step("unlink")
        super().unlink(path)
        self._settle(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename")
        super().rename(source, target)

    def sync_directory(self, path: Path) -> None:
        self._step("sync_directory")

    def free_size(self, path: Path) -> int:
        self._step("free_size")
        return super().free_size(path)

    def _step(self, name: str, last: Callable[[], None] | None = None) -> None:
        with self._lock:
            self.calls[name] += 1
            if self._calls_left is not None and not self.is_dead:
                self.is_dead = self._calls_left == 0
                self._calls_left -= 1
                if self.is_dead and last is not None:
                    last()
            if self.is_dead:
                raise OSError(errno.EIO, "the process is dead")
        self.fault(name)

    def _tear(self, fd: int, vectors: Vectors, offset: int) -> None:
        whole = np.concatenate([np.asarray(vector) for vector in vectors])
        if whole.size > BLOCK_SIZE:
            os.pwrite(fd, whole[: whole.size // 2].tobytes(), offset)

    def _remember(self, fd: int, vectors: Vectors, offset: int) -> None:
        size = sum(vector.size for vector in vectors)
        before = os.pread(fd, size, offset).ljust(size, b"\0")
        with self._lock:
            for at in range(0, size, BLOCK_SIZE):
                states = self._before.setdefault((self._paths[fd], offset + at), [])
                states.append(before[at : at + BLOCK_SIZE])

    def _settle(self, path: Path) -> None:
        with self._lock:
            for key in [key for key in self._before if key[0] == path]:
                del self._before[key]


class NoProfiles:
    """A node without a profile of any model."""

    def for_layout(self, layout: KVLayout) -> None:
        return None

    def by_hash(self, hash: bytes) -> None:
        return None


class IndexFile:
    """The index on the disk, without a process: `open` as `ChunkIndex.open`."""

    def __init__(self) -> None:
        self.records: dict[ChunkKey, IndexRecord] = {}
        self.layouts: dict[bytes, bytes] = {}
        self.reason = "missing: no index was found"
        self.is_dead: Callable[[], bool] = lambda: False

    async def open(
        self, folder: Path, log_id: bytes, **_: object
    ) -> tuple[MemoryIndex, FoundIndex]:
        found = [self.records[key] for key in sorted(self.records)]
        return MemoryIndex(self), FoundIndex(found, dict(self.layouts), self.reason)

    def apply(self, changes: Sequence[tuple[Any, ...]]) -> None:
        for name, *values in changes:
            if name == "put":
                self.records[values[0].key] = values[0]
            elif name == "layout":
                self.layouts[values[0]] = values[1]
            elif (known := self.records.get(values[0])) and known.offset == values[1]:
                del self.records[values[0]]


class MemoryIndex:
    """What `ChunkIndex` promises: durable after `commit`, maybe before; gone with its process."""

    def __init__(self, file: IndexFile) -> None:
        self.failure = ""
        self._file = file
        self._queue: list[tuple[Any, ...]] = []
        self._is_beginning = False

    def put(self, record: IndexRecord) -> None:
        self._add(("put", record))

    def delete(self, key: ChunkKey, offset: int) -> None:
        self._add(("delete", key, offset))

    def put_layout(self, fingerprint: bytes, encoded: bytes) -> None:
        self._add(("layout", fingerprint, encoded))

    async def commit(self, **_: object) -> None:
        if self.failure and not self._is_beginning:
            raise TierFailed(f"the index keeps nothing: {self.failure}")
        queue, count = self._queue, len(self._queue)
        while count and (queue is self._queue) and self._is_beginning:
            await asyncio.sleep(0.0005)
        if count:
            await asyncio.sleep(0.001)
        if queue is not self._queue or self._file.is_dead():
            raise TierFailed(f"the index keeps nothing: {self.failure}")
        self.flush(count)

    async def reset(self, records: Iterable[IndexRecord], layouts: Mapping[bytes, bytes]) -> None:
        self.failure, self._queue, self._is_beginning = "it is begun anew", [], True
        try:
            await asyncio.sleep(0.003)
            if self._file.is_dead() or self.failure != "it is begun anew":
                raise TierFailed(f"the index keeps nothing: {self.failure}")
            self._file.records = {record.key: record for record in records}
            self._file.layouts = dict(layouts)
            self._file.reason = self.failure = ""
        except asyncio.CancelledError:
            self.failure = "the reset did not end"
            raise
        finally:
            self._is_beginning = False

    async def close(self) -> None:
        if not self.failure and not self._file.is_dead():
            self.flush(len(self._queue))
        self.failure = "closed"

    def fail(self) -> None:
        """The process is killed: what is queued is lost."""
        self.failure, self._queue, self._is_beginning = "killed", [], False

    def flush(self, count: int) -> None:
        """What is queued may be durable before anybody asks."""
        count = min(count, len(self._queue))
        self._file.apply(self._queue[:count])
        del self._queue[:count]

    def _add(self, change: tuple[Any, ...]) -> None:
        is_open = not self.failure or self._is_beginning
        if is_open and not self._file.is_dead():
            self._queue.append(change)


class Node:
    """Store and mover over `folder`. `index_file` is the stand-in; without it the real index."""

    def __init__(
        self,
        folder: Path,
        *,
        size: int,
        index_file: IndexFile | None = None,
        ops: MortalOps | None = None,
        segment_size: int = SEGMENT_SIZE,
        packed_size: int = PACKED_SIZE,
        **options: Any,
    ) -> None:
        self.folder = folder
        self.index_file = index_file
        self.ops = ops or MortalOps()
        self.segment_size = segment_size
        self.packed_size = packed_size
        self.packed: PackedMemory | None = None
        self.now_ns = 0
        # The wall's clock, less the monotonic one.
        self.wall_ahead_ns = 1_767_225_600 * S
        self.config = Config(
            tiers=("cpu", "nvme"),
            nvme_path=str(folder),
            nvme_size=size,
            nvme_reserve=options.pop("nvme_reserve", 0),
            nvme_scrub_rate=0,
            **options,
        )
        self.coder = Coder(self.config.codec_rules, NoProfiles(), num_threads=2)

    async def open(self) -> None:
        self.arena = Arena.create(MEMORY_SIZE, huge_pages="never")
        self.store = ChunkStore(CpuTier(self.arena), Lru())
        for layout in (LAYOUT, TENANT_LAYOUT):
            self.store.declare(layout)
        index: Any = ChunkIndex
        if self.index_file is not None:
            self.index_file.is_dead = lambda: self.ops.is_dead
            index = self.index_file
        with (
            mock.patch.object(reopen_module, "_open_log", self._open_log),
            mock.patch.object(reopen_module, "ChunkIndex", index),
            mock.patch.object(reopen_module, "time", self._clock),
        ):
            self.mover = await reopen_module.reopen(self.config, self.store, self.coder)
        self.packed = None
        if self.config.packed_size:
            tier = CpuTier(Arena.create(self.packed_size, huge_pages="never"), name="packed")
            # No arena is so small.
            tier.size, tier._allocator = self.packed_size, Allocator(self.packed_size)
            self.packed = PackedMemory(self.store, tier, Lru(), self.coder)
            self.store.packed = self.packed
        self.mover.start()

    async def close(self, flush_s: float = PATIENCE_S) -> None:
        await self.mover.close(flush_s=flush_s)
        await self._close_memory()

    async def _close_memory(self) -> None:
        if self.packed is not None:
            await self.packed.close()
            self.packed.tier.arena.close()
        self.arena.close()

    async def crash(self, *, calls: int, applied: int, cut: random.Random | None) -> None:
        """SIGKILL after `calls` more calls to the disk, or when there are none; with `cut` the
        power goes too. `applied` queued changes of the index have reached it.
        """
        self.ops.die_after(calls)
        give_up = asyncio.get_running_loop().time() + 0.005 * bool(calls)
        while not self.ops.is_dead and asyncio.get_running_loop().time() < give_up:
            await asyncio.sleep(0.0005)
        index: Any = self.mover.index
        if self.index_file is None:
            index._fail("killed")
        elif not self.ops.is_dead:
            index.flush(applied)
        self.ops.die()
        ours = asyncio.all_tasks() - {asyncio.current_task()}
        for task in ours:
            task.cancel()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*ours, return_exceptions=True)
            await self.mover.index.close()
        self.mover.tier.close()
        if cut is not None:
            self.ops.lose_unsynced(cut)
        await self._close_memory()
        self.ops = MortalOps()

    # What clients do.

    def put(
        self,
        path: Sequence[int],
        *,
        root: Fingerprint = ROOT,
        has_checksums: bool = False,
        ttl_ns: int = 0,
    ) -> list[ChunkMeta]:
        """Store a prompt; the chunks that are new."""
        self.now_ns += 1
        lease, _ = self.store.reserve(
            chain(path, root),
            lease_ns=S,
            now_ns=self.now_ns,
            expiry=expiry_after(
                ttl_ns, now_ns=self.now_ns, wall_now_ns=self.now_ns + self.wall_ahead_ns
            ),
        )
        if lease is None:
            return []
        checksums = []
        for meta, extent in zip(lease.metas, lease.extents, strict=True):
            content = pattern(meta.key, extent.size)
            self.store.tier.view(extent)[:] = content
            checksums.append(xxhash.xxh3_64_intdigest(content))
        metas = list(lease.metas)
        self.store.commit(lease.id, checksums if has_checksums else (), now_ns=self.now_ns)
        return metas

    def pin(
        self, keys: Sequence[ChunkKey], *, root: Fingerprint = ROOT, standalone: bool = False
    ) -> ReadLease | None:
        self.now_ns += 1
        lease, _ = self.store.pin(keys, root, standalone=standalone, lease_ns=S, now_ns=self.now_ns)
        return lease

    async def read(
        self, keys: Sequence[ChunkKey], *, root: Fingerprint = ROOT, standalone: bool = False
    ) -> tuple[list[ChunkKey], list[ChunkKey]]:
        """Pin, and look at every byte as it becomes ready: the keys read, and those lost."""
        lease = self.pin(keys, root=root, standalone=standalone)
        if lease is None:
            return [], []
        good: list[ChunkKey] = []
        lost: list[ChunkKey] = []
        for entry in list(lease.entries):
            (good if await self.arrived(entry) else lost).append(entry.meta.key)
        self.store.release(lease.id)
        return good, lost

    async def arrived(self, entry: Entry) -> bool:
        """Whether all of a pinned chunk came; each byte that was called ready is its own."""
        size = self.store.layouts[entry.meta.layout].size(entry.meta.num_tokens)
        stored = pattern(entry.meta.key, size)
        while (ready := self.store.ready_size(entry)) is not None:
            view = self.store.tier.view(self.store.extent_of(entry))
            # One that is being lost has no copy any more, and has not said what it was.
            arrival = self.store.arrival(entry)
            copy = entry.in_memory or (arrival.source if arrival is not None else None)
            wanted = [stored] if copy is None or copy.is_exact else []
            if "lossy" in self.config.codec and (copy is None or not copy.is_exact):
                wanted.append(stored & MASK)
            assert any(np.array_equal(view[:ready], w[:ready]) for w in wanted), "wrong bytes"
            if ready == size:
                return True
            progress = asyncio.Event()
            arrival = self.store.arrival(entry)
            assert arrival is not None
            arrival.watch(progress.set)
            if arrival.ready == ready:
                async with asyncio.timeout(PATIENCE_S):
                    await progress.wait()
        return False

    async def persist(self, entries: Sequence[Entry]) -> PersistCount:
        return await self.mover.persist(entries, PATIENCE_S)

    async def settle(self) -> None:
        """Wait until nothing moves any more."""
        async with asyncio.timeout(PATIENCE_S):
            while self.is_moving:
                await asyncio.sleep(0.0005)

    @property
    def is_moving(self) -> bool:
        # Three tasks go on for ever.
        mover = self.mover
        if self.packed is not None and (self.packed._packing or self.packed._reading):
            return True
        return bool(mover._writing or mover.promoter.tasks or len(mover._tasks) > 3)

    def audit(self) -> None:
        """Every invariant of store, shelf and log, and the bounds on the disk."""
        self.store.check()
        log = self.mover.tier.log
        assert log.disk_size <= log.size
        files = list(self.folder.glob("segment-????????"))
        assert len(files) * self.segment_size <= log.size
        quota = self.config.nvme_quota
        sizes = self.mover.shelf._sizes
        assert not quota or all(size <= quota for size in sizes.values()), "beyond the quota"
        if not self.is_moving:
            assert log.num_extents == self.mover.shelf.num_chunks, "a record is leaked"

    def record_of(self, entry: Entry) -> tuple[Path, int, int]:
        """File, offset and size of a chunk's record on the disk."""
        assert entry.on_disk is not None
        extent = entry.on_disk.extent
        slot, offset = divmod(extent.offset, self.segment_size)
        return self.folder / f"segment-{slot:08d}", offset, BLOCK_SIZE + extent.size

    @property
    def _clock(self) -> SimpleNamespace:
        """In place of the module: time as the node has it, but for how long things take."""
        return SimpleNamespace(
            monotonic=time.monotonic,
            monotonic_ns=lambda: self.now_ns,
            time_ns=lambda: self.now_ns + self.wall_ahead_ns,
        )

    def _open_log(self, config: Config, path: Path, *_: object) -> SegmentLog:
        return SegmentLog(
            path,
            config.nvme_size,
            reserve=config.nvme_reserve,
            segment_size=self.segment_size,
            is_direct=False,
            ops=self.ops,
        )


def quick(patch: Callable[[object, str, object], None]) -> None:
    """Shorten the rests; `patch` is a monkeypatch's `setattr`."""
    for module, values in QUICK.items():
        for name, value in values.items():
            patch(module, name, value)


def end_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what is left in a loop, and close it."""

    async def end() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    loop.run_until_complete(end())
    loop.close()
