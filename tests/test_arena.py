"""The arena: sealed, private, populated, and never gone under a reader."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from kvd.arena import HUGE_PAGE_SIZE, Arena, make_sealed
from kvd.chunk import Extent
from kvd.errors import ConfigError, Corrupt, Unavailable
from kvd.mapping import Mapping
from kvd.tiers.base import Tier
from kvd.tiers.cpu import CpuTier
from tests.contracts.tier import TierContract

SIZE = 4 * HUGE_PAGE_SIZE


class TestCpuTier(TierContract):
    @pytest.fixture
    def tier(self) -> Tier:
        return CpuTier(Arena.create(SIZE, huge_pages="never"))

    def test_a_view_is_the_extent_itself(self) -> None:
        tier = CpuTier(Arena.create(SIZE, huge_pages="never"))
        extent = tier.allocate(5000)
        assert extent is not None
        tier.view(extent)[:] = 7
        assert tier.arena.bytes[extent.offset + 4999] == 7
        assert tier.arena.bytes[extent.offset + 5000] == 0

    def test_exactly_these_bytes_are_taken_where_they_are_free(self) -> None:
        tier = CpuTier(Arena.create(SIZE, huge_pages="never"))
        assert tier.allocate_at(8192, 5000) == Extent("cpu", 8192, 5000)
        assert tier.allocate_at(12288, 1) is None
        assert tier.allocate_at(SIZE - 4096, 4097) is None
        assert tier.used == 8192
        assert tier.allocate_at(16384, 1) == Extent("cpu", 16384, 1)
        tier.check()


def test_nobody_can_shrink_or_grow_it() -> None:
    arena = Arena.create(SIZE, huge_pages="never")
    for size in (SIZE // 2, SIZE * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_other_users_cannot_open_it_again() -> None:
    arena = Arena.create(SIZE, huge_pages="never")
    assert os.fstat(arena.fd).st_mode & 0o777 == 0o600


def test_sizes_are_whole_huge_pages() -> None:
    assert Arena.create(1, huge_pages="never").size == HUGE_PAGE_SIZE


def test_two_mappings_are_one_memory() -> None:
    arena = Arena.create(SIZE, huge_pages="never")
    other = Arena.attach(os.dup(arena.fd))
    other.view(10, 3)[:] = (1, 2, 3)
    assert list(arena.view(10, 3)) == [1, 2, 3]


def test_a_view_outlives_its_arena() -> None:
    arena = Arena.create(SIZE, huge_pages="never")
    view = arena.view(0, 100)
    view[:] = 9
    arena.close()
    del arena
    assert view.sum() == 900


@pytest.mark.parametrize(("offset", "size"), [(SIZE, 1), (0, SIZE + 1), (-1, 1), (1, -1)])
def test_an_extent_outside_is_refused(offset: int, size: int) -> None:
    arena = Arena.create(SIZE, huge_pages="never")
    with pytest.raises(Unavailable, match="outside the arena"):
        arena.view(offset, size)


def test_an_arena_that_could_shrink_is_not_attached() -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    with pytest.raises(Unavailable, match="not sealed"):
        Arena.attach(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_populate_gives_every_page_its_memory_and_says_so() -> None:
    arena = Arena.create(SIZE, huge_pages="never")
    # Allocated blocks of 512 bytes: what the file really holds.
    assert os.fstat(arena.fd).st_blocks == 0
    arena.view(0, 4)[:] = 5
    seen: list[int] = []
    arena.populate(seen.append)
    assert os.fstat(arena.fd).st_blocks * 512 == SIZE
    assert seen[-1] == SIZE
    assert list(arena.view(0, 4)) == [5, 5, 5, 5]


def test_an_adopted_arena_has_the_bytes_that_were_left() -> None:
    first = Arena.create(SIZE, huge_pages="never")
    first.bytes[:] = np.arange(SIZE, dtype=np.uint8)
    second = Arena.adopt(os.dup(first.fd))
    first.close()
    for huge_pages in ("never", "auto"):
        second.populate(huge_pages=huge_pages)  # type: ignore[arg-type]
        assert np.array_equal(second.bytes, np.arange(SIZE, dtype=np.uint8))
    assert Arena.attach(os.dup(second.fd)).size == SIZE


def test_what_is_no_arena_is_not_adopted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, SIZE)
    open_to_all = make_sealed("kvd-arena", SIZE)
    os.fchmod(open_to_all, 0o666)
    for fd, message in [
        (os.open(path, os.O_RDWR), "not sealed"),
        (unsealed, "not sealed"),
        (make_sealed("kvd-arena", SIZE - 4096), f"{SIZE - 4096} were kept"),
        (make_sealed("kvd-arena", 0), "0 were kept"),
        (open_to_all, "found 666"),
    ]:
        with pytest.raises(Corrupt, match=message):
            Arena.adopt(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_populating_never_undoes_what_another_process_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # To read a byte and write it back would: so no byte is written, whatever the kernel can do.
    def refuse(self: Mapping, advice: int, start: int, size: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    arena = Arena.create(SIZE, huge_pages="never")
    with monkeypatch.context() as patch:
        # As on a kernel that knows neither advice.
        patch.setattr(Mapping, "advise", refuse)
        arena.bytes.flags.writeable = False
        arena.populate()
        arena.map_in(0, SIZE)
    assert os.fstat(arena.fd).st_blocks * 512 == SIZE


def test_map_in_changes_no_byte() -> None:
    arena = Arena.create(SIZE, huge_pages="never")
    arena.bytes[:] = np.arange(SIZE, dtype=np.uint8)
    other = Arena.attach(os.dup(arena.fd))
    other.map_in(HUGE_PAGE_SIZE - 5, HUGE_PAGE_SIZE)
    other.map_in(SIZE - 1, 1)
    assert np.array_equal(other.bytes, np.arange(SIZE, dtype=np.uint8))


def test_huge_pages_that_are_not_there_are_a_clear_error() -> None:
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if free.exists() and int(free.read_text()) * HUGE_PAGE_SIZE >= 1 << 40:
        pytest.skip("this machine has a TiB of huge pages")
    with pytest.raises(ConfigError, match=r"524288 of 2 MiB wanted.*nr_hugepages=524288"):
        Arena.create(1 << 40, huge_pages="require")


def test_an_extent_survives_as_numbers() -> None:
    assert Extent("cpu", 4096, 10) == Extent(tier="cpu", offset=4096, size=10)
