"""A client for programs that start before their daemon does, or without it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from kvd.client.client import Client
from kvd.client.lease import Lease, Reservation
from kvd.errors import KvdError, Unavailable

# A daemon that was never there is looked for this often.
RETRY_EVERY_S = 1.0


class LateClient:
    """`pin` and `reserve` of the client that `attach` makes, as soon as it can; until then each
    call raises `Unavailable` at once. Thread-safe.
    """

    def __init__(self, attach: Callable[[], Client]) -> None:
        self._attach = attach
        self._client: Client | None = None
        self._lock = threading.Lock()
        self._retry_at = 0.0
        self._is_closed = False

    def attach(self) -> None:
        """Look for the daemon now, so that the first call need not."""
        with suppress(KvdError):
            self._attached()

    def pin(self, *args: Any, **options: Any) -> Lease:
        """As `Client.pin`."""
        return self._attached().pin(*args, **options)

    def reserve(self, *args: Any, **options: Any) -> Reservation:
        """As `Client.reserve`."""
        return self._attached().reserve(*args, **options)

    def close(self) -> None:
        """End the session, if there is one."""
        with self._lock:
            self._is_closed = True
            if self._client is not None:
                self._client.close()

    def _attached(self) -> Client:
        if self._client is not None:
            return self._client
        with self._lock:
            if self._is_closed:
                raise Unavailable("the client is closed")
            if self._client is None:
                if time.monotonic() < self._retry_at:
                    raise Unavailable("the daemon was away a moment ago")
                self._retry_at = time.monotonic() + RETRY_EVERY_S
                self._client = self._attach()
            return self._client
