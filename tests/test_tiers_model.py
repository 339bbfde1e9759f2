"""The two-tier store against a dict: clients, evictions, damage, crashes, power cuts, reopenings.

Three disks: one that everything fits on, where what was acknowledged must be there, exactly; one
that is far too small, where segments are given back all the time; one with a quota. All with a
stand-in for the index's process, so that many examples run; a fourth machine has the real one.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvd.codecs.base import Span
from kvd.codecs.registry import decode_any
from kvd.daemon.directory import Entry
from kvd.daemon.leases import Loan, ReadLease, Terms
from kvd.keys import ChunkKey
from tests.crash_client import pattern
from tests.file_faults import flip
from tests.tier_harness import (
    LAYOUT,
    MEMORY_SIZE,
    PATIENCE_S,
    ROOT,
    SEGMENT_SIZE,
    IndexFile,
    Node,
    S,
    end_loop,
    keys_of,
    quick,
)
from tests.toy_codec import MASK, toy_codecs

T = TypeVar("T")

# Prompts that share prefixes; all their chunks together are several times the memory.
PATHS = st.lists(st.integers(0, 3), min_size=1, max_size=5)
# Long enough for a few demotions, or for none.
PAUSES = st.sampled_from([0, 1, 3, 10])


@pytest.fixture(scope="module", autouse=True)
def _quick_rests() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, toy_codecs():
        quick(patch.setattr)
        yield


class TiersMachine(RuleBasedStateMachine):
    """What is read was stored under that key. What was acknowledged is there after any crash."""

    SIZE: ClassVar[int]
    OPTIONS: ClassVar[dict[str, Any]] = {}
    # Nothing is ever given back for want of room: the promise is exact.
    is_roomy: ClassVar[bool] = False
    has_real_index: ClassVar[bool] = False

    @initialize(is_through=st.booleans(), is_prefetching=st.booleans())
    def start(self, is_through: bool, is_prefetching: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvd-tiers-"))
        self.loop = asyncio.new_event_loop()
        self.node = Node(
            self.folder,
            size=self.SIZE,
            index_file=None if self.has_real_index else IndexFile(),
            nvme_write="through" if is_through else "back",
            nvme_prefetch=is_prefetching,
            **self.OPTIONS,
        )
        # Keys by what became of them.
        self.stored: set[ChunkKey] = set()
        self.acknowledged: set[ChunkKey] = set()
        self.damaged: set[ChunkKey] = set()
        self.ever_damaged: set[ChunkKey] = set()
        # Damaged, then stored anew: the index may still name the old record.
        self.doubtful: set[ChunkKey] = set()
        self.cleared: set[ChunkKey] = set()
        self.forgotten: set[ChunkKey] = set()
        self.held: set[ChunkKey] = set()
        # When chunks end at the latest, and when they may end, for what they continue does.
        self.must_end: dict[ChunkKey, int] = {}
        self.may_end: dict[ChunkKey, int] = {}
        self.paths: dict[ChunkKey, tuple[int, ...]] = {}
        self.leases: list[tuple[ReadLease, list[Entry]]] = []
        self.lent: list[ReadLease] = []
        self.num_fresh = 4
        self.do(self.node.open())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def find(self, key: ChunkKey) -> Entry | None:
        return self.node.store.directory.finder(self.node.now_ns)(key)

    @property
    def found(self) -> list[Entry]:
        return [e for e in self.node.store.directory if self.find(e.meta.key) is not None]

    @property
    def listed(self) -> set[ChunkKey]:
        return {entry.meta.key for entry in self.node.store.directory}

    # What clients do.

    @rule(path=PATHS, has_checksums=st.booleans(), pause=PAUSES)
    def store(self, path: list[int], has_checksums: bool, pause: int) -> None:
        self.put(path, has_checksums)
        self.wait(pause)

    @rule(count=st.integers(1, 8), pause=PAUSES)
    def fill(self, count: int, pause: int) -> None:
        """New prompts, so that old ones have to leave memory."""
        for _ in range(count):
            self.num_fresh += 1
            self.put([self.num_fresh % 256, self.num_fresh // 256, 1, 2, 3])
            self.wait(pause)

    @rule(path=PATHS)
    def look_up(self, path: list[int]) -> None:
        keys = keys_of(path)
        found = self.node.store.lookup(keys, now_ns=self.node.now_ns, prefetch=True)
        assert found == [*(self.find(key) is not None for key in keys), False].index(False)

    @rule(path=PATHS, standalone=st.booleans())
    def read(self, path: list[int], standalone: bool) -> None:
        good, lost = self.do(self.node.read(keys_of(path), standalone=standalone))
        self.assert_read(good, lost)

    @rule(path=PATHS)
    def pin(self, path: list[int]) -> None:
        """Read later, or never."""
        lease = self.node.pin(keys_of(path))
        if lease is not None:
            self.leases.append((lease, list(lease.entries)))
        if len(self.leases) > 2:
            self.release()

    @rule()
    def release(self) -> None:
        # No precondition: which rules there are must not depend on how threads took turns.
        if not self.leases:
            return
        lease, entries = self.leases.pop(0)
        for entry in entries:
            is_good = self.do(self.node.arrived(entry))
            # It may be damaged, lost and stored anew by now.
            key = [entry.meta.key]
            self.assert_read(key[:is_good], key[is_good:], self.ever_damaged)
        self.node.store.release(lease.id)

    @rule(path=PATHS, standalone=st.booleans())
    def read_exact(self, path: list[int], standalone: bool) -> None:
        """What a lookup promises is there, and bit for bit what was stored."""
        keys = keys_of(path)
        store, terms = self.node.store, Terms(is_exact=True)
        told = sum(store.present(keys, now_ns=self.node.now_ns, terms=terms))
        if not standalone:
            told = store.lookup(keys, now_ns=self.node.now_ns, terms=terms)
        full = store.counters["promote_full"]
        lease, found = store.pin(
            keys, ROOT, standalone=standalone, lease_ns=S, now_ns=self.node.now_ns, terms=terms
        )
        assert sum(found) == told or store.counters["promote_full"] > full
        for entry in lease.entries if lease is not None else ():
            key, size = entry.meta.key, LAYOUT.size(entry.meta.num_tokens)
            is_good = self.do(self.node.arrived(entry))
            self.assert_read([key][:is_good], [key][is_good:])
            view = store.tier.view(store.extent_of(entry)) if is_good else None
            assert view is None or np.array_equal(view, pattern(key, size)), "it is not exact"
        if lease is not None:
            store.release(lease.id)

    @rule(path=PATHS, standalone=st.booleans(), is_exact=st.booleans())
    def borrow(self, path: list[int], standalone: bool, is_exact: bool) -> None:
        """Pin what is encoded as the bitstream; read it later, or never."""
        terms = Terms(is_exact=is_exact, codecs=frozenset({"toy/1", "toy-lossy/1"}))
        lease, _ = self.node.store.pin(
            keys_of(path),
            ROOT,
            standalone=standalone,
            lease_ns=S,
            now_ns=self.node.now_ns,
            terms=terms,
        )
        if lease is not None:
            self.lent.append(lease)
        if len(self.lent) > 2:
            self.give_back()

    @rule()
    def give_back(self) -> None:
        """Whatever has become of the chunk and its copies, the bitstream is the chunk's."""
        if not self.lent:
            return
        lease = self.lent.pop(0)
        for loan in lease.loans.values():
            key, meta = loan.entry.meta.key, loan.entry.meta
            is_packed = loan.copy.extent.tier == "packed"
            if not self.do(_landed(loan)):
                # Packed memory may have had no room for it any more.
                self.assert_read([], [] if is_packed else [key], self.ever_damaged)
                continue
            out = np.empty(LAYOUT.size(meta.num_tokens), np.uint8)
            span = Span(start=meta.start, num_tokens=meta.num_tokens)
            decode_any(self.node.store.tier.view(loan.extent), LAYOUT, span, out)
            expected = pattern(key, out.size)
            assert np.array_equal(out, expected if loan.copy.is_exact else expected & MASK)
        self.node.store.release(lease.id)

    @rule(paths=st.lists(PATHS, min_size=2, max_size=5), cleared=PATHS)
    def many_at_once(self, paths: list[list[int]], cleared: list[int]) -> None:
        """Reads, a store and a clear while the bytes are on their way."""

        async def storm() -> list[tuple[list[ChunkKey], list[ChunkKey]]]:
            reads = [asyncio.ensure_future(self.node.read(keys_of(path))) for path in paths]
            await asyncio.sleep(0)
            self.put(paths[0][::-1])
            self.drop(cleared)
            await asyncio.sleep(0.001)
            self.put(cleared)
            return await asyncio.gather(*reads)

        damaged = set(self.damaged)
        for good, lost in self.do(storm()):
            self.assert_read(good, lost, damaged)

    @rule(pause=PAUSES)
    def time_passes(self, pause: int) -> None:
        self.wait(pause)

    # What operators do.

    @rule(path=PATHS)
    def clear(self, path: list[int]) -> None:
        self.drop(path)

    @rule(path=PATHS, is_held=st.booleans())
    def hold(self, path: list[int], is_held: bool) -> None:
        keys = [key for key in keys_of(path) if self.find(key) is not None]
        assert self.node.store.hold(keys_of(path), is_held, now_ns=self.node.now_ns) == len(keys)
        self.held = self.held | set(keys) if is_held else self.held - set(keys)

    @rule(path=PATHS)
    def persist(self, path: list[int]) -> None:
        self.acknowledge([entry for entry in map(self.find, keys_of(path)) if entry is not None])

    @rule()
    def persist_all(self) -> None:
        self.acknowledge(self.found)

    @rule()
    def scrub(self) -> None:
        """Finds what is damaged and not arriving."""
        self.do(self.node.settle())
        shelved = {e.meta.key: e.on_disk for e in self.node.store.directory if e.on_disk}
        self.node.mover.scrub(0)
        self.do(self.node.settle())
        bad = (self.damaged | self.doubtful) & shelved.keys()
        assert self.node.mover.scrubbed.num_bad <= len(bad)

    # What happens to daemons and disks.

    @rule(where=st.integers(0, 1 << 16), which=st.integers(0, 1 << 16), is_header=st.booleans())
    def damage(self, where: int, which: int, is_header: bool) -> None:
        """Flip a bit of a record that is there."""
        self.do(self.node.settle())
        found = [entry for entry in self.node.store.directory if entry.on_disk is not None]
        if not found:
            return
        self.flip_record(sorted(found, key=_key)[which % len(found)], where, is_header)

    @rule(
        calls=st.sampled_from([0, 0, 1, 2, 5, 12]),
        applied=st.integers(0, 20),
        is_cut=st.booleans(),
        seed=st.integers(0, 1 << 16),
        is_busy=st.booleans(),
        flips=st.sampled_from([0, 0, 1, 2]),
    )
    def crash(
        self, calls: int, applied: int, is_cut: bool, seed: int, is_busy: bool, flips: int
    ) -> None:
        chance = random.Random(seed)
        if is_busy:
            # In the middle of writing everything.
            self.loop.create_task(self.node.persist(list(self.node.store.directory)))
        calls = 0 if self.has_real_index else calls
        cut = chance if is_cut and not self.has_real_index else None
        self.do(self.node.crash(calls=calls, applied=applied, cut=cut))
        shelved = [entry for entry in self.node.store.directory if entry.on_disk is not None]
        if not self.is_roomy:
            # What was given back by then is gone for good, also if it was written again since and
            # the index had not heard of it.
            index_file = self.node.index_file
            assert index_file is not None
            known = {key: record.offset for key, record in index_file.records.items()}
            self.acknowledged &= {
                entry.meta.key
                for entry in shelved
                if entry.on_disk is not None
                and known.get(entry.meta.key) == entry.on_disk.extent.offset
            }
            has_stale = any(
                record.offset not in {e.on_disk.extent.offset for e in shelved if e.on_disk}
                for record in index_file.records.values()
            )
            if has_stale and "nvme_quota" in self.OPTIONS:
                # What a quota had pushed out is back, and the oldest go in its place.
                self.acknowledged.clear()
        for entry in chance.sample(sorted(shelved, key=_key), min(flips, len(shelved))):
            self.flip_record(entry, chance.randrange(1 << 16), chance.random() < 0.5)
        if flips == 2 and shelved:
            self.flip_segment(chance.choice(sorted(shelved, key=_key)))
        self.reopened()

    @rule()
    def stop(self) -> None:
        """A clean stop writes what is only in memory."""
        self.release_all()
        self.sweep()
        before = self.listed
        self.do(self.node.close())
        kept = {e.meta.key for e in self.node.store.directory if e.on_disk is not None}
        assert not self.is_roomy or before - kept <= self.damaged, "a chunk was left behind"
        self.acknowledged = kept
        self.doubtful -= kept
        self.forgotten |= self.cleared
        self.reopened()

    @rule(is_waiting=st.booleans())
    def index_fails(self, is_waiting: bool) -> None:
        index: Any = self.node.mover.index
        if self.has_real_index:
            if index._channel is not None:
                index._channel.kill()
            while not index.failure:
                self.wait(1)
        else:
            index.fail()
        if is_waiting:
            # Whoever asks for durability until it is there again is told that there is none.
            give_up = self.loop.time() + PATIENCE_S
            while self.node.mover.index.failure:
                self.acknowledge(self.found, may_fail=True)
                assert self.loop.time() < give_up, "the index is never begun anew"

    # What must be true at any time.

    @invariant()
    def what_must_be_true(self) -> None:
        if not hasattr(self, "node"):
            return
        self.node.audit()
        self.let_end()
        over = [key for key, end_ns in self.must_end.items() if end_ns <= self.node.now_ns]
        assert not any(map(self.find, over)), "a chunk is found that is over"
        assert self.listed <= self.stored, "a chunk is listed that was never stored"
        assert not self.listed & self.cleared, "a cleared chunk is listed"
        assert self.held - self.damaged - self.doubtful <= self.listed, "a held chunk is gone"
        if self.is_roomy:
            assert self.acknowledged <= self.listed | self.damaged, "an acknowledged chunk is gone"

    def teardown(self) -> None:
        if not hasattr(self, "node"):
            return
        try:
            self.release_all()
            self.do(self.node.settle())
            self.node.audit()
            for key in sorted(self.listed):
                self.assert_read(*self.do(self.node.read([key], standalone=True)))
            self.do(self.node.settle())
            self.node.audit()
        finally:
            try:
                self.do(self.node.crash(calls=0, applied=0, cut=None))
            finally:
                end_loop(self.loop)
                shutil.rmtree(self.folder)

    # Steps that rules share.

    def put(self, path: Sequence[int], has_checksums: bool = False, ttl_ns: int = 0) -> None:
        metas = self.node.put(path, has_checksums=has_checksums, ttl_ns=ttl_ns)
        self.let_end()
        self.paths |= {key: tuple(path[:end]) for end, key in enumerate(keys_of(path), 1)}
        for meta in metas:
            self.may_end.pop(meta.key, None)
            self.must_end.pop(meta.key, None)
        for meta in metas:
            if ttl_ns:
                self.must_end[meta.key] = self.node.now_ns + ttl_ns
                self.bound(meta.key, self.node.now_ns + ttl_ns)
        for end, key in enumerate(keys_of(path), 1):
            if key in self.may_end and end < len(path):
                self.bound(key, self.may_end[key])
        for meta in metas:
            self.stored.add(meta.key)
            self.doubtful |= {meta.key} & self.damaged
            # What was known of an earlier chunk of the key is over.
            for keys in (self.acknowledged, self.damaged, self.cleared, self.forgotten, self.held):
                keys.discard(meta.key)

    def sweep(self) -> None:
        self.node.store.expire_chunks(self.node.now_ns)

    def bound(self, key: ChunkKey, end_ns: int) -> None:
        """A chunk may end by then, and with it all that continues it."""
        path = self.paths[key]
        for other, longer in self.paths.items():
            if longer[: len(path)] == path:
                self.may_end[other] = min(self.may_end.get(other, end_ns), end_ns)

    def let_end(self) -> None:
        """What may be over by now may be gone."""
        over = {key for key, end_ns in self.may_end.items() if end_ns <= self.node.now_ns}
        for keys in (self.acknowledged, self.held):
            keys -= over

    def drop(self, path: Sequence[int]) -> None:
        entry = self.node.store.directory.get(keys_of(path)[-1])
        if entry is None:
            return
        before = self.listed
        members = {member.meta.key for member in entry.descendants()}
        count, _ = self.node.store.drop([entry])
        gone = before - self.listed
        assert gone == (members if count else set())
        self.cleared |= gone
        for keys in (self.acknowledged, self.held):
            keys -= gone

    def wait(self, milliseconds: int) -> None:
        if milliseconds and not self.loop.is_running():
            self.do(asyncio.sleep(milliseconds / 1000))

    def acknowledge(self, entries: list[Entry], *, may_fail: bool = False) -> None:
        may_fail = may_fail or bool(self.damaged or self.node.mover.index.failure)
        done = self.do(self.node.persist(entries))
        assert done.num_pending == 0
        if done.num_durable < len(entries) or done.reason:
            # Also of no chunks at all: then nothing was made durable, clears among it.
            assert done.reason
            assert not self.is_roomy or may_fail, done
            return
        durable = {entry.meta.key for entry in entries}
        self.acknowledged |= durable
        self.doubtful -= durable
        # The same transaction takes what was cleared.
        self.forgotten |= self.cleared

    def release_all(self) -> None:
        while self.leases:
            self.release()
        while self.lent:
            self.give_back()

    def flip_record(self, entry: Entry, where: int, is_header: bool) -> None:
        path, offset, size = self.node.record_of(entry)
        flip(path, offset + where % (4096 if is_header else size), 1 << where % 8)
        self.damaged.add(entry.meta.key)
        self.ever_damaged.add(entry.meta.key)

    def flip_segment(self, entry: Entry) -> None:
        """A segment without a good header holds nothing."""
        path, _, _ = self.node.record_of(entry)
        flip(path, random.Random(entry.meta.key).randrange(4096))
        for other in self.node.store.directory:
            if other.on_disk is not None and self.node.record_of(other)[0] == path:
                self.damaged.add(other.meta.key)
                self.ever_damaged.add(other.meta.key)

    def reopened(self) -> None:
        self.leases.clear()
        self.lent.clear()
        self.held.clear()
        self.do(self.node.open())
        self.let_end()
        listed = self.listed
        assert not listed & self.forgotten, "a cleared chunk is back"
        gone = self.acknowledged - self.damaged - listed
        assert not gone, "an acknowledged chunk is gone"
        # Those that were not forgotten for good may be back: their bytes are right all the same.
        self.cleared -= listed
        self.forgotten &= self.cleared
        self.damaged &= listed
        self.doubtful &= listed
        self.acknowledged &= listed

    def assert_read(
        self,
        good: Sequence[ChunkKey],
        lost: Sequence[ChunkKey],
        damaged: set[ChunkKey] | None = None,
    ) -> None:
        assert set(good) <= self.stored
        allowed = self.damaged | self.doubtful | (damaged or set())
        assert set(lost) <= allowed, "a chunk without damage was lost"


def _key(entry: Entry) -> ChunkKey:
    return entry.meta.key


async def _landed(loan: Loan) -> bool:
    """Whether a bitstream came, when it has come or will not."""
    while loan.state == "coming":
        progress = asyncio.Event()
        loan.watch(progress.set)
        if loan.state == "coming":
            async with asyncio.timeout(PATIENCE_S):
                await progress.wait()
    return loan.state == "here"


class RoomyMachine(TiersMachine):
    SIZE = 32 * MEMORY_SIZE
    is_roomy = True


class SmallMachine(TiersMachine):
    SIZE = 16 * SEGMENT_SIZE


class QuotaMachine(TiersMachine):
    SIZE = 16 * MEMORY_SIZE
    OPTIONS: ClassVar[dict[str, Any]] = {"nvme_quota": 40 * (64 << 10)}


class EncodedMachine(RoomyMachine):
    """What goes to disk goes as a bitstream that gives back just what was stored."""

    OPTIONS: ClassVar[dict[str, Any]] = {"codec": "nvme=toy"}


class LossyMachine(SmallMachine):
    """What comes back from disk is approximate, says so, and never becomes exact or worse again."""

    OPTIONS: ClassVar[dict[str, Any]] = {"codec": "nvme=toy:lossy"}


class PackedMachine(SmallMachine):
    """Memory has chunks raw and encoded, the disk in yet another form."""

    OPTIONS: ClassVar[dict[str, Any]] = {"codec": "cpu=toy:lossy,nvme=toy"}


class MortalRules(TiersMachine):
    """Chunks with a time to live: over is over, in every tier, whatever happens to the daemon."""

    @rule(path=PATHS, ttl_ns=st.integers(1, 30), pause=PAUSES)
    def store_for_a_while(self, path: list[int], ttl_ns: int, pause: int) -> None:
        """A nanosecond is what one store or pin takes."""
        self.put(path, ttl_ns=ttl_ns)
        self.wait(pause)

    @rule(elapsed_ns=st.integers(1, 30))
    def clock_moves(self, elapsed_ns: int) -> None:
        self.node.now_ns += elapsed_ns

    @rule()
    def sweep_now(self) -> None:
        """What is over is gone then, but for what somebody reads or waits for."""
        self.sweep()
        expiries, now_ns = self.node.store.directory.expiries, self.node.now_ns
        read = {entry for _, entries in self.leases for entry in entries}
        read |= {entry for lease in self.lent for entry in lease.entries}
        left = {e for e in self.node.store.directory if expiries.is_over(e, now_ns)}
        assert left <= read, "a chunk that is over stays"


class MortalMachine(MortalRules, RoomyMachine):
    """All else stays as it was promised."""


class MortalPackedMachine(MortalRules, PackedMachine):
    """In three tiers, and with too little room for what is not over."""


class RealIndexMachine(RoomyMachine):
    has_real_index = True


def _case(machine: type[TiersMachine], examples: int, steps: int) -> Any:
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        # Threads take turns as they like: a shorter example is not the same run any more.
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
        print_blob=False,
    )
    return case


# Times as many examples, for a search that may take an hour.
EFFORT = int(os.environ.get("KVD_TEST_EFFORT", "1"))

TestRoomyDisk = _case(RoomyMachine, 10 * EFFORT, 40)
TestSmallDisk = _case(SmallMachine, 10 * EFFORT, 40)
TestQuota = _case(QuotaMachine, 8 * EFFORT, 40)
TestEncoded = _case(EncodedMachine, 6 * EFFORT, 40)
TestLossy = _case(LossyMachine, 6 * EFFORT, 40)
TestPacked = _case(PackedMachine, 6 * EFFORT, 40)
TestMortal = _case(MortalMachine, 8 * EFFORT, 40)
TestMortalPacked = _case(MortalPackedMachine, 8 * EFFORT, 40)
TestRealIndex = _case(RealIndexMachine, 3 * EFFORT, 40)
