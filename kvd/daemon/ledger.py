"""Ledger: which extents of the arena hold what, in shared memory that outlives the daemon.

A daemon that follows one that was killed adopts its arena, and reads here which bytes are chunks
and which bytes somebody may still write. The one idea: a slot counts by its first byte. It is
filled while that byte says free, one store makes it count, one store ends it; a change of state
fills a second slot before the first one ends. So a SIGKILL between any two instructions leaves an
extent in its old state, in its new one, or in both, of which the later one counts
(docs/formats/ledger.md).

Every extent that is allocated has a slot: what no slot names is free.
"""

from __future__ import annotations

import mmap
import os
import struct

from kvd.arena import is_sealed, make_sealed
from kvd.daemon.ledger_format import (
    COMMITTED,
    FREE,
    HEADER_SIZE,
    KEPT,
    LABEL_SIZE_MAX,
    NUM_SLOTS_MAX,
    SLOT,
    SLOT_CHECKSUM_AT,
    SLOT_EXTENT_SIZE_AT,
    SLOT_SIZE,
    WRITING,
    LedgerContents,
    LedgerHeader,
    Slot,
    checksum,
    contents_of,
    pack_header,
    parse_header,
    parse_slot,
    refuse,
    sort_out,
)
from kvd.daemon.processes import read_boot_id, read_namespaces
from kvd.errors import Unavailable

# Memory is taken in steps, before it is stored into: a store without memory would be a SIGBUS.
GROW_SIZE = 64 << 10

_U64 = struct.Struct("<Q")


class Ledger:
    """The ledger behind `fd`, mapped. Not thread-safe.

    All but `create`, `adopt` and `entries` take a few microseconds and make nothing large.
    """

    def __init__(self, fd: int, header: LedgerHeader) -> None:
        self.fd = fd
        self.header = header
        self.size = header.file_size
        self._map = mmap.mmap(fd, self.size)
        self._view = memoryview(self._map)
        # A slot is made here, then copied.
        self._scratch = memoryview(bytearray(SLOT_SIZE))
        self._sealed = self._scratch[:SLOT_CHECKSUM_AT]
        self._tail = self._scratch[1:]
        self._slot_by_offset: dict[int, int] = {}
        self._free: list[int] = []
        # Slots from `_num_touched` on were never used, those from `_num_backed` have no memory.
        self._num_touched = 0
        self._num_backed = 0
        self._is_read = False

    @classmethod
    def create(cls, num_slots: int, *, arena_size: int, instance: bytes) -> Ledger:
        """An empty ledger, sealed, for a new arena of `arena_size` bytes that the daemon `instance`
        (16 bytes) made. Raises `Unavailable` where the machine does not give it.
        """
        assert 0 < num_slots <= NUM_SLOTS_MAX
        assert len(instance) == 16
        header = LedgerHeader(
            instance=instance,
            arena_size=arena_size,
            num_slots=num_slots,
            boot_id=read_boot_id(),
            namespaces=read_namespaces(),
        )
        try:
            fd = make_sealed("kvd-ledger", header.file_size)
            try:
                os.posix_fallocate(fd, 0, HEADER_SIZE)
                ledger = cls(fd, header)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise Unavailable(f"no memory for a ledger of {num_slots} slots: {error}") from error
        ledger._view[:HEADER_SIZE] = pack_header(header)
        ledger._is_read = True
        return ledger

    @classmethod
    def adopt(cls, fd: int, *, arena_size: int) -> Ledger:
        """The ledger that an earlier daemon left with an arena of `arena_size` bytes; takes `fd`
        over. Its `entries` are read before anything is written.

        Raises `Corrupt` for all but a sound ledger of this version, arena, boot and set of
        namespaces: then nothing of that arena may be believed.
        """
        try:
            if not is_sealed(fd):
                refuse("sealed memory", "something else")
            block = os.pread(fd, HEADER_SIZE, 0)
            header = parse_header(block, file_size=os.fstat(fd).st_size)
            if header.arena_size != arena_size:
                refuse(f"an arena of {arena_size} bytes", f"one of {header.arena_size}")
            if header.boot_id != read_boot_id():
                refuse("one of this boot of the machine", "one of an earlier boot")
            if header.namespaces != read_namespaces():
                refuse("one of these pid and time namespaces", "one of others")
            return cls(fd, header)
        except BaseException:
            os.close(fd)
            raise

    @property
    def num_entries(self) -> int:
        """How many extents have a slot."""
        return len(self._slot_by_offset)

    def write(self, offset: int, size: int, pid: int, start: int, token: int) -> bool:
        """Process `pid`, started at `start`, may write the extent from now on, in session `token`.

        False where no slot is left: then nobody must be given the extent.
        """
        assert offset not in self._slot_by_offset
        return self._put(WRITING, offset, size, pid=pid, start=start, token=token)

    def commit(self, offset: int) -> bool:
        """Nobody writes the extent any more; it has no checksum yet, and others may read it.

        False where there is no memory for that: then it stays as it was.
        """
        return self._put(COMMITTED, offset, self._extent_size(offset))

    def keep(self, offset: int, size: int, checksum: int, label: bytes) -> bool:
        """The extent holds a whole chunk: `label` says which, its bytes have this XXH3-64.

        Of an extent that was written or committed, or of a new one. False for a label of more than
        `LABEL_SIZE_MAX` bytes or where no slot is left: then it stays as it was.
        """
        assert offset not in self._slot_by_offset or self._extent_size(offset) == size
        if len(label) > LABEL_SIZE_MAX:
            return False
        return self._put(KEPT, offset, size, payload=checksum, label=label)

    def erase(self, offset: int) -> None:
        """The extent holds nothing. MUST come before its bytes are anybody else's."""
        self._clear(self._slot_by_offset.pop(offset))

    def entries(self) -> LedgerContents:
        """All that the ledger holds. O(slots ever used); not for the event loop.

        Slots that an interrupted change left behind are freed. Those that are not sound, or name
        extents that overlap, are counted, left out, left as they are and never used again.
        """
        self._num_touched = self._num_backed = self._count_touched()
        found: list[tuple[Slot, int]] = []
        self._free = []
        num_torn = 0
        # Backwards, so that the lowest free slots are taken first.
        for index in reversed(range(self._num_touched)):
            at = HEADER_SIZE + index * SLOT_SIZE
            if self._view[at] == FREE:
                self._free.append(index)
                continue
            slot = parse_slot(
                bytes(self._view[at : at + SLOT_SIZE]), arena_size=self.header.arena_size
            )
            if slot is None:
                num_torn += 1
            else:
                found.append((slot, index))
        sorted_slots = sort_out(found)
        for index in sorted_slots.outdated:
            self._clear(index)
        self._slot_by_offset = {slot.offset: index for slot, index in sorted_slots.sound}
        self._is_read = True
        return contents_of(sorted_slots, num_torn=num_torn)

    def close(self) -> None:
        """Let go of descriptor and mapping. What is in it stays as long as a keeper holds it."""
        if self.fd >= 0:
            self._view.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1

    def _put(
        self,
        state: int,
        offset: int,
        size: int,
        *,
        payload: int = 0,
        pid: int = 0,
        start: int = 0,
        token: int = 0,
        label: bytes = b"",
    ) -> bool:
        assert self._is_read, "an adopted ledger is read before it is written"
        scratch = self._scratch
        SLOT.pack_into(
            scratch, 0, state, len(label), pid, offset, size, payload, start, token, label
        )
        _U64.pack_into(scratch, SLOT_CHECKSUM_AT, checksum(self._sealed))
        before = self._slot_by_offset.get(offset)
        index = self._take_slot(num_spare=1 if before is None else 0)
        if index is None:
            return False
        at = HEADER_SIZE + index * SLOT_SIZE
        # All but the state; then the state; then the end of the state before. In this order.
        self._view[at + 1 : at + SLOT_SIZE] = self._tail
        self._view[at] = state
        self._slot_by_offset[offset] = index
        if before is not None:
            self._clear(before)
        return True

    def _take_slot(self, *, num_spare: int) -> int | None:
        # A new extent leaves one slot over, so that every extent can change its state.
        if len(self._free) + self.header.num_slots - self._num_touched <= num_spare:
            return None
        if self._free:
            return self._free.pop()
        if self._num_touched == self._num_backed and not self._grow():
            return None
        self._num_touched += 1
        return self._num_touched - 1

    def _grow(self) -> bool:
        start = HEADER_SIZE + self._num_backed * SLOT_SIZE
        end = min(start + GROW_SIZE, self.size)
        try:
            os.posix_fallocate(self.fd, start, end - start)
        except OSError:
            # Every slot that is in use stays as it is.
            return False
        self._num_backed = (end - HEADER_SIZE) // SLOT_SIZE
        return True

    def _clear(self, index: int) -> None:
        self._view[HEADER_SIZE + index * SLOT_SIZE] = FREE
        self._free.append(index)

    def _extent_size(self, offset: int) -> int:
        at = HEADER_SIZE + self._slot_by_offset[offset] * SLOT_SIZE
        (size,) = _U64.unpack_from(self._view, at + SLOT_EXTENT_SIZE_AT)
        return int(size)

    def _count_touched(self) -> int:
        # Slots are taken from the first on: behind the last page of data none was ever used.
        end = HEADER_SIZE
        while end < self.size:
            try:
                start = os.lseek(self.fd, end, os.SEEK_DATA)
            except OSError:
                # ENXIO: only holes from here on.
                break
            end = os.lseek(self.fd, start, os.SEEK_HOLE)
        return (end - HEADER_SIZE) // SLOT_SIZE
