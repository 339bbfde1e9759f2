"""Chunks that tiers keep as bitstreams: what is exact stays exact, what is approximate says so, and
a codec that is not there costs a miss.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvd.chunk import Extent, Placement
from kvd.daemon.directory import Entry
from kvd.daemon.room import has_room, make_room
from kvd.errors import Unsupported
from kvd.keys import ChunkKey
from tests.crash_client import pattern
from tests.tier_harness import LAYOUT, IndexFile, Node, key_of, keys_of, meta_of, quick
from tests.tier_stories import becomes, entry_of, on, small_node
from tests.toy_codec import ROW, Toy, toy_codecs

PATH = [1, 2, 3]


@pytest.fixture(autouse=True)
def _quick_rests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    quick(monkeypatch.setattr)
    with toy_codecs():
        yield


def entries_of(node: Node, path: list[int]) -> list[Entry]:
    return [entry_of(node, path[:end]) for end in range(1, len(path) + 1)]


async def on_disk_only(node: Node, path: list[int]) -> None:
    """Store a prompt, and push it out of memory."""
    node.put(path)
    await node.persist(entries_of(node, path))
    number = 0
    while any(entry.in_memory is not None for entry in entries_of(node, path)):
        number += 1
        assert number < 100, "it never leaves memory"
        node.put([100 + number, 1, 2, 3, 4])
        await asyncio.sleep(0.002)


async def assert_reads(node: Node, path: list[int]) -> None:
    good, lost = await node.read(keys_of(path))
    assert (good, lost) == (keys_of(path), [])
    # The last byte may be there a moment before the store has heard of it.
    await node.settle()


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("codec", "name", "is_exact"), [("toy", "toy/1", True), ("toy:lossy", "toy-lossy/1", False)]
)
def test_a_bitstream_goes_to_disk_and_comes_back_also_after_a_restart(
    tmp_path: Path, codec: str, name: str, is_exact: bool
) -> None:
    async def story() -> None:
        node = small_node(tmp_path, codec=f"nvme={codec}")
        await node.open()
        await on_disk_only(node, PATH)
        for entry in entries_of(node, PATH):
            assert entry.on_disk is not None
            assert (entry.on_disk.codec, entry.on_disk.is_exact) == (name, is_exact)
            assert entry.on_disk.extent.size < 4 * ROW + 512
        await assert_reads(node, PATH)
        await node.close()
        await node.open()
        assert [entry.placement.is_exact for entry in entries_of(node, PATH)] == [is_exact] * 3
        await assert_reads(node, PATH)
        assert [e.in_memory and e.in_memory.is_exact for e in entries_of(node, PATH)] == (
            [is_exact] * 3
        )
        node.audit()
        await node.close()

    run(story)


def test_what_is_approximate_is_never_encoded_lossily_again_nor_taken_for_exact(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        node = small_node(tmp_path, codec="nvme=toy:lossy")
        await node.open()
        await on_disk_only(node, PATH)
        await assert_reads(node, PATH)
        for entry in entries_of(node, PATH):
            # Its segment is given back while it is in memory.
            node.store.unshelve(entry)
        await node.persist(entries_of(node, PATH))
        for entry in entries_of(node, PATH):
            assert entry.on_disk is not None
            assert (entry.on_disk.codec, entry.on_disk.is_exact) == ("raw", False)
        await node.close()
        await node.open()
        assert not any(entry.placement.is_exact for entry in entries_of(node, PATH))
        await assert_reads(node, PATH)
        await node.close()

    run(story)


def test_a_codec_that_is_not_here_costs_a_miss_and_nothing_else(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        node.coder._by_spec.clear()
        node.coder._by_name.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvd.codecs.registry._OWN", {})
            good, lost = await node.read(keys_of(PATH))
        assert (good, lost) == ([], keys_of(PATH))
        assert node.store.counters["decode_errors"] == 3
        await node.settle()
        node.audit()
        node.put([7])
        await assert_reads(node, [7])

    async def both() -> None:
        node = small_node(tmp_path, codec="nvme=toy")
        await node.open()
        await on_disk_only(node, PATH)
        await node.close()
        await node.open()
        await story(node)
        await node.close()

    run(both)


def test_a_layout_that_a_codec_cannot_keep_stays_raw_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(node: Node) -> None:
        # Of uint8, where bf16 keeps elements of 16 bits.
        await on_disk_only(node, PATH)
        assert [entry.placement.codec for entry in entries_of(node, PATH)] == ["raw"] * 3
        await assert_reads(node, PATH)
        assert sum("event=not_encoded" in record.message for record in caplog.records) == 1

    on(small_node(tmp_path, codec="nvme=bf16,cpu=bf16"), story)


def test_a_codec_that_could_not_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(node: Node) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Toy, "encode", refuse)
            await on_disk_only(node, [1])
            assert entry_of(node, [1]).placement.codec == "raw"
        await on_disk_only(node, [2])
        assert entry_of(node, [2]).placement.codec == "raw", "too early"
        node.coder._refused = dict.fromkeys(node.coder._refused, 0.0)
        await on_disk_only(node, [3])
        assert entry_of(node, [3]).placement.codec == "toy/1"

    on(small_node(tmp_path, codec="nvme=toy"), story)


def refuse(*args: object) -> int:
    raise Unsupported("no profile")


def test_bytes_that_have_changed_in_memory_are_not_encoded(tmp_path: Path) -> None:
    async def story(node: Node) -> None:
        node.mover._rest_s, node.mover._rest_until = 1.0, asyncio.get_running_loop().time() + 60
        node.put(PATH, has_checksums=True)
        entry = entry_of(node, PATH)
        assert entry.in_memory is not None
        node.store.tier.view(entry.in_memory.extent)[100] ^= 1
        node.mover._rest_s = node.mover._rest_until = 0.0
        await node.persist([entry])
        assert node.store.directory.get(entry.meta.key) is None
        assert node.store.counters["damaged_chunks"] == 1

    on(small_node(tmp_path, codec="nvme=toy"), story)


def test_the_first_layers_are_decoded_first() -> None:
    async def story() -> None:
        node = Node(Path("/nowhere"), size=1 << 30, index_file=IndexFile(), codec="nvme=toy")
        meta = meta_of([1])
        chunk = pattern(meta.key, LAYOUT.size(meta.num_tokens)).copy()
        source = Placement(Extent("cpu", 0, chunk.size))
        encoded = await node.coder.encode("nvme", meta, LAYOUT, chunk, source)
        assert encoded is not None
        out, told = np.zeros_like(chunk), []

        def progress(ready: int) -> None:
            assert np.array_equal(out[:ready], chunk[:ready])
            told.append(ready * LAYOUT.num_layers // chunk.size)

        await node.coder.decode(encoded.data, meta, LAYOUT, out, progress)
        assert told == [1, 3, 4]

    run(story)


class TestPacked:
    """Memory of the daemon's own that keeps bitstreams."""

    def test_a_chunk_leaves_mapped_memory_and_comes_back(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            await packed_only(node, PATH)
            assert [entry.placement.codec for entry in entries_of(node, PATH)] == ["toy/1"] * 3
            assert node.store.lookup(keys_of(PATH)) == 3
            await assert_reads(node, PATH)
            assert node.store.counters["unpack_chunks"] == 3
            assert all(entry.in_memory and entry.packed for entry in entries_of(node, PATH))
            node.audit()

        on(memory_node(tmp_path, "cpu=toy"), story)

    def test_the_coldest_go_when_there_is_no_room(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            await packed_only(node, [1])
            for number in range(60):
                node.put([2, number])
                await node.settle()
                node.audit()
            assert node.store.counters["pack_evict_chunks"] > 0
            assert node.store.directory.get(key_of([1])) is None, "the coldest is still here"
            assert node.store.lookup(keys_of([2, 59])) == 2

        on(memory_node(tmp_path, "cpu=toy"), story)

    def test_what_continues_a_chunk_keeps_it(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            await packed_only(node, PATH)
            assert node.packed is not None
            victims = [
                entry for entry in node.packed._evictable() if entry in entries_of(node, PATH)
            ]
            assert victims[:1] == [entry_of(node, PATH)]

        on(memory_node(tmp_path, "cpu=toy"), story)

    def test_clear_takes_the_bitstream_too_also_while_it_is_decoded(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            await packed_only(node, PATH)
            lease = node.pin(keys_of(PATH))
            assert lease is not None
            node.store.release(lease.id)
            node.store.drop([entry_of(node, PATH[:1])])
            node.audit()
            await node.settle()
            node.audit()
            assert node.packed is not None
            packed = [e for e in node.store.directory if e.packed is not None]
            assert node.packed.tier.num_extents == len(packed)

        on(memory_node(tmp_path, "cpu=toy"), story)

    def test_an_approximate_copy_says_so_and_an_exact_one_on_disk_stays(
        self, tmp_path: Path
    ) -> None:
        async def story(node: Node) -> None:
            await packed_only(node, PATH)
            for entry in entries_of(node, PATH):
                assert entry.packed is not None
                assert not entry.packed.is_exact
                assert entry.on_disk is None or entry.on_disk.is_exact
            await assert_reads(node, PATH)
            memory = [entry.in_memory for entry in entries_of(node, PATH)]
            assert not any(placement is None or placement.is_exact for placement in memory)

        on(memory_node(tmp_path, "cpu=toy:lossy"), story)

    @pytest.mark.parametrize("codec", ["cpu=toy,nvme=toy", "cpu=toy:lossy,nvme=toy:lossy"])
    def test_what_disk_keeps_alike_is_encoded_once(self, tmp_path: Path, codec: str) -> None:
        async def story(node: Node) -> None:
            node.put(PATH)
            await becomes(lambda: all(e.packed for e in entries_of(node, PATH)), "never packed")
            await node.persist(entries_of(node, PATH))
            for entry in entries_of(node, PATH):
                assert entry.packed is not None
                assert entry.on_disk is not None
                assert entry.on_disk.codec == entry.packed.codec
                assert entry.on_disk.is_exact == entry.packed.is_exact
            assert node.store.counters["encode_chunks"] == 0
            for entry in entries_of(node, PATH):
                node.store.transit.unpack(entry)
                node.store._evict(entry)
            await assert_reads(node, PATH)

        on(memory_node(tmp_path, codec), story)

    def test_what_is_approximate_goes_to_disk_as_it_is_packed(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            await packed_only(node, PATH)
            await assert_reads(node, PATH)
            await node.persist(entries_of(node, PATH))
            for entry in entries_of(node, PATH):
                assert entry.on_disk is not None
                assert (entry.on_disk.codec, entry.on_disk.is_exact) == ("toy-lossy/1", False)

        on(memory_node(tmp_path, "cpu=toy:lossy"), story)

    def test_a_writer_waits_for_the_encoder_rather_than_lose_a_chunk(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            paths = [[number, 1, 2, 3] for number in range(5)]
            for path in paths:
                size = 4 * LAYOUT.size(16)
                if not has_room(node.store.below, size):
                    await make_room(node.store.below, size, 5.0)
                node.put(path)
            keys: list[ChunkKey] = [key for path in paths for key in keys_of(path)]
            await node.settle()
            assert [key for key in keys if key not in node.store.directory] == []

        on(memory_node(tmp_path, "cpu=toy"), story)


def memory_node(folder: Path, codec: str, **options: Any) -> Node:
    """A node whose disk takes nothing: an operator wants more hits first."""
    return small_node(folder, codec=codec, nvme_admit_hits=1000, **options)


async def packed_only(node: Node, path: list[int]) -> None:
    """Store a prompt, and push it out of mapped memory."""
    node.put(path)
    await becomes(lambda: all(e.packed for e in entries_of(node, path)), "it is never packed")
    for entry in entries_of(node, path)[::-1]:
        node.store._evict(entry)
    assert not any(entry.in_memory for entry in entries_of(node, path))
