"""Transit: a store's chunks between memory and what lies below it, either way.

    fetch ─► arriving, pinned ─► land: in memory                 a bitstream is lent: loans.py
                             └─► lose: gone; who has it pinned keeps what had come of it
    begin_demotion ─► demoting, pinned ─► end_demotion: on disk as well, or not

A chunk that is dropped on its way keeps its extent until the move has ended. Bookkeeping only: the
`Lower` moves the bytes, and says here what has become of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from kvd.chunk import ChunkMeta, Extent, Placement
from kvd.daemon.arrival import Arrival, Arrivals
from kvd.daemon.codec_rules import RAW
from kvd.daemon.directory import Directory, Entry
from kvd.daemon.expiries import Expiry
from kvd.daemon.leases import ANYTHING_RAW, Loan, Terms
from kvd.daemon.loans import Loans
from kvd.daemon.memory import Memory
from kvd.keys import ChunkKey, PackedKeys

# Chunks that come from disk because a lookup found them: enough to keep the device busy until the
# pin, few enough that lookups which no pin follows cost little.
PREFETCHES_MAX = 32


class Transit:
    """Between `memory` and its `lower`. `make_room` gives an extent of so many bytes at a time, or
    None; `whole_size` knows how many a chunk has there; `evict` takes it out of memory, `remove`
    unlists it.
    """

    def __init__(
        self,
        memory: Memory,
        directory: Directory,
        counters: Counter[str],
        arrivals: Arrivals,
        loans: Loans,
        *,
        make_room: Callable[[int, int], Extent | None],
        whole_size: Callable[[ChunkMeta, Placement], int | None],
        evict: Callable[[Entry], None],
        remove: Callable[[Entry], None],
    ) -> None:
        # Chunks on their way into memory, and those whose bytes are being written or encoded.
        self.arriving = arrivals.coming
        self.demoting: set[Entry] = set()
        self.packing: set[Entry] = set()
        # What had come of chunks that were lost on the way, while somebody has them pinned.
        self.lost: dict[Entry, Extent] = {}
        self._arrivals = arrivals
        self._loans = loans
        self._memory = memory
        self._directory = directory
        self._counters = counters
        self._make_room = make_room
        self._whole_size = whole_size
        self._evict = evict
        self._remove = remove

    def source_of(self, entry: Entry, *, is_exact: bool = False) -> Placement | None:
        """The copy that a pin gives, or that comes for it; with `is_exact`, None where there is no
        exact one, or where somebody reads an approximate one in memory or waits for it there.
        """
        arrival = self.arriving.get(entry)
        found = entry.placement if arrival is None else arrival.source
        if found.is_exact or not is_exact:
            return found
        if arrival is not None or (entry.in_memory is not None and entry.pins):
            return None
        copies = (entry.packed, entry.on_disk)
        return next((copy for copy in copies if copy is not None and copy.is_exact), None)

    def lent_from(self, entry: Entry, terms: Terms) -> Placement | None:
        """The bitstream that a client of these terms gets of a chunk, or None: it gets it raw."""
        if entry in self.arriving:
            return None
        source = self.source_of(entry, is_exact=terms.is_exact)
        if source is None or source.codec == RAW or source.codec not in terms.codecs:
            return None
        return source

    def fetch(self, entry: Entry, now_ns: int, source: Placement | None = None) -> bool:
        """Let a listed chunk begin to come to memory unless it is there; False where there is no
        room. It comes from `source`, which takes the place of an approximate copy that nobody
        reads.
        """
        if entry in self.arriving:
            return True
        source = source or entry.placement
        if source is entry.in_memory:
            return True
        home = self._memory.packed if source is entry.packed else self._memory.lower
        assert home is not None
        size = self._whole_size(entry.meta, source)
        if size is not None and entry.in_memory is not None:
            self._evict(entry)
        extent = None if size is None else self._make_room(size, now_ns)
        if extent is None:
            return False
        arrival = Arrival(entry, extent, source)
        self.arriving[entry] = arrival
        self._memory.reserve(extent)
        self._memory.policy.insert(entry.meta, now_ns)
        self._memory.pin(entry)
        home.fetch(arrival)
        return True

    def fetch_all(
        self,
        entries: list[Entry],
        found: list[bool],
        now_ns: int,
        *,
        standalone: bool,
        terms: Terms = ANYTHING_RAW,
    ) -> tuple[list[Entry], list[bool], dict[int, Loan]]:
        """Let those of the found chunks begin to come that are not in memory as `terms` want them,
        lent where they want that: loans by the place of their chunk. Where memory has no room for
        one it counts as not found, and so do those behind it in a chain.
        """
        # Before the pins: what somebody else reads is told by those.
        wanted = [
            (self.source_of(entry, is_exact=terms.is_exact), self.lent_from(entry, terms))
            for entry in entries
        ]
        for entry in entries:
            self._memory.pin(entry)
        kept: list[Entry] = []
        comes: list[bool] = []
        loans: dict[int, Loan] = {}
        try:
            for entry, (source, bitstream) in zip(entries, wanted, strict=True):
                if bitstream is None:
                    comes.append(self.fetch(entry, now_ns, source))
                else:
                    loan = self._loans.lend(entry, bitstream, now_ns)
                    comes.append(loan is not None)
                    if loan is not None:
                        loans[len(kept)] = loan
                if comes[-1]:
                    kept.append(entry)
                    continue
                self._counters["promote_full"] += 1
                if not standalone:
                    break
        finally:
            for entry in entries:
                self._memory.unpin(entry)
        if len(kept) == len(entries):
            return entries, found, loans
        if not standalone:
            return kept, [True] * len(kept) + [False], loans
        each = iter(comes)
        return kept, [is_here and next(each) for is_here in found], loans

    def prefetch(
        self,
        keys: Sequence[ChunkKey] | PackedKeys,
        count: int,
        now_ns: int,
        *,
        terms: Terms = ANYTHING_RAW,
    ) -> None:
        """Let those of the first `count` chunks that are on disk only begin to come, as far as that
        costs nobody a chunk. What a client of `terms` takes as a bitstream stays as it is.
        """
        for index in range(count):
            entry = self._directory.get(keys[index])
            if entry is None or entry.in_memory is not None or entry in self.arriving:
                continue
            if self.lent_from(entry, terms) is not None:
                continue
            if len(self.arriving) >= PREFETCHES_MAX:
                return
            source = self.source_of(entry, is_exact=terms.is_exact) or entry.placement
            size = self._whole_size(entry.meta, source)
            if size is None or size > self._memory.ready_size:
                return
            if not self.fetch(entry, now_ns, source):
                return
            self._counters["prefetch_chunks"] += 1

    def land(self, arrival: Arrival) -> None:
        """All bytes of a chunk from disk are in memory, verified."""
        if isinstance(arrival, Loan):
            self._loans.land(arrival)
            return
        entry = arrival.entry
        self._end_arrival(arrival)
        if not self._is_listed(entry):
            self._memory.free(arrival.extent)
            return
        source = arrival.source
        # A bitstream's checksum is not that of what comes out of it.
        checksum = source.checksum if source.codec == RAW else None
        self._memory.place(
            entry, Placement(arrival.extent, is_exact=source.is_exact, checksum=checksum)
        )
        if self._memory.hot is not None and source.is_exact:
            # What is remembered beyond the daemon's life is taken for exact.
            self._memory.hot.keep(entry)
        self._counters["promote_chunks"] += 1
        self._counters["promote_bytes"] += arrival.extent.size

    def lose(self, arrival: Arrival) -> None:
        """The chunk could not be read right: it is gone, and a miss for those who wait for it."""
        if isinstance(arrival, Loan):
            self._loans.lose(arrival)
            return
        entry = arrival.entry
        if self._is_listed(entry):
            self._remove(entry)
        self._end_arrival(arrival)
        if entry.pins:
            # Somebody may be copying what has come of it, which was right.
            self.lost[entry] = arrival.extent
            self._memory.reserve(arrival.extent)
        else:
            self._memory.free(arrival.extent)

    def free_lost(self, entry: Entry) -> None:
        """Nobody has the lost chunk pinned any more."""
        extent = self.lost.pop(entry)
        self._memory.unreserve(extent)
        self._memory.free(extent)

    def begin_demotion(self, entry: Entry) -> None:
        """The chunk's bytes are being written to disk: they stay where they are."""
        assert entry.in_memory is not None
        assert entry.on_disk is None
        self.demoting.add(entry)
        self._memory.pin(entry)

    def end_demotion(self, entry: Entry, placement: Placement | None) -> bool:
        """They are on disk, or, with None, will not be. False if nobody wants them any more: then
        the copy is the caller's to drop.
        """
        self.demoting.discard(entry)
        if not self._stays(entry):
            return False
        if placement is not None:
            self._memory.shelve(entry, placement)
            entry.is_recent = False
        return True

    def begin_packing(self, entry: Entry) -> None:
        """The chunk's bytes are being encoded: they stay where they are."""
        assert entry.in_memory is not None
        assert entry.packed is None
        self.packing.add(entry)
        self._memory.pin(entry)

    def end_packing(self, entry: Entry) -> bool:
        """They are encoded, or will not be. False if nobody wants them any more."""
        self.packing.discard(entry)
        return self._stays(entry)

    def pack(self, entry: Entry, placement: Placement) -> None:
        """The chunk has an encoded copy."""
        self._memory.pack(entry, placement)

    def unpack(self, entry: Entry) -> None:
        """Give up the encoded copy of a chunk that does not arrive from it; without another, the
        chunk.
        """
        arrival = self.arriving.get(entry)
        assert arrival is None or arrival.source is not entry.packed
        if entry.in_memory is None and entry.on_disk is None:
            self._remove(entry)
            return
        assert self._memory.packed is not None
        self._memory.packed.drop(entry)
        self._memory.unpack(entry)

    def is_leaving(self, entry: Entry) -> bool:
        """Whether its bytes in memory are being written or encoded."""
        return entry in self.demoting or entry in self.packing

    def num_moves(self, entry: Entry) -> int:
        """How many moves have the entry pinned; its other pins are those of readers."""
        moving = (entry in self.demoting, entry in self.packing, entry in self.arriving)
        return sum(moving)

    def _stays(self, entry: Entry) -> bool:
        """A move that needed the chunk's bytes has ended; False if it is not listed any more."""
        self._memory.unpin(entry)
        if self._is_listed(entry):
            return True
        if not self.is_leaving(entry):
            assert entry.in_memory is not None
            self._memory.free(entry.in_memory.extent)
            entry.in_memory = None
        return False

    @property
    def demoting_size(self) -> int:
        """Bytes of memory that are being written to disk."""
        return _size_in_memory(self.demoting)

    @property
    def packing_size(self) -> int:
        """Bytes of memory that are being encoded."""
        return _size_in_memory(self.packing)

    def is_demoting(self, entry: Entry) -> bool:
        """Whether its bytes are on their way to disk."""
        return entry in self.demoting

    def restore(
        self, meta: ChunkMeta, placement: Placement, expiry: Expiry | None = None
    ) -> Entry | None:
        """List a chunk that is on disk from before; None if it is listed with such a copy."""
        entry = self._directory.get(meta.key)
        if entry is None:
            entry = Entry(meta, on_disk=placement)
            self._directory.insert(entry, expiry)
            return entry
        if entry.on_disk is not None:
            return None
        self._memory.shelve(entry, placement)
        self._directory.expiries.begin(entry, expiry)
        return entry

    def unshelve(self, entry: Entry) -> None:
        """Give up the copy on disk of a chunk, which nobody reads; without another, the chunk."""
        assert not self._arrivals.reads_disk(entry)
        if entry.in_memory is None and entry.packed is None:
            self._remove(entry)
            return
        assert self._memory.lower is not None
        self._memory.lower.drop(entry)
        self._memory.unshelve(entry)

    def _end_arrival(self, arrival: Arrival) -> None:
        del self.arriving[arrival.entry]
        self._memory.unreserve(arrival.extent)
        self._memory.unpin(arrival.entry)

    def _is_listed(self, entry: Entry) -> bool:
        return self._directory.get(entry.meta.key) is entry


def _size_in_memory(entries: Iterable[Entry]) -> int:
    return sum(e.in_memory.extent.size for e in entries if e.in_memory is not None)
