"""Engines that start quickly: forked from a process that has imported vLLM and does nothing else.

    harness ─► one request: an environment and three open files ─► nursery ─► fork: an engine

Imports are nine tenths of an engine's start. Nothing but them has happened in the nursery, so what
is forked from it is a process as new as any other: it has seen no engine, no prompt and no daemon.

    python -m tests.vllm.nursery FILE-DESCRIPTOR    (see `Nursery`, which starts it)
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent.parent

# What an engine imports in any case.
MODULES = (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.metrics.loggers",
    "vllm.model_executor.models.qwen3",
    "kvd.client",
)

_MESSAGE_SIZE_MAX = 1 << 17
# Imports on a busy machine.
_START_S_MAX = 240.0


class Process:
    """A process that is not this one's child, as `subprocess.Popen` shows one that is."""

    def __init__(self, pid: int, stdin: IO[str], stdout: IO[str]) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self._file = os.pidfd_open(pid)

    def kill(self) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._file, signal.SIGKILL)

    def poll(self) -> bool | None:
        """None while it runs."""
        return True if select.select([self._file], [], [], 0)[0] else None

    def wait(self, timeout: float | None = None) -> None:
        """Return when it has ended. Raises `TimeoutExpired`."""
        if not select.select([self._file], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)


class Nursery:
    """A process that forks, with this environment. It ends with this one."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_START_S_MAX)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.vllm.nursery", str(other.fileno())],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
            )
        atexit.register(self.close)

    def engine(self, environment: dict[str, str], log: IO[bytes]) -> Process:
        """`engine_main` in a process and a group of its own."""
        stdin_end, stdin = os.pipe()
        stdout, stdout_end = os.pipe()
        files = [stdin_end, stdout_end, log.fileno()]
        socket.send_fds(self._socket, [json.dumps(environment).encode()], files)
        os.close(stdin_end)
        os.close(stdout_end)
        pid = int(self._socket.recv(_MESSAGE_SIZE_MAX) or 0)
        assert pid, "the nursery has ended"
        return Process(pid, os.fdopen(stdin, "w", buffering=1), os.fdopen(stdout, "r"))

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    # Whoever waits for an engine has a file of it; here nobody does.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for name in MODULES:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "threads are lost in a fork"
    # Nobody looks for garbage in what engines share.
    gc.freeze()
    while True:
        message, files, _, _ = socket.recv_fds(requests, _MESSAGE_SIZE_MAX, 3)
        if not message:
            return
        pid = os.fork()
        if not pid:
            requests.close()
            _become_engine(json.loads(message), files)
            return
        for file in files:
            os.close(file)
        # A group of its own, so that workers can be ended with it.
        os.setpgid(pid, pid)
        requests.send(str(pid).encode())


def _become_engine(environment: dict[str, str], files: list[int]) -> None:
    """In the child. Returns when the engine is to end, or raises `SystemExit`."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    importlib.import_module("tests.vllm.engine_main").main()


if __name__ == "__main__":
    main()
