"""Chunks with a time to live: over is over. Nobody finds them from that moment on, in no tier and
after no restart, and their bytes are given back.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvd
from kvd.chunk import Extent, Placement
from kvd.daemon import admin as admin_module
from kvd.daemon import expiries as expiries_module
from kvd.daemon import session as session_module
from kvd.daemon.directory import Entry
from kvd.daemon.expiries import Expiry, Stamp, expiry_after, expiry_of
from kvd.daemon.labels import decode_label
from kvd.daemon.leases import Terms
from kvd.daemon.session import Session
from kvd.daemon.store import EXPIRED_AT_ONCE_MAX, ChunkStore
from kvd.errors import InvalidRequest, Unsupported
from kvd.keys import join_keys
from kvd.proto import kvd_pb2 as pb
from kvd.proto.limits import TTL_NS_MAX
from kvd.tiers.segment import payload_size_max
from tests import tier_harness
from tests.conftest import DaemonProcess
from tests.crash_client import pattern
from tests.fake_daemon import FakeDaemon
from tests.test_hot_set import forgotten, hashed
from tests.test_inherited import Beside
from tests.test_session import KEYS as CHAIN
from tests.test_session import ask, error_of, new_session, reserve
from tests.test_store import LAYOUT, ROOT, Below, S, chain, key_of, keys_of, new_store, pin
from tests.tier_harness import SEGMENT_SIZE, Node, quick
from tests.tier_prompts import LAYOUT as PROMPTS
from tests.tier_prompts import PATIENCE_S, SIZE, until
from tests.tier_prompts import keys_of as prompt_keys
from tests.tier_stories import becomes, entry_of, small_node
from tests.toy_codec import toy_codecs

WALL_NS = 1_767_225_600 * S
KEYS: list[bytes] = [*CHAIN]


def put(store: ChunkStore, path: Sequence[int], *, ttl_ns: int = 0, now_ns: int = 0) -> list[str]:
    expiry = expiry_after(ttl_ns, now_ns=now_ns, wall_now_ns=WALL_NS + now_ns)
    lease, states = store.reserve(chain(path), lease_ns=S, now_ns=now_ns, expiry=expiry)
    if lease is not None:
        store.commit(lease.id, (), now_ns=now_ns)
    return list(states)


def found(store: ChunkStore, path: Sequence[int], now_ns: int) -> int:
    """How many chunks of a prompt are here: lookup, pin and each for itself say the same."""
    keys = keys_of(path)
    count = store.lookup(keys, now_ns=now_ns)
    each = store.present(keys, now_ns=now_ns)
    exact = store.present(keys, now_ns=now_ns, terms=Terms(is_exact=True))
    lease, pinned = store.pin(keys, ROOT, standalone=True, lease_ns=S, now_ns=now_ns)
    chained, _ = store.pin(keys, ROOT, standalone=False, lease_ns=S, now_ns=now_ns)
    for one in (lease, chained):
        if one is not None:
            store.release(one.id)
    assert each == exact == pinned == [True] * count + [False] * (len(keys) - count)
    assert store.lookup(keys, now_ns=now_ns, terms=Terms(is_exact=True)) == count
    assert (chained is not None) == (count > 0)
    return count


def sweep(store: ChunkStore, now_ns: int) -> None:
    while store.expire_chunks(now_ns):
        continue
    store.check()


class TestStore:
    def test_from_its_end_on_nobody_finds_it_before_any_sweep(self) -> None:
        store = new_store()
        put(store, [1, 2], ttl_ns=100)
        assert found(store, [1, 2], 99) == 2
        assert found(store, [1, 2], 100) == 0
        assert store.hold(keys_of([1, 2]), True, now_ns=100) == 0
        assert store.tier.num_extents == 2
        store.check()

    def test_a_sweep_gives_the_bytes_back_and_counts(self) -> None:
        store = new_store()
        put(store, [1, 2], ttl_ns=100)
        put(store, [7])
        sweep(store, 99)
        assert store.tier.num_extents == 3
        sweep(store, 100)
        assert store.tier.num_extents == len(store.directory) == 1
        assert store.counters["expired_chunks"] == 2
        assert found(store, [7], 10**18) == 1

    def test_what_has_no_end_costs_nothing(self) -> None:
        store = new_store()
        put(store, [1, 2, 3])
        assert len(store.directory.expiries) == 0
        assert not store.directory.expiries.is_due(10**18)

    def test_what_continues_it_is_gone_with_it(self) -> None:
        store = new_store()
        put(store, [1], ttl_ns=100)
        # One without an end, one that was to stay longer, and theirs.
        put(store, [1, 2, 3], now_ns=50)
        put(store, [1, 4, 5], ttl_ns=1000, now_ns=50)
        put(store, [6, 2])
        assert [found(store, path, 99) for path in ([1, 2, 3], [1, 4, 5], [6, 2])] == [3, 3, 2]
        assert [found(store, path, 100) for path in ([1, 2, 3], [1, 4, 5], [6, 2])] == [0, 0, 2]
        sweep(store, 100)
        assert store.tier.num_extents == 2

    def test_what_ends_first_leaves_what_it_continues(self) -> None:
        store = new_store()
        put(store, [1], ttl_ns=1000)
        put(store, [1, 2], ttl_ns=100)
        assert [found(store, [1, 2], now_ns) for now_ns in (99, 100, 999, 1000)] == [2, 1, 1, 0]

    def test_what_waited_for_its_parent_is_gone_with_it(self) -> None:
        store = new_store()
        put(store, [1, 2, 3])
        store.discard(store.directory.get(key_of([1])))  # type: ignore[arg-type]
        assert store.lookup(keys_of([1, 2, 3])) == 0
        put(store, [1], ttl_ns=100)
        assert found(store, [1, 2, 3], 99) == 3
        sweep(store, 100)
        assert len(store.directory) == 0

    def test_it_stays_bound_when_its_parent_has_left_before(self) -> None:
        store = new_store()
        put(store, [1], ttl_ns=100)
        put(store, [1, 2], now_ns=1)
        store.discard(store.directory.get(key_of([1])))  # type: ignore[arg-type]
        assert store.present([key_of([1, 2])], now_ns=99) == [True]
        assert store.present([key_of([1, 2])], now_ns=100) == [False]

    @pytest.mark.parametrize(("first", "second"), [(100, 0), (100, 50), (100, 1000), (0, 100)])
    def test_who_stores_it_again_does_not_change_its_end(self, first: int, second: int) -> None:
        store = new_store()
        put(store, [1], ttl_ns=first)
        assert put(store, [1], ttl_ns=second, now_ns=10) == ["exists"]
        assert found(store, [1], 99) == 1
        assert found(store, [1], 100) == (0 if first else 1)

    def test_it_is_stored_anew_before_any_sweep(self) -> None:
        store = new_store()
        put(store, [1, 2], ttl_ns=100)
        assert put(store, [1, 2], now_ns=100) == ["granted", "granted"]
        sweep(store, 10**18)
        assert found(store, [1, 2], 10**18) == 2
        assert store.counters["expired_chunks"] == 2

    def test_what_is_committed_after_its_end_is_not_listed(self) -> None:
        store = new_store()
        expiry = expiry_after(100, now_ns=0, wall_now_ns=WALL_NS)
        lease, _ = store.reserve(chain([1, 2]), lease_ns=S, now_ns=0, expiry=expiry)
        assert lease is not None
        assert store.commit(lease.id, (), now_ns=100) == 0
        assert store.tier.used == len(store.directory) == 0
        store.check()

    def test_who_has_it_pinned_reads_on_until_release(self) -> None:
        store = new_store()
        put(store, [1, 2], ttl_ns=100)
        lease = pin(store, [1, 2], now_ns=99)
        views = [store.tier.view(store.extent_of(entry)) for entry in lease.entries]
        for view in views:
            view[:] = 7
        store.hold(keys_of([1, 2]), True, now_ns=99)
        sweep(store, 100)
        # Nobody gets its bytes, and nobody finds it.
        assert put(store, [1, 2], now_ns=100) == ["busy", "busy"]
        assert found(store, [1, 2], 100) == 0
        for number in range(10):
            put(store, [3, number], now_ns=100)
        assert store.are_ready(lease.entries)
        assert all((view == 7).all() for view in views)
        store.release(lease.id)
        sweep(store, 101)
        assert not any(entry.in_memory for entry in lease.entries)
        assert store.counters["expired_chunks"] == 2

    def test_an_operators_hold_does_not_keep_it(self) -> None:
        store = new_store()
        put(store, [1], ttl_ns=100)
        assert store.hold(keys_of([1]), True, now_ns=0) == 1
        sweep(store, 100)
        assert store.tier.used == 0

    def test_what_left_before_its_end_is_forgotten(self) -> None:
        store = new_store()
        expiries = store.directory.expiries
        for number in range(3000):
            put(store, [number % 256, number // 256], ttl_ns=10**15, now_ns=number)
        # Memory has room for eight.
        assert len(store.directory) == len(expiries) == 8
        assert len(expiries._queue) <= expiries_module.STALE_MAX + 2
        store.check()
        sweep(store, 10**16)
        assert store.counters["expired_chunks"] == 8

    def test_a_sweep_keeps_nobody_waiting(self) -> None:
        store, below = new_store(), Below()
        store.lower = below  # type: ignore[assignment]
        expiry = expiry_after(100, now_ns=0, wall_now_ns=WALL_NS)
        metas = chain([1] * 2 * EXPIRED_AT_ONCE_MAX)
        for index, meta in enumerate(metas):
            store.restore(meta, Placement(Extent("nvme", index << 20, LAYOUT.size(16))), expiry)
        assert store.expire_chunks(100)
        assert len(store.directory) == EXPIRED_AT_ONCE_MAX
        assert store.lookup([meta.key for meta in metas], now_ns=100) == 0
        sweep(store, 100)
        # The last of a prompt is first: none has to be cut off from what continues it.
        assert [entry.meta for entry in below.dropped] == metas[::-1]

    def test_on_its_way_from_disk_it_is_gone_when_it_comes(self) -> None:
        store, below = new_store(), Below()
        store.lower = below  # type: ignore[assignment]
        expiry = expiry_after(100, now_ns=0, wall_now_ns=WALL_NS)
        (meta,) = chain([1])
        store.restore(meta, Placement(Extent("nvme", 0, LAYOUT.size(16)), checksum=5), expiry)
        assert store.lookup([meta.key], now_ns=99, prefetch=True) == 1
        (arrival,) = below.arrivals
        sweep(store, 100)
        assert below.dropped == [arrival.entry]
        store.land(arrival)
        store.check()
        assert store.tier.used == 0

    def test_pinned_on_its_way_it_comes_and_goes_at_the_release(self) -> None:
        store, below = new_store(), Below()
        store.lower = below  # type: ignore[assignment]
        expiry = expiry_after(100, now_ns=0, wall_now_ns=WALL_NS)
        (meta,) = chain([1])
        store.restore(meta, Placement(Extent("nvme", 0, LAYOUT.size(16)), checksum=5), expiry)
        lease = pin(store, [1], now_ns=99)
        sweep(store, 100)
        (arrival,) = below.arrivals
        arrival.ready = arrival.extent.size
        store.land(arrival)
        assert store.are_ready(lease.entries)
        store.release(lease.id)
        sweep(store, 100)
        assert store.tier.used == 0

    def test_of_two_copies_from_before_the_earlier_end_counts(self) -> None:
        store = new_store()
        store.lower, hot = Below(), Beside()  # type: ignore[assignment]
        store.hot = hot
        extent = store.tier.allocate_at(0, LAYOUT.size(16))
        assert extent is not None
        hot.write(extent, None)
        (meta,) = chain([1])
        late, early = (Expiry(end, Stamp(WALL_NS + end, 200)) for end in (200, 100))
        assert store.inherited.revive(meta, Placement(extent, checksum=5), 0, late)
        on_disk = Placement(Extent("nvme", 0, LAYOUT.size(16)), checksum=5)
        assert store.restore(meta, on_disk, early)
        assert [store.lookup([meta.key], now_ns=now_ns) for now_ns in (99, 100)] == [1, 0]
        sweep(store, 100)
        assert store.tier.used == 0

    def test_its_label_in_the_ledger_has_the_end_of_what_it_continues(self) -> None:
        """Chunks are listed last first: the first one alone knows its parent."""
        store = new_store()
        labels: list[Stamp | None] = []

        class Remembering(Beside):
            def keep(self, entry: Entry) -> None:
                labels.append(decode_label(store.label_of(entry)).stamp)

        put(store, [1], ttl_ns=100)
        store.hot = hot = Remembering()
        hot.num_extents = 1
        put(store, [1, 2, 3], now_ns=10)
        assert labels == [Stamp(WALL_NS + 100, 100)] * 2


class TestClocks:
    def test_time_goes_on_while_the_daemon_is_down(self) -> None:
        expiry = expiry_after(100, now_ns=5, wall_now_ns=WALL_NS)
        stamp = Stamp(WALL_NS + 100, 100)
        assert expiry == Expiry(105, stamp)
        # Another boot, another monotonic clock.
        assert expiry_of(stamp, now_ns=7, wall_now_ns=WALL_NS + 60) == Expiry(47, stamp)
        late = expiry_of(stamp, now_ns=7, wall_now_ns=WALL_NS + 1000)
        assert late is not None
        assert late.expires_ns < 7

    def test_a_clock_that_was_set_back_adds_no_more_than_the_time_to_live(self) -> None:
        stamp = Stamp(WALL_NS + 100, 100)
        for wall_now_ns in (WALL_NS - 1, 0, -(10**18)):
            expiry = expiry_of(stamp, now_ns=7, wall_now_ns=wall_now_ns)
            assert expiry == Expiry(107, stamp)

    def test_a_wall_clock_before_1970_has_a_label_all_the_same(self) -> None:
        expiry = expiry_after(100, now_ns=0, wall_now_ns=-5)
        assert expiry == Expiry(100, Stamp(100, 100))

    def test_none_is_none(self) -> None:
        assert expiry_after(0, now_ns=5, wall_now_ns=WALL_NS) is None
        assert expiry_of(None, now_ns=5, wall_now_ns=WALL_NS) is None


class Clock:
    """Time as sessions have it."""

    def __init__(self) -> None:
        self.now_ns = 1000

    def monotonic_ns(self) -> int:
        return self.now_ns

    def time_ns(self) -> int:
        return WALL_NS + self.now_ns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (session_module, admin_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


class TestSession:
    def stored(self, session: Session, **fields: int) -> pb.ReserveReply:
        reply = ask(session, reserve=reserve(KEYS, **fields)).reserve
        ask(session, commit=pb.CommitRequest(lease=reply.lease))
        return reply

    def lookups(self, session: Session) -> tuple[int, int]:
        keys = join_keys(KEYS)
        counts = [
            ask(session, lookup=pb.LookupRequest(keys=keys, standalone=standalone)).lookup.count
            for standalone in (False, True)
        ]
        return counts[0], counts[1]

    def test_a_request_sets_the_end(self, clock: Clock) -> None:
        session = new_session(new_store())
        assert self.stored(session, ttl_ns=100).ttl_ns == 100
        clock.now_ns += 99
        assert self.lookups(session) == (4, 4)
        infos = ask(session, list=pb.ListRequest()).list.chunks
        assert [info.expires_in_ns for info in infos] == [1] * 4
        clock.now_ns += 1
        assert self.lookups(session) == (0, 0)
        assert not ask(session, list=pb.ListRequest()).list.chunks
        message = pb.PinRequest(keys=join_keys(KEYS), layout=LAYOUT.fingerprint)
        assert ask(session, pin=message).pin.lease == 0
        hold = pb.HoldRequest(keys=join_keys(KEYS), is_held=True)
        assert ask(session, hold=hold).hold.count == 0

    def test_a_client_of_before_stores_for_good(self, clock: Clock) -> None:
        store = new_store()
        session = new_session(store)
        assert self.stored(session).ttl_ns == 0
        clock.now_ns += 10**18
        sweep(store, clock.now_ns)
        assert self.lookups(session) == (4, 4)
        infos = ask(session, list=pb.ListRequest()).list.chunks
        assert [info.expires_in_ns for info in infos] == [0] * 4

    @pytest.mark.parametrize("ttl_ns", [TTL_NS_MAX + 1, 2**63, 2**64 - 1])
    def test_a_time_to_live_beyond_the_bound_changes_nothing(
        self, clock: Clock, ttl_ns: int
    ) -> None:
        store = new_store()
        session = new_session(store)
        assert error_of(ask(session, reserve=reserve(KEYS, ttl_ns=ttl_ns))) == "invalid_request"
        assert store.tier.used == store.num_reserved == 0

    @pytest.mark.parametrize("ttl_ns", [1, TTL_NS_MAX])
    def test_the_least_and_the_most_are_taken(self, clock: Clock, ttl_ns: int) -> None:
        store = new_store()
        reply = ask(new_session(store), reserve=reserve(KEYS, ttl_ns=ttl_ns)).reserve
        assert len(reply.offsets) == 4
        lease = store.lease(reply.lease)
        assert lease.expiry == Expiry(  # type: ignore[union-attr]
            clock.now_ns + ttl_ns, Stamp(clock.time_ns() + ttl_ns, ttl_ns)
        )


class TestClient:
    @pytest.mark.parametrize("ttl_s", [-1, -1e-9, float("nan"), float("inf"), 1e10, 315360001])
    def test_a_time_to_live_that_is_none_is_refused(self, tmp_path: Path, ttl_s: float) -> None:
        fake = FakeDaemon(tmp_path)
        try:
            with kvd.connect(fake.address) as client, pytest.raises(InvalidRequest, match="live"):
                client.reserve(PROMPTS, prompt_keys(1), ttl_s=ttl_s)
            assert [request.WhichOneof("verb") for request in fake.requests] == ["attach"]
        finally:
            fake.stop()

    def test_one_too_short_to_count_is_not_for_ever(self, tmp_path: Path) -> None:
        fake, requests = scripted(tmp_path, is_old=False)
        try:
            with kvd.connect(fake.address) as client:
                for ttl_s in (1e-12, 3600, 0.5, None, 0):
                    client.reserve(PROMPTS, prompt_keys(1), ttl_s=ttl_s)
            told = [request.ttl_ns for request in requests]
            assert told == [1, 3600 * S, S // 2, 0, 0]
        finally:
            fake.stop()

    def test_a_daemon_that_knows_of_none_gets_nothing(self, tmp_path: Path) -> None:
        fake, _ = scripted(tmp_path, is_old=True)
        try:
            with kvd.connect(fake.address) as client:
                with pytest.raises(Unsupported, match="time to live"):
                    client.reserve(PROMPTS, prompt_keys(1), ttl_s=3600)
                (release,) = fake.until_requests("release")
                assert release.release.lease == 9
                client.reserve(PROMPTS, prompt_keys(1)).release()
        finally:
            fake.stop()


def scripted(folder: Path, *, is_old: bool) -> tuple[FakeDaemon, list[pb.ReserveRequest]]:
    """A daemon that grants nothing but a lease, and what it was asked for."""
    requests: list[pb.ReserveRequest] = []

    def script(request: pb.Request) -> pb.Response | None:
        verb = request.WhichOneof("verb")
        if verb == "declare":
            return pb.Response(declare=pb.DeclareReply(fingerprint=PROMPTS.fingerprint))
        if verb != "reserve":
            return None
        requests.append(request.reserve)
        reply = pb.ReserveReply(lease=9, deadline_ns=time.monotonic_ns() + 30 * S)
        reply.ttl_ns = 0 if is_old else request.reserve.ttl_ns
        return pb.Response(reserve=reply)

    return FakeDaemon(folder, script), requests


@pytest.fixture
def _quick_rests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    quick(monkeypatch.setattr)
    with toy_codecs():
        yield


def on_open(node: Node, story: Callable[[Node], Awaitable[None]]) -> None:
    """As `tier_stories.on`, for stories that end and begin the node themselves."""

    async def run() -> None:
        await node.open()
        try:
            await story(node)
        finally:
            await node.crash(calls=0, applied=0, cut=None)

    asyncio.run(run())


async def reopen(node: Node, *, has_index: bool = True) -> None:
    """A kill after everything was durable, and the next daemon."""
    await node.crash(calls=0, applied=1000, cut=None)
    if not has_index:
        assert node.index_file is not None
        node.index_file.reason = "missing: the test took it"
        node.index_file.records.clear()
    await node.open()


def names(path: Sequence[int]) -> list[Any]:
    return tier_harness.keys_of(path)


def here(node: Node, path: Sequence[int]) -> int:
    return node.store.lookup(names(path), now_ns=node.now_ns)


async def durable(node: Node, *paths: Sequence[int]) -> None:
    entries = [entry_of(node, list(path[: at + 1])) for path in paths for at in range(len(path))]
    done = await node.persist(entries)
    assert done.num_durable == len(entries)


@pytest.mark.usefixtures("_quick_rests")
class TestDisk:
    @pytest.mark.parametrize("has_index", [True, False])
    def test_what_was_over_while_no_daemon_ran_is_gone(
        self, tmp_path: Path, has_index: bool
    ) -> None:
        async def story(node: Node) -> None:
            node.put([1, 2], ttl_ns=100)
            node.put([1, 2, 3])
            node.put([4, 5])
            await durable(node, [1, 2, 3], [4, 5])
            node.now_ns += 200
            await reopen(node, has_index=has_index)
            assert (here(node, [1, 2, 3]), here(node, [4, 5])) == (0, 2)
            node.audit()
            # No record lives, and the next index names none.
            assert node.mover.tier.log.num_extents == len(node.store.directory) == 2
            await node.persist(list(node.store.directory))
            assert node.index_file is not None
            assert set(node.index_file.records) == set(names([4, 5]))

        on_open(small_node(tmp_path), story)

    @pytest.mark.parametrize("has_index", [True, False])
    def test_what_is_not_over_goes_on_with_what_is_left(
        self, tmp_path: Path, has_index: bool
    ) -> None:
        async def story(node: Node) -> None:
            node.put([1, 2], ttl_ns=1000)
            await durable(node, [1, 2])
            end_ns = node.now_ns + 1000
            node.now_ns += 400
            # The machine was started again: another monotonic clock.
            node.now_ns -= 300
            node.wall_ahead_ns += 300
            await reopen(node, has_index=has_index)
            assert here(node, [1, 2]) == 2
            node.now_ns = end_ns - 301
            assert here(node, [1, 2]) == 2
            node.now_ns += 1
            assert here(node, [1, 2]) == 0

        on_open(small_node(tmp_path), story)

    def test_a_clock_that_was_set_back_revives_nothing_for_long(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            node.put([1], ttl_ns=100)
            await durable(node, [1])
            node.wall_ahead_ns -= 10**15
            await reopen(node)
            node.now_ns += 99
            assert here(node, [1]) == 1
            node.now_ns += 1
            assert here(node, [1]) == 0

        on_open(small_node(tmp_path), story)

    def test_what_was_written_before_its_parent_had_an_end_goes_with_it(
        self, tmp_path: Path
    ) -> None:
        async def story(node: Node) -> None:
            node.put([1, 2, 3])
            await durable(node, [1, 2, 3])
            node.store.discard(entry_of(node, [1]))
            node.put([1], ttl_ns=100)
            await durable(node, [1])
            node.now_ns += 100
            await reopen(node)
            assert len(node.store.directory) == 0
            assert node.mover.tier.log.num_extents == 0

        on_open(small_node(tmp_path), story)

    def test_the_label_on_disk_is_bound_by_what_it_continues(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            node.put([1], ttl_ns=100)
            node.put([1, 2])
            await durable(node, [1, 2])
            stored = node.store.directory.expiries.get(entry_of(node, [1]))
            # The parent is gone for another reason, and its record with it.
            node.store.discard(entry_of(node, [1]))
            await node.persist(list(node.store.directory))
            await reopen(node)
            assert node.store.directory.get(names([1])[0]) is None
            again = node.store.directory.expiries.get(entry_of(node, [1, 2]))
            assert stored is not None
            assert again == stored

        on_open(small_node(tmp_path), story)

    def test_what_is_over_is_not_written(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            node.put([1], ttl_ns=100)
            lease = node.pin(names([1]))
            assert lease is not None
            node.now_ns += 100
            node.store.expire_chunks(node.now_ns)
            entry = lease.entries[0]
            assert not node.mover.is_owed(entry)
            assert (await node.persist([entry])).num_durable == 0
            assert entry.on_disk is None
            assert node.mover.tier.log.device_bytes == 0
            node.store.release(lease.id)

        on_open(small_node(tmp_path), story)

    def test_while_it_is_written_it_may_end(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            node.put([1], ttl_ns=100)
            entry = entry_of(node, [1])
            may_go_on = threading.Event()

            def wait(call: str) -> None:
                if call == "pwritev":
                    may_go_on.wait(PATIENCE_S)

            node.ops.fault = wait
            writing = asyncio.create_task(node.persist([entry]))
            await becomes(lambda: node.store.transit.is_demoting(entry), "nothing is written")
            node.now_ns += 100
            sweep(node.store, node.now_ns)
            assert node.store.tier.num_extents == 1
            may_go_on.set()
            assert (await writing).num_durable == 0
            await node.settle()
            node.audit()
            assert node.store.tier.used == node.mover.tier.log.num_extents == 0

        on_open(small_node(tmp_path), story)

    def test_a_record_that_is_over_is_not_copied_on(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            per_segment = payload_size_max(SEGMENT_SIZE) // tier_harness.LAYOUT.size(16)
            paths = [[1, number] for number in range(per_segment)]
            node.put([1], ttl_ns=100)
            for path in paths:
                node.put(path)
            await durable(node, *paths)
            lease = node.pin(names(paths[0]))
            assert lease is not None
            for entry in node.store.directory:
                entry.is_recent = True
                if not entry.pins:
                    node.store._evict(entry)
            node.now_ns += 100
            sweep(node.store, node.now_ns)
            # What is still read would be copied, for its place in memory may be lost.
            left = list(node.store.directory)
            assert {entry.meta.key for entry in left} == set(names(paths[0]))
            for entry in left:
                await node.mover.upkeep._copy_on(entry)
            assert node.store.counters["nvme_copy_chunks"] == 0
            node.store.release(lease.id)

        on_open(small_node(tmp_path), story)

    @pytest.mark.parametrize("codec", ["cpu=toy", "cpu=toy:lossy,nvme=toy"])
    def test_encoded_copies_go_too(self, tmp_path: Path, codec: str) -> None:
        async def story(node: Node) -> None:
            node.put([1, 2], ttl_ns=100)
            entries = [entry_of(node, [1]), entry_of(node, [1, 2])]
            await becomes(lambda: all(entry.packed for entry in entries), "it is never packed")
            if "nvme" in codec:
                await durable(node, [1, 2])
            for entry in reversed(entries):
                node.store._evict(entry)
            lease = node.pin(names([1, 2]))
            assert lease is not None
            node.now_ns += 100
            assert here(node, [1, 2]) == 0
            assert [await node.arrived(entry) for entry in entries] == [True, True]
            node.store.release(lease.id)
            await node.settle()
            sweep(node.store, node.now_ns)
            assert node.packed is not None
            assert node.packed.tier.used == node.store.tier.used == 0
            assert node.mover.tier.log.num_extents == 0
            node.audit()

        on_open(small_node(tmp_path, codec=codec), story)

    def test_what_is_over_is_not_encoded(self, tmp_path: Path) -> None:
        async def story(node: Node) -> None:
            assert node.packed is not None
            node.put([1], ttl_ns=100)
            entry = entry_of(node, [1])
            assert node.packed.is_owed(entry)
            lease = node.pin(names([1]))
            assert lease is not None
            node.now_ns += 100
            node.store.expire_chunks(node.now_ns)
            assert not node.packed.is_owed(entry)
            node.store.release(lease.id)

        on_open(small_node(tmp_path, codec="cpu=toy"), story)


def store_prompt(client: kvd.Client, prompt: int, ttl_s: float | None) -> None:
    keys = prompt_keys(prompt)
    chunks = [pattern(key, SIZE).reshape(PROMPTS.shape(PROMPTS.chunk_tokens)) for key in keys]
    states = client.store(PROMPTS, keys, chunks, ttl_s=ttl_s, timeout_s=PATIENCE_S)
    assert set(states) == {"granted"}


class TestDaemons:
    """Whole daemons, and real time."""

    def test_bytes_are_given_back_within_seconds(self, tmp_path: Path) -> None:
        with DaemonProcess.on_disk(tmp_path) as daemon, daemon.connect() as client:
            store_prompt(client, 1, ttl_s=1.5)
            store_prompt(client, 2, ttl_s=None)
            end = time.monotonic() + 1.5
            client.persist(timeout_s=PATIENCE_S)
            until(lambda: client.status().counters["expired_chunks"] == 8, "nothing ends")
            assert end <= time.monotonic()
            status = client.status(audit=True)
            assert status.num_chunks == status.tiers[0].num_extents == 8
            assert status.tiers[1].num_extents == 8
            assert client.lookup(prompt_keys(1)) == 0

    @pytest.mark.parametrize("loss", ["nothing", "index"])
    def test_over_while_the_daemon_was_down(self, tmp_path: Path, loss: str) -> None:
        with DaemonProcess.on_disk(tmp_path) as daemon:
            with daemon.connect() as client:
                store_prompt(client, 1, ttl_s=3600)
                store_prompt(client, 2, ttl_s=None)
                # Else it may end before it is durable.
                store_prompt(client, 3, ttl_s=3)
                end = time.monotonic() + 3
                client.persist(timeout_s=PATIENCE_S)
            daemon.kill()
            if loss == "index":
                shutil.rmtree(tmp_path / "nvme" / "index")
            until(lambda: time.monotonic() > end, "time does not pass")
            daemon.restart()
            with daemon.connect() as client:
                assert [client.lookup(prompt_keys(prompt)) for prompt in (1, 2, 3)] == [8, 8, 0]
                status = client.status(audit=True)
                assert status.num_chunks == status.tiers[1].num_extents == 16
                assert status.counters["expired_chunks"] == 8
                said = listed(daemon)
            for key in prompt_keys(1):
                assert 3500 < said[key.hex()] < 3600
            assert {said[key.hex()] for key in prompt_keys(2)} == {None}
            assert daemon.stop() == 0

    def test_memory_that_outlives_the_daemon_forgets_it(self, tmp_path: Path) -> None:
        with forgotten(DaemonProcess(tmp_path, "--cpu-persist")) as daemon:
            with daemon.connect() as client:
                for prompt, ttl_s in ((1, 3600.0), (2, None), (3, 3.0)):
                    store_prompt(client, prompt, ttl_s)
                    hashed(client, prompt)
                end = time.monotonic() + 3
            daemon.kill()
            until(lambda: time.monotonic() > end, "time does not pass")
            daemon.restart()
            with daemon.connect() as client:
                assert [client.lookup(prompt_keys(prompt)) for prompt in (1, 2, 3)] == [8, 8, 0]
                status = client.status(audit=True)
                assert status.num_chunks == status.tiers[0].num_extents == 16
                assert status.counters["expired_chunks"] == 8
            said = listed(daemon)
            assert all(3500 < said[key.hex()] < 3600 for key in prompt_keys(1))

    def test_a_reader_keeps_what_it_reads(self, tmp_path: Path) -> None:
        with DaemonProcess(tmp_path) as daemon, daemon.connect() as client:
            store_prompt(client, 1, ttl_s=1)
            with client.pin(PROMPTS, prompt_keys(1)) as lease:
                until(lambda: client.lookup(prompt_keys(1)) == 0, "it never ends")
                out = np.empty(SIZE, dtype=np.uint8)
                for index, key in enumerate(prompt_keys(1)):
                    lease.load(index, out)
                    assert np.array_equal(out, pattern(key, SIZE))
                assert client.status().counters["expired_chunks"] == 0
            until(lambda: client.status().tiers[0].used == 0, "its bytes stay")


def listed(daemon: DaemonProcess) -> dict[str, Any]:
    """What `kvd ls --json` says of each chunk's end: seconds or None."""
    command = [sys.executable, "-m", "kvd", "ls", "--json", "--socket", str(daemon.socket)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {chunk["key"]: chunk["expires_in_s"] for chunk in json.loads(done.stdout)["chunks"]}
