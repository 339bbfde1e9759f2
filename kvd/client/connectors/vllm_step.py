"""Loads within a step: the engine computes a layer as soon as its KV is there, while that of the
next ones is still being copied.

    begin ─► layer by layer, on a thread ─► wait_for_layer, where the engine reads it ─► end

An engine that does not stop at each layer, as one that replays a graph of the whole model, has
computed on nobody knows what: `end` tells.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvd.client.connectors.vllm_streams import Ready


class Progress:
    """How far one load is. The thread that copies tells, the engine waits."""

    def __init__(self) -> None:
        self._written: list[Ready] = []
        self._has_ended = False
        self._condition = threading.Condition()

    def layer_written(self, ready: Ready) -> None:
        """The next layer is there, as soon as `ready` has come."""
        with self._condition:
            self._written.append(ready)
            self._condition.notify_all()

    def end(self) -> None:
        """Nothing is written any more, whatever has become of it."""
        with self._condition:
            self._has_ended = True
            self._condition.notify_all()

    def wait_for(self, layer: int) -> Ready:
        """Wait until so many layers and one more are written, or never will be."""
        with self._condition:
            self._condition.wait_for(lambda: self._has_ended or len(self._written) > layer)
            return self._written[layer] if len(self._written) > layer else None

    def wait_for_end(self) -> None:
        """Wait until nothing is written any more."""
        with self._condition:
            self._condition.wait_for(lambda: self._has_ended)


class StepLoads:
    """The loads of a step, one step after the other. `layers` are the engine's names of a chunk's
    layers, in their order.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(layers)}
        self._under_way: list[Progress] = []
        self._waited_for: set[int] = set()

    def begin(self) -> Progress:
        """One load more."""
        self._under_way.append(Progress())
        return self._under_way[-1]

    def wait_for_layer(self, name: str) -> list[Ready]:
        """Wait for a layer of every load; what its reader has to come after."""
        number = self._numbers.get(name)
        if number is None or not self._under_way:
            return []
        self._waited_for.add(number)
        found = [progress.wait_for(number) for progress in self._under_way]
        return [ready for ready in found if ready is not None]

    def wait_for_all(self) -> None:
        """Wait for all layers at once."""
        for progress in self._under_way:
            progress.wait_for_end()
        self._waited_for.update(self._numbers.values())

    def end(self) -> bool:
        """Wait until the step's loads have ended; whether each layer was waited for."""
        for progress in self._under_way:
            progress.wait_for_end()
        was_waited_for = not self._under_way or len(self._waited_for) == len(self._numbers)
        self._under_way.clear()
        self._waited_for.clear()
        return was_waited_for
