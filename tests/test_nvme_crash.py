"""Twenty SIGKILLs in mid-write: every acknowledged record is there and right, nothing else is."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from pathlib import Path

from kvd.errors import Corrupt
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.segment_log import SegmentLog
from tests.file_faults import pattern
from tests.nvme_writer import SEGMENT_SIZE, SIZE, payload_size

KILLS = 20

# What anything may take on a loaded machine, before the test gives up.
PATIENCE_S = 60

REPOSITORY = Path(__file__).parent.parent


def journal_of(path: Path) -> dict[str, set[int]]:
    """Seeds by the words said of them; a line cut off by the kill was never said."""
    said: dict[str, set[int]] = {"begin": set(), "done": set(), "drop": set()}
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            word, seed = line.split()
            said[word].add(int(seed))
    return said


def kill_after(command: list[str], journal: Path, num_bytes: int) -> None:
    """Start the writer and kill it when its journal has grown by so much."""
    goal = journal.stat().st_size + num_bytes if journal.exists() else num_bytes
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        give_up = time.monotonic() + PATIENCE_S
        while not journal.exists() or journal.stat().st_size < goal:
            assert process.poll() is None, "the writer ended by itself"
            assert time.monotonic() < give_up, "the writer stands still"
        process.kill()


def test_twenty_kills_in_mid_write(tmp_path: Path) -> None:
    chance = random.Random(11)
    folder, journal = tmp_path / "kv", tmp_path / "journal"
    acknowledged = 0
    for _ in range(KILLS):
        first = max(journal_of(journal)["begin"], default=0) + 1 if journal.exists() else 1
        command = [sys.executable, "-m", "tests.nvme_writer", str(folder), str(journal), str(first)]
        kill_after(command, journal, chance.randint(50, 4000))
        said = journal_of(journal)
        log = SegmentLog(folder, SIZE, segment_size=SEGMENT_SIZE)
        with contextlib.closing(log):
            found = {int(record.header.label): record for record in log.scan()}
            wanted = said["done"] - said["drop"]
            assert wanted <= found.keys(), "an acknowledged record is missing"
            assert found.keys() <= said["begin"], "a record that nobody wrote"
            for seed, record in found.items():
                out = aligned_bytes(record.extent.size)
                try:
                    log.read(record.extent, out)
                except Corrupt:
                    assert seed not in wanted, "an acknowledged record is damaged"
                    continue
                assert out.size == payload_size(seed)
                assert (out == pattern(seed, out.size)).all(), "wrong bytes"
            assert log.disk_size <= SIZE
        acknowledged = len(said["done"])
    assert acknowledged > KILLS
