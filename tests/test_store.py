"""The store against a dict: what is listed is what was committed, and no byte has two owners."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvd.arena import HUGE_PAGE_SIZE, Arena
from kvd.chunk import ChunkMeta, Extent, Fingerprint, Placement
from kvd.daemon.arrival import Arrival
from kvd.daemon.directory import Entry
from kvd.daemon.eviction.lru import Lru
from kvd.daemon.leases import GRACE_NS, LEASE_NS_MAX, ReadLease, WriteLease
from kvd.daemon.store import ChunkStore
from kvd.errors import InvalidRequest, LayoutMismatch, LeaseExpired, TooLarge, UnknownLease
from kvd.keys import ChunkKey
from kvd.layout import KVLayout
from kvd.tiers.cpu import CpuTier

# A whole chunk fills an eighth of the arena of 2 MiB.
LAYOUT = KVLayout(
    model="m",
    revision="r",
    dtype="uint8",
    num_layers=4,
    num_kv_heads=16,
    head_dim=128,
    chunk_tokens=16,
)
OTHER = KVLayout(
    model="n",
    revision="r",
    dtype="uint8",
    num_layers=4,
    num_kv_heads=16,
    head_dim=128,
    chunk_tokens=16,
)
ROOT = Fingerprint(LAYOUT.fingerprint)
S = 10**9


def new_store() -> ChunkStore:
    store = ChunkStore(CpuTier(Arena.create(HUGE_PAGE_SIZE, huge_pages="never")), Lru())
    store.declare(LAYOUT)
    store.declare(OTHER)
    return store


def key_of(path: Sequence[int]) -> ChunkKey:
    return ChunkKey(hashlib.blake2b(bytes(path), digest_size=32).digest())


def chain(path: Sequence[int], tokens: int = 16) -> list[ChunkMeta]:
    """The chunks of the prompt `path`: equal paths share keys as prompts share prefixes."""
    metas = []
    for end in range(1, len(path) + 1):
        parent = key_of(path[: end - 1]) if end > 1 else ROOT
        metas.append(
            ChunkMeta(
                key=key_of(path[:end]),
                parent=parent,
                layout=ROOT,
                start=16 * (end - 1),
                num_tokens=tokens,
            )
        )
    return metas


def keys_of(path: Sequence[int]) -> list[ChunkKey]:
    return [meta.key for meta in chain(path)]


def put(store: ChunkStore, path: Sequence[int], now_ns: int = 0, tokens: int = 16) -> list[str]:
    lease, states = store.reserve(chain(path, tokens), lease_ns=S, now_ns=now_ns)
    if lease is not None:
        store.commit(lease.id, (), now_ns=now_ns)
    return list(states)


def pin(store: ChunkStore, path: Sequence[int], now_ns: int = 0, lease_ns: int = S) -> ReadLease:
    lease, _ = store.pin(keys_of(path), ROOT, standalone=False, lease_ns=lease_ns, now_ns=now_ns)
    assert lease is not None
    return lease


class StoreMachine(RuleBasedStateMachine):
    """Random clients with a fake clock, and after every step all the invariants.

    The model writes a pattern of the chunk's key into each extent when it is granted; a listed
    chunk whose bytes are not its pattern was overwritten by somebody.
    """

    def __init__(self) -> None:
        super().__init__()
        self.store = new_store()
        self.now_ns = 0
        self.writing: list[WriteLease] = []
        self.reading: list[tuple[ReadLease, list[ChunkKey]]] = []

    paths = st.lists(st.integers(0, 2), min_size=1, max_size=5)

    @rule(
        path=paths,
        tokens=st.sampled_from([3, 16]),
        lease_ns=st.integers(1, 5 * S),
        is_shared=st.booleans(),
    )
    def reserve(self, path: list[int], tokens: int, lease_ns: int, is_shared: bool) -> None:
        metas = chain(path, tokens)
        lease, states = self.store.reserve(
            metas, lease_ns=lease_ns, now_ns=self.now_ns, is_shared=is_shared
        )
        granted = [meta for meta, state in zip(metas, states, strict=True) if state == "granted"]
        assert (lease is None) == (not granted)
        if lease is not None:
            assert lease.metas == granted
            for meta, extent in zip(lease.metas, lease.extents, strict=True):
                self.store.tier.view(extent)[:] = meta.key[0]
            self.writing.append(lease)

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        lease = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
        if self.now_ns > lease.deadline_ns:
            with pytest.raises(LeaseExpired):
                self.store.commit(lease.id, (), now_ns=self.now_ns)
            self.store.release(lease.id)
        else:
            assert self.store.commit(lease.id, (), now_ns=self.now_ns) == len(lease.metas)
        with pytest.raises(UnknownLease):
            self.store.commit(lease.id, (), now_ns=self.now_ns)

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        lease = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
        self.store.release(lease.id)

    @rule(path=paths, lease_ns=st.integers(1, 5 * S))
    def pin(self, path: list[int], lease_ns: int) -> None:
        keys = keys_of(path)
        listed = [key in self.store.directory for key in keys]
        lease, found = self.store.pin(
            keys, ROOT, standalone=False, lease_ns=lease_ns, now_ns=self.now_ns
        )
        leading = [*listed, False].index(False)
        assert found.count(True) == leading
        if lease is not None:
            self.reading.append((lease, keys[:leading]))

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease, _ = self.reading.pop(data.draw(st.integers(0, len(self.reading) - 1)))
        self.store.release(lease.id)
        with pytest.raises(UnknownLease):
            self.store.release(lease.id)

    @rule(path=paths, is_held=st.booleans())
    def hold(self, path: list[int], is_held: bool) -> None:
        self.store.hold(keys_of(path)[-1:], is_held)

    @rule(path=paths)
    def drop(self, path: list[int]) -> None:
        entry = self.store.directory.get(keys_of(path)[-1])
        if entry is not None:
            family = list(entry.descendants())
            is_pinned = any(member.is_pinned for member in family)
            assert self.store.drop([entry])[0] == (0 if is_pinned else len(family))

    @rule(step_ns=st.integers(1, 3 * S))
    def time_passes(self, step_ns: int) -> None:
        self.now_ns += step_ns
        self.store.expire(self.now_ns)

    @rule(path=paths)
    def lookup(self, path: list[int]) -> None:
        keys = keys_of(path)
        listed = [key in self.store.directory for key in keys]
        assert self.store.lookup(keys) == [*listed, False].index(False)

    @invariant()
    def nothing_is_lost_or_shared(self) -> None:
        self.store.check()

    @invariant()
    def listed_chunks_hold_their_own_bytes(self) -> None:
        for entry in self.store.directory:
            raw = self.store.tier.view(entry.placement.extent)
            assert raw[0] == raw[-1] == entry.meta.key[0]

    @invariant()
    def pinned_chunks_are_here_until_deadline_and_grace(self) -> None:
        for lease, keys in self.reading:
            if self.now_ns <= lease.deadline_ns + GRACE_NS:
                assert all(key in self.store.directory for key in keys)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)


def test_nothing_half_written_is_listed() -> None:
    store = new_store()
    lease, _ = store.reserve(chain([1, 2]), lease_ns=S, now_ns=0)
    assert lease is not None
    assert store.lookup(keys_of([1, 2])) == 0
    store.commit(lease.id, (), now_ns=0)
    assert store.lookup(keys_of([1, 2])) == 2


def test_one_writes_and_the_others_are_told() -> None:
    store = new_store()
    lease, states = store.reserve(chain([1]), lease_ns=S, now_ns=0)
    assert lease is not None
    assert states == ["granted"]
    assert store.reserve(chain([1, 2]), lease_ns=S, now_ns=0)[1] == ["busy", "granted"]
    store.commit(lease.id, (), now_ns=0)
    assert store.reserve(chain([1]), lease_ns=S, now_ns=0) == (None, ["exists"])


def test_a_full_tier_evicts_the_oldest_and_the_tails_first() -> None:
    store = new_store()
    put(store, [1, 1, 1, 1], 1)
    put(store, [2, 2, 2, 2], 2)
    assert put(store, [3, 3, 3], 3) == ["granted"] * 3
    assert store.lookup(keys_of([1, 1, 1, 1])) == 1
    assert store.lookup(keys_of([2, 2, 2, 2])) == 4
    assert store.lookup(keys_of([3, 3, 3])) == 3


def test_evict_never_takes_a_pinned_chunk() -> None:
    store = new_store()
    put(store, [1, 1, 1, 1])
    pin(store, [1, 1, 1, 1])
    assert put(store, [2] * 6) == ["granted"] * 4 + ["full"] * 2
    assert store.lookup(keys_of([1, 1, 1, 1])) == 4


def test_a_held_chunk_outlives_every_pressure() -> None:
    store = new_store()
    put(store, [1, 1])
    store.hold(keys_of([1, 1]), True)
    for value in range(2, 10):
        put(store, [value] * 6)
    assert store.lookup(keys_of([1, 1])) == 2
    store.hold(keys_of([1, 1]), False)
    put(store, [2] * 8)
    assert store.lookup(keys_of([1, 1])) == 0


def test_a_prefix_is_never_evicted_before_what_continues_it() -> None:
    store = new_store()
    put(store, [1], 1)
    put(store, [1, 1], 2)
    put(store, [1, 1, 1], 3)
    put(store, [2] * 6, 4)
    assert store.lookup(keys_of([1, 1, 1])) == 2


def test_a_reservation_does_not_evict_what_it_continues() -> None:
    store = new_store()
    put(store, [1, 1, 1, 1], 1)
    put(store, [2, 2, 2, 2], 2)
    assert put(store, [1, 1, 1, 1, 5, 5, 5, 5], 3) == ["exists"] * 4 + ["granted"] * 4
    assert store.lookup(keys_of([1, 1, 1, 1, 5, 5, 5, 5])) == 8


def test_a_pin_that_ran_out_is_taken_after_the_grace_not_before() -> None:
    store = new_store()
    put(store, [1] * 8)
    lease = pin(store, [1] * 8, lease_ns=S)
    at = S + GRACE_NS
    assert store.reserve(chain([2]), lease_ns=S, now_ns=at)[1] == ["full"]
    assert store.reserve(chain([2]), lease_ns=S, now_ns=at + 1)[1] == ["granted"]
    store.release(lease.id)
    store.check()


def test_a_renewed_pin_lasts_longer() -> None:
    store = new_store()
    put(store, [1] * 8)
    lease = pin(store, [1] * 8, lease_ns=S)
    assert store.renew(lease.id, lease_ns=10 * S, now_ns=S) == 11 * S
    assert store.expire(9 * S) == 0
    with pytest.raises(LeaseExpired):
        store.renew(lease.id, lease_ns=S, now_ns=11 * S + 1)
    assert store.expire(11 * S + GRACE_NS + 1) == 1


def test_a_late_writer_lists_nothing_and_keeps_its_bytes_until_it_lets_go() -> None:
    store = new_store()
    late, _ = store.reserve(chain([1] * 8), lease_ns=S, now_ns=0)
    assert late is not None
    store.expire(S + GRACE_NS + 1)
    # Its keys are free for others, its bytes are not: it may still be writing.
    assert store.reserve(chain([1]), lease_ns=S, now_ns=5 * S)[1] == ["full"]
    with pytest.raises(LeaseExpired):
        store.commit(late.id, (), now_ns=5 * S)
    store.release(late.id)
    assert store.reserve(chain([1]), lease_ns=S, now_ns=5 * S)[1] == ["granted"]
    store.check()


def test_bytes_that_only_the_daemon_writes_are_free_at_the_deadline() -> None:
    store = new_store()
    late, _ = store.reserve(chain([1] * 8), lease_ns=S, now_ns=0, is_shared=False)
    assert late is not None
    store.expire(S + GRACE_NS + 1)
    assert store.num_reserved == 0
    assert put(store, [2] * 8, 5 * S) == ["granted"] * 8
    with pytest.raises(LeaseExpired):
        store.commit(late.id, (), now_ns=5 * S)
    store.release(late.id)
    store.check()


def test_a_commit_past_its_deadline_lists_nothing_even_within_the_grace() -> None:
    store = new_store()
    lease, _ = store.reserve(chain([1]), lease_ns=S, now_ns=0)
    assert lease is not None
    with pytest.raises(LeaseExpired):
        store.commit(lease.id, (), now_ns=S + 1)
    assert len(store.directory) == 0
    # The key is free for another writer at once, the late one's bytes are not.
    assert put(store, [1], S + 1) == ["granted"]
    assert store.num_reserved == 1
    store.release(lease.id)
    store.check()


def test_a_large_chunk_finds_room_among_small_ones() -> None:
    # Every second small chunk is pinned, so that no order of eviction alone joins two free ranges.
    store = new_store()
    for value in range(32):
        assert put(store, [value], tokens=4) == ["granted"]
    for value in range(0, 24, 2):
        pin(store, [value])
    assert put(store, [99], tokens=16) == ["granted"]
    for value in range(0, 24, 2):
        assert store.lookup(keys_of([value])) == 1
    store.check()


def test_pins_that_leave_no_run_mean_full() -> None:
    store = new_store()
    for value in range(32):
        put(store, [value], tokens=4)
    for value in range(0, 32, 2):
        pin(store, [value])
    assert put(store, [99], tokens=16) == ["full"]
    store.check()


def test_chunks_that_come_before_their_parents_count_once_they_are_there() -> None:
    store = new_store()
    first, second, third = chain([1, 2, 3])
    for metas in ([third], [second]):
        lease, _ = store.reserve(metas, lease_ns=S, now_ns=0)
        assert lease is not None
        store.commit(lease.id, (), now_ns=0)
        assert store.lookup(keys_of([1, 2, 3])) == 0
    lease, _ = store.reserve([first], lease_ns=S, now_ns=0)
    assert lease is not None
    store.commit(lease.id, (), now_ns=0)
    assert store.lookup(keys_of([1, 2, 3])) == 3
    store.check()


def test_clients_that_lie_about_parents_make_no_cycle() -> None:
    store = new_store()
    one, two = key_of([1]), key_of([2])
    for key, parent in ((one, two), (two, one)):
        meta = ChunkMeta(key=key, parent=parent, layout=ROOT, start=0, num_tokens=16)
        lease, _ = store.reserve([meta], lease_ns=S, now_ns=0)
        assert lease is not None
        store.commit(lease.id, (), now_ns=0)
    store.check()
    assert put(store, [7] * 8) == ["granted"] * 8
    store.check()


def test_a_dropped_chunk_takes_what_continues_it() -> None:
    store = new_store()
    put(store, [1, 1, 1])
    put(store, [1, 2])
    entry = store.directory.get(key_of([1]))
    assert entry is not None
    assert store.drop([entry])[0] == 4
    assert len(store.directory) == 0
    store.check()


REFUSED = [
    (
        [
            ChunkMeta(
                key=key_of([9]), parent=ROOT, layout=Fingerprint(bytes(32)), start=0, num_tokens=1
            )
        ],
        LayoutMismatch,
        "not known",
    ),
    (
        [ChunkMeta(key=key_of([9]), parent=ROOT, layout=ROOT, start=0, num_tokens=17)],
        InvalidRequest,
        "at most 16 tokens, found 17",
    ),
    (
        [ChunkMeta(key=key_of([9]), parent=key_of([9]), layout=ROOT, start=0, num_tokens=1)],
        InvalidRequest,
        "as its parent",
    ),
    ([*chain([9]), *chain([9])], InvalidRequest, "once"),
    (chain([9] * 9), TooLarge, "2359296 bytes reserved at once, the cpu tier has 2097152"),
]


@pytest.mark.parametrize(("metas", "error", "message"), REFUSED)
def test_a_refused_reservation_changes_nothing(
    metas: list[ChunkMeta], error: type[Exception], message: str
) -> None:
    store = new_store()
    put(store, [1])
    with pytest.raises(error, match=message):
        store.reserve(metas, lease_ns=S, now_ns=0)
    assert len(store.directory) == 1
    assert (store.num_pinned, store.num_reserved) == (0, 0)
    store.check()


@pytest.mark.parametrize("lease_ns", [0, -1, LEASE_NS_MAX + 1])
def test_a_lease_is_bounded(lease_ns: int) -> None:
    store = new_store()
    put(store, [1])
    with pytest.raises(InvalidRequest):
        store.reserve(chain([2]), lease_ns=lease_ns, now_ns=0)
    with pytest.raises(InvalidRequest):
        store.pin(keys_of([1]), ROOT, standalone=False, lease_ns=lease_ns, now_ns=0)
    store.check()


def test_a_chunk_of_another_layout_is_an_error_and_pins_nothing() -> None:
    store = new_store()
    put(store, [1, 1])
    with pytest.raises(LayoutMismatch, match="expected, chunk"):
        store.pin(
            keys_of([1, 1]), Fingerprint(OTHER.fingerprint), standalone=False, lease_ns=S, now_ns=0
        )
    assert (store.num_pinned, store.num_reserved) == (0, 0)
    store.check()


def test_wrong_lease_kinds_and_checksums_change_nothing() -> None:
    store = new_store()
    lease, _ = store.reserve(chain([1, 1]), lease_ns=S, now_ns=0)
    assert lease is not None
    with pytest.raises(InvalidRequest, match="2 checksums wanted or none, found 1"):
        store.commit(lease.id, [7], now_ns=0)
    assert store.commit(lease.id, [7, 8], now_ns=0) == 2
    reading = pin(store, [1, 1])
    with pytest.raises(UnknownLease, match="nothing to commit"):
        store.commit(reading.id, (), now_ns=0)
    assert [entry.placement.checksum for entry in reading.entries] == [7, 8]
    store.check()


def test_standalone_pins_take_each_for_itself() -> None:
    store = new_store()
    put(store, [1])
    put(store, [3])
    keys = [key_of([1]), key_of([2]), key_of([3])]
    lease, found = store.pin(keys, ROOT, standalone=True, lease_ns=S, now_ns=0)
    assert found == [True, False, True]
    assert lease is not None
    assert [entry.meta.key for entry in lease.entries] == [keys[0], keys[2]]
    assert store.present(keys) == found


def test_bytes_of_a_pinned_chunk_stay_while_others_are_written() -> None:
    store = new_store()
    lease, _ = store.reserve(chain([1]), lease_ns=S, now_ns=0)
    assert lease is not None
    pattern = np.arange(LAYOUT.size(16), dtype=np.uint8)
    store.tier.view(lease.extents[0])[:] = pattern
    store.commit(lease.id, (), now_ns=0)
    held = pin(store, [1])
    for value in range(2, 12):
        writing, _ = store.reserve(chain([value] * 7), lease_ns=S, now_ns=0)
        assert writing is not None
        for extent in writing.extents:
            store.tier.view(extent)[:] = 255
        store.commit(writing.id, (), now_ns=0)
    assert np.array_equal(store.tier.view(held.entries[0].placement.extent), pattern)


class Below:
    """A disk tier of which the test says when what becomes of a chunk."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.dropped: list[Entry] = []

    def is_owed(self, entry: Entry) -> bool:
        return False

    def fetch(self, arrival: Arrival) -> None:
        self.arrivals.append(arrival)

    def drop(self, entry: Entry) -> None:
        self.dropped.append(entry)

    def wake(self, committed: Sequence[Entry] = ()) -> None:
        pass

    def check(self, entries: object) -> None:
        pass


def store_with_disk(*path: int) -> tuple[ChunkStore, Below]:
    """A store whose chunks of `path` are on disk only."""
    store, below = new_store(), Below()
    store.lower = below  # type: ignore[assignment]
    for index, meta in enumerate(chain(path)):
        extent = Extent("nvme", index << 20, LAYOUT.size(16))
        store.restore(meta, Placement(extent, checksum=index + 1))
    return store, below


class TestArrivals:
    def test_a_pin_brings_what_is_on_disk(self) -> None:
        store, below = store_with_disk(1, 2)
        lease = pin(store, (1, 2))
        assert [store.ready_size(entry) for entry in lease.entries] == [0, 0]
        store.check()
        for arrival in below.arrivals:
            arrival.ready = arrival.extent.size
            store.land(arrival)
        store.check()
        assert [store.ready_size(entry) for entry in lease.entries] == [LAYOUT.size(16)] * 2
        # A second pin finds them in memory.
        pin(store, (1, 2))
        assert len(below.arrivals) == 2

    def test_what_is_lost_on_the_way_keeps_its_bytes_for_those_who_read_them(self) -> None:
        store, below = store_with_disk(1)
        lease = pin(store, (1,))
        (arrival,) = below.arrivals
        arrival.ready = 4096
        store.lose(arrival)
        store.check()
        assert store.ready_size(lease.entries[0]) is None
        assert store.lookup(keys_of((1,))) == 0
        # The reader may be copying the first 4096 bytes: nobody else gets them meanwhile.
        granted = [put(store, (7, index)) for index in range(8)]
        assert store.tier.num_extents == 8
        offsets = {entry.placement.extent.offset for entry in store.directory}
        assert arrival.extent.offset not in offsets, granted
        store.release(lease.id)
        store.check()
        assert store.tier.num_extents == 7

    def test_a_chunk_cleared_on_the_way_is_gone_when_it_comes(self) -> None:
        store, below = store_with_disk(1)
        store.lookup(keys_of((1,)), prefetch=True)
        (arrival,) = below.arrivals
        assert store.drop([arrival.entry]) == (1, LAYOUT.size(16))
        assert below.dropped == [arrival.entry]
        store.check()
        store.land(arrival)
        store.check()
        assert store.tier.used == 0

    def test_memory_that_is_pinned_makes_a_chunk_on_disk_a_miss(self) -> None:
        store, below = store_with_disk(1)
        leases = [pin(store, (5, index)) for index in range(8) if put(store, (5, index))]
        assert leases
        lease, found = store.pin(keys_of((1,)), ROOT, standalone=False, lease_ns=S, now_ns=0)
        assert (lease, found) == (None, [False])
        assert below.arrivals == []
        store.check()
        # It is still on disk, for a better day.
        assert store.lookup(keys_of((1,))) == 1
