"""Client: store and load chunks through a daemon. Thread-safe.

Every call takes `timeout_s`. When the daemon is away a call fails at once with `Unavailable` and a
later one attaches anew: an engine computes in the meantime, it never waits.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from kvd.client.connection import Connection, LocalConnection
from kvd.client.lease import Lease, Reservation
from kvd.errors import (
    AccessDenied,
    DeadlineExceeded,
    InvalidRequest,
    TierFailed,
    Unavailable,
    Unsupported,
)
from kvd.keys import ChunkKey, chain_keys, join_keys
from kvd.layout import KVLayout
from kvd.proto import kvd_pb2 as pb
from kvd.proto.address import default_socket
from kvd.proto.convert import layout_to_message
from kvd.proto.limits import KEYS_MAX, TTL_NS_MAX, WAIT_NS_MAX

if TYPE_CHECKING:
    from kvd.codecs.kvq import ProfileBook

TIMEOUT_S_DEFAULT = 5.0
LEASE_S_DEFAULT = 30.0

# How long a store lets a disk catch up: a second of it is more than a gigabyte.
WAIT_S_DEFAULT = 1.0

# After a failed attach, calls fail at once for this long instead of trying again.
RETRY_EVERY_S = 0.2


def connect(
    address: str | Path | None = None,
    *,
    timeout_s: float = TIMEOUT_S_DEFAULT,
    name: str = "",
    verify: bool = False,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
) -> Client:
    """Attach to the daemon at `address`: a socket path (default: `KVD_SOCKET` or the daemon's own
    default), or `grpc://host:port`, `grpcs://host:port` (TLS) or `grpc+unix:///path` for clients
    without shared memory.

    `timeout_s` is each call's deadline unless it names its own. With `verify`, chunks are stored
    with a checksum and checked after each load. Raises `Unavailable`, `AccessDenied` or
    `DeadlineExceeded`.
    """

    def attach() -> Connection:
        if isinstance(address, str) and address.startswith(("grpc://", "grpcs://", "grpc+unix://")):
            # gRPC is heavy: only clients that use it import it.
            from kvd.client.remote import RemoteConnection

            return RemoteConnection(
                address,
                name=name,
                timeout_s=timeout_s,
                tls_ca=tls_ca,
                tls_cert=tls_cert,
                tls_key=tls_key,
            )
        path = Path(address) if address else default_socket()
        if not address:
            _check_owner(path.parent)
        return LocalConnection(path, name=name, timeout_s=timeout_s)

    return Client(attach, timeout_s=timeout_s, verify=verify)


class Client:
    """A session with a daemon that comes back after the daemon does. Made by `connect`."""

    def __init__(self, attach: Callable[[], Connection], *, timeout_s: float, verify: bool) -> None:
        self.timeout_s = timeout_s
        self.verify = verify
        self._attach = attach
        self._lock = threading.Lock()
        self._is_closed = False
        self._retry_at = 0.0
        self._declared: set[KVLayout] = set()
        self._connection: Connection = attach()

    @property
    def instance(self) -> str:
        """The daemon's run: another instance knows nothing of what the last one gave out."""
        return self._connection.instance

    def lookup(
        self,
        keys: Sequence[ChunkKey],
        *,
        standalone: bool = False,
        exact: bool = False,
        codecs: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> int:
        """How many of the first `keys`, a chain in order, the daemon has; with `standalone`, how
        many of all. `exact` and `codecs` are those of the `pin` that will follow.

        A moment later it may be fewer: what counts is what `pin` returns.
        """
        found = 0
        for start in range(0, len(keys), KEYS_MAX):
            part = keys[start : start + KEYS_MAX]
            message = pb.LookupRequest(
                keys=join_keys(part), standalone=standalone, is_exact=exact, codecs=codecs
            )
            count = self._call(pb.Request(lookup=message), timeout_s).lookup.count
            found += count
            if count < len(part) and not standalone:
                break
        return found

    def lookup_tokens(
        self,
        layout: KVLayout,
        tokens: ArrayLike,
        *,
        exact: bool = False,
        timeout_s: float | None = None,
    ) -> int:
        """How many of the first `tokens` the daemon has KV for, in whole chunks."""
        keys = chain_keys(layout.fingerprint, tokens, chunk_tokens=layout.chunk_tokens)
        return self.lookup(keys, exact=exact, timeout_s=timeout_s) * layout.chunk_tokens

    def pin(
        self,
        layout: KVLayout,
        keys: Sequence[ChunkKey],
        *,
        standalone: bool = False,
        exact: bool = False,
        codecs: Sequence[str] = (),
        wait: bool = True,
        wait_s: float = WAIT_S_DEFAULT,
        lease_s: float = LEASE_S_DEFAULT,
        timeout_s: float | None = None,
    ) -> Lease:
        """Pin the leading `keys` that are there, or with `standalone` each that is; may be none:
        `len(lease)`.

        With `exact`, a chunk of which there is only approximate KV (what a lossy codec gave back,
        or what was computed on top of such) counts as not there. `codecs` names those whose
        bitstreams this client decodes itself, like "kvq/1": a chunk that the daemon would have to
        decode from one of them comes as the bitstream, see `Lease.codec`.

        With `wait`, chunks on disk are in memory when this returns, and those that could not be
        read right are left out. Without, the lease is there at once, and each chunk is waited for
        as it is read: see `Lease.wait`. Where memory is full of what waits for the disk, the daemon
        makes room first, for `wait_s` at most; what finds none then counts as not there. At most
        2048 keys a call. Raises `LayoutMismatch` if a chunk has another layout.
        """
        message = pb.PinRequest(
            keys=join_keys(keys),
            layout=layout.fingerprint,
            standalone=standalone,
            lease_ns=_lease_ns(lease_s),
            wait_ns=self._wait_ns(wait_s, timeout_s),
            is_exact=exact,
            codecs=codecs,
        )
        response, connection = self._call_on(pb.Request(pin=message), timeout_s)
        reply = response.pin
        if standalone:
            pinned = [key for key, is_here in zip(keys, reply.present, strict=True) if is_here]
        else:
            pinned = list(keys[: len(reply.offsets)])
        timeout_s = timeout_s or self.timeout_s
        lease = Lease(
            connection, layout, pinned, reply, is_verified=self.verify, timeout_s=timeout_s
        )
        if wait:
            lease.keep_good(standalone=standalone, timeout_s=timeout_s)
        return lease

    def reserve(
        self,
        layout: KVLayout,
        keys: Sequence[ChunkKey],
        *,
        parent: bytes | None = None,
        start: int = 0,
        num_tokens: Sequence[int] | None = None,
        standalone: bool = False,
        category: str = "",
        prefill_us: int = 0,
        exact: bool = True,
        ttl_s: float | None = None,
        wait_s: float = WAIT_S_DEFAULT,
        lease_s: float = LEASE_S_DEFAULT,
        timeout_s: float | None = None,
    ) -> Reservation:
        """Extents for those of `keys` that nobody has stored or is storing.

        The chunks follow each other behind `parent` (default: they begin the prompt); `num_tokens`
        defaults to whole chunks; `start` is the position of the first token. With `exact=False` the
        chunks are known as approximate from the start: say so of KV that was computed on top of
        chunks whose `Lease.is_exact` is False. Where a disk cannot
        follow what is stored, the daemon waits for it up to `wait_s`, then drops the coldest chunks
        instead; 0 never waits. At most 2048 keys a call.

        With `ttl_s`, the granted chunks are gone that many seconds from now, from every tier and
        after any restart, and with them what continues them; 0 and None mean no such end. A chunk
        that exists keeps the end that it was stored with, or none. Raises `Unsupported` where the
        daemon knows of no such end: then nothing is reserved.
        """
        ttl_ns = _ttl_ns(ttl_s)
        counts = [layout.chunk_tokens] * len(keys) if num_tokens is None else list(num_tokens)
        if start and parent is None and not standalone:
            raise InvalidRequest(
                f"chunks at position {start} need the key of the chunk before them as parent"
            )
        message = pb.ReserveRequest(
            layout=layout.fingerprint,
            keys=join_keys(keys),
            parent=b"" if standalone else (parent or layout.fingerprint),
            standalone=standalone,
            start=start,
            num_tokens=counts,
            category=category,
            prefill_us=prefill_us,
            lease_ns=_lease_ns(lease_s),
            wait_ns=self._wait_ns(wait_s, timeout_s),
            is_approximate=not exact,
            ttl_ns=ttl_ns,
        )
        response, connection = self._call_on(pb.Request(reserve=message), timeout_s, declare=layout)
        if response.reserve.ttl_ns != ttl_ns:
            if response.reserve.lease:
                connection.release(response.reserve.lease)
            raise Unsupported("this daemon keeps no time to live: use one of the client's version")
        return Reservation(
            connection,
            layout,
            keys,
            counts,
            response.reserve,
            is_verified=self.verify,
            timeout_s=timeout_s or self.timeout_s,
        )

    def store(
        self, layout: KVLayout, keys: Sequence[ChunkKey], chunks: Sequence[Any], **options: Any
    ) -> list[str]:
        """Store `chunks[i]`, arrays or tensors `[layers, planes, tokens, kv_heads, head_dim]`,
        under `keys[i]`.

        One copy each. Returns the state of each key as `Reservation.states` does: "granted" ones
        are stored now. `options` are those of `reserve`. Token counts come from the chunks' shapes.
        """
        if len(keys) != len(chunks):
            raise InvalidRequest(f"{len(keys)} keys come with {len(chunks)} chunks")
        options.setdefault("num_tokens", [_num_tokens(layout, chunk) for chunk in chunks])
        with self.reserve(layout, keys, **options) as reservation:
            for index in reservation:
                reservation.write(index, chunks[index])
            reservation.commit()
        return reservation.states

    def load(
        self,
        layout: KVLayout,
        keys: Sequence[ChunkKey],
        outs: Sequence[Any],
        *,
        profiles: ProfileBook | None = None,
        **options: Any,
    ) -> int:
        """Copy the leading `keys` that are there into `outs`, arrays or tensors of their shape; how
        many.

        One copy each. `options` are those of `pin`; bitstreams are decoded with `profiles`, as by
        `Lease.decode`. Raises `LeaseExpired` or `Corrupt`: `outs` is undefined then.
        """
        with self.pin(layout, keys, **options) as lease:
            for index in range(len(lease)):
                lease.load(index, outs[index], profiles=profiles)
            return len(lease)

    def status(self, *, audit: bool = False, timeout_s: float | None = None) -> pb.StatusReply:
        """The daemon in numbers; with `audit` it checks its invariants first and fails if one is
        broken.
        """
        return self._call(pb.Request(status=pb.StatusRequest(audit=audit)), timeout_s).status

    def list_chunks(
        self,
        *,
        limit: int = 0,
        cursor: int = 0,
        category: str = "",
        layout: bytes = b"",
        timeout_s: float | None = None,
    ) -> pb.ListReply:
        """A page of chunks; its `cursor` is the next page's, 0 at the end."""
        message = pb.ListRequest(limit=limit, cursor=cursor, category=category, layout=layout)
        return self._call(pb.Request(list=message), timeout_s).list

    def clear(
        self,
        keys: Sequence[ChunkKey] | None = None,
        *,
        category: str = "",
        layout: bytes = b"",
        timeout_s: float | None = None,
    ) -> tuple[int, int]:
        """Drop chunks that match all that is given, and what continues them; (chunks, bytes)
        dropped.
        """
        count = size = 0
        for part in [()] if keys is None else split_parts(keys):
            message = pb.ClearRequest(keys=join_keys(part), category=category, layout=layout)
            is_partial = True
            while is_partial:
                reply = self._call(pb.Request(clear=message), timeout_s).clear
                count, size, is_partial = count + reply.count, size + reply.size, reply.is_partial
                message.cursor = reply.cursor
        return count, size

    def hold(
        self, keys: Sequence[ChunkKey], is_held: bool, *, timeout_s: float | None = None
    ) -> int:
        """Pin chunks without a deadline (an operator's decision), or take that back; how many of
        `keys` are there.
        """
        count = 0
        for part in split_parts(keys):
            message = pb.HoldRequest(keys=join_keys(part), is_held=is_held)
            count += self._call(pb.Request(hold=message), timeout_s).hold.count
        return count

    def persist(
        self, keys: Sequence[ChunkKey] | None = None, *, timeout_s: float | None = None
    ) -> int:
        """Write chunks (default: all) to disk now, and return how many of them are durable there.

        Raises `TierFailed` if not all that are here can be, `InvalidRequest` where there is no tier
        on disk, and `DeadlineExceeded`: the rest is still being written then.
        """
        give_up = time.monotonic() + (timeout_s or self.timeout_s)
        num_durable = 0
        for part in [()] if keys is None else split_parts(keys):
            num_durable += self._persist(part, give_up)
        return num_durable

    def _persist(self, keys: Sequence[ChunkKey], give_up: float) -> int:
        while True:
            left_s = max(give_up - time.monotonic(), 0.001)
            timeout_ns = min(int(left_s * 1e9), WAIT_NS_MAX)
            message = pb.PersistRequest(keys=join_keys(keys), timeout_ns=timeout_ns)
            reply = self._call(pb.Request(persist=message), left_s + 1.0).persist
            if reply.reason:
                raise TierFailed(f"{reply.num_durable} chunks are durable, not all: {reply.reason}")
            if not reply.num_pending:
                return reply.num_durable
            if time.monotonic() > give_up:
                raise DeadlineExceeded(f"{reply.num_pending} chunks are still being written")

    def scrub(
        self, *, start: bool = True, rate: int = 0, timeout_s: float | None = None
    ) -> pb.ScrubReply:
        """Begin to verify everything on disk, at `rate` bytes a second (0: the daemon's own rate),
        or only ask how far it is.
        """
        message = pb.ScrubRequest(start=start, rate=rate)
        return self._call(pb.Request(scrub=message), timeout_s).scrub

    def close(self) -> None:
        """End the session: all leases end with it. Reservations still open keep it until they are
        written.
        """
        with self._lock:
            self._is_closed = True
            self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_ns(self, wait_s: float, timeout_s: float | None) -> int:
        # Half of the deadline is left for the rest.
        return int(min(wait_s, (timeout_s or self.timeout_s) / 2) * 1e9)

    def _call(self, request: pb.Request, timeout_s: float | None) -> pb.Response:
        return self._call_on(request, timeout_s)[0]

    def _call_on(
        self, request: pb.Request, timeout_s: float | None, *, declare: KVLayout | None = None
    ) -> tuple[pb.Response, Connection]:
        timeout_s = timeout_s or self.timeout_s
        connection = self._open_connection()
        try:
            return self._call_once(connection, request, timeout_s, declare), connection
        except Unavailable:
            # The session that would have held the outcome is gone, so asking a new daemon again
            # repeats nothing.
            if connection.is_open:
                raise
        connection = self._open_connection()
        return self._call_once(connection, request, timeout_s, declare), connection

    def _call_once(
        self,
        connection: Connection,
        request: pb.Request,
        timeout_s: float,
        declare: KVLayout | None,
    ) -> pb.Response:
        if declare is not None and declare not in self._declared:
            message = pb.DeclareRequest(layout=layout_to_message(declare))
            connection.call(pb.Request(declare=message), timeout_s)
            self._declared.add(declare)
        return connection.call(request, timeout_s)

    def _open_connection(self) -> Connection:
        if self._connection.is_open:
            return self._connection
        with self._lock:
            if self._is_closed:
                raise Unavailable("the client is closed")
            if not self._connection.is_open:
                if time.monotonic() < self._retry_at:
                    raise Unavailable("the daemon was away a moment ago")
                self._retry_at = time.monotonic() + RETRY_EVERY_S
                self._connection.close()
                self._connection = self._attach()
                self._declared = set()
                self._retry_at = 0.0
            return self._connection


def split_parts(keys: Sequence[ChunkKey]) -> list[Sequence[ChunkKey]]:
    """`keys` in parts that fit one message each."""
    return [keys[start : start + KEYS_MAX] for start in range(0, len(keys), KEYS_MAX)]


def _check_owner(directory: Path) -> None:
    """Anybody can make the default directory below /tmp first, and listen there for our KV."""
    try:
        owner = directory.stat().st_uid
    except OSError:
        # Not there: the attach says so.
        return
    if owner not in (0, os.geteuid()):
        raise AccessDenied(f"{directory} belongs to user {owner}; name the daemon's socket instead")


def _lease_ns(lease_s: float) -> int:
    return max(int(lease_s * 1e9), 1)


def _ttl_ns(ttl_s: float | None) -> int:
    """0 for none. What is too short for a nanosecond is one: it must not become for ever."""
    if not ttl_s:
        return 0
    # Also false of what is no number.
    if not 0 < ttl_s <= TTL_NS_MAX / 1e9:
        raise InvalidRequest(
            f"a time to live is more than 0 and at most {TTL_NS_MAX // 10**9} s, found {ttl_s}"
        )
    return max(int(ttl_s * 1e9), 1)


def _num_tokens(layout: KVLayout, chunk: Any) -> int:
    shape = getattr(chunk, "shape", None)
    if shape is not None and len(shape) == 5:
        return int(shape[2])
    size = int(getattr(chunk, "nbytes", 0)) or len(chunk)
    if size % layout.token_size:
        raise InvalidRequest(
            f"a chunk of {size} bytes is no whole number of tokens of {layout.token_size} bytes"
        )
    return size // layout.token_size
