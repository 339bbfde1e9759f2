"""ReadAhead: calls that are waited for in order, a few of them begun before their turn.

One caller, some threads that serve many callers. A call that no thread has begun when its turn
comes is made by the caller itself: busy threads make a read slower, never stuck.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

Call = Callable[[], None]


class ReadAhead:
    """`calls`, at most `depth` of them under way at a time; the first is the caller's own.

    Not thread-safe: it belongs to one caller, who closes it.
    """

    def __init__(self, pool: ThreadPoolExecutor, calls: Iterable[Call], *, depth: int) -> None:
        assert depth > 0
        self._pool = pool
        self._depth = depth
        self._later = deque(calls)
        self._begun: deque[tuple[Call, Future[None] | None]] = deque()
        self._begun.append((self._later.popleft(), None))
        self._begin()

    def wait(self) -> None:
        """End the next call, and begin another. Raises what the call raises."""
        call, future = self._begun.popleft()
        if future is None or future.cancel():
            call()
        else:
            future.result()
        self._begin()

    def close(self) -> None:
        """Wait for what is under way and forget the rest; what it raises is lost."""
        self._later.clear()
        wait([future for _, future in self._begun if future is not None and not future.cancel()])
        self._begun.clear()

    def _begin(self) -> None:
        while self._later and len(self._begun) < self._depth:
            call = self._later.popleft()
            self._begun.append((call, self._pool.submit(call)))
