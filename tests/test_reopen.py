"""What a daemon makes, at its start, of an index that names what it cannot use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from kvd.daemon.index import IndexRecord
from tests.tier_harness import SEGMENT_SIZE, IndexFile, Node, key_of
from tests.tier_stories import entry_of, small_node

GOOD, BAD = key_of([1]), key_of([2])


def with_label_of_another(bad: IndexRecord, good: IndexRecord) -> IndexRecord:
    return bad._replace(label=good.label)


def with_broken_label(bad: IndexRecord, good: IndexRecord) -> IndexRecord:
    return bad._replace(label=b"no label")


def with_size_of_no_chunk(bad: IndexRecord, good: IndexRecord) -> IndexRecord:
    return bad._replace(size=bad.size - 1)


def of_an_earlier_life(bad: IndexRecord, good: IndexRecord) -> IndexRecord:
    return bad._replace(life=bad.life - 1)


@pytest.mark.parametrize(
    "spoil",
    [with_label_of_another, with_broken_label, with_size_of_no_chunk, of_an_earlier_life],
)
def test_the_index_forgets_what_cannot_be_used(
    tmp_path: Path, spoil: Callable[[IndexRecord, IndexRecord], IndexRecord]
) -> None:
    async def run() -> None:
        node = small_node(tmp_path)
        await node.open()
        node.put([1])
        node.put([2])
        await node.persist(list(node.store.directory))
        await node.close()
        file = node.index_file
        assert isinstance(file, IndexFile)
        assert file.records.keys() == {GOOD, BAD}
        file.records[BAD] = spoil(file.records[BAD], file.records[GOOD])
        await node.open()
        assert [entry.meta.key for entry in node.store.directory] == [GOOD]
        node.audit()
        await node.close()
        assert file.records.keys() == {GOOD}, "the index names it for ever"

    asyncio.run(run())


def test_beyond_its_quota_a_tenant_loses_what_is_oldest(tmp_path: Path) -> None:
    async def run() -> None:
        node = small_node(tmp_path)
        await node.open()
        paths = [[number] for number in range(12)]
        for path in paths:
            node.put(path)
            await node.persist([entry_of(node, path)])
        await node.close()
        node = Node(
            tmp_path, size=16 * SEGMENT_SIZE, index_file=node.index_file, nvme_quota=SEGMENT_SIZE
        )
        await node.open()
        kept = [path for path in paths if key_of(path) in node.store.directory]
        assert kept == paths[-len(kept) :]
        assert 0 < len(kept) < len(paths)
        node.audit()
        await node.close()

    asyncio.run(run())
