"""Faults under both tiers: the answer is the right bytes or a miss, and what works goes on.

First in one process, where any call to the disk can be made to fail at any moment; then whole
daemons on real file systems that are full, read-only or gone.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kvd
from kvd.chunk import ChunkMeta, Fingerprint
from kvd.daemon import mover
from kvd.daemon.directory import Entry
from kvd.errors import TierFailed
from kvd.keys import ChunkKey
from kvd.tiers.file_ops import Vectors
from tests.conftest import DaemonProcess
from tests.crash_client import pattern
from tests.file_faults import flip
from tests.test_tiers import SIZE, keys_of, load, store, until
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


@pytest.fixture
def _quick_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch.setattr)


pytestmark = pytest.mark.usefixtures("_quick_rests")


def on(node: Node, story: Callable[[Node], Awaitable[None]]) -> None:
    """Run a story on an open node, and kill the node after it."""

    async def run() -> None:
        await node.open()
        try:
            await story(node)
        finally:
            await node.crash(calls=0, applied=0, cut=None)

    asyncio.run(run())


def small_node(folder: Path, **options: Any) -> Node:
    return Node(folder, size=16 * SEGMENT_SIZE, index_file=IndexFile(), **options)


def entry_of(node: Node, chunk: list[int] | ChunkMeta) -> Entry:
    key = chunk.key if isinstance(chunk, ChunkMeta) else key_of(chunk)
    entry = node.store.directory.get(key)
    assert entry is not None
    return entry


async def becomes(condition: Callable[[], bool], what: str) -> None:
    give_up = asyncio.get_running_loop().time() + PATIENCE_S
    while not condition():
        assert asyncio.get_running_loop().time() < give_up, what
        await asyncio.sleep(0.002)


async def works(node: Node, first: int) -> None:
    """Chunks go to disk, leave memory and come back."""
    paths = [[first + number, 1, 2] for number in range(8)]
    for path in paths:
        node.put(path)
        await asyncio.sleep(0.002)
    give_up = asyncio.get_running_loop().time() + PATIENCE_S
    while True:
        # Memory may have had to drop some before they were written.
        entries = [e for path in paths for key in keys_in(path) if (e := get(node, key))]
        done = await node.persist(entries)
        if len(entries) > 6 and done.num_durable == len(entries):
            break
        assert asyncio.get_running_loop().time() < give_up, done
        await asyncio.sleep(0.01)
        for path in paths:
            node.put(path)
    for number in range(12):
        node.put([first + 10 + number, 1, 2])
        await asyncio.sleep(0.001)
    for path in paths:
        good, lost = await node.read(keys_in(path))
        assert not lost
        assert len(good) in range(4)
    await node.settle()
    node.audit()
    assert node.mover.failure == ""


def get(node: Node, key: ChunkKey) -> Entry | None:
    return node.store.directory.get(key)


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


def test_short_writes_are_written_on(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        node.ops.write_size_max = 5000
        await works(node, 1)
        node.ops.write_size_max = None
        await works(node, 100)

    on(small_node(tmp_path), story)


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


def test_a_lost_index_that_nobody_noticed_is_begun_anew_for_a_persist(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        node.put([1])
        await node.persist([entry_of(node, [1])])
        index: Any = node.mover.index
        index.fail()
        done = await node.persist([entry_of(node, [1])])
        assert (done.num_durable, bool(done.reason)) == (0, True)
        await becomes(lambda: not index.failure, "the index is never begun anew")
        assert (await node.persist([entry_of(node, [1])])).num_durable == 1

    on(small_node(tmp_path), story)


def test_nothing_is_durable_while_the_index_is_begun_anew(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        node.put([1])
        await node.persist([entry_of(node, [1])])
        index: Any = node.mover.index
        index.fail()
        # Written, but the index that is lost has not heard of it.
        node.put([2])
        await node.persist([entry_of(node, [2])])
        await becomes(lambda: index.failure == "it is begun anew", "the index is never begun anew")
        done = await node.persist([entry_of(node, [2])])
        assert done.num_durable == 0 or not index.failure

    on(small_node(tmp_path), story)


def test_what_is_written_while_the_index_commits_is_not_durable_yet(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        node.put([1])
        await node.persist([entry_of(node, [1])])
        # The device has just failed: nobody waits for the second chunk.
        node.mover._rest_s, node.mover._rest_until = 1.0, asyncio.get_running_loop().time() + 60
        node.put([2])
        index: Any = node.mover.index
        commit = index.commit

        async def commit_slowly(**options: Any) -> None:
            await commit(**options)
            index.commit = commit
            node.mover._rest_s = node.mover._rest_until = 0.0
            node.mover._urgent[entry_of(node, [2])] = None
            node.mover.wake()
            await becomes(lambda: entry_of(node, [2]).on_disk is not None, "it is never written")

        index.commit = commit_slowly
        done = await node.persist([entry_of(node, [1]), entry_of(node, [2])])
        assert done.num_durable == 1
        assert done.reason

    on(small_node(tmp_path), story)


def test_a_copy_that_moves_while_the_index_commits_is_committed_again(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        node.put([1])
        entry = entry_of(node, [1])
        await node.persist([entry])
        index: Any = node.mover.index
        commit = index.commit

        async def commit_slowly(**options: Any) -> None:
            await commit(**options)
            index.commit = commit
            node.store.unshelve(entry)
            await node.persist([entry])
            index.put(node.mover._record(entry))

        index.commit = commit_slowly
        assert (await node.persist([entry])).num_durable == 1
        assert not index._queue

    on(small_node(tmp_path), story)


def test_a_clean_stop_leaves_a_whole_index_even_if_it_was_lost(tmp_path: Path) -> None:
    async def run() -> None:
        node = small_node(tmp_path)
        await node.open()
        node.put([1, 2])
        await node.persist(list(node.store.directory))
        index: Any = node.mover.index
        index.fail()
        node.put([3, 4])
        await node.close()
        await node.open()
        assert len(node.store.directory) == 4
        await node.crash(calls=0, applied=0, cut=None)

    asyncio.run(run())


def test_a_record_in_the_place_of_a_lost_one_is_not_lost_with_it(tmp_path: Path) -> None:
    """The last record's header is damaged: the log goes on in its place. What the index said of
    the lost one must not stand in the way of the new one.
    """
    paths = [[1, number] for number in range(40)]
    # Of the same size; the lost one's key comes first, so that it is looked at first.
    sizes: dict[int, list[list[int]]] = {}
    for path in paths:
        sizes.setdefault(key_of(path)[0] % 4 > 0, []).append(path)
    lost, new = sorted(sizes[True], key=key_of)[:2]

    async def run() -> None:
        node = small_node(tmp_path)
        await node.open()
        node.put([1])
        await node.persist(list(node.store.directory))
        node.put(lost)
        await node.persist(list(node.store.directory))
        path, offset, _ = node.record_of(entry_of(node, lost))
        place = entry_of(node, lost).on_disk
        await node.crash(calls=0, applied=0, cut=None)
        flip(path, offset + 100)
        await node.open()
        assert get(node, key_of(lost)) is None
        node.put(new)
        assert (await node.persist([entry_of(node, new)])).num_durable == 1
        found = entry_of(node, new).on_disk
        assert (found and found.extent) == (place and place.extent)
        await node.crash(calls=0, applied=0, cut=None)
        await node.open()
        assert get(node, key_of(lost)) is None
        good, _ = await node.read([key_of(new)], standalone=True)
        assert good == [key_of(new)]
        await node.crash(calls=0, applied=0, cut=None)

    asyncio.run(run())


def test_an_index_that_names_the_wrong_record_costs_misses(tmp_path: Path) -> None:
    """Both records are good; what they say of themselves is believed, not the index."""
    paths = [[number] for number in range(40) if key_of([number])[0] % 4][:6]

    async def run() -> None:
        node = small_node(tmp_path)
        await node.open()
        for path in paths:
            node.put(path)
        await node.close()
        assert node.index_file is not None
        records = node.index_file.records
        one, other = records[key_of(paths[0])], records[key_of(paths[1])]
        records[one.key] = one._replace(offset=other.offset, life=other.life)
        records[other.key] = other._replace(offset=one.offset, life=one.life)
        await node.open()
        good, lost = await node.read([key_of(path) for path in paths], standalone=True)
        assert set(lost) == {one.key, other.key}
        assert len(good) == 4
        await node.settle()
        node.audit()
        await node.crash(calls=0, applied=0, cut=None)

    asyncio.run(run())


def test_a_copied_chunk_survives_a_crash_at_once(tmp_path: Path) -> None:
    """Its old segment is given back: the index must know the new place by then."""

    async def run() -> None:
        node = Node(tmp_path, size=64 * SEGMENT_SIZE, index_file=IndexFile())
        await node.open()
        for number in range(20):
            node.put([number, 1, 2])
            await node.persist(list(node.store.directory))
        assert entry_of(node, [0]).in_memory is None
        node.store.hold([key_of([0])], True)
        while not node.store.counters["nvme_copy_chunks"]:
            assert await node.mover.upkeep.give_back_one()
        await node.crash(calls=0, applied=0, cut=None)
        await node.open()
        assert await node.read([key_of([0])]) == ([key_of([0])], [])
        await node.crash(calls=0, applied=0, cut=None)

    asyncio.run(run())


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
    monkeypatch.setattr(mover, "WHOLE_SIZE_MAX", 1 << 20)
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


# Whole daemons, on real file systems.

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")

# Every class of bytes of a segment: its header, a record's header (fields, label, checksum), a
# payload, padding and what is behind the last record.
CLASSES = ("segment", "header", "label", "payload", "anywhere")


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts file systems of a size; they are gone after the test."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """Starts daemons of a memory that ten prompts do not fit in; ends them."""
    started: list[DaemonProcess] = []

    def start(folder: Path, *flags: str, nvme_size: str = "256MiB") -> DaemonProcess:
        daemon = DaemonProcess(
            tmp_path,
            *("--tiers", "cpu,nvme", "--nvme-path", str(folder), "--nvme-size", nvme_size),
            *([] if "--nvme-reserve" in flags else ["--nvme-reserve", "0"]),
            *flags,
            cpu_size="16MiB",
        )
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        if daemon.process.poll() is None:
            daemon.kill()


def load_right(client: kvd.Client, prompts: Iterable[int]) -> int:
    """How many chunks of the prompts came back, all of them right."""
    return sum(load(client, prompt) for prompt in prompts)


def assert_serves(client: kvd.Client, first: int) -> None:
    """Stores and loads go on, and no invariant is broken."""
    for prompt in range(first, first + 3):
        store(client, prompt)
        assert load(client, prompt) == 8
    status = client.status(audit=True)
    assert status.counters["internal_errors"] == 0


def persist_in_time(client: kvd.Client, keys: list[ChunkKey] | None = None) -> int:
    """The device rests after a failure: ask until it has worked again."""
    give_up = time.monotonic() + 30
    while True:
        try:
            return client.persist(keys, timeout_s=30)
        except TierFailed:
            assert time.monotonic() < give_up, "writes do not resume"
            time.sleep(0.05)


@NEEDS_ROOT
def test_a_file_system_smaller_than_the_tier_may_be(
    tmpfs: Callable[[str], Path], start: Callable[..., DaemonProcess]
) -> None:
    daemon = start(tmpfs("100m"))
    with daemon.connect() as client:
        for prompt in range(12):
            store(client, prompt)
        load_right(client, range(12))
        assert_serves(client, 20)
        disk = client.status().tiers[1]
        assert 0 < disk.disk_size <= 100 << 20
        assert client.persist(keys_of(22), timeout_s=30) == 8
    assert daemon.stop() == 0


@NEEDS_ROOT
def test_others_fill_the_file_system_and_get_what_is_theirs(
    tmpfs: Callable[[str], Path], start: Callable[..., DaemonProcess]
) -> None:
    folder = tmpfs("120m")
    daemon = start(folder / "nvme", "--nvme-reserve", "24MiB")
    with daemon.connect() as client:
        for prompt in range(4):
            store(client, prompt)
        assert client.persist(timeout_s=30) == 32
        assert client.status().tiers[1].disk_size >= 48 << 20
        (folder / "others").write_bytes(bytes(64 << 20))
        assert free_size(folder) < 24 << 20
        until(lambda: free_size(folder) >= 24 << 20, "the reserve is not given back")
        load_right(client, range(4))
        assert_serves(client, 20)
        assert free_size(folder) >= 24 << 20


def free_size(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def test_a_reserve_that_nobody_has_leaves_memory_to_serve(
    tmp_path: Path, start: Callable[..., DaemonProcess]
) -> None:
    daemon = start(tmp_path / "nvme", "--nvme-reserve", "1000000GiB")
    with daemon.connect() as client:
        for prompt in range(6):
            store(client, prompt)
        with pytest.raises(TierFailed, match="reserve"):
            client.persist(timeout_s=30)
        assert "reserve" in client.status().tiers[1].failure
        assert_serves(client, 20)
    assert not list((tmp_path / "nvme").glob("segment-*"))
    assert daemon.stop() == 0


@NEEDS_ROOT
def test_a_file_system_that_turns_read_only(
    tmp_path: Path, start: Callable[..., DaemonProcess]
) -> None:
    """As ext4 does it after an error: under files that are open for writing."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(200 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True).returncode:
        pytest.skip("no loop devices here")
    try:
        daemon = start(folder / "nvme")
        with daemon.connect() as client:
            for prompt in range(6):
                store(client, prompt)
            assert client.persist(timeout_s=30) == 48
            subprocess.run(["mount", "-o", "remount,abort", folder], capture_output=True)
            for prompt in range(10, 14):
                store(client, prompt)
            with pytest.raises(TierFailed):
                client.persist(timeout_s=30)
            assert client.status().tiers[1].failure
            # What was written is still read.
            assert load_right(client, range(6)) > 0
            assert_serves(client, 20)
        daemon.kill()
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_no_descriptor_is_left(tmp_path: Path, start: Callable[..., DaemonProcess]) -> None:
    daemon = start(tmp_path / "nvme")
    with daemon.connect() as client:
        for prompt in range(6):
            store(client, prompt)
        assert client.persist(timeout_s=30) == 48
        before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (5, before[1]))
        load_right(client, range(6))
        for prompt in range(10, 16):
            store(client, prompt)
        assert_serves(client, 20)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
        store(client, 30)
        assert persist_in_time(client, keys_of(30)) == 8
        assert_serves(client, 40)


def test_the_folder_is_deleted_under_it(
    tmp_path: Path, start: Callable[..., DaemonProcess]
) -> None:
    daemon = start(tmp_path / "nvme")
    with daemon.connect() as client:
        for prompt in range(6):
            store(client, prompt)
        client.persist(timeout_s=30)
        shutil.rmtree(tmp_path / "nvme")
        load_right(client, range(6))
        for prompt in range(10, 20):
            store(client, prompt)
        assert_serves(client, 20)
    assert daemon.stop() == 0
    daemon.restart()
    with daemon.connect() as client:
        store(client, 1)
        assert client.persist(timeout_s=30) == 8


def test_the_process_of_the_index_is_killed_again_and_again(
    tmp_path: Path, start: Callable[..., DaemonProcess]
) -> None:
    daemon = start(tmp_path / "nvme")
    with daemon.connect() as client:
        for prompt in range(3):
            for pid in children_of(daemon.pid):
                os.kill(pid, signal.SIGKILL)
            store(client, prompt)
            assert persist_in_time(client, keys_of(prompt)) == 8
            assert_serves(client, 20 + 10 * prompt)
    daemon.restart()
    with daemon.connect() as client:
        assert load_right(client, range(3)) == 24


def test_an_index_that_dies_while_no_descriptor_is_left(
    tmp_path: Path, start: Callable[..., DaemonProcess]
) -> None:
    """Its process cannot even be started again, until there are descriptors."""
    daemon = start(tmp_path / "nvme")
    with daemon.connect() as client:
        store(client, 1)
        assert client.persist(timeout_s=30) == 8
        before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (5, before[1]))
        for pid in children_of(daemon.pid):
            os.kill(pid, signal.SIGKILL)
        until(lambda: not persists(client), "nobody has noticed")
        until(lambda: "rebuild_failed" in daemon.log.read_text(), "nobody has tried")
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
        store(client, 2)
        assert persist_in_time(client, keys_of(2)) == 8
    daemon.restart()
    with daemon.connect() as client:
        assert load_right(client, [1, 2]) == 16


def persists(client: kvd.Client) -> bool:
    try:
        client.persist(timeout_s=30)
    except TierFailed:
        return False
    return True


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.parametrize("harm", ["missing", "empty", "cut", "garbage"])
def test_an_index_that_is_lost_between_runs_costs_no_chunk(
    tmp_path: Path, start: Callable[..., DaemonProcess], harm: str
) -> None:
    daemon = start(tmp_path / "nvme")
    with daemon.connect() as client:
        for prompt in range(4):
            store(client, prompt)
        assert client.persist(timeout_s=30) == 32
    daemon.kill()
    [data] = (tmp_path / "nvme").rglob("data.mdb")
    whole = data.read_bytes()
    match harm:
        case "missing":
            data.unlink()
        case "empty":
            data.write_bytes(b"")
        case "cut":
            data.write_bytes(whole[: len(whole) // 2])
        case _:
            data.write_bytes(random.Random(1).randbytes(len(whole)))
    daemon.restart()
    with daemon.connect() as client:
        assert load_right(client, range(4)) == 32
        assert_serves(client, 20)
    daemon.restart()
    with daemon.connect() as client:
        assert load_right(client, range(4)) == 32


def flip_places(folder: Path, chance: random.Random, count: int) -> set[str]:
    """Flip bits at `count` places of every class; which classes."""
    classes = set()
    for number in range(count):
        path = chance.choice(sorted(folder.glob("segment-*")))
        size = path.stat().st_size
        name = CLASSES[number % len(CLASSES)]
        # All records are of 1 MiB and a header block.
        record = 4096 + chance.randrange((size - 4096) // (SIZE + 4096)) * (SIZE + 4096)
        offset = {
            "segment": chance.randrange(4096),
            "header": record + chance.choice([*range(128), *range(256, 300), 4090]),
            "label": record + 1280 + chance.randrange(200),
            "payload": record + 4096 + chance.randrange(SIZE),
            "anywhere": chance.randrange(size),
        }[name]
        flip(path, offset, 1 << chance.randrange(8))
        classes.add(name)
    return classes


@pytest.mark.parametrize("is_running", [False, True], ids=["between-runs", "while-it-runs"])
def test_flipped_bits_cost_misses_only(
    tmp_path: Path, start: Callable[..., DaemonProcess], is_running: bool
) -> None:
    daemon = start(tmp_path / "nvme")
    with daemon.connect() as client:
        for prompt in range(12):
            store(client, prompt)
        assert client.persist(timeout_s=30) == 96
    if not is_running:
        daemon.kill()
    classes = flip_places(tmp_path / "nvme", random.Random(7), 60)
    assert classes == set(CLASSES)
    if not is_running:
        daemon.restart()
    with daemon.connect() as client:
        client.scrub(rate=1 << 40)
        found = load_right(client, range(12))
        assert 0 < found < 96
        until(lambda: not client.scrub(start=False).is_running, "the pass has no end")
        assert client.status().counters["quarantine_chunks"] > 0
        assert_serves(client, 20)
        store(client, 40)
        assert client.persist(keys_of(40), timeout_s=30) == 8
        # What was quarantined is not found again.
        again = load_right(client, range(12))
        assert again <= found
        before = client.status().counters["quarantine_chunks"]
        assert load_right(client, range(12)) == again
        assert client.status().counters["quarantine_chunks"] == before
        client.status(audit=True)
    daemon.restart()
    with daemon.connect() as client:
        load_right(client, range(12))
        assert load(client, 40) == 8
        assert_serves(client, 50)


def test_kills_while_it_starts_lose_nothing(
    tmp_path: Path, start: Callable[..., DaemonProcess]
) -> None:
    daemon = start(tmp_path / "nvme")
    with daemon.connect() as client:
        store(client, 1)
        assert client.persist(timeout_s=30) == 8
    daemon.kill()
    command = [sys.executable, "-m", "kvd", "start", "--socket", str(daemon.socket)]
    for number in range(6):
        process = subprocess.Popen(
            [*command, *daemon._flags], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        time.sleep(0.15 + 0.07 * number)
        process.kill()
        process.wait()
    daemon.restart()
    with daemon.connect() as client:
        assert load(client, 1) == 8
        assert_serves(client, 20)
