"""The ledger: killed between any two instructions, read by the next daemon, never believed too
much.
"""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.arena import Arena, make_sealed
from kvd.daemon import ledger as ledger_module
from kvd.daemon import ledger_format as fmt
from kvd.daemon.ledger import Ledger
from kvd.daemon.ledger_format import (
    HEADER_SIZE,
    LABEL_SIZE_MAX,
    SLOT_SIZE,
    CommittedSlot,
    KeptSlot,
    LedgerHeader,
    Slot,
    WritingSlot,
    checksum,
    num_slots_for,
    pack_header,
    parse_header,
    parse_slot,
)
from kvd.daemon.processes import (
    is_process_gone,
    process_start,
    read_boot_id,
    read_namespaces,
)
from kvd.errors import Corrupt, Unavailable
from tests.ledger_writer import ARENA_SIZE, NUM_SLOTS, pattern

PAGE = Path(__file__).parent.parent / "docs" / "formats" / "ledger.md"
REPOSITORY = Path(__file__).parent.parent

KILLS = 150

# What anything may take on a loaded machine, before the test gives up.
PATIENCE_S = 60

INSTANCE = bytes(range(16))
GIB = 1 << 30


def make(num_slots: int = 16, arena_size: int = GIB) -> Ledger:
    return Ledger.create(num_slots, arena_size=arena_size, instance=INSTANCE)


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = make()
    yield made
    made.close()


def reread(ledger: Ledger) -> Ledger:
    """As the next daemon has it."""
    return Ledger.adopt(os.dup(ledger.fd), arena_size=ledger.header.arena_size)


def found_in(ledger: Ledger) -> dict[int, Slot]:
    """What the next daemon finds."""
    after = reread(ledger)
    contents = after.entries()
    assert contents.is_sound
    slots: list[Slot] = [*contents.kept, *contents.committed, *contents.writing]
    assert after.num_entries == len(slots)
    after.close()
    return {slot.offset: slot for slot in slots}


def image_of(ledger: Ledger) -> bytes:
    return os.pread(ledger.fd, ledger.size, 0)


def adopt_image(image: bytes, arena_size: int = GIB) -> Ledger:
    fd = make_sealed("image", len(image))
    os.pwrite(fd, image, 0)
    return Ledger.adopt(fd, arena_size=arena_size)


def test_the_next_daemon_finds_what_was_said(ledger: Ledger) -> None:
    assert ledger.write(0, 10_000, 77, 123456, 2**64 - 1)
    assert ledger.write(12288, 4096, 78, 5, 6)
    assert ledger.commit(12288)
    assert ledger.write(16384, 1, 78, 5, 6)
    assert ledger.keep(16384, 1, 2**64 - 1, b"x" * LABEL_SIZE_MAX)
    assert ledger.keep(20480, GIB - 20480, 0, b"")
    assert ledger.num_entries == 4
    wanted: list[Slot] = [
        WritingSlot(0, 10_000, 77, 123456, 2**64 - 1),
        CommittedSlot(12288, 4096),
        KeptSlot(16384, 1, 2**64 - 1, b"x" * LABEL_SIZE_MAX),
        KeptSlot(20480, GIB - 20480, 0, b""),
    ]
    assert found_in(ledger) == {slot.offset: slot for slot in wanted}
    ledger.erase(16384)
    ledger.erase(0)
    assert found_in(ledger) == {slot.offset: slot for slot in wanted[1::2]}


offsets = st.sampled_from([index * 8192 for index in range(12)])
steps = st.lists(st.tuples(st.sampled_from(["write", "commit", "keep", "erase"]), offsets))


@given(steps, st.data())
@settings(max_examples=100, deadline=None)
def test_it_is_a_dict_that_outlives_its_process(
    story: list[tuple[str, int]], data: st.DataObject
) -> None:
    # Seven extents fit: the eighth slot is the spare one.
    ledger, model = make(num_slots=8), dict[int, Slot]()
    for verb, offset in story:
        had_room = len(model) < 7 or offset in model
        if verb == "write" and offset not in model:
            assert ledger.write(offset, 5000, 7, 8, 9) == had_room
            if had_room:
                model[offset] = WritingSlot(offset, 5000, 7, 8, 9)
        elif verb == "commit" and offset in model:
            assert ledger.commit(offset)
            model[offset] = CommittedSlot(offset, 5000)
        elif verb == "keep":
            label = data.draw(st.binary(max_size=8))
            assert ledger.keep(offset, 5000, offset, label) == had_room
            if had_room:
                model[offset] = KeptSlot(offset, 5000, offset, label)
        elif verb == "erase" and offset in model:
            ledger.erase(offset)
            del model[offset]
        if data.draw(st.integers(0, 9)) == 0:
            after = reread(ledger)
            after.entries()
            ledger.close()
            ledger = after
    assert found_in(ledger) == model
    ledger.close()


class KillEverywhere:
    """Looks, before each instruction of the ledger's own code, at what a kill there would leave."""

    def __init__(self, ledger: Ledger, look: Callable[[Ledger], None]) -> None:
        self.ledger, self.look, self.looks = ledger, look, 0

    def __call__(self, step: Callable[[], object]) -> None:
        sys.settrace(self._enter)
        try:
            step()
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != ledger_module.__file__:
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        sys.settrace(None)
        self.looks += 1
        after = adopt_image(image_of(self.ledger), self.ledger.header.arena_size)
        self.look(after)
        after.close()
        sys.settrace(self._enter)
        return self._step


def test_a_kill_between_any_two_instructions_leaves_the_state_before_or_after() -> None:
    ledger = make(num_slots=6)
    assert ledger.keep(8192, 100, 1, b"bystander")
    model: dict[int, Slot] = {8192: KeptSlot(8192, 100, 1, b"bystander")}
    allowed: list[dict[int, Slot]] = []

    def look(after: Ledger) -> None:
        contents = after.entries()
        assert contents.is_sound
        slots: list[Slot] = [*contents.kept, *contents.committed, *contents.writing]
        assert {slot.offset: slot for slot in slots} in allowed

    everywhere = KillEverywhere(ledger, look)

    def step(verb: str, *arguments: Any, result: Slot | None) -> None:
        after = {offset: slot for offset, slot in model.items() if offset != arguments[0]}
        if result is not None:
            after[arguments[0]] = result
        allowed[:] = [dict(model), after]
        everywhere(lambda: getattr(ledger, verb)(*arguments))
        model.clear()
        model.update(after)
        assert found_in(ledger) == model

    for at in (0, 4096):
        writing = WritingSlot(at, 50, 1, 2, 3)
        step("write", at, 50, 1, 2, 3, result=writing)
        step("erase", at, result=None)
        step("write", at, 50, 1, 2, 3, result=writing)
        step("commit", at, result=CommittedSlot(at, 50))
        step("keep", at, 50, 7, b"first", result=KeptSlot(at, 50, 7, b"first"))
        step("erase", at, result=None)
        step("keep", at, 50, 8, b"a longer label", result=KeptSlot(at, 50, 8, b"a longer label"))
        step("keep", at, 50, 9, b"other", result=KeptSlot(at, 50, 9, b"other"))
    assert everywhere.looks > 1000


class Writers:
    """`tests.ledger_writer` over an arena and a ledger of ours."""

    def __init__(self, journal: Path) -> None:
        self.arena = Arena.create(ARENA_SIZE, huge_pages="never")
        self.ledger = Ledger.create(NUM_SLOTS, arena_size=ARENA_SIZE, instance=INSTANCE)
        self.journal = journal
        journal.write_bytes(b"")
        fds = [self.arena.fd, self.ledger.fd]
        command = [sys.executable, "-m", "tests.ledger_writer", *map(str, fds), str(journal)]
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            pass_fds=fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run_and_kill(self, seed: int, num_bytes: int) -> None:
        """One worker, killed when its journal has grown by so much."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        goal = self.journal.stat().st_size + num_bytes
        print(seed, file=self.process.stdin, flush=True)
        pid = int(self.process.stdout.readline())
        give_up = time.monotonic() + PATIENCE_S
        while self.journal.stat().st_size < goal and time.monotonic() < give_up:
            time.sleep(0.0002)
        os.kill(pid, signal.SIGKILL)
        assert int(self.process.stdout.readline()) == -signal.SIGKILL, "it ended by itself"

    def said(self) -> tuple[set[int], set[int]]:
        """Chunks that were kept and not dropped, and all that were ever begun to be dropped."""
        words = [line.split() for line in self.journal.read_text().splitlines()]
        kept = {int(number) for word, number in words if word == "kept"}
        dropped = {int(number) for word, number in words if word == "drop"}
        return kept - dropped, dropped

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.ledger.close()
        self.arena.close()


def test_a_hundred_and_fifty_kills_never_keep_a_wrong_byte(tmp_path: Path) -> None:
    chance = random.Random(3)
    writers = Writers(tmp_path / "journal")
    seen = {"kept": 0, "unfinished": 0, "acknowledged": 0}
    try:
        for kill in range(KILLS):
            writers.run_and_kill(1 + kill * 1_000_000, chance.randrange(1, 1500))
            after = reread(writers.ledger)
            contents = after.entries()
            after.close()
            assert contents.is_sound
            wanted, _ = writers.said()
            kept = {int(slot.label): slot for slot in contents.kept}
            assert wanted <= kept.keys(), "a chunk that was kept is lost"
            for number, slot in kept.items():
                data = writers.arena.view(slot.offset, slot.size)
                assert checksum(data.data) == slot.checksum, "a kept slot names other bytes"
                assert (data == pattern(number)).all()
            unfinished = [*contents.writing, *contents.committed]
            end = 0
            for slot in sorted([*contents.kept, *unfinished], key=lambda slot: slot.offset):  # type: ignore[assignment]
                assert slot.offset >= end, "extents overlap"
                end = slot.offset + slot.size
            seen["kept"] += len(kept)
            seen["unfinished"] += len(unfinished)
            seen["acknowledged"] = len(wanted)
        assert seen["kept"] > KILLS
        assert seen["unfinished"] > KILLS // 10, "no kill ever came in between"
    finally:
        writers.close()


def test_what_is_full_says_so_and_still_changes(ledger: Ledger) -> None:
    for index in range(15):
        assert ledger.write(index * 4096, 1, 1, 1, 1)
    assert not ledger.write(15 * 4096, 1, 1, 1, 1)
    assert not ledger.keep(15 * 4096, 1, 1, b"")
    for index in range(15):
        assert ledger.commit(index * 4096)
        assert ledger.keep(index * 4096, 1, index, b"")
    assert found_in(ledger) == {i * 4096: KeptSlot(i * 4096, 1, i, b"") for i in range(15)}
    ledger.erase(7 * 4096)
    assert ledger.write(15 * 4096, 1, 1, 1, 1)
    assert ledger.num_entries == 15


def test_a_label_that_is_too_long_changes_nothing(ledger: Ledger) -> None:
    ledger.write(0, 10, 1, 2, 3)
    before = image_of(ledger)
    assert not ledger.keep(0, 10, 5, b"x" * (LABEL_SIZE_MAX + 1))
    assert image_of(ledger) == before
    assert ledger.keep(0, 10, 5, b"x" * LABEL_SIZE_MAX)


def test_memory_comes_with_the_slots_and_no_faster() -> None:
    ledger = make(num_slots=100_000)

    def held() -> int:
        return os.fstat(ledger.fd).st_blocks * 512

    assert held() == HEADER_SIZE
    for index in range(1000):
        assert ledger.write(index * 4096, 1, 1, 1, 1)
    used = HEADER_SIZE + 1000 * SLOT_SIZE
    assert used <= held() <= used + 2 * ledger_module.GROW_SIZE
    after = reread(ledger)
    assert len(after.entries().writing) == 1000
    assert held() <= used + 2 * ledger_module.GROW_SIZE, "reading made memory of holes"
    for index in range(1000):
        after.erase(index * 4096)
    for index in range(1000):
        assert after.write(index * 4096, 1, 1, 1, 1)
    assert held() <= used + 2 * ledger_module.GROW_SIZE, "slots are not used again"
    after.close()
    ledger.close()


def test_without_memory_for_a_slot_everything_stays(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    large = make(num_slots=1000)
    for index in range(ledger_module.GROW_SIZE // SLOT_SIZE):
        assert large.write(index * 4096, 1, 1, 1, 1)
    before = found_in(large)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        assert not large.write(GIB // 2, 1, 1, 1, 1)
        assert not large.commit(0)
        assert not large.keep(0, 1, 1, b"")
        assert found_in(large) == before
        with pytest.raises(Unavailable, match="no memory for a ledger of 5 slots"):
            make(num_slots=5)
    assert large.commit(0)
    assert large.write(GIB // 2, 1, 1, 1, 1)
    large.close()


def test_an_adopted_ledger_is_read_before_it_is_written(ledger: Ledger) -> None:
    ledger.keep(0, 1, 1, b"")
    after = reread(ledger)
    with pytest.raises(AssertionError, match="read before"):
        after.write(4096, 1, 1, 1, 1)
    after.entries()
    assert after.write(4096, 1, 1, 1, 1)
    after.close()


# Bad headers.


def resealed(image: bytes, at: int, value: bytes) -> bytes:
    """The image with other bytes in its header and a checksum that fits: a lie, not bit rot."""
    changed = bytearray(image)
    changed[at : at + len(value)] = value
    struct.pack_into("<Q", changed, 120, checksum(changed[:120]))
    return bytes(changed)


def test_every_flipped_byte_of_the_header_is_corrupt(ledger: Ledger) -> None:
    image = image_of(ledger)
    for at in [*range(160), *range(160, HEADER_SIZE, 37), HEADER_SIZE - 1]:
        flipped = bytearray(image)
        flipped[at] ^= 0x10
        with pytest.raises(Corrupt):
            adopt_image(bytes(flipped))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"KVD-SEG\0", "a header"),
        (8, b"\x02", "version 1 expected, found 2"),
        (10, b"\x01", "flags"),
        (12, b"\x00\x20", "flags and sizes"),
        (32, b"\x01", "an arena of 1073741824 bytes expected, found one of 1073741825"),
        (40, b"\x01", "flags and sizes"),
        (44, bytes(4), "0 slots"),
        (44, b"\x11", "17 slots"),
        (44, b"\xff\xff\xff\xff", "slots"),
        (48, bytes(16), "earlier boot"),
        (64, bytes(8), "namespaces"),
        (72, b"\x01", "zeros"),
        (128, b"\x01", "zeros"),
    ],
)
def test_a_header_that_is_not_ours_is_corrupt(
    ledger: Ledger, at: int, value: bytes, message: str
) -> None:
    with pytest.raises(Corrupt, match=message):
        adopt_image(resealed(image_of(ledger), at, value))


@pytest.mark.parametrize("size", [0, 1, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 16 * 512 - 1])
def test_a_ledger_cut_short_is_corrupt(ledger: Ledger, size: int) -> None:
    with pytest.raises(Corrupt):
        adopt_image(image_of(ledger)[:size])


def test_what_could_shrink_or_is_a_file_is_corrupt(ledger: Ledger, tmp_path: Path) -> None:
    image = image_of(ledger)
    path = tmp_path / "file"
    path.write_bytes(image)
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.pwrite(unsealed, image, 0)
    for fd in (os.open(path, os.O_RDWR), unsealed):
        with pytest.raises(Corrupt, match="sealed memory"):
            Ledger.adopt(fd, arena_size=GIB)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_nobody_can_shrink_or_open_it(ledger: Ledger) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(ledger.fd, 0)
    assert os.fstat(ledger.fd).st_mode & 0o777 == 0o600


# Bad slots.


def with_slot(image: bytes, index: int, block: bytes) -> bytes:
    at = HEADER_SIZE + index * SLOT_SIZE
    return image[:at] + block + image[at + SLOT_SIZE :]


def slot_block(state: int, offset: int, size: int, label_size: int = 1) -> bytes:
    block = bytearray(SLOT_SIZE)
    fmt.SLOT.pack_into(block, 0, state, label_size, 7, offset, size, 11, 12, 13, b"L")
    struct.pack_into("<Q", block, SLOT_SIZE - 8, checksum(block[: SLOT_SIZE - 8]))
    return bytes(block)


def test_a_slot_with_any_byte_changed_is_no_slot(ledger: Ledger) -> None:
    ledger.keep(0, 1000, 5, b"label")
    image = image_of(ledger)
    for at in range(SLOT_SIZE):
        for mask in (0x01, 0x03, 0x80):
            torn = bytearray(image)
            torn[HEADER_SIZE + at] ^= mask
            after = adopt_image(bytes(torn))
            contents = after.entries()
            assert after.num_entries == 0
            # A state of 0 is a free slot, whatever stands behind it.
            is_free = at == 0 and mask == 0x03
            assert (contents.num_torn, contents.is_sound) == ((0, True) if is_free else (1, False))
            assert not contents.kept
            after.close()


@pytest.mark.parametrize(
    "block",
    [
        slot_block(4, 0, 100),
        slot_block(255, 0, 100),
        slot_block(fmt.KEPT, 1, 100),
        slot_block(fmt.KEPT, 0, 0),
        slot_block(fmt.KEPT, 0, GIB + 1),
        slot_block(fmt.KEPT, GIB, 1),
        slot_block(fmt.KEPT, 4096, GIB - 4095),
        slot_block(fmt.KEPT, 2**64 - 4096, 4096),
        slot_block(fmt.WRITING, 0, 2**64 - 1),
        slot_block(fmt.COMMITTED, 2**63, 2**63),
        slot_block(fmt.KEPT, 0, 100, label_size=LABEL_SIZE_MAX + 1),
        slot_block(fmt.KEPT, 0, 100, label_size=65535),
    ],
)
def test_a_slot_that_cannot_be_is_left_out_and_never_used_again(
    ledger: Ledger, block: bytes
) -> None:
    ledger.keep(8192, 10, 1, b"good")
    after = adopt_image(with_slot(image_of(ledger), 3, block))
    contents = after.entries()
    assert contents.kept == [KeptSlot(8192, 10, 1, b"good")]
    assert (contents.num_torn, contents.num_overlapping) == (1, 0)
    while after.write(after.num_entries * 16384 + 16384, 1, 1, 1, 1):
        pass
    assert image_of(after)[HEADER_SIZE + 3 * SLOT_SIZE :][:SLOT_SIZE] == block
    assert after.entries().num_torn == 1
    after.close()


@given(st.binary(min_size=SLOT_SIZE, max_size=SLOT_SIZE))
def test_noise_is_no_slot(noise: bytes) -> None:
    assert parse_slot(noise, arena_size=GIB) is None


@pytest.mark.parametrize(
    ("extents", "num_overlapping", "left"),
    [
        ([(0, 8192), (4096, 1)], 2, []),
        ([(0, 4097), (4096, 4096), (8192, 1)], 2, [8192]),
        ([(0, 100_000), (4096, 1), (16384, 1), (102400, 1)], 3, [102400]),
        ([(0, 1), (0, 2)], 2, []),
        ([(0, 1), (0, 4096)], 2, []),
        ([(0, 4096), (4096, 4096)], 0, [0, 4096]),
    ],
)
def test_of_extents_that_overlap_none_is_believed(
    ledger: Ledger, extents: list[tuple[int, int]], num_overlapping: int, left: list[int]
) -> None:
    image = image_of(ledger)
    for index, (offset, size) in enumerate(reversed(extents)):
        state = fmt.WRITING if index == 0 else fmt.KEPT
        image = with_slot(image, index, slot_block(state, offset, size))
    after = adopt_image(image)
    contents = after.entries()
    assert contents.num_overlapping == num_overlapping
    found = sorted(slot.offset for slot in [*contents.kept, *contents.writing])
    assert found == left
    assert contents.is_sound == (not num_overlapping)
    after.close()


def test_of_two_states_of_one_extent_the_later_counts_and_the_slot_is_free(ledger: Ledger) -> None:
    states = [fmt.KEPT, fmt.WRITING, fmt.COMMITTED]
    for first in states:
        for second in states:
            image = with_slot(image_of(ledger), 0, slot_block(first, 4096, 10))
            after = adopt_image(with_slot(image, 9, slot_block(second, 4096, 10)))
            contents = after.entries()
            assert contents.is_sound
            found = (len(contents.writing), len(contents.committed), len(contents.kept))
            assert found == tuple(
                int(max(first, second) == state) for state in (fmt.WRITING, fmt.COMMITTED, fmt.KEPT)
            )
            again = reread(after)
            assert again.entries() == contents
            # 16 slots, one in use, one spare.
            count = sum(again.write(8192 * index, 1, 1, 1, 1) for index in range(1, 20))
            assert count == 14
            again.close()
            after.close()


# Processes.


def test_a_process_is_gone_when_it_can_touch_no_memory() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        start = process_start(process.pid)
        assert start > 0
        assert not is_process_gone(process.pid, start)
        assert is_process_gone(process.pid, start - 1), "another one has its number now"
        process.kill()
        # Dead and not yet waited for: its memory is gone, its number is not.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_start(process.pid) == start
        assert is_process_gone(process.pid, start)
    assert is_process_gone(process.pid, start)
    assert process_start(process.pid) == 0


def test_a_process_whose_first_thread_ended_is_still_there() -> None:
    code = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(3600,)).start()
print("x", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        start = process_start(process.pid)
        give_up = time.monotonic() + PATIENCE_S
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < give_up
            time.sleep(0.01)
        assert not is_process_gone(process.pid, start)
        process.kill()


@pytest.mark.parametrize(("pid", "start"), [(0, 0), (0, 5), (-1, 5), (os.getpid(), 0)])
def test_what_cannot_be_known_is_not_gone(pid: int, start: int) -> None:
    assert not is_process_gone(pid, start)


def test_a_process_with_a_strange_name_is_found() -> None:
    code = """
open("/proc/self/comm", "w").write("a) Z 1 2 (b")
print("x", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        assert not is_process_gone(process.pid, process_start(process.pid))
        process.kill()


# The page.


def hex_dump(title: str, size: int) -> bytes:
    """The bytes of the page's dump under `title`; rows that are not there are zeros."""
    text = PAGE.read_text().split(f"### {title}", 1)[1].split("```")[1]
    block = bytearray(size)
    for line in text.strip().splitlines():
        match = re.match(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)", line)
        assert match, line
        row = bytes.fromhex(match[2])
        block[int(match[1], 16) : int(match[1], 16) + len(row)] = row
    return bytes(block)


def test_the_pages_example_is_what_the_code_writes(ledger: Ledger) -> None:
    header = LedgerHeader(
        instance=bytes(range(0x10, 0x20)),
        arena_size=GIB,
        num_slots=num_slots_for(GIB),
        boot_id=bytes(range(0xA0, 0xB0)),
        namespaces=0x0123456789ABCDEF,
    )
    dump = hex_dump("The header", HEADER_SIZE)
    assert dump == pack_header(header)
    assert parse_header(dump, file_size=header.file_size) == header
    ledger.write(0x8000, 300_000, 4242, 987_654, 0x1122334455667788)
    ledger.keep(0x60000, 300_000, 0x5405A705D7C9EC7F, b"hello")
    image = image_of(ledger)
    for index, title in enumerate(["A slot that is being written", "A slot that is kept"]):
        at = HEADER_SIZE + index * SLOT_SIZE
        assert hex_dump(title, SLOT_SIZE) == image[at : at + SLOT_SIZE]


def test_the_page_names_the_real_limits() -> None:
    text = PAGE.read_text()
    numbers = (HEADER_SIZE, SLOT_SIZE, LABEL_SIZE_MAX, fmt.NUM_SLOTS_MAX, fmt.ARENA_SIZE_PER_SLOT)
    for number in numbers:
        assert f"{number:,}" in text
    assert f"version {fmt.FORMAT_VERSION}" in text
    assert len(read_boot_id()) == 16
    assert 0 <= read_namespaces() < 2**64
