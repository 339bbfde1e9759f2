"""After an answer that came too late nobody asks for a while: who waits for one question after the
other would get slower with each, and a daemon that is slow would have more to do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvd.errors import DeadlineExceeded

# How long nobody asks.
REST_S = 1.0


class Rest:
    """Lets questions through, but for `REST_S` after one that raised `DeadlineExceeded`.
    Thread-safe; what is under way when a rest begins goes on.
    """

    def __init__(self) -> None:
        self._until = 0.0

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Around a question. Raises `DeadlineExceeded` at once in a rest, which gets no longer."""
        if time.monotonic() < self._until:
            raise DeadlineExceeded("the daemon was slow a moment ago")
        try:
            yield
        except DeadlineExceeded:
            self._until = time.monotonic() + REST_S
            raise
