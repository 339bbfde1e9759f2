"""Faults under both tiers, in one process where any call to the disk can be made to fail.

The answer is the right bytes or a miss, and what works goes on.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from kvd.chunk import ChunkMeta, Fingerprint
from kvd.daemon import promoter
from kvd.tiers.file_ops import Vectors
from tests.crash_client import pattern
from tests.file_faults import flip
from tests.tier_harness import (
    LAYOUT,
    PATIENCE_S,
    SEGMENT_SIZE,
    IndexFile,
    MortalOps,
    Node,
    S,
    key_of,
    quick,
)
from tests.tier_harness import keys_of as keys_in
from tests.tier_stories import becomes, entry_of, on, small_node, works


@pytest.fixture
def _quick_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch.setattr)


pytestmark = pytest.mark.usefixtures("_quick_rests")
READ_ONLY = {"pwritev", "fallocate", "ftruncate", "unlink", "rename", "sync_directory", "fsync"}

FAULTS = [
    pytest.param({"pwritev"}, errno.ENOSPC, id="no-space-in-a-write"),
    pytest.param({"pwritev"}, errno.EIO, id="write-error"),
    pytest.param({"preadv"}, errno.EIO, id="read-error"),
    pytest.param({"fdatasync"}, errno.EIO, id="sync-error"),
    pytest.param({"fsync", "fdatasync"}, errno.ENOSPC, id="no-space-in-a-sync"),
    pytest.param({"fallocate"}, errno.ENOSPC, id="no-space-for-a-segment"),
    pytest.param({"open"}, errno.EMFILE, id="no-descriptor-left"),
    pytest.param({"free_size"}, errno.ENOENT, id="no-folder-to-ask"),
    pytest.param({"unlink", "rename"}, errno.EACCES, id="names-cannot-change"),
    pytest.param(READ_ONLY, errno.EROFS, id="read-only"),
    pytest.param(
        READ_ONLY | {"open", "preadv", "fdatasync", "free_size"}, errno.EIO, id="device-gone"
    ),
]


@pytest.mark.parametrize("share", [0.3, 1.0], ids=["sometimes", "always"])
@pytest.mark.parametrize(("names", "code"), FAULTS)
def test_a_fault_costs_misses_and_writes_resume(
    tmp_path: Path, names: set[str], code: int, share: float
) -> None:
    chance = random.Random(f"{sorted(names)} {code} {share}")

    def fault(name: str) -> None:
        if name in names and chance.random() < share:
            raise OSError(code, os.strerror(code))

    async def story(node: Node) -> None:
        for number in range(20):
            node.put([number, 1, 2])
            await asyncio.sleep(0.001)
        for step in range(60):
            if step % 20 == chance.randrange(20):
                node.ops.fault = fault
            await one_step(node, chance, step)
            node.audit()
            # Whoever asks is answered, whatever the disk does.
            node.mover.facts()
        node.ops.fault = lambda _: None
        await works(node, 100)
        await node.settle()
        node.audit()

    node = small_node(tmp_path)
    on(node, story)

    async def after(node: Node) -> None:
        node.audit()
        for entry in list(node.store.directory):
            await node.read([entry.meta.key], standalone=True)
        await works(node, 200)

    on(node, after)


async def one_step(node: Node, chance: random.Random, step: int) -> None:
    """One of what clients and operators do; each byte that is read is looked at."""
    path = [chance.randrange(20 + step), 1, 2]
    match chance.randrange(6):
        case 0 | 1:
            node.put(path)
        case 2:
            reads = [node.read(keys_in([chance.randrange(20), 1, 2])) for _ in range(3)]
            await asyncio.gather(*reads)
        case 3:
            await node.read(keys_in(path))
        case 4:
            done = await node.persist(list(node.store.directory))
            # Whoever is not told that all is durable is told why, or that it takes longer.
            assert done.num_durable == len(node.store.directory) or done.reason or done.num_pending
        case _:
            await asyncio.sleep(0.003)


def test_short_writes_are_written_on(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        node.ops.write_size_max = 5000
        await works(node, 1)
        node.ops.write_size_max = None
        await works(node, 100)

    on(small_node(tmp_path), story)


def test_without_room_to_write_memory_goes_on_and_nothing_spins(tmp_path: Path) -> None:
    """A reserve beyond what is free: not a byte of segments, a reason, no attempt after attempt."""

    async def story(node: Node) -> None:
        for number in range(30):
            node.put([number, 1, 2])
            await asyncio.sleep(0.001)
        assert not list(tmp_path.glob("segment-*"))
        assert len(node.store.directory) >= 24
        done = await node.persist(list(node.store.directory))
        assert done.num_durable == 0
        assert "reserve" in done.reason
        assert "reserve" in node.mover.facts()["failure"]
        # Who wants room for a store need not wait for a disk that takes nothing.
        assert node.mover.has_room(1 << 20)
        before = node.ops.calls["free_size"]
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert node.ops.calls["free_size"] - before < 200
        node.audit()

    on(small_node(tmp_path, nvme_reserve=1 << 60), story)


def test_a_full_file_system_is_answered_with_own_segments(tmp_path: Path) -> None:
    """Nobody gives the log another byte, whatever `statvfs` says: it goes on in what it has."""

    async def story(node: Node) -> None:
        for number in range(10):
            node.put([number, 1, 2])
        assert (await node.persist(list(node.store.directory))).reason == ""
        size = node.mover.tier.log.disk_size

        def fault(name: str) -> None:
            if name == "fallocate":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        node.ops.fault = fault
        for number in range(100, 120):
            node.put([number, 1, 2])
            entries = [entry_of(node, path) for path in ([number], [number, 1], [number, 1, 2])]
            give_up = asyncio.get_running_loop().time() + PATIENCE_S
            while (done := await node.persist(entries)).num_durable < 3:
                # Somebody else took the segment that was given back.
                assert asyncio.get_running_loop().time() < give_up, done
                await asyncio.sleep(0.005)
        assert node.mover.tier.log.disk_size <= size
        await node.settle()
        node.audit()

    on(small_node(tmp_path), story)


def test_a_tenant_never_has_more_than_its_quota(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        for number in range(20):
            node.put([number, 1, 2])
            for _ in range(5):
                await asyncio.sleep(0.0005)
                node.audit()
        await node.persist(list(node.store.directory))
        node.audit()
        assert node.store.counters["nvme_quota_chunks"] > 0

    on(small_node(tmp_path, nvme_quota=5 * (68 << 10)), story)


def test_a_chunk_that_is_cleared_while_it_is_copied_leaves_nothing(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        for number in range(20):
            node.put([number, 1, 2])
            await node.persist(list(node.store.directory))
        await node.settle()
        node.store.hold([key_of([0])], True)
        gate, is_there = threading.Event(), threading.Event()

        def fault(name: str) -> None:
            if name == "preadv":
                is_there.set()
                assert gate.wait(PATIENCE_S)

        node.ops.fault = fault
        giving = asyncio.ensure_future(node.mover.upkeep.give_back_one())
        await becomes(is_there.is_set, "nothing is copied")
        node.store.hold([key_of([0])], False)
        assert node.store.drop([entry_of(node, [0])])[0] > 0
        gate.set()
        assert await giving
        await node.settle()
        node.audit()

    on(Node(tmp_path, size=64 * SEGMENT_SIZE, index_file=IndexFile()), story)


class GatedOps(MortalOps):
    """Reads behind the first MiB of a segment wait for the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def preadv(self, fd: int, vectors: Vectors, offset: int) -> int:
        if offset > 1 << 20:
            assert self.gate.wait(PATIENCE_S)
        return super().preadv(fd, vectors, offset)


@pytest.mark.parametrize("is_damaged", [False, True], ids=["whole", "damaged-at-its-end"])
def test_no_byte_is_ready_before_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    """A chunk of 1.5 MiB comes in two stripes; nobody is told of the second before it is good."""
    monkeypatch.setattr(promoter, "WHOLE_SIZE_MAX", 1 << 20)
    layout = replace(LAYOUT, chunk_tokens=384)
    root = Fingerprint(layout.fingerprint)
    size = layout.size(384)
    metas = [
        ChunkMeta(key=key_of([n]), parent=root, layout=root, start=0, num_tokens=384)
        for n in range(2)
    ]

    async def story(node: Node) -> None:
        node.store.declare(layout)
        for meta in metas:
            lease, _ = node.store.reserve([meta], lease_ns=S, now_ns=0)
            assert lease is not None
            node.store.tier.view(lease.extents[0])[:] = pattern(meta.key, size)
            node.store.commit(lease.id, (), now_ns=0)
            assert (await node.persist([entry_of(node, meta)])).num_durable == 1
        entry = entry_of(node, metas[0])
        assert entry.in_memory is None
        if is_damaged:
            path, offset, record = node.record_of(entry)
            flip(path, offset + record - 1)
        lease = node.pin([metas[0].key], root=root)
        assert lease is not None
        await becomes(lambda: node.store.ready_size(entry) != 0, "the first stripe does not come")
        assert node.store.ready_size(entry) == 1 << 20
        ops.gate.set()
        assert await node.arrived(entry) is not is_damaged
        node.store.release(lease.id)
        await node.settle()
        node.audit()

    ops = GatedOps()
    node = Node(tmp_path, size=8 << 20, index_file=IndexFile(), ops=ops, segment_size=2 << 20)
    on(node, story)


def test_a_task_that_watches_outlives_every_fault(tmp_path: Path) -> None:
    """The reserve is kept after the file system could not even be asked about it."""

    async def story(node: Node) -> None:
        for number in range(12):
            node.put([number, 1, 2])
        await node.persist(list(node.store.directory))
        seen = []

        def fault(name: str) -> None:
            if name == "free_size":
                seen.append(name)
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

        node.ops.fault = fault
        await becomes(lambda: len(seen) > 9, "nobody watches")
        node.ops.fault = lambda _: None
        log = node.mover.tier.log
        # Others fill the file system: the reserve is short from now on.
        log._pool._reserve = 1 << 60
        size = log.disk_size
        await becomes(lambda: log.disk_size < size, "nothing is given back")
        await node.settle()
        node.audit()

    on(small_node(tmp_path), story)
