"""A daemon in a process of its own, which a test stops, kills and starts anew.

with Daemon(tmp_path) as daemon, Engine(tmp_path, "qwen3", **daemon.transfer()) as engine: ...
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kvd
from kvd.errors import KvdError
from kvd.keys import ChunkKey
from kvd.layout import KVLayout
from kvd.proto import kvd_pb2 as pb
from kvd.proto.convert import layout_from_message
from tests.vllm.harness import ROOT

# A busy machine may take long; a daemon of this size needs half a second.
PATIENCE_S = 60.0
LOOK_EVERY_S = 0.02
LOOKUP_S = 5.0


class Daemon:
    """`arguments` are those of `kvd start`. A context manager: at its end the process is killed."""

    def __init__(self, folder: Path, *arguments: str, size: str = "512MiB") -> None:
        self.socket = folder / "kvd.sock"
        self.log = folder / "kvd.log"
        self._line = [sys.executable, "-m", "kvd", "start", "--socket", str(self.socket)]
        self._line += ["--http", "none", "--cpu-size", size, *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the daemon was not started"
        return self._process

    def start(self) -> None:
        """Return when clients can attach."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._line, cwd=ROOT, stdout=log, stderr=log)
        self.until(self._answers, "the daemon does not answer")

    def kill(self) -> None:
        """SIGKILL; once more does no harm."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE_S)

    def restart(self) -> None:
        """Killed, and started anew: empty."""
        self.kill()
        self.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It does nothing before the end of the block; its sockets stay open."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def transfer(self, *, role: str = "kv_both", **options: Any) -> dict[str, Any]:
        """The engine's argument that makes it use this daemon. `options` are the connector's. A
        lookup may take as long as it does on a busy machine.
        """
        extra = {"socket": str(self.socket), "lookup_s": LOOKUP_S, **options}
        config = {
            "kv_connector": "KvdConnector",
            "kv_connector_module_path": "kvd.client.connectors.vllm",
            "kv_role": role,
            "kv_connector_extra_config": extra,
        }
        return {"kv_transfer_config": config}

    def connect(self, **options: Any) -> kvd.Client:
        return kvd.connect(self.socket, **{"timeout_s": PATIENCE_S, **options})

    def status(self, *, audit: bool = False) -> pb.StatusReply:
        with self.connect() as client:
            return client.status(audit=audit)

    def chunks(self) -> list[pb.ChunkInfo]:
        return [chunk for page in self._pages() for chunk in page.chunks]

    def layouts(self) -> dict[bytes, KVLayout]:
        """The layouts of all chunks, by fingerprint."""
        found = [layout_from_message(each) for page in self._pages() for each in page.layouts]
        return {layout.fingerprint: layout for layout in found}

    def clear(self) -> int:
        """Drop all chunks that nobody has pinned; how many."""
        with self.connect() as client:
            return client.clear()[0]

    def new_keys(self, store: Callable[[], object], num_chunks: int) -> list[ChunkKey]:
        """The keys of the chunks that `store` stores, which are so many."""
        before = {chunk.key for chunk in self.chunks()}
        store()
        self.until_stored(len(before) + num_chunks)
        keys = [ChunkKey(chunk.key) for chunk in self.chunks() if chunk.key not in before]
        assert len(keys) == num_chunks
        return keys

    def overwrite(self, keys: list[ChunkKey], noise: Callable[[Any], None]) -> None:
        """Let `noise` write into chunks in the arena, which the daemon does not notice."""
        layouts, there = self.layouts(), {chunk.key: chunk for chunk in self.chunks()}
        with self.connect() as client:
            for key in keys:
                with client.pin(layouts[there[key].layout], [key], standalone=True) as lease:
                    noise(lease.tensor(0))

    def until_stored(self, num_chunks: int) -> None:
        """Return when so many chunks are there and nobody writes any more."""

        def is_so() -> bool:
            status = self.status()
            return status.num_chunks >= num_chunks and not status.num_reserved

        self.until(is_so, f"fewer than {num_chunks} chunks were stored")

    def until_idle(self) -> pb.StatusReply:
        """Return, with its numbers, when nothing is pinned and nothing is being written."""

        def is_so() -> bool:
            status = self.status()
            return not (status.num_pinned or status.num_reserved)

        self.until(is_so, "pins or writes stay open")
        return self.status(audit=True)

    def until(self, is_so: Callable[[], bool], otherwise: str) -> None:
        give_up = time.monotonic() + PATIENCE_S
        while not is_so():
            assert self.process.poll() is None, f"the daemon ended:\n{self.log.read_text()}"
            assert time.monotonic() < give_up, otherwise
            time.sleep(LOOK_EVERY_S)

    def _answers(self) -> bool:
        try:
            with kvd.connect(self.socket, timeout_s=1.0):
                return True
        except KvdError:
            return False

    def _pages(self) -> Iterator[pb.ListReply]:
        cursor = 0
        with self.connect() as client:
            while True:
                page = client.list_chunks(cursor=cursor)
                yield page
                cursor = page.cursor
                if not cursor:
                    return
