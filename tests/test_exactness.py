"""Exactness: what is approximate says so, to clients too. Who asks for exact KV gets no other."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import kvd
from kvd.daemon.directory import Entry
from kvd.daemon.keeper import drop_kept
from kvd.daemon.leases import ReadLease, Terms
from kvd.keys import ChunkKey
from tests.conftest import DaemonProcess
from tests.node_daemon import NodeDaemon, put_last, stored
from tests.test_tiers_codec import entries_of, on_disk_only
from tests.tier_harness import LAYOUT, ROOT, Node, S, chain, key_of, keys_of, quick
from tests.tier_stories import becomes, entry_of, on, small_node
from tests.toy_codec import MASK, toy_codecs

PATH = [1, 2, 3]
EXACT = Terms(is_exact=True)


@pytest.fixture(autouse=True)
def _quick_rests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    quick(monkeypatch.setattr)
    with toy_codecs():
        yield


def pin_exact(node: Node, path: list[int], *, standalone: bool = False) -> ReadLease | None:
    keys = keys_of(path)
    told = sum(node.store.present(keys, terms=EXACT))
    if not standalone:
        told = node.store.lookup(keys, terms=EXACT)
    lease, found = node.store.pin(
        keys, ROOT, standalone=standalone, lease_ns=S, now_ns=node.now_ns, terms=EXACT
    )
    assert sum(found) == told, "lookup and pin do not agree"
    return lease


def put_approximate(node: Node, path: list[int]) -> list[Entry]:
    metas = chain(path)
    lease, _ = node.store.reserve(metas, lease_ns=S, now_ns=node.now_ns, is_exact=False)
    assert lease is not None
    node.store.commit(lease.id, (), now_ns=node.now_ns)
    return [entry_of(node, meta) for meta in metas]


def put_states(node: Node, path: list[int], *, is_exact: bool) -> list[str]:
    lease, states = node.store.reserve(
        chain(path), lease_ns=S, now_ns=node.now_ns, is_exact=is_exact
    )
    if lease is not None:
        node.store.commit(lease.id, (), now_ns=node.now_ns)
    return list(states)


async def arrived(node: Node, lease: ReadLease) -> list[ChunkKey]:
    """The chunks of a lease, each of them bit for bit what was stored."""
    for entry in lease.entries:
        assert await node.arrived(entry)
        assert entry.in_memory is not None or node.store.transit.arriving[entry].source.is_exact
        view = node.store.tier.view(node.store.extent_of(entry))
        assert np.array_equal(view, stored(entry.meta.key, entry.meta.num_tokens))
    return [entry.meta.key for entry in lease.entries]


class TestStore:
    """What a pin that asks for exact KV finds."""

    def test_an_approximate_chunk_ends_a_chain_and_is_absent_for_itself(
        self, tmp_path: Path
    ) -> None:
        async def story(node: Node) -> None:
            await on_disk_only(node, [1, 2])
            put_last(node, PATH)
            assert entry_of(node, PATH).in_memory is not None
            assert pin_exact(node, PATH) is None
            lease = pin_exact(node, PATH, standalone=True)
            assert lease is not None
            assert await arrived(node, lease) == [key_of(PATH)]
            assert node.store.lookup(keys_of(PATH)) == 3
            # Whoever takes what there is gets all three, and they do not become exact by that.
            assert await node.read(keys_of(PATH)) == (keys_of(PATH), [])
            await node.settle()
            assert pin_exact(node, PATH) is None
            node.audit()

        on(small_node(tmp_path, codec="nvme=toy:lossy"), story)

    def test_what_is_lossless_is_exact(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            await on_disk_only(node, PATH)
            lease = pin_exact(node, PATH)
            assert lease is not None
            assert await arrived(node, lease) == keys_of(PATH)

        on(small_node(tmp_path, codec="nvme=toy"), story)

    def test_an_exact_copy_on_disk_is_taken_rather_than_an_approximate_one(
        self, tmp_path: Path
    ) -> None:
        async def story(node: Node) -> None:
            await two_copies(node, PATH)
            lease = pin_exact(node, PATH)
            assert lease is not None
            assert await arrived(node, lease) == keys_of(PATH)
            await node.settle()
            node.audit()

        on(small_node(tmp_path, codec="cpu=toy:lossy"), story)

    def test_it_takes_the_place_of_an_approximate_one_that_nobody_reads(
        self, tmp_path: Path
    ) -> None:
        async def story(node: Node) -> None:
            await two_copies(node, PATH)
            assert await node.read(keys_of(PATH)) == (keys_of(PATH), [])
            await node.settle()
            entries = entries_of(node, PATH)
            assert not any(e.in_memory is None or e.in_memory.is_exact for e in entries)
            reader = node.pin(keys_of(PATH[:1]))
            assert reader is not None
            # The first is read: its bytes stay where they are.
            assert pin_exact(node, PATH) is None
            node.store.release(reader.id)
            lease = pin_exact(node, PATH)
            assert lease is not None
            assert await arrived(node, lease) == keys_of(PATH)
            await node.settle()
            assert all(e.in_memory is not None and e.in_memory.is_exact for e in entries)
            node.audit()

        on(small_node(tmp_path, codec="cpu=toy:lossy"), story)

    def test_the_packed_copy_may_go_while_the_exact_one_comes(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            await two_copies(node, PATH)
            lease = pin_exact(node, PATH)
            assert lease is not None
            for entry in entries_of(node, PATH):
                node.store.transit.unpack(entry)
            node.audit()
            assert await arrived(node, lease) == keys_of(PATH)

        on(small_node(tmp_path, codec="cpu=toy:lossy"), story)

    def test_a_chunk_that_arrives_approximate_is_a_miss_until_it_is_there(
        self, tmp_path: Path
    ) -> None:
        async def story(node: Node) -> None:
            await two_copies(node, [1])
            reader = node.pin(keys_of([1]))
            assert reader is not None
            assert pin_exact(node, [1]) is None
            await node.settle()
            assert pin_exact(node, [1]) is None
            node.store.release(reader.id)
            assert pin_exact(node, [1]) is not None

        on(small_node(tmp_path, codec="cpu=toy:lossy"), story)

    def test_a_lookup_lets_the_exact_copy_come(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            await two_copies(node, PATH)
            assert node.store.lookup(keys_of(PATH), now_ns=1, prefetch=True, terms=EXACT) == 3
            assert node.store.counters["prefetch_chunks"] == 3
            lease = pin_exact(node, PATH)
            assert lease is not None
            assert await arrived(node, lease) == keys_of(PATH)

        on(small_node(tmp_path, codec="cpu=toy:lossy"), story)

    def test_what_is_stored_as_approximate_stays_so_also_after_a_restart(
        self, tmp_path: Path
    ) -> None:
        async def story() -> None:
            node = small_node(tmp_path)
            await node.open()
            entries = put_approximate(node, PATH)
            assert pin_exact(node, PATH) is None
            await node.persist(entries)
            assert [(e.on_disk.codec, e.on_disk.is_exact) for e in entries if e.on_disk] == (
                [("raw", False)] * 3
            )
            await node.close()
            await node.open()
            assert node.store.lookup(keys_of(PATH)) == 3
            assert pin_exact(node, PATH) is None
            node.audit()
            await node.close()

        asyncio.run(story())

    def test_an_exact_chunk_takes_the_place_of_an_approximate_one(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            await on_disk_only(node, PATH)
            assert await node.read(keys_of(PATH[:1])) == (keys_of(PATH[:1]), [])
            await node.settle()
            node.put([*PATH, 4])
            assert node.store.lookup(keys_of([*PATH, 4]), terms=EXACT) == 4
            node.audit()
            lease = pin_exact(node, [*PATH, 4])
            assert lease is not None
            assert await arrived(node, lease) == keys_of([*PATH, 4])
            assert put_states(node, PATH, is_exact=True) == ["exists"] * 3

        on(small_node(tmp_path, codec="nvme=toy:lossy"), story)

    def test_an_approximate_chunk_takes_nobody_s_place(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            put_approximate(node, PATH)
            assert put_states(node, PATH, is_exact=False) == ["exists"] * 3

        on(small_node(tmp_path), story)

    @pytest.mark.parametrize("is_held", [False, True])
    def test_what_is_read_or_held_keeps_its_place(self, tmp_path: Path, is_held: bool) -> None:
        async def story(node: Node) -> None:
            for is_late in (False, True):
                path = [is_late, 2, 3]
                entries = put_approximate(node, path)
                reservation = node.store.reserve(chain(path), lease_ns=S, now_ns=node.now_ns)[0]
                assert reservation is not None
                if not is_late:
                    node.store.release(reservation.id)
                # By the time of the reservation, or of the commit.
                if is_held:
                    node.store.hold([entries[1].meta.key], True)
                else:
                    assert node.pin([entries[1].meta.key], standalone=True) is not None
                if is_late:
                    assert node.store.commit(reservation.id, (), now_ns=node.now_ns) == 2
                else:
                    states = ["granted", "exists", "granted"]
                    assert put_states(node, path, is_exact=True) == states
                node.audit()
                assert entry_of(node, path[:2]) is entries[1]
                assert node.store.present(keys_of(path), terms=EXACT) == [True, False, True]

        on(small_node(tmp_path), story)

    @pytest.mark.parametrize(("codec", "count"), [("toy", 3), ("toy:lossy", 0)])
    def test_what_comes_back_approximate_is_not_kept_beyond_the_daemon(
        self, tmp_path: Path, codec: str, count: int
    ) -> None:
        async def story(node: Node) -> None:
            await on_disk_only(node, PATH)
            with mock.patch.object(node.store.memory, "hot") as hot:
                assert await node.read(keys_of(PATH)) == (keys_of(PATH), [])
                await node.settle()
                assert hot.keep.call_count == count

        on(small_node(tmp_path, codec=f"nvme={codec}"), story)


async def two_copies(node: Node, path: list[int]) -> None:
    """Exact on disk, approximate and packed, not in mapped memory."""
    node.put(path)
    await node.persist(entries_of(node, path))
    await becomes(lambda: all(e.packed for e in entries_of(node, path)), "it is never packed")
    await node.settle()
    for entry in entries_of(node, path)[::-1]:
        node.store._evict(entry)
        assert entry.on_disk is not None
        assert entry.on_disk.is_exact
        assert entry.packed is not None
        assert not entry.packed.is_exact


@pytest.fixture
def lossy(tmp_path: Path) -> Iterator[NodeDaemon]:
    """A daemon whose disk is lossy."""
    with NodeDaemon(tmp_path, codec="nvme=toy:lossy") as daemon:
        yield daemon


class TestClient:
    """What clients see."""

    @pytest.mark.parametrize("is_remote", [False, True])
    def test_a_lease_says_what_is_exact(self, lossy: NodeDaemon, is_remote: bool) -> None:
        lossy.put_on_disk([1, 2])
        lossy.loop.call(put_last, lossy.node, PATH)
        keys = keys_of(PATH)
        with (
            lossy.connect_remote() if is_remote else lossy.connect() as client,
            client.pin(LAYOUT, keys) as lease,
        ):
            assert [lease.is_exact(index) for index in range(3)] == [False, False, True]
            assert not lease.all_exact
            for index, key in enumerate(keys):
                expected = stored(key, lease.chunk_tokens(index))
                expected = expected if lease.is_exact(index) else expected & MASK
                assert np.array_equal(lease.raw(index), expected)
            with client.pin(LAYOUT, keys[2:], standalone=True) as exact:
                assert exact.all_exact
                assert exact.is_exact(0)
        lossy.audit()

    @pytest.mark.parametrize("is_remote", [False, True])
    def test_exact_leaves_out_what_is_not(self, lossy: NodeDaemon, is_remote: bool) -> None:
        lossy.put_on_disk([1, 2])
        lossy.loop.call(put_last, lossy.node, PATH)
        keys = keys_of(PATH)
        with lossy.connect_remote() if is_remote else lossy.connect() as client:
            assert (client.lookup(keys), client.lookup(keys, exact=True)) == (3, 0)
            assert client.lookup(keys, exact=True, standalone=True) == 1
            assert len(client.pin(LAYOUT, keys, exact=True)) == 0
            with client.pin(LAYOUT, keys, exact=True, standalone=True) as lease:
                assert lease.keys == keys[2:]
                assert lease.all_exact

    def test_what_was_lost_leaves_the_others_their_exactness(self, lossy: NodeDaemon) -> None:
        lossy.put_on_disk([1, 2])
        lossy.loop.call(put_last, lossy.node, PATH)
        keys = keys_of(PATH)
        path, offset, _ = lossy.node.record_of(lossy.entries([1])[0])
        with path.open("r+b") as file:
            file.seek(offset + 4096 + 300)
            file.write(b"\xff\xfe\xfd")
        with lossy.connect() as client, client.pin(LAYOUT, keys, standalone=True) as lease:
            assert lease.keys == keys[1:]
            assert [lease.is_exact(0), lease.is_exact(1)] == [False, True]

    def test_what_is_computed_on_top_is_stored_as_approximate(self, lossy: NodeDaemon) -> None:
        keys, chunks = small_chunks()
        with lossy.connect() as client:
            assert client.store(LAYOUT, keys, chunks, exact=False) == ["granted"] * 2
            assert client.lookup(keys) == 2
            assert client.lookup(keys, exact=True) == 0
            assert client.lookup_tokens(LAYOUT, [0] * 32, exact=True) == 0
            with client.pin(LAYOUT, keys) as lease:
                assert not lease.is_exact(0)
                assert not lease.is_exact(1)
            outs = [np.empty_like(chunk) for chunk in chunks]
            assert client.load(LAYOUT, keys, outs, exact=True) == 0
            assert client.load(LAYOUT, keys, outs) == 2
            assert np.array_equal(outs[1], chunks[1])
        lossy.audit()

    def test_asyncio_says_the_same(self, lossy: NodeDaemon) -> None:
        keys, chunks = small_chunks()

        async def story() -> None:
            address = lossy.node.config.socket
            async with await kvd.connect_async(address, timeout_s=30) as client:
                await client.store(LAYOUT, keys, chunks, exact=False)
                assert await client.lookup(keys, exact=True) == 0
                assert not (await client.pin(LAYOUT, keys)).all_exact
                assert len(await client.pin(LAYOUT, keys, exact=True)) == 0

        asyncio.run(story())

    def test_a_listing_says_it(self, lossy: NodeDaemon) -> None:
        keys, chunks = small_chunks()
        with lossy.connect() as client:
            client.store(LAYOUT, keys[:1], chunks[:1], exact=False)
            client.store(LAYOUT, keys[1:], chunks[1:], parent=keys[0], start=16)
        socket = str(lossy.node.config.socket)
        command = [sys.executable, "-m", "kvd", "ls", "--socket", socket]
        found = json.loads(subprocess.check_output([*command, "--json"], timeout=60))
        assert [chunk["is_exact"] for chunk in found["chunks"]] == [False, True]
        table = subprocess.check_output(command, text=True, timeout=60).splitlines()
        assert [line.split()[-2] for line in table[-2:]] == ["no", "yes"]

    def test_checksums_are_those_of_the_bytes_that_come(self, tmp_path: Path) -> None:
        """A copy on disk may be known by its bitstream's checksum."""
        with NodeDaemon(tmp_path, codec="nvme=toy") as daemon:
            keys = daemon.put_on_disk([1])
            (entry,) = daemon.entries([1])
            assert entry.on_disk is not None
            entry.on_disk = replace(entry.on_disk, checksum=1)
            with (
                daemon.connect(verify=True) as client,
                client.pin(LAYOUT, keys, wait=False) as lease,
            ):
                out = np.empty(LAYOUT.size(lease.chunk_tokens(0)), np.uint8)
                lease.load(0, out)
                assert np.array_equal(out, stored(keys[0], lease.chunk_tokens(0)))


def small_chunks() -> tuple[list[ChunkKey], list[Any]]:
    keys = kvd.chain_keys(LAYOUT.fingerprint, [0] * 32, chunk_tokens=16)
    return keys, [np.full(LAYOUT.shape(16), value, np.uint8) for value in (1, 2)]


def test_memory_that_survives_its_daemon_forgets_what_is_approximate(tmp_path: Path) -> None:
    """The ledger has no word for it, and would take it for exact."""
    keys, chunks = small_chunks()
    others = [kvd.chained_key(keys[0], [7] * 16)]
    daemon = DaemonProcess(tmp_path, "--cpu-persist", "--cpu-persist-s", "60")
    try:
        with daemon:
            # With their checksums they are kept at once.
            with daemon.connect(verify=True) as client:
                client.store(LAYOUT, keys[:1], chunks[:1])
                client.store(LAYOUT, keys[1:], chunks[1:], parent=keys[0], start=16, exact=False)
                client.store(LAYOUT, others, chunks[1:], parent=keys[0], start=16)
            daemon.kill()
            daemon.restart()
            with daemon.connect() as client:
                assert client.lookup(others, standalone=True, exact=True) == 1
                assert client.lookup(keys) == 1
                assert client.lookup(keys[1:], standalone=True) == 0
                client.status(audit=True)
    finally:
        drop_kept(daemon.socket)
