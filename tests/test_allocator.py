"""The allocator against a plain list of ranges."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvd.tiers.allocator import GRANULE_SIZE, Allocator, round_up

SIZE = 256 * GRANULE_SIZE


class AllocatorMachine(RuleBasedStateMachine):
    """Allocations never overlap, failures are honest, and everything comes back."""

    ranges = Bundle("ranges")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(SIZE)
        self.model: dict[int, int] = {}

    @rule(target=ranges, size=st.integers(1, SIZE // 3))
    def allocate(self, size: int) -> int | None:
        longest = self.allocator.largest_free
        offset = self.allocator.allocate(size)
        assert (offset is None) == (round_up(size) > longest)
        if offset is not None:
            assert offset % GRANULE_SIZE == 0
            assert offset + size <= SIZE
            self.model[offset] = round_up(size)
        return offset

    @rule(
        target=ranges,
        granule=st.integers(-1, SIZE // GRANULE_SIZE),
        size=st.integers(-1, SIZE // 3),
        shift=st.sampled_from([0, 0, 0, 0, 1, 100]),
    )
    def allocate_at(self, granule: int, size: int, shift: int) -> int | None:
        offset = granule * GRANULE_SIZE + shift
        end = offset + round_up(size)
        is_free = all(
            end <= start or start + length <= offset for start, length in self.model.items()
        )
        is_sound = offset >= 0 and end <= SIZE and size > 0 and not shift
        assert self.allocator.allocate_at(offset, size) == (is_free and is_sound)
        if not (is_free and is_sound):
            return None
        assert self.allocator.allocated_size(offset) == round_up(size)
        self.model[offset] = round_up(size)
        return offset

    @rule(offset=consumes(ranges))
    def free(self, offset: int | None) -> None:
        if offset is not None:
            self.allocator.free(offset)
            del self.model[offset]

    @invariant()
    def tiles_the_arena(self) -> None:
        self.allocator.check()
        assert self.allocator.used == sum(self.model.values())
        assert self.allocator.num_allocated == len(self.model)

    @invariant()
    def longest_run_is_the_longest(self) -> None:
        at, longest = 0, 0
        for offset, size in [*sorted(self.model.items()), (SIZE, 0)]:
            longest = max(longest, offset - at)
            at = offset + size
        assert self.allocator.largest_free == longest

    def teardown(self) -> None:
        for offset in self.model:
            self.allocator.free(offset)
        assert self.allocator.free_runs() == [(0, SIZE)]


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@given(st.integers(1, SIZE))
def test_one_size_fills_the_arena_without_waste(size: int) -> None:
    allocator = Allocator(SIZE)
    offsets = []
    while (offset := allocator.allocate(size)) is not None:
        offsets.append(offset)
    assert len(offsets) == SIZE // round_up(size)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=40), st.randoms())
def test_a_prompt_freed_together_leaves_room_for_its_like(
    granules: list[int], random: object
) -> None:
    # Chunks of one prompt, whole ones and a shorter tail, freed in any order, fit again.
    allocator = Allocator(sum(granules) * GRANULE_SIZE)
    offsets = [allocator.allocate(count * GRANULE_SIZE) for count in granules]
    random.shuffle(offsets)  # type: ignore[attr-defined]
    for offset in offsets:
        assert offset is not None
        allocator.free(offset)
    assert allocator.allocate(sum(granules) * GRANULE_SIZE) == 0


def test_the_tightest_run_is_taken() -> None:
    allocator = Allocator(64 * GRANULE_SIZE)
    holes = []
    for count in (20, 1, 5, 1, 9, 1):
        holes.append(allocator.allocate(count * GRANULE_SIZE))
    for index in (0, 2, 4):
        allocator.free(holes[index])  # type: ignore[arg-type]
    assert allocator.allocate(5 * GRANULE_SIZE) == holes[2]
    assert allocator.allocate(8 * GRANULE_SIZE) == holes[4]


@given(st.lists(st.integers(1, 8), min_size=1, max_size=60), st.randoms())
def test_an_allocator_is_rebuilt_from_what_was_allocated(
    granules: list[int], random: object
) -> None:
    before = Allocator(SIZE)
    offsets = [before.allocate(count * GRANULE_SIZE) for count in granules]
    kept = {offset for offset in offsets if offset is not None and random.random() < 0.6}  # type: ignore[attr-defined]
    ranges = [(offset, before.allocated_size(offset)) for offset in kept]
    for offset in offsets:
        if offset is not None and offset not in kept:
            before.free(offset)
    random.shuffle(ranges)  # type: ignore[attr-defined]
    for order in (ranges, sorted(ranges)):
        after = Allocator(SIZE)
        assert all(after.allocate_at(offset, size - 1) for offset, size in order)
        after.check()
        assert sorted(after.free_runs()) == sorted(before.free_runs())
        assert not any(after.allocate_at(offset, size) for offset, size in order)
        assert sorted(after.free_runs()) == sorted(before.free_runs())


def test_rebuilding_in_the_order_of_offsets_looks_at_no_run_twice() -> None:
    # Ten thousand holes: looking through them for each range would be fifty million looks.
    looks = 0

    class Counted(dict[int, int]):
        def get(self, start: int, otherwise: int = 0) -> int:  # type: ignore[override]
            nonlocal looks
            looks += 1
            return super().get(start, otherwise)

    count = 10_000
    allocator = Allocator(2 * count * GRANULE_SIZE)
    allocator._free_by_start = Counted(allocator._free_by_start)
    for index in range(count):
        assert allocator.allocate_at(2 * index * GRANULE_SIZE, 1)
    assert len(allocator.free_runs()) == count
    assert looks <= 3 * count
