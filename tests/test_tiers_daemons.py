"""Whole daemons on bad disks: full, read-only, gone or with flipped bits. What works goes on, also
without descriptors and after kills while it starts.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvd.errors import TierFailed
from tests.conftest import DaemonProcess
from tests.file_faults import flip
from tests.tier_prompts import (
    SIZE,
    assert_serves,
    keys_of,
    load,
    load_right,
    persist_in_time,
    store,
    until,
)

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")

# Every class of bytes of a segment: its header, a record's header (fields, label, checksum), a
# payload, padding and what is behind the last record.
CLASSES = ("segment", "header", "label", "payload", "anywhere")


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts file systems of a size; they are gone after the test."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@NEEDS_ROOT
def test_a_file_system_smaller_than_the_tier_may_be(
    tmpfs: Callable[[str], Path], start: Callable[..., DaemonProcess]
) -> None:
    daemon = start(tmpfs("100m"))
    with daemon.connect() as client:
        for prompt in range(12):
            store(client, prompt)
        load_right(client, range(12))
        assert_serves(client, 20)
        disk = client.status().tiers[1]
        assert 0 < disk.disk_size <= 100 << 20
        assert client.persist(keys_of(22), timeout_s=30) == 8
    assert daemon.stop() == 0


@NEEDS_ROOT
def test_others_fill_the_file_system_and_get_what_is_theirs(
    tmpfs: Callable[[str], Path], start: Callable[..., DaemonProcess]
) -> None:
    folder = tmpfs("120m")
    daemon = start(folder / "nvme", "--nvme-reserve", "24MiB")
    with daemon.connect() as client:
        for prompt in range(4):
            store(client, prompt)
        assert client.persist(timeout_s=30) == 32
        assert client.status().tiers[1].disk_size >= 48 << 20
        (folder / "others").write_bytes(bytes(64 << 20))
        assert free_size(folder) < 24 << 20
        until(lambda: free_size(folder) >= 24 << 20, "the reserve is not given back")
        load_right(client, range(4))
        assert_serves(client, 20)
        assert free_size(folder) >= 24 << 20


def free_size(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def test_a_reserve_that_nobody_has_leaves_memory_to_serve(
    tmp_path: Path, start: Callable[..., DaemonProcess]
) -> None:
    daemon = start(tmp_path / "nvme", "--nvme-reserve", "1000000GiB")
    with daemon.connect() as client:
        for prompt in range(6):
            store(client, prompt)
        with pytest.raises(TierFailed, match="reserve"):
            client.persist(timeout_s=30)
        assert "reserve" in client.status().tiers[1].failure
        assert_serves(client, 20)
    assert not list((tmp_path / "nvme").glob("segment-*"))
    assert daemon.stop() == 0


@NEEDS_ROOT
def test_a_file_system_that_turns_read_only(
    tmp_path: Path, start: Callable[..., DaemonProcess]
) -> None:
    """As ext4 does it after an error: under files that are open for writing."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(200 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True).returncode:
        pytest.skip("no loop devices here")
    try:
        daemon = start(folder / "nvme")
        with daemon.connect() as client:
            for prompt in range(6):
                store(client, prompt)
            assert client.persist(timeout_s=30) == 48
            subprocess.run(["mount", "-o", "remount,abort", folder], capture_output=True)
            for prompt in range(10, 14):
                store(client, prompt)
            with pytest.raises(TierFailed):
                client.persist(timeout_s=30)
            assert client.status().tiers[1].failure
            # What was written is still read.
            assert load_right(client, range(6)) > 0
            assert_serves(client, 20)
        daemon.kill()
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_no_descriptor_is_left(tmp_path: Path, start: Callable[..., DaemonProcess]) -> None:
    daemon = start(tmp_path / "nvme")
    with daemon.connect() as client:
        for prompt in range(6):
            store(client, prompt)
        assert client.persist(timeout_s=30) == 48
        before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (5, before[1]))
        load_right(client, range(6))
        for prompt in range(10, 16):
            store(client, prompt)
        assert_serves(client, 20)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
        store(client, 30)
        assert persist_in_time(client, keys_of(30)) == 8
        assert_serves(client, 40)


def test_the_folder_is_deleted_under_it(
    tmp_path: Path, start: Callable[..., DaemonProcess]
) -> None:
    daemon = start(tmp_path / "nvme")
    with daemon.connect() as client:
        for prompt in range(6):
            store(client, prompt)
        client.persist(timeout_s=30)
        shutil.rmtree(tmp_path / "nvme")
        load_right(client, range(6))
        for prompt in range(10, 20):
            store(client, prompt)
        assert_serves(client, 20)
    assert daemon.stop() == 0
    daemon.restart()
    with daemon.connect() as client:
        store(client, 1)
        assert client.persist(timeout_s=30) == 8


def flip_places(folder: Path, chance: random.Random, count: int) -> set[str]:
    """Flip bits at `count` places of every class; which classes."""
    classes = set()
    for number in range(count):
        path = chance.choice(sorted(folder.glob("segment-*")))
        size = path.stat().st_size
        name = CLASSES[number % len(CLASSES)]
        # All records are of 1 MiB and a header block.
        record = 4096 + chance.randrange((size - 4096) // (SIZE + 4096)) * (SIZE + 4096)
        offset = {
            "segment": chance.randrange(4096),
            "header": record + chance.choice([*range(128), *range(256, 300), 4090]),
            "label": record + 1280 + chance.randrange(200),
            "payload": record + 4096 + chance.randrange(SIZE),
            "anywhere": chance.randrange(size),
        }[name]
        flip(path, offset, 1 << chance.randrange(8))
        classes.add(name)
    return classes


@pytest.mark.parametrize("is_running", [False, True], ids=["between-runs", "while-it-runs"])
def test_flipped_bits_cost_misses_only(
    tmp_path: Path, start: Callable[..., DaemonProcess], is_running: bool
) -> None:
    daemon = start(tmp_path / "nvme")
    with daemon.connect() as client:
        for prompt in range(12):
            store(client, prompt)
        assert client.persist(timeout_s=30) == 96
    if not is_running:
        daemon.kill()
    classes = flip_places(tmp_path / "nvme", random.Random(7), 60)
    assert classes == set(CLASSES)
    if not is_running:
        daemon.restart()
    with daemon.connect() as client:
        client.scrub(rate=1 << 40)
        found = load_right(client, range(12))
        assert 0 < found < 96
        until(lambda: not client.scrub(start=False).is_running, "the pass has no end")
        assert client.status().counters["quarantine_chunks"] > 0
        assert_serves(client, 20)
        store(client, 40)
        assert client.persist(keys_of(40), timeout_s=30) == 8
        # What was quarantined is not found again.
        again = load_right(client, range(12))
        assert again <= found
        before = client.status().counters["quarantine_chunks"]
        assert load_right(client, range(12)) == again
        assert client.status().counters["quarantine_chunks"] == before
        client.status(audit=True)
    daemon.restart()
    with daemon.connect() as client:
        load_right(client, range(12))
        assert load(client, 40) == 8
        assert_serves(client, 50)


def test_kills_while_it_starts_lose_nothing(
    tmp_path: Path, start: Callable[..., DaemonProcess]
) -> None:
    daemon = start(tmp_path / "nvme")
    with daemon.connect() as client:
        store(client, 1)
        assert client.persist(timeout_s=30) == 8
    daemon.kill()
    command = [sys.executable, "-m", "kvd", "start", "--socket", str(daemon.socket)]
    for number in range(6):
        process = subprocess.Popen(
            [*command, *daemon._flags], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        time.sleep(0.15 + 0.07 * number)
        process.kill()
        process.wait()
    daemon.restart()
    with daemon.connect() as client:
        assert load(client, 1) == 8
        assert_serves(client, 20)
