"""An index that dies, is lost or is wrong, in one process and then under whole daemons.

No chunk that has a record is gone, and nothing is called durable that the index has not heard of.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvd
from kvd.errors import TierFailed
from tests.conftest import DaemonProcess
from tests.file_faults import flip
from tests.tier_harness import SEGMENT_SIZE, IndexFile, Node, key_of, quick
from tests.tier_prompts import (
    assert_serves,
    children_of,
    keys_of,
    load_right,
    persist_in_time,
    store,
    until,
)
from tests.tier_stories import becomes, entry_of, get, on, small_node


@pytest.fixture
def _quick_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch.setattr)


pytestmark = pytest.mark.usefixtures("_quick_rests")


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
            index.put(node.mover.feed.record(entry))

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


def persists(client: kvd.Client) -> bool:
    try:
        client.persist(timeout_s=30)
    except TierFailed:
        return False
    return True
