"""The segment log against a dict, with power cuts that take any block that was not synced."""

from __future__ import annotations

import random
import shutil
import tempfile
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from kvd.chunk import Extent
from kvd.errors import Corrupt
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.cipher import Cipher
from kvd.tiers.segment import BLOCK_SIZE, record_size
from kvd.tiers.segment_log import FoundRecord, SegmentLog
from tests.file_faults import ForgetfulOps, pattern

SEGMENT_SIZE = 16 * BLOCK_SIZE
SIZE = 4 * SEGMENT_SIZE


@dataclass
class Written:
    """A record that was once appended."""

    seed: int
    size: int
    extent: Extent
    life: int
    is_durable: bool = False
    # Freed and its segment used again: it must never be seen any more.
    is_over: bool = False

    @property
    def payload(self) -> NDArray[object]:
        return pattern(self.seed, self.size)


class SegmentLogMachine(RuleBasedStateMachine):
    """What is synced stays until it is freed; what is found was written; nothing old comes back."""

    cipher: Cipher | None = None

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvd-log-"))
        self.generation = 0
        self.written: dict[bytes, Written] = {}
        self.live: dict[bytes, Written] = {}
        self.seeds = count(1)
        self.open()

    def open(self) -> None:
        self.ops = ForgetfulOps()
        self.log = SegmentLog(
            self.folder / str(self.generation),
            SIZE,
            segment_size=SEGMENT_SIZE,
            is_direct=False,
            cipher=self.cipher,
            ops=self.ops,
        )

    @rule(size=st.integers(1, SEGMENT_SIZE - 2 * BLOCK_SIZE), tail=st.booleans())
    def append(self, size: int, tail: bool) -> None:
        # Whole blocks make old and new records meet at the same offsets.
        size = size if tail else record_size(size) - BLOCK_SIZE
        seed = next(self.seeds)
        label = b"%d" % seed
        before = self.log.segments()
        extent = self.log.append(label, pattern(seed, size))
        if extent is None:
            assert len(before) * SEGMENT_SIZE == SIZE
            assert not any(segment.status == "void" for segment in before)
            assert all(s.free_size < record_size(size) for s in before if s.status == "active")
            assert sum(s.status == "active" for s in before) <= 1
            return
        life = self.log.life(extent)
        slot = extent.offset // SEGMENT_SIZE
        for old in self.written.values():
            if old.extent.offset // SEGMENT_SIZE == slot and old.life != life:
                assert b"%d" % old.seed not in self.live
                old.is_over = True
        self.live[label] = self.written[label] = Written(seed, size, extent, life)

    @rule()
    def sync(self) -> None:
        self.log.sync()
        for record in self.live.values():
            record.is_durable = True

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def sync_one(self, data: st.DataObject) -> None:
        record = data.draw(st.sampled_from(list(self.live.values())))
        self.log.sync([record.extent])
        record.is_durable = True

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        self.assert_right(data.draw(st.sampled_from(list(self.live.values()))))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        label = data.draw(st.sampled_from(list(self.live)))
        self.log.free(self.live.pop(label).extent)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        label = data.draw(st.sampled_from(list(self.live)))
        assert self.log.kill(self.live.pop(label).extent)
        # Durably, and with all that was written to its segment.
        self.written[label].is_over = True

    @precondition(lambda self: any(not s.num_extents for s in self.log.segments()))
    @rule(data=st.data())
    def reclaim(self, data: st.DataObject) -> None:
        slots = [s.slot for s in self.log.segments() if s.status == "full" and not s.num_extents]
        if slots:
            self.log.reclaim(data.draw(st.sampled_from(slots)))

    @rule()
    def free_oldest_segment(self) -> None:
        full = [s for s in self.log.segments() if s.status == "full"]
        if not full:
            return
        slot = min(full, key=lambda s: s.sequence).slot
        for label, record in list(self.live.items()):
            if record.extent.offset // SEGMENT_SIZE == slot:
                self.log.free(record.extent)
                del self.live[label]
        self.log.reclaim(slot)

    @rule()
    def prepare(self) -> None:
        self.log.prepare()

    @rule()
    def retire(self) -> None:
        self.log.retire()

    @rule()
    def reopen(self) -> None:
        self.log.close()
        self.open()
        found = self.take_up()
        assert self.live.keys() <= found.keys()

    @rule(seed=st.integers(0, 2**32))
    def power_cut(self, seed: int) -> None:
        target = self.folder / str(self.generation + 1)
        source = self.folder / str(self.generation)
        self.ops.power_cut(source, target, random.Random(seed))
        self.log.close()
        shutil.rmtree(source)
        self.generation += 1
        self.open()
        found = self.take_up()
        for label, record in self.live.items():
            assert label in found or not record.is_durable
        out = aligned_bytes(SEGMENT_SIZE)
        for label in found.keys() & self.live.keys():
            record = self.live[label]
            try:
                self.log.read(record.extent, out[: record.size])
            except Corrupt:
                assert not record.is_durable
                self.log.free(record.extent)
                del self.live[label]
        for label in self.live.keys() - found.keys():
            del self.live[label]
        for record in self.live.values():
            record.is_durable = True

    @invariant()
    def books_balance(self) -> None:
        self.log.check()
        assert self.log.num_extents == len(self.live)
        assert self.log.used == sum(record_size(r.size) for r in self.live.values())
        files = list((self.folder / str(self.generation)).glob("segment-*"))
        assert sum(path.stat().st_size for path in files) == self.log.disk_size <= SIZE
        for segment in self.log.segments():
            assert segment.live_size + segment.dead_size + segment.free_size == SEGMENT_SIZE

    def take_up(self) -> dict[bytes, FoundRecord]:
        found = {record.header.label: record for record in self.log.scan()}
        out = aligned_bytes(SEGMENT_SIZE)
        for label, record in found.items():
            # A phantom, or a stale one, would fail here.
            known = self.written[label]
            assert record.extent == known.extent
            assert self.log.life(record.extent) == known.life
            assert not known.is_over
            if label in self.live:
                assert self.log.adopt(record.extent, life=known.life)
            else:
                # Freed, but its segment is not reclaimed yet, or that did not reach the disk.
                try:
                    self.log.read(record.extent, out[: known.size])
                except Corrupt:
                    continue
                assert (out[: known.size] == known.payload).all()
        return found

    def assert_right(self, record: Written) -> None:
        out = aligned_bytes(record.size)
        header = self.log.read(record.extent, out)
        assert header.label == b"%d" % record.seed
        assert (out == record.payload).all()

    def teardown(self) -> None:
        if hasattr(self, "log"):
            for record in self.live.values():
                self.assert_right(record)
            self.log.close()
            shutil.rmtree(self.folder)


TestSegmentLog = SegmentLogMachine.TestCase
TestSegmentLog.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


class EncryptedLogMachine(SegmentLogMachine):
    """The same, and no byte without its key."""

    cipher = Cipher(b"k" * 32)


TestEncryptedLog = EncryptedLogMachine.TestCase
TestEncryptedLog.settings = settings(TestSegmentLog.settings, max_examples=20)
