"""A folder on disk and who may use it: keys, offline checks, sizes that change."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvd.cli import main
from tests.conftest import DaemonProcess
from tests.tier_prompts import PATIENCE_S, damage_payloads, keys_of, load, store


def fill(folder: Path, *flags: str, prompts: int = 2) -> None:
    """A daemon that stores a few prompts and stops."""
    with DaemonProcess.on_disk(folder, *flags) as daemon:
        with daemon.connect() as client:
            for prompt in range(prompts):
                store(client, prompt)
            assert client.persist(timeout_s=PATIENCE_S) == 8 * prompts
        assert daemon.stop() == 0


def found_again(folder: Path, *flags: str, prompts: int = 2, nvme_size: str = "256MiB") -> int:
    """How many chunks a new daemon still has."""
    with (
        DaemonProcess.on_disk(folder, *flags, nvme_size=nvme_size) as daemon,
        daemon.connect() as client,
    ):
        count = sum(load(client, prompt) for prompt in range(prompts))
        client.status(audit=True)
        return count


def refusal(folder: Path, *flags: str) -> str:
    """What `kvd start` says when it does not start; it says it at once, with exit code 1 or 2."""
    command = [sys.executable, "-m", "kvd", "start", "--tiers", "cpu,nvme", "--cpu-size", "8MiB"]
    command += ["--socket", str(folder / "other.sock"), "--http", "none", "--grpc-socket", "none"]
    command += ["--nvme-path", str(folder / "nvme"), "--nvme-size", "256MiB", "--nvme-reserve", "0"]
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode in (1, 2)
    return done.stderr.splitlines()[-1]


def fsck(folder: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(main, ["fsck", "--nvme-path", str(folder), "--json", *flags])
    return done.exit_code, json.loads(done.stdout)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return new_key(tmp_path / "key")


def new_key(path: Path) -> Path:
    path.write_bytes(secrets.token_bytes(32))
    path.chmod(0o600)
    return path


class TestKeys:
    def test_what_is_encrypted_is_read_with_the_same_key(
        self, tmp_path: Path, key_file: Path
    ) -> None:
        flags = ("--nvme-key-file", str(key_file))
        fill(tmp_path, *flags)
        assert found_again(tmp_path, *flags) == 16
        # The same key from a command.
        assert found_again(tmp_path, "--nvme-key-command", f"cat {key_file}") == 16

    def test_nothing_of_a_payload_is_on_disk(self, tmp_path: Path, key_file: Path) -> None:
        # Every chunk of the pattern repeats bytes of its key, plain to see.
        plain, sealed = tmp_path / "plain", tmp_path / "sealed"
        for folder, flags in ((plain, ()), (sealed, ("--nvme-key-file", str(key_file)))):
            folder.mkdir()
            fill(folder, *flags, prompts=1)
        needle = keys_of(0)[0] * 8
        for folder, is_there in ((plain, True), (sealed, False)):
            segments = sorted((folder / "nvme").glob("segment-*"))
            assert any(needle in path.read_bytes() for path in segments) == is_there

    def test_another_key_or_none_is_refused_at_the_start(
        self, tmp_path: Path, key_file: Path
    ) -> None:
        fill(tmp_path, "--nvme-key-file", str(key_file), prompts=1)
        other = new_key(tmp_path / "other-key")
        assert "key" in refusal(tmp_path, "--nvme-key-file", str(other))
        assert "key" in refusal(tmp_path)
        # Nothing was harmed by asking.
        assert found_again(tmp_path, "--nvme-key-file", str(key_file), prompts=1) == 8

    def test_a_key_for_what_is_not_encrypted_is_refused(
        self, tmp_path: Path, key_file: Path
    ) -> None:
        fill(tmp_path, prompts=1)
        assert "key" in refusal(tmp_path, "--nvme-key-file", str(key_file))

    def test_a_key_that_others_can_read_is_refused(self, tmp_path: Path, key_file: Path) -> None:
        key_file.chmod(0o644)
        line = refusal(tmp_path, "--nvme-key-file", str(key_file))
        assert str(key_file) in line
        assert key_file.read_bytes().hex() not in line


class TestFsck:
    def test_a_sound_folder_is_clean(self, tmp_path: Path) -> None:
        fill(tmp_path)
        code, report = fsck(tmp_path / "nvme")
        assert (code, report["is_clean"], report["num_records"]) == (0, True, 16)

    def test_damage_is_found_and_taken_away(self, tmp_path: Path) -> None:
        fill(tmp_path)
        damage_payloads(tmp_path / "nvme", count=3)
        code, report = fsck(tmp_path / "nvme")
        assert (code, len(report["damaged"]), report["is_repaired"]) == (1, 3, False)
        code, report = fsck(tmp_path / "nvme", "--repair")
        assert (code, report["is_repaired"]) == (0, True)
        code, report = fsck(tmp_path / "nvme")
        assert (code, report["is_clean"], report["num_records"]) == (0, True, 13)
        with DaemonProcess.on_disk(tmp_path) as daemon, daemon.connect() as client:
            assert client.status(audit=True).num_chunks == 13
            for prompt in range(2):
                load(client, prompt)
            assert client.status().counters["quarantine_chunks"] == 0

    def test_a_folder_in_use_is_refused_with_the_pid(self, tmp_path: Path) -> None:
        with DaemonProcess.on_disk(tmp_path) as daemon:
            code, report = fsck(tmp_path / "nvme")
            assert code == 2
            assert str(daemon.pid) in report["error"]["message"]


class TestSizes:
    def test_a_tier_may_grow_and_shrink(self, tmp_path: Path) -> None:
        fill(tmp_path, prompts=8)
        assert found_again(tmp_path, prompts=8, nvme_size="1GiB") == 64
        # 64 MiB of chunks do not fit 32: some are there, within the bound.
        assert 0 < found_again(tmp_path, prompts=8, nvme_size="48MiB") < 64
        files = (tmp_path / "nvme").glob("segment-*")
        assert sum(path.stat().st_size for path in files) <= 48 << 20
