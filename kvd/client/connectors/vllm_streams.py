"""On a GPU what the connector's threads do is ordered against the engine's work by streams and
events; on a CPU there is nothing to order.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

# An event of a stream, or None where there are no streams.
Ready = Any

_local = threading.local()


class Streams:
    """Those of `device`, one for each thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._has_streams = device.type == "cuda"

    def mark(self) -> Ready:
        """Now, in the order of this thread's work."""
        if not self._has_streams:
            return None
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def follow(self, ready: Ready) -> None:
        """What this thread of the connector does from here on comes after `ready`."""
        if ready is not None:
            stream = _stream_of_thread(self._device)
            torch.cuda.set_stream(stream)
            stream.wait_event(ready)

    def wait_for(self, ready: Ready) -> None:
        """What the engine does from here on comes after `ready`."""
        torch.cuda.current_stream(self._device).wait_event(ready)

    def finish(self) -> None:
        """What this thread has asked for is done."""
        if self._has_streams:
            torch.cuda.current_stream(self._device).synchronize()


def _stream_of_thread(device: torch.device) -> Any:
    if not hasattr(_local, "stream"):
        _local.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _local.stream
