"""Session: one attached client. It turns each request into a call on the store and remembers what
it must give back.

Both planes feed it: the attach socket one packet at a time, gRPC one stream message at a time. A
request is answered before the client's next one is looked at. Most are answered at once; those that
wait for a disk (`wait`, `persist`, a `reserve` that may) are answered later, within a bound, and
keep nobody else waiting.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import count
from types import CoroutineType
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from kvd.chunk import ChunkMeta, Fingerprint
from kvd.daemon import admin, pinned
from kvd.daemon.arrival import Arrival
from kvd.daemon.expiries import check_ttl_ns, expiry_after
from kvd.daemon.leases import (
    ANYTHING_RAW,
    LEASE_NS_DEFAULT,
    ReadLease,
    Terms,
    WriteLease,
    Writer,
)
from kvd.daemon.processes import process_start
from kvd.daemon.room import has_room, make_room
from kvd.daemon.store import ChunkStore
from kvd.errors import Corrupt, InvalidRequest, KvdError, LeaseExpired, TooLarge, UnknownLease
from kvd.keys import ChunkKey, PackedKeys, check_key, short, split_keys
from kvd.proto import kvd_pb2 as pb
from kvd.proto.convert import layout_from_message
from kvd.proto.limits import (
    CODEC_SIZE_MAX,
    CODECS_MAX,
    DATA_SIZE_MAX,
    GRPC_MESSAGE_SIZE_MAX,
    KEYS_MAX,
    MESSAGE_SIZE_MAX,
    PROTOCOL_VERSION,
    ROOM_WAIT_NS_MAX,
    WAIT_NS_MAX,
)

log = logging.getLogger("kvd.session")

CLIENT_NAME_SIZE_MAX = 128

L = TypeVar("L", ReadLease, WriteLease)
R = TypeVar("R")

_STATES = {"granted": pb.GRANTED, "exists": pb.EXISTS, "busy": pb.BUSY, "full": pb.FULL}

_session_ids = count(1)


class Session:
    """One client's requests and leases. `has_arena` says whether the client maps the arena, from
    process `pid`, or asks for bytes.
    """

    def __init__(
        self, store: ChunkStore, facts: admin.Facts, *, has_arena: bool, pid: int = 0
    ) -> None:
        self.id = next(_session_ids)
        self.client = ""
        self.is_attached = False
        self.leases: set[int] = set()
        self._store = store
        self._facts = facts
        self._has_arena = has_arena
        self._pid = pid
        # Who writes what this session reserves, for a later daemon on the same arena.
        self._writer: Writer | None = None
        self._message_size_max = MESSAGE_SIZE_MAX if has_arena else GRPC_MESSAGE_SIZE_MAX
        self._verbs: dict[str, Callable[..., object]] = {
            "attach": self._attach,
            "declare": self._declare,
            "lookup": self._lookup,
            "reserve": self._reserve,
            "commit": self._commit,
            "pin": self._pin,
            "renew": self._renew,
            "release": self._release,
            "write": self._write,
            "read": self._read,
            "wait": self._wait,
            "persist": lambda message: admin.persist(store, message),
            "scrub": lambda message: admin.scrub(store, message),
            "status": lambda message: admin.status(store, facts, message),
            "list": lambda message: admin.list_chunks(store, message),
            "clear": lambda message: admin.clear(store, message),
            "hold": lambda message: admin.hold(store, message),
        }

    def handle_packet(self, packet: bytes) -> bytes | Awaitable[bytes | None] | None:
        """The answer to one encoded request, at once or to be awaited, or None if it wants none.
        Never raises.
        """
        if len(packet) > self._message_size_max:
            message = f"a message has at most {self._message_size_max} bytes"
            return _failure(0, TooLarge.code, message).SerializeToString()
        try:
            request = pb.Request.FromString(packet)
        except DecodeError:
            message = f"{len(packet)} bytes are no kvd.v1 request"
            return _failure(0, InvalidRequest.code, message).SerializeToString()
        response = self.handle(request)
        if isinstance(response, pb.Response):
            return self._encode(request, response)
        return self._encode_later(request, response)

    def handle(self, request: pb.Request) -> pb.Response | Awaitable[pb.Response]:
        """The answer to one request, at once or to be awaited; a failure is an answer too, and then
        nothing has changed.
        """
        verb = request.WhichOneof("verb")
        try:
            if verb is None:
                raise InvalidRequest("the request has no verb that this daemon knows")
            if not self.is_attached and verb != "attach":
                raise InvalidRequest(f"attach comes first, found {verb}")
            result = self._verbs[verb](getattr(request, verb))
            if isinstance(result, CoroutineType):
                return self._finish(request, verb, result)
            return _answer(request, verb, result)
        except Exception as error:  # noqa: BLE001 - every failure is answered
            return self._failed(request, verb, error)

    async def _finish(
        self, request: pb.Request, verb: str, pending: Awaitable[object]
    ) -> pb.Response:
        try:
            return _answer(request, verb, await pending)
        except Exception as error:  # noqa: BLE001 - every failure is answered
            return self._failed(request, verb, error)

    def _failed(self, request: pb.Request, verb: str | None, error: Exception) -> pb.Response:
        if isinstance(error, KvdError):
            self._store.counters["request_errors"] += 1
            return _failure(request.id, error.code, str(error))
        # The store's own promise is that a failed call changed nothing; the client must not wait
        # for ever.
        log.error("event=request_failed session=%d verb=%s", self.id, verb, exc_info=error)
        self._store.counters["internal_errors"] += 1
        message = f"{verb} failed inside the daemon, see its log"
        return _failure(request.id, KvdError.code, message)

    async def _encode_later(
        self, request: pb.Request, pending: Awaitable[pb.Response]
    ) -> bytes | None:
        return self._encode(request, await pending)

    def _encode(self, request: pb.Request, response: pb.Response) -> bytes | None:
        if request.id == 0 and request.WhichOneof("verb") == "release":
            return None
        answer = response.SerializeToString()
        if len(answer) > self._message_size_max:
            message = f"the answer has {len(answer)} bytes, ask for less at once"
            return _failure(request.id, TooLarge.code, message).SerializeToString()
        return answer

    def close(self) -> None:
        """Give back all that this session reserved or pinned. Its client has stopped using the
        bytes.
        """
        for lease in self.leases:
            self._store.release(lease)
        self.leases.clear()

    def _attach(self, message: pb.AttachRequest) -> pb.AttachReply:
        if message.version != PROTOCOL_VERSION:
            raise InvalidRequest(
                f"this daemon speaks protocol {PROTOCOL_VERSION}, the client {message.version}: "
                "install the same kvd-cache on both sides"
            )
        if self.is_attached:
            raise InvalidRequest("this session is attached already")
        self.is_attached = True
        self.client = message.client[:CLIENT_NAME_SIZE_MAX]
        if self._has_arena and self._store.hot is not None:
            token = secrets.randbits(64) or 1
            self._writer = Writer(self._pid, process_start(self._pid), token)
            self._store.hot.stopped(message.stopped)
        return pb.AttachReply(
            version=PROTOCOL_VERSION,
            session=self.id,
            now_ns=time.monotonic_ns(),
            arena_size=self._store.tier.size if self._has_arena else 0,
            message_size_max=self._message_size_max,
            instance=self._facts.instance,
            daemon_version=self._facts.version,
            token=self._writer.token if self._writer is not None else 0,
        )

    def _declare(self, message: pb.DeclareRequest) -> pb.DeclareReply:
        return pb.DeclareReply(fingerprint=self._store.declare(layout_from_message(message.layout)))

    def _lookup(self, message: pb.LookupRequest) -> pb.LookupReply:
        return lookup(self._store, message)

    def _reserve(self, message: pb.ReserveRequest) -> pb.ReserveReply | Awaitable[pb.ReserveReply]:
        self._facts.check_serving()
        check_ttl_ns(message.ttl_ns)
        metas = _metas_of(message)
        if message.wait_ns and self._store.below:
            size = self._store.missing_size(metas)
            if not has_room(self._store.below, size):
                room = make_room(self._store.below, size, _room_wait_s(message.wait_ns))
                return _later(room, partial(self._reserve_now, message, metas))
        return self._reserve_now(message, metas)

    def _reserve_now(
        self, message: pb.ReserveRequest, metas: Sequence[ChunkMeta]
    ) -> pb.ReserveReply:
        now_ns = time.monotonic_ns()
        lease, states = self._store.reserve(
            metas,
            lease_ns=message.lease_ns or LEASE_NS_DEFAULT,
            now_ns=now_ns,
            is_shared=self._has_arena,
            is_exact=not message.is_approximate,
            writer=self._writer,
            expiry=expiry_after(message.ttl_ns, now_ns=now_ns, wall_now_ns=time.time_ns()),
        )
        states_named = [_STATES[state] for state in states]
        reply = pb.ReserveReply(states=states_named, ttl_ns=message.ttl_ns)
        if lease is not None:
            self.leases.add(lease.id)
            reply.lease = lease.id
            reply.deadline_ns = lease.deadline_ns
            reply.offsets.extend([extent.offset for extent in lease.extents])
            reply.sizes.extend([extent.size for extent in lease.extents])
        return reply

    def _commit(self, message: pb.CommitRequest) -> pb.CommitReply:
        self._check_own(message.lease)
        count = self._store.commit(message.lease, message.checksums, now_ns=time.monotonic_ns())
        self.leases.discard(message.lease)
        return pb.CommitReply(count=count)

    def _pin(self, message: pb.PinRequest) -> pb.PinReply | Awaitable[pb.PinReply]:
        self._facts.check_serving()
        layout = Fingerprint(check_key(message.layout))
        keys = checked_keys(message.keys)
        terms = _terms_of(message)
        if message.wait_ns and self._store.below:
            size = self._store.absent_size(keys, terms=terms)
            if not has_room(self._store.below, size):
                room = make_room(self._store.below, size, _room_wait_s(message.wait_ns))
                return _later(room, partial(self._pin_now, message, keys, layout, terms))
        return self._pin_now(message, keys, layout, terms)

    def _pin_now(
        self, message: pb.PinRequest, keys: Sequence[ChunkKey], layout: Fingerprint, terms: Terms
    ) -> pb.PinReply:
        lease, found = self._store.pin(
            keys,
            layout,
            standalone=message.standalone,
            lease_ns=message.lease_ns or LEASE_NS_DEFAULT,
            now_ns=time.monotonic_ns(),
            terms=terms,
        )
        reply = pb.PinReply(present=bytes(found) if message.standalone else b"")
        if lease is None:
            return reply
        self.leases.add(lease.id)
        reply.lease = lease.id
        reply.deadline_ns = lease.deadline_ns
        pinned.describe(self._store, lease, reply)
        return reply

    def _wait(self, message: pb.WaitRequest) -> pb.WaitReply | Awaitable[pb.WaitReply]:
        if message.is_rest:
            return self._wait_for_rest(message)
        lease = self._read_lease(message.lease, message.index)
        ready = pinned.ready_size(self._store, lease, message.index)
        if ready is None:
            return pb.WaitReply(is_lost=True)
        arrival = pinned.arrival_of(self._store, lease, message.index)
        if arrival is None or ready >= message.size or not message.timeout_ns:
            return pb.WaitReply(ready=ready)
        return self._wait_later(message, arrival)

    async def _wait_later(self, message: pb.WaitRequest, arrival: Arrival) -> pb.WaitReply:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + min(message.timeout_ns, WAIT_NS_MAX) / 1e9
        size = min(message.size, arrival.extent.size)
        while loop.time() < give_up:
            progress: asyncio.Future[None] = loop.create_future()
            arrival.watch(partial(_resolve, progress))
            # What came before the watch is not told again.
            if arrival.ready < size:
                await asyncio.wait([progress], timeout=max(give_up - loop.time(), 0))
            lease = self._read_lease(message.lease, message.index)
            ready = pinned.ready_size(self._store, lease, message.index)
            if ready is None:
                return pb.WaitReply(is_lost=True)
            if ready >= size:
                return pb.WaitReply(ready=ready)
        return pb.WaitReply(ready=arrival.ready)

    async def _wait_for_rest(self, message: pb.WaitRequest) -> pb.WaitReply:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + min(message.timeout_ns, WAIT_NS_MAX) / 1e9
        at = message.index
        while True:
            lease = self._read_lease(message.lease, message.index)
            count = len(lease.entries)
            while at < count and pinned.is_whole(self._store, lease, at):
                at += 1
            arrival = pinned.arrival_of(self._store, lease, at) if at < count else None
            if arrival is None or loop.time() >= give_up:
                # Neither here nor on its way is lost.
                is_lost = arrival is None and at < count
                return pb.WaitReply(num_ready=at - message.index, is_lost=is_lost)
            progress: asyncio.Future[None] = loop.create_future()
            arrival.watch(partial(_resolve, progress))
            await asyncio.wait([progress], timeout=max(give_up - loop.time(), 0))

    def _read_lease(self, lease_id: int, index: int) -> ReadLease:
        """A pin of this session that has a chunk `index`."""
        self._check_own(lease_id)
        lease = self._store.lease(lease_id)
        if not isinstance(lease, ReadLease):
            raise InvalidRequest("bytes are waited for under a pin")
        if not index < len(lease.entries):
            raise InvalidRequest(f"the lease has {len(lease.entries)} chunks, found index {index}")
        return lease

    def _renew(self, message: pb.RenewRequest) -> pb.RenewReply:
        self._check_own(message.lease)
        deadline_ns = self._store.renew(
            message.lease, lease_ns=message.lease_ns or LEASE_NS_DEFAULT, now_ns=time.monotonic_ns()
        )
        return pb.RenewReply(deadline_ns=deadline_ns)

    def _release(self, message: pb.ReleaseRequest) -> pb.ReleaseReply:
        self._check_own(message.lease)
        self._store.release(message.lease)
        self.leases.discard(message.lease)
        return pb.ReleaseReply()

    def _write(self, message: pb.WriteRequest) -> pb.WriteReply:
        lease = self._bytes_lease(message.lease, WriteLease)
        if not message.index < len(lease.extents):
            raise InvalidRequest(
                f"the lease has {len(lease.extents)} chunks, found index {message.index}"
            )
        extent = lease.extents[message.index]
        _check_range(message.offset, len(message.data), extent.size)
        view = self._store.tier.view(extent)
        memoryview(view)[message.offset : message.offset + len(message.data)] = message.data
        return pb.WriteReply()

    def _read(self, message: pb.ReadRequest) -> pb.ReadReply:
        lease = self._bytes_lease(message.lease, ReadLease)
        if not message.index < len(lease.entries):
            raise InvalidRequest(
                f"the lease has {len(lease.entries)} chunks, found index {message.index}"
            )
        ready = pinned.ready_size(self._store, lease, message.index)
        if ready is None:
            key = lease.entries[message.index].meta.key
            raise Corrupt(f"chunk {short(key)} was lost; treat it as a miss")
        extent = pinned.place_of(self._store, lease, message.index).extent
        _check_range(message.offset, message.size, extent.size)
        if message.offset + message.size > ready:
            raise InvalidRequest(f"only {ready} bytes of the chunk are there yet; wait for more")
        view = self._store.tier.view(extent)
        return pb.ReadReply(data=view[message.offset : message.offset + message.size].tobytes())

    def _check_own(self, lease_id: int) -> None:
        if lease_id not in self.leases:
            raise UnknownLease(
                f"lease {lease_id} is not open in this session: "
                "committed or released already, or never granted"
            )

    def _bytes_lease(self, lease_id: int, kind: type[L]) -> L:
        if self._has_arena:
            raise InvalidRequest("this session maps the arena: its bytes do not travel in messages")
        self._check_own(lease_id)
        lease = self._store.lease(lease_id)
        if not isinstance(lease, kind):
            raise InvalidRequest("bytes are written under a reservation and read under a pin")
        if time.monotonic_ns() > lease.deadline_ns:
            raise LeaseExpired(f"lease {lease_id} has ended")
        return lease


async def _later(room: Awaitable[None], answer: Callable[[], R]) -> R:
    """The answer when there is room, or the wait for it is over."""
    await room
    return answer()


def _room_wait_s(wait_ns: int) -> float:
    return min(wait_ns, ROOM_WAIT_NS_MAX) / 1e9


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _answer(request: pb.Request, verb: str, result: object) -> pb.Response:
    named: dict[str, Any] = {verb: result}
    return pb.Response(id=request.id, **named)


def _failure(request_id: int, code: str, message: str) -> pb.Response:
    return pb.Response(id=request_id, error=pb.Error(code=code, message=message))


def lookup(store: ChunkStore, message: pb.LookupRequest) -> pb.LookupReply:
    """Which of the keys are here; needs no session."""
    terms = _terms_of(message)
    if not message.standalone:
        packed = PackedKeys(message.keys)
        _check_count(len(packed))
        now_ns = time.monotonic_ns()
        count = store.lookup(packed, now_ns=now_ns, prefetch=store.is_prefetching, terms=terms)
        return pb.LookupReply(count=count)
    keys = checked_keys(message.keys)
    present = store.present(keys, now_ns=time.monotonic_ns(), terms=terms)
    return pb.LookupReply(count=sum(present), present=bytes(present))


def checked_keys(packed: bytes) -> list[ChunkKey]:
    """The keys of a message. Raises `TooLarge` for too many, `InvalidRequest` for broken ones."""
    keys = split_keys(packed)
    _check_count(len(keys))
    return keys


def _terms_of(message: pb.LookupRequest | pb.PinRequest) -> Terms:
    if not message.is_exact and not message.codecs:
        return ANYTHING_RAW
    if len(message.codecs) > CODECS_MAX:
        raise TooLarge(f"at most {CODECS_MAX} codecs in one message, found {len(message.codecs)}")
    for name in message.codecs:
        if not 0 < len(name) <= CODEC_SIZE_MAX:
            raise InvalidRequest(f"a codec's name has 1 to {CODEC_SIZE_MAX} letters: {name!r}")
    return Terms(is_exact=message.is_exact, codecs=frozenset(message.codecs))


def _check_count(num_keys: int) -> None:
    if num_keys > KEYS_MAX:
        raise TooLarge(f"at most {KEYS_MAX} keys in one message, found {num_keys}")


def _metas_of(message: pb.ReserveRequest) -> list[ChunkMeta]:
    keys = checked_keys(message.keys)
    layout = Fingerprint(check_key(message.layout))
    if len(message.num_tokens) != len(keys) or not keys:
        raise InvalidRequest(f"{len(keys)} keys come with {len(message.num_tokens)} token counts")
    if message.standalone == bool(message.parent):
        raise InvalidRequest("a chain of chunks names its parent, standalone chunks have none")
    parent = None if message.standalone else check_key(message.parent)
    metas = []
    start = message.start
    for key, num_tokens in zip(keys, message.num_tokens, strict=True):
        metas.append(
            ChunkMeta(
                key=key,
                parent=parent,
                layout=layout,
                start=start,
                num_tokens=num_tokens,
                category=message.category,
                prefill_us=message.prefill_us,
            )
        )
        if parent is not None:
            parent, start = key, start + num_tokens
    return metas


def _check_range(offset: int, size: int, extent_size: int) -> None:
    if size > DATA_SIZE_MAX:
        raise TooLarge(f"at most {DATA_SIZE_MAX} bytes in one message, found {size}")
    if offset + size > extent_size:
        raise InvalidRequest(f"range {offset}+{size} is outside the chunk of {extent_size} bytes")
