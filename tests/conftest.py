"""Fixtures that more than one file needs: real daemons, as users start them; a segment log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import kvd
from kvd.errors import Unavailable
from tests.file_faults import FaultyOps
from tests.nvme_log import Opener, opener

# What a daemon may take to say ready on a loaded machine, before a test gives up.
START_S_MAX = 60

# Who starts the tests in the background may have Ctrl-C ignored, and every daemon here with them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class DaemonProcess:
    """`kvd start` in a process of its own, on a socket below the test's folder.

    A context manager: what still runs at its end is killed.
    """

    def __init__(self, folder: Path, *flags: str, cpu_size: str = "64MiB") -> None:
        self.socket = folder / "kvd.sock"
        self.log = folder / "kvd.log"
        self._flags = ["--cpu-size", cpu_size, "--http", "none", *flags]
        if "--tiers" not in flags:
            self._flags += ["--tiers", "cpu"]
        if "--grpc-socket" not in flags:
            self._flags += ["--grpc-socket", "none"]
        self.process = self._start()

    def __enter__(self) -> DaemonProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self.process.pid

    def connect(self, **options: Any) -> kvd.Client:
        return kvd.connect(self.socket, **options)

    def kill(self) -> None:
        """SIGKILL if it still runs, and wait for the end."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self.process = self._start()

    @classmethod
    def on_disk(
        cls, folder: Path, *flags: str, nvme_size: str = "256MiB", cpu_size: str = "64MiB"
    ) -> DaemonProcess:
        """A daemon with a disk tier in `folder`/nvme."""
        disk = ("--tiers", "cpu,nvme", "--nvme-path", str(folder / "nvme"))
        bounds = ("--nvme-size", nvme_size, "--nvme-reserve", "0")
        return cls(folder, *disk, *bounds, *flags, cpu_size=cpu_size)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=START_S_MAX)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "kvd", "start", "--socket", str(self.socket)]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*command, *self._flags], stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"}
            )
        give_up = time.monotonic() + START_S_MAX
        while time.monotonic() < give_up:
            try:
                kvd.connect(self.socket, timeout_s=1).close()
            except Unavailable:
                assert process.poll() is None, self.log.read_text()
                time.sleep(0.02)
            else:
                return process
        raise AssertionError(f"no daemon after {START_S_MAX} s: {self.log.read_text()}")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon of 64 MiB."""
    with DaemonProcess(tmp_path) as running:
        yield running


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """Starts daemons of a memory that ten prompts do not fit in; ends them."""
    with ExitStack() as running:

        def start(folder: Path, *flags: str, nvme_size: str = "256MiB") -> DaemonProcess:
            daemon = DaemonProcess(
                tmp_path,
                *("--tiers", "cpu,nvme", "--nvme-path", str(folder), "--nvme-size", nvme_size),
                *([] if "--nvme-reserve" in flags else ["--nvme-reserve", "0"]),
                *flags,
                cpu_size="16MiB",
            )
            return running.enter_context(daemon)

        yield start


@pytest.fixture
def layout() -> kvd.KVLayout:
    """Small chunks: `float32 [2, 2, tokens, 2, 8]`, 256 bytes a token, 16 tokens."""
    return kvd.KVLayout(
        model="tiny",
        revision="1",
        dtype="float32",
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        chunk_tokens=16,
    )


@pytest.fixture
def ops() -> FaultyOps:
    """The disk of `open_log`."""
    return FaultyOps()


@pytest.fixture
def open_log(tmp_path: Path, ops: FaultyOps) -> Iterator[Opener]:
    """Opens the log of the test's folder; the one before is closed."""
    with opener(tmp_path / "kv", ops) as open_log:
        yield open_log
