"""The daemon's end of the channel to the process of its index.

The one idea: whatever becomes of that process is an error here, within a bound. It may die of a bad
page, hang in a disk that answers no more, or talk nonsense.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from kvd.daemon import index_frames as frames
from kvd.errors import Corrupt, TierFailed

# The process of a daemon that was killed may still be in a write to the disk, with the lock.
LOCK_S_MAX = 10.0

# After the end of its input, or SIGKILL. Longer takes only a process that the kernel holds in a
# write; it keeps its lock, and the next one waits for that.
ENDING_S_MAX = 10.0

_STREAM_LIMIT = 1 << 20
_POLL_S = 0.005
_MODULE = "kvd.daemon.index_process"
_PACKAGE_ROOT = Path(__file__).parent.parent.parent


class ProcessLost(TierFailed):
    """The process ended without a word, or is silent for too long."""


class IndexChannel:
    """A running process. `start` makes one."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, folder: Path, log_id: bytes) -> IndexChannel:
        """Start the process for the index in `folder`. Raises `TierFailed`."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_STREAM_LIMIT)
            try:
                return cls(_spawn(folder, log_id, theirs), reader, writer)
            except OSError as error:
                writer.close()
                raise TierFailed(f"the index's process could not be started: {error}") from error

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, kind: bytes, body: bytes = b"") -> None:
        """Hand a frame to the loop. Never waits; that it did not arrive is for `receive` to say."""
        # uvloop raises for a transport that its peer has closed.
        if not self._writer.is_closing():
            self._writer.write(frames.pack_frame(kind, body))

    async def receive(self, patience_s: float | None) -> tuple[bytes, bytes]:
        """The next frame's kind and body. Raises `TierFailed` with what the process says of its
        failure, `ProcessLost` where it says nothing. Cancelled in mid-frame, the channel is of no
        more use.
        """
        try:
            async with asyncio.timeout(patience_s):
                kind, size = frames.parse_head(await self._reader.readexactly(frames.HEAD.size))
                body = await self._reader.readexactly(size)
        except TimeoutError as error:
            raise ProcessLost(f"no answer within {patience_s:g} s") from error
        except Corrupt as error:
            raise ProcessLost(f"the process of the index sent no frame: {error}") from error
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ProcessLost(f"the process of the index ended: {await self.end()}") from error
        if kind == frames.FAILED:
            raise TierFailed(body.decode(errors="replace"))
        return kind, body

    async def ask(self, kind: bytes, body: bytes = b"", *, patience_s: float | None) -> None:
        """Send a frame and hear that it is done. Raises what `receive` does."""
        self.send(kind, body)
        await self.hear_done(patience_s)

    async def hear_done(self, patience_s: float | None) -> None:
        """Raises `ProcessLost` for any frame but DONE, and what `receive` does."""
        kind, _ = await self.receive(patience_s)
        if kind != frames.DONE:
            raise ProcessLost(f"a frame of kind {kind!r} was not expected now")

    def kill(self) -> None:
        """SIGKILL. Does not wait; `end` does."""
        self._process.kill()
        self._writer.close()

    async def end(self, *, patience_s: float = 0) -> str:
        """End the input, wait for so long, then kill; how the process ended. Waits no longer than
        `patience_s` and `ENDING_S_MAX`.
        """
        self._writer.close()
        code = await self._wait(patience_s)
        if code is None:
            self._process.kill()
            code = await self._wait(ENDING_S_MAX)
        if code is None:
            return "the kernel still holds it"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    async def _wait(self, wait_s: float) -> int | None:
        # Not on a thread: those may all be busy with the disk that does not answer.
        loop = asyncio.get_running_loop()
        give_up = loop.time() + wait_s
        while (code := self._process.poll()) is None and loop.time() < give_up:
            await asyncio.sleep(_POLL_S)
        return code


def _spawn(folder: Path, log_id: bytes, channel: socket.socket) -> subprocess.Popen[bytes]:
    # Our own package, and not what happens to lie in the working folder (-P).
    paths = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _MODULE, str(folder), log_id.hex(), str(LOCK_S_MAX)],
        stdin=channel.fileno(),
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
