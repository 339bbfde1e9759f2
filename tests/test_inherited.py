"""What an earlier daemon left in memory, while it is being looked at."""

from __future__ import annotations

from collections.abc import Iterable

from kvd.chunk import Extent, Placement
from kvd.daemon.arrival import Arrival
from kvd.daemon.directory import Entry
from kvd.daemon.leases import Writer
from tests.test_store import LAYOUT, Below, chain, keys_of, new_store, pin, put


class Beside:
    """A hot set of which the test says when it has looked at a chunk."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.num_extents = 0

    def write(self, extent: Extent, writer: Writer | None) -> bool:
        self.num_extents += 1
        return True

    def keep(self, entry: Entry) -> None:
        pass

    def erase(self, extent: Extent) -> None:
        self.num_extents -= 1

    def stopped(self, tokens: Iterable[int]) -> None:
        pass

    def verify(self, arrival: Arrival) -> None:
        self.arrivals.append(arrival)

    def check(self, num_extents: int) -> None:
        assert num_extents == self.num_extents


def test_a_chunk_that_left_memory_while_it_was_looked_at_keeps_its_copy_on_disk() -> None:
    store, beside, size = new_store(), Beside(), LAYOUT.size(16)
    store.lower = Below()  # type: ignore[assignment]
    store.hot = beside
    extent = store.tier.allocate_at(0, size)
    assert extent is not None
    assert beside.write(extent, None)
    (meta,) = chain((1,))
    assert store.inherited.revive(meta, Placement(extent, checksum=5), 0)
    assert store.restore(meta, Placement(Extent("nvme", 0, size), checksum=5))
    lease = pin(store, (1,))
    (arrival,) = beside.arrivals
    assert store.ready_size(lease.entries[0]) == 0
    # The client has left before anybody has said what its chunk is.
    store.release(lease.id)
    for index in range(8):
        put(store, (7, index))
    store.check()
    # Others have its bytes by now.
    store.inherited.verified(arrival, is_good=False)
    store.check()
    assert store.lookup(keys_of((1,))) == 1
    assert store.counters["damaged_chunks"] == 0
