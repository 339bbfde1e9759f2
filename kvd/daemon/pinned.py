"""Pinned: what a read lease has of each of its chunks in the arena, and how much may be read.

Raw and in memory, raw and still coming, or a bitstream that is lent to this lease.
"""

from __future__ import annotations

from kvd.chunk import Placement
from kvd.daemon.arrival import Arrival
from kvd.daemon.codec_rules import RAW
from kvd.daemon.leases import ReadLease
from kvd.daemon.store import ChunkStore
from kvd.proto import kvd_pb2 as pb


def place_of(store: ChunkStore, lease: ReadLease, index: int) -> Placement:
    """Where a chunk's bytes are, or will be, and what they are."""
    loan = lease.loans.get(index)
    if loan is not None:
        return Placement(loan.extent, loan.copy.codec, loan.copy.is_exact, loan.copy.checksum)
    entry = lease.entries[index]
    if entry.in_memory is not None:
        return entry.in_memory
    arrival = store.transit.arriving[entry]
    source = arrival.source
    # A bitstream's checksum is not that of what comes out of it.
    checksum = source.checksum if source.codec == RAW else None
    return Placement(arrival.extent, is_exact=source.is_exact, checksum=checksum)


def ready_size(store: ChunkStore, lease: ReadLease, index: int) -> int | None:
    """How many leading bytes may be read now; None if the chunk is lost."""
    loan = lease.loans.get(index)
    if loan is None:
        return store.ready_size(lease.entries[index])
    return None if loan.state == "lost" else loan.ready


def arrival_of(store: ChunkStore, lease: ReadLease, index: int) -> Arrival | None:
    """A chunk's way into the arena while it lasts."""
    loan = lease.loans.get(index)
    if loan is None:
        return store.arrival(lease.entries[index])
    return loan if loan.state == "coming" else None


def is_whole(store: ChunkStore, lease: ReadLease, index: int) -> bool:
    """Whether every byte may be read."""
    loan = lease.loans.get(index)
    if loan is None:
        return store.are_ready(lease.entries[index : index + 1])
    return loan.state == "here"


def describe(store: ChunkStore, lease: ReadLease, reply: pb.PinReply) -> None:
    """Say in `reply` what the lease has."""
    places: list[Placement] = []
    if not lease.loans and store.are_ready(lease.entries):
        places = [entry.placement for entry in lease.entries]
    else:
        indices = range(len(lease.entries))
        places = [place_of(store, lease, index) for index in indices]
        reply.ready.extend([ready_size(store, lease, index) or 0 for index in indices])
    reply.offsets.extend([place.extent.offset for place in places])
    reply.sizes.extend([place.extent.size for place in places])
    reply.num_tokens.extend([entry.meta.num_tokens for entry in lease.entries])
    if any(place.checksum is not None for place in places):
        reply.checksums.extend([place.checksum or 0 for place in places])
    if not all(place.is_exact for place in places):
        reply.is_approximate = bytes(not place.is_exact for place in places)
    if lease.loans:
        reply.codecs.extend(["" if place.codec == RAW else place.codec for place in places])
        reply.starts.extend([entry.meta.start for entry in lease.entries])
