"""The ledger's format: header and slots, bytes to values and back. docs/formats/ledger.md.

Nothing here trusts what it reads: a slot that is not sound is no slot, and of extents that overlap
none is believed. No I/O; the ledger of shared memory over it is in ledger.py.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NoReturn

import xxhash

from kvd.errors import Corrupt
from kvd.tiers.allocator import GRANULE_SIZE

FORMAT_VERSION = 1

HEADER_SIZE = 4096
SLOT_SIZE = 512
LABEL_SIZE_MAX = 448

# Chunks are larger, so slots do not run out; the ledger is at most 1/128 of its arena.
ARENA_SIZE_PER_SLOT = 64 << 10
# An arena of 4 TiB.
NUM_SLOTS_MAX = 1 << 26

FREE, WRITING, COMMITTED, KEPT = range(4)

MAGIC = b"KVD-LDG\0"

# Magic, version, flags, header size, instance, arena size, slot size, num slots, boot, namespaces.
_HEADER = struct.Struct("<8sHHI16sQII16sQ")
_HEADER_CHECKSUM_AT = 120
_U64 = struct.Struct("<Q")

# State, label size, pid, offset, size, checksum, process start, token, label.
SLOT = struct.Struct(f"<BxHIQQQQQ8x{LABEL_SIZE_MAX}s")
SLOT_CHECKSUM_AT = SLOT_SIZE - 8
SLOT_EXTENT_SIZE_AT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerHeader:
    """Whose ledger it is. `instance` is the daemon that made it and its arena, 16 bytes."""

    instance: bytes
    arena_size: int
    num_slots: int
    boot_id: bytes
    namespaces: int

    @property
    def file_size(self) -> int:
        """Bytes of the whole ledger."""
        return HEADER_SIZE + self.num_slots * SLOT_SIZE


@dataclass(frozen=True, slots=True)
class WritingSlot:
    """An extent that a process may be writing. `start` is in clock ticks since the boot."""

    offset: int
    size: int
    pid: int
    start: int
    token: int


@dataclass(frozen=True, slots=True)
class CommittedSlot:
    """An extent that nobody writes, whose bytes have no checksum: of use to nobody any more."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class KeptSlot:
    """A whole chunk: its bytes have this XXH3-64, or are not to be used."""

    offset: int
    size: int
    checksum: int
    label: bytes


Slot = WritingSlot | CommittedSlot | KeptSlot

# The later of two states of one extent is the greater.
_RANKS = {WritingSlot: WRITING, CommittedSlot: COMMITTED, KeptSlot: KEPT}


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerContents:
    """What a ledger holds, each list in the order of offsets.

    A kill leaves nothing torn and nothing that overlaps. Where there is any, somebody else wrote
    into the ledger, and bytes that it does not name may be in use all the same.
    """

    kept: list[KeptSlot]
    committed: list[CommittedSlot]
    writing: list[WritingSlot]
    num_torn: int
    num_overlapping: int

    @property
    def is_sound(self) -> bool:
        """Whether the bytes that no slot names are free."""
        return not self.num_torn and not self.num_overlapping


@dataclass(frozen=True, slots=True, kw_only=True)
class SortedSlots:
    """Slots with their places, in the order of offsets; `outdated` are places of earlier states."""

    sound: list[tuple[Slot, int]]
    outdated: list[int]
    num_overlapping: int


def pack_header(header: LedgerHeader) -> bytes:
    """The whole header of a ledger."""
    block = bytearray(HEADER_SIZE)
    _HEADER.pack_into(
        block,
        0,
        MAGIC,
        FORMAT_VERSION,
        0,
        HEADER_SIZE,
        header.instance,
        header.arena_size,
        SLOT_SIZE,
        header.num_slots,
        header.boot_id,
        header.namespaces,
    )
    _U64.pack_into(block, _HEADER_CHECKSUM_AT, checksum(block[:_HEADER_CHECKSUM_AT]))
    return bytes(block)


def parse_header(block: bytes, *, file_size: int) -> LedgerHeader:
    """The header of a ledger of `file_size` bytes. Raises `Corrupt`."""
    if len(block) != HEADER_SIZE or not block.startswith(MAGIC):
        refuse("a header", "none")
    if _U64.unpack_from(block, _HEADER_CHECKSUM_AT) != (checksum(block[:_HEADER_CHECKSUM_AT]),):
        refuse("a whole header", "a damaged one")
    (_, version, flags, header_size, instance, arena_size, slot_size, num_slots, *place) = (
        _HEADER.unpack_from(block)
    )
    if version != FORMAT_VERSION:
        refuse(f"version {FORMAT_VERSION}", version)
    if (flags, header_size, slot_size) != (0, HEADER_SIZE, SLOT_SIZE):
        refuse(f"flags and sizes 0, {HEADER_SIZE}, {SLOT_SIZE}", (flags, header_size, slot_size))
    if any(block[_HEADER.size : _HEADER_CHECKSUM_AT]) or any(block[_HEADER_CHECKSUM_AT + 8 :]):
        refuse("zeros in what is reserved", "others")
    header = LedgerHeader(
        instance=instance,
        arena_size=arena_size,
        num_slots=num_slots,
        boot_id=place[0],
        namespaces=place[1],
    )
    if not 0 < num_slots <= NUM_SLOTS_MAX or file_size != header.file_size:
        refuse(f"{num_slots} slots of {SLOT_SIZE} bytes", f"{file_size} bytes in all")
    return header


def parse_slot(block: bytes, *, arena_size: int) -> Slot | None:
    """What a slot that is not free says, or None where it is not sound."""
    if _U64.unpack_from(block, SLOT_CHECKSUM_AT) != (checksum(block[:SLOT_CHECKSUM_AT]),):
        return None
    state, label_size, pid, offset, size, payload, start, token, label = SLOT.unpack_from(block)
    if offset % GRANULE_SIZE or not 0 < size <= arena_size - offset:
        return None
    if label_size > LABEL_SIZE_MAX:
        return None
    if state == KEPT:
        return KeptSlot(offset, size, payload, label[:label_size])
    if state == COMMITTED:
        return CommittedSlot(offset, size)
    if state == WRITING:
        return WritingSlot(offset, size, pid, start, token)
    return None


def sort_out(found: list[tuple[Slot, int]]) -> SortedSlots:
    """Take each extent once, in its latest state, and none that overlaps another. `found` holds
    slots with their places, in any order.
    """
    found = sorted(found, key=lambda one: (one[0].offset, one[0].size, _RANKS[type(one[0])]))
    latest: list[tuple[Slot, int]] = []
    outdated: list[int] = []
    for slot, index in found:
        if latest and (latest[-1][0].offset, latest[-1][0].size) == (slot.offset, slot.size):
            outdated.append(latest.pop()[1])
        latest.append((slot, index))
    sound: list[tuple[Slot, int]] = []
    end, is_clash = 0, False
    for slot, index in latest:
        if slot.offset < end:
            # It goes, and so does the one before it if that is still believed.
            if not is_clash:
                sound.pop()
            is_clash = True
        else:
            sound.append((slot, index))
            is_clash = False
        end = max(end, slot.offset + slot.size)
    return SortedSlots(sound=sound, outdated=outdated, num_overlapping=len(latest) - len(sound))


def contents_of(sorted_slots: SortedSlots, *, num_torn: int) -> LedgerContents:
    """The sound ones by their states."""
    slots = [slot for slot, _ in sorted_slots.sound]
    return LedgerContents(
        kept=[slot for slot in slots if isinstance(slot, KeptSlot)],
        committed=[slot for slot in slots if isinstance(slot, CommittedSlot)],
        writing=[slot for slot in slots if isinstance(slot, WritingSlot)],
        num_torn=num_torn,
        num_overlapping=sorted_slots.num_overlapping,
    )


def num_slots_for(arena_size: int) -> int:
    """Slots of a ledger for an arena of that size."""
    return min(-(-arena_size // ARENA_SIZE_PER_SLOT), NUM_SLOTS_MAX)


def checksum(block: bytes | bytearray | memoryview) -> int:
    """XXH3-64 with seed 0."""
    return xxhash.xxh3_64_intdigest(block)


def refuse(wanted: str, found: object) -> NoReturn:
    """Raise `Corrupt` for a ledger that cannot be believed."""
    raise Corrupt(f"the ledger that was kept: {wanted} expected, found {found}; start a new one")
