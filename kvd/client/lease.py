"""Leases as a client holds them: chunks to read, and extents to write.

Either is a context manager. Times are the host's monotonic clock, which daemon and client share.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvd.client.connection import Connection
from kvd.client.tensors import as_array, as_tensor, copy_in, copy_out
from kvd.errors import Corrupt, DeadlineExceeded, InvalidRequest, LeaseExpired, UnknownLease
from kvd.keys import ChunkKey, short
from kvd.layout import KVLayout
from kvd.proto import kvd_pb2 as pb
from kvd.proto.limits import DATA_SIZE_MAX, WAIT_NS_MAX

if TYPE_CHECKING:
    import torch

    from kvd.codecs.base import Part
    from kvd.codecs.kvq import ProfileBook

STATES = {pb.GRANTED: "granted", pb.EXISTS: "exists", pb.BUSY: "busy", pb.FULL: "full"}

# What a lease knows of each chunk.
_BY_CHUNK = (
    "_offsets",
    "_sizes",
    "_num_tokens",
    "_checksums",
    "_approximate",
    "_codecs",
    "_starts",
)


class Lease:
    """Pinned chunks, readable until `deadline_ns`.

    `array`, `tensor` and `raw` are views without a copy: what was read from one counts only if
    `check` passes afterwards, as leaving the `with` block does. `load` copies and checks by itself.

    A chunk that comes from disk may not be all there yet. Whatever reads one waits for it; `wait`
    waits for a part of it. One that turns out to be damaged is lost: reading it raises `Corrupt`,
    and it is a miss. `pin(..., wait=True)`, the default, has done all that before it returns.

    A pin that names codecs may have bitstreams instead of chunks: `codec` says so, `load` and
    `decode` decode them, `bitstream` is a view of one.
    """

    def __init__(
        self,
        connection: Connection,
        layout: KVLayout,
        keys: Sequence[ChunkKey],
        reply: pb.PinReply,
        *,
        is_verified: bool,
        timeout_s: float,
    ) -> None:
        self.layout = layout
        self.keys = keys
        self.deadline_ns = reply.deadline_ns
        self.is_released = not reply.lease
        self._id = reply.lease
        self._connection = connection
        self._offsets: Sequence[int] = reply.offsets
        self._sizes: Sequence[int] = reply.sizes
        self._num_tokens: Sequence[int] = reply.num_tokens
        self._checksums: Sequence[int] = reply.checksums
        self._ready = list(reply.ready)
        self._approximate: Sequence[int] = reply.is_approximate
        self._codecs: Sequence[str] = reply.codecs
        self._starts: Sequence[int] = reply.starts
        for described in (reply.is_approximate, reply.codecs, reply.starts):
            if len(described) not in (0, len(reply.offsets)):
                raise Corrupt(f"{len(reply.offsets)} chunks pinned, {len(described)} described")
        # Where each chunk stands in the daemon's lease.
        self._positions: Sequence[int] = range(len(reply.offsets))
        self._is_verified = is_verified
        self._timeout_s = timeout_s
        if connection.arena is not None:
            for offset, size in zip(reply.offsets, reply.sizes, strict=True):
                connection.arena.view(offset, size)

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks together."""
        return sum(self._num_tokens)

    @property
    def size(self) -> int:
        """Bytes of all chunks together."""
        return sum(self._sizes)

    @property
    def all_exact(self) -> bool:
        """Whether every chunk is just what was computed, on top of nothing approximate."""
        return not any(self._approximate)

    def is_exact(self, index: int) -> bool:
        """Whether one chunk is. What an engine computes on top of one that is not is approximate
        too: `reserve(..., exact=False)`.
        """
        return not (self._approximate and self._approximate[index])

    def codec(self, index: int) -> str:
        """ "raw", or the codec whose bitstream one chunk is there as."""
        return (self._codecs[index] if self._codecs else "") or "raw"

    def chunk_tokens(self, index: int) -> int:
        """Tokens of one chunk."""
        return self._num_tokens[index]

    def shape(self, index: int) -> tuple[int, int, int, int, int]:
        """`[layers, planes, tokens, kv_heads, head_dim]` of one chunk."""
        return self.layout.shape(self._num_tokens[index])

    def is_ready(self, index: int) -> bool:
        """Whether all of one chunk may be read now, without waiting for a disk or a codec."""
        return not self._ready or self._ready[index] >= self._sizes[index]

    def wait(self, index: int, size: int | None = None, *, timeout_s: float | None = None) -> bool:
        """Wait until the first `size` bytes of a chunk (default: all) may be read; False if the
        chunk is lost. Raises `DeadlineExceeded` or `LeaseExpired`.

        Layers come in order: `size` for the first n of them is n / layers of the chunk.
        """
        size = self._sizes[index] if size is None else size
        if not self._ready or self._ready[index] >= size:
            return True
        give_up = time.monotonic() + (timeout_s or self._timeout_s)
        while (left_s := give_up - time.monotonic()) > 0:
            self.check()
            timeout_ns = min(int(left_s * 1e9), WAIT_NS_MAX)
            message = pb.WaitRequest(lease=self._id, index=index, size=size, timeout_ns=timeout_ns)
            # The answer comes within the time asked for; what is added is for the way.
            answer = self._connection.call(pb.Request(wait=message), left_s + 1.0).wait
            if answer.is_lost:
                return False
            self._ready[index] = answer.ready
            if answer.ready >= size:
                return True
        raise DeadlineExceeded(
            f"chunk {short(self.keys[index])}: {self._ready[index]} of {size} bytes came in time"
        )

    def keep_good(self, *, standalone: bool, timeout_s: float) -> None:
        """Wait for every chunk, and leave out those that are lost; of a chain, also what continues
        them. Raises as `wait`: the lease is released then.
        """
        if not self._ready:
            return
        give_up = time.monotonic() + timeout_s
        try:
            good = self._wait_for_all(give_up, standalone=standalone)
        except BaseException:
            if not self.is_released:
                self.release()
            raise
        if len(good) < len(self):
            self._positions = good
            self.keys = [self.keys[index] for index in good]
            for name in _BY_CHUNK:
                values = getattr(self, name)
                setattr(self, name, [values[index] for index in good] if values else values)
        self._ready = []

    def _wait_for_all(self, give_up: float, *, standalone: bool) -> list[int]:
        """The chunks that are whole; of a chain, those before the first that is lost."""
        good: list[int] = []
        index = 0
        while index < len(self):
            self.check()
            left_s = max(give_up - time.monotonic(), 0.001)
            timeout_ns = min(int(left_s * 1e9), WAIT_NS_MAX)
            message = pb.WaitRequest(
                lease=self._id, index=index, timeout_ns=timeout_ns, is_rest=True
            )
            reply = self._connection.call(pb.Request(wait=message), left_s + 1.0).wait
            good += range(index, index + reply.num_ready)
            index += reply.num_ready
            if reply.is_lost:
                if not standalone:
                    break
                index += 1
            elif index < len(self) and time.monotonic() > give_up:
                raise DeadlineExceeded(f"{len(good)} of {len(self)} chunks came from disk in time")
        return good

    def raw(self, index: int) -> NDArray[np.uint8]:
        """`uint8 [size]` of one chunk: a view of the arena, or, without shared memory, a copy of
        the bytes. Raises `Corrupt` for one that is lost, `InvalidRequest` for a bitstream.
        """
        if self.codec(index) != "raw":
            raise InvalidRequest(
                f"chunk {short(self.keys[index])} is there as a bitstream of {self.codec(index)}: "
                "load() or decode() it, or pin it without codecs"
            )
        return self._content(index)

    def bitstream(self, index: int) -> NDArray[np.uint8]:
        """`uint8 [size]` of one bitstream: a view as `raw` gives it. Raises `Corrupt` for one that
        is lost, `InvalidRequest` for a chunk that is there raw.
        """
        if self.codec(index) == "raw":
            raise InvalidRequest(f"chunk {short(self.keys[index])} is there raw: use raw()")
        return self._content(index)

    def _content(self, index: int) -> NDArray[np.uint8]:
        self.check()
        size = self._sizes[index]
        if self._ready and not self.wait(index):
            raise Corrupt(f"chunk {short(self.keys[index])} was lost on disk; treat it as a miss")
        arena = self._connection.arena
        if arena is not None:
            return arena.view(self._offsets[index], size)
        out = np.empty(size, dtype=np.uint8)
        for offset in range(0, size, DATA_SIZE_MAX):
            part = min(DATA_SIZE_MAX, size - offset)
            position = self._positions[index]
            message = pb.ReadRequest(lease=self._id, index=position, offset=offset, size=part)
            data = self._connection.call(pb.Request(read=message), self._timeout_s).read.data
            if len(data) != part:
                raise Corrupt(f"{part} bytes asked for, the daemon sent {len(data)}")
            out[offset : offset + part] = np.frombuffer(data, dtype=np.uint8)
        return out

    def array(self, index: int) -> NDArray[Any]:
        """One chunk as `dtype [layers, planes, tokens, kv_heads, head_dim]`; bfloat16 shows as
        uint16.
        """
        return as_array(self.raw(index), self.layout.dtype, self.shape(index))

    def tensor(self, index: int) -> torch.Tensor:
        """One chunk as a torch tensor `dtype [layers, planes, tokens, kv_heads, head_dim]`."""
        return as_tensor(self.raw(index), self.layout.dtype, self.shape(index))

    def decode(
        self, index: int, out: Any, *, profiles: ProfileBook | None = None, part: Part | None = None
    ) -> None:
        """Fill `out`, an array or tensor of one chunk's shape and dtype, from its bitstream, and
        check; with `part`, only where that says. A chunk that is there raw is copied.

        `profiles` is where codecs find what they know of models (default: those that come with
        kvd). A tensor on a GPU is decoded there. Raises `LeaseExpired`; `Corrupt` where the bytes
        are no bitstream of the chunk; `Unsupported` where the codec or its profile is not here:
        `out` is undefined then.
        """
        # Codecs are heavy: only clients that decode import them.
        from kvd.client.decoding import decode

        content = self._content(index)
        start = self._starts[index] if self._starts else 0
        try:
            decode(
                content,
                self.codec(index),
                self.layout,
                start=start,
                num_tokens=self._num_tokens[index],
                out=out,
                profiles=profiles,
                part=part,
            )
        except Corrupt:
            # Bytes that were reused are no damage.
            self.check()
            raise
        self.check()

    def load(self, index: int, out: Any, *, profiles: ProfileBook | None = None) -> None:
        """Copy one chunk into `out`, an array or tensor of its shape and dtype or `uint8 [size]`,
        and check; a bitstream is decoded, see `decode`.

        Raises `LeaseExpired`, or `Corrupt` when the client verifies and the bytes are not those
        that were stored: `out` is undefined then.
        """
        if self.codec(index) != "raw":
            self.decode(index, out, profiles=profiles)
            return
        raw = self.raw(index)
        if self._connection.arena is not None:
            self._connection.arena.map_in(self._offsets[index], self._sizes[index])
        copy_out(raw, self.layout.dtype, self.shape(index), out)
        if self._is_verified:
            self._verify(index, raw)
        self.check()

    def verify(self, index: int) -> None:
        """Raise `Corrupt` unless the chunk's bytes match the checksum it was stored with; one
        without passes.
        """
        self._verify(index, self._content(index))
        self.check()

    def _verify(self, index: int, raw: NDArray[np.uint8]) -> None:
        expected = self._checksums[index] if self._checksums else 0
        if expected and xxhash.xxh3_64_intdigest(raw) != expected:
            raise Corrupt(
                f"chunk {short(self.keys[index])} is not what was stored; treat it as a miss"
            )

    def check(self) -> None:
        """Raise `LeaseExpired` unless everything read so far was the pinned chunks' bytes."""
        if self.is_released:
            raise LeaseExpired("the lease was released; pin the chunks again")
        if not self._connection.is_alive:
            raise LeaseExpired("the session ended under the lease; pin the chunks again")
        if time.monotonic_ns() > self.deadline_ns:
            raise LeaseExpired("the lease's deadline has passed; pin the chunks again, for longer")

    def renew(self, lease_s: float) -> None:
        """Put the deadline off. Raises `LeaseExpired` if it has passed already."""
        self.check()
        message = pb.RenewRequest(lease=self._id, lease_ns=int(lease_s * 1e9))
        response = self._connection.call(pb.Request(renew=message), self._timeout_s)
        self.deadline_ns = response.renew.deadline_ns

    def release(self) -> None:
        """Let the chunks go. Raises `UnknownLease` the second time."""
        if self.is_released:
            raise UnknownLease("the lease was released already")
        self.is_released = True
        self._connection.release(self._id)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.is_released:
            return
        try:
            if kind is None:
                self.check()
        finally:
            self.release()

    def __del__(self) -> None:
        if not getattr(self, "is_released", True):
            self.release()


class Reservation:
    """Extents to write chunks into, listed for everybody by `commit`, given back by `release` or an
    exception.

    `states[i]` says what became of key i: "granted", "exists", "busy" (another client is writing
    it) or "full".
    """

    def __init__(
        self,
        connection: Connection,
        layout: KVLayout,
        keys: Sequence[ChunkKey],
        num_tokens: Sequence[int],
        reply: pb.ReserveReply,
        *,
        is_verified: bool,
        timeout_s: float,
    ) -> None:
        self.layout = layout
        self.keys = keys
        self.states = [STATES[state] for state in reply.states]
        self.granted = [index for index, state in enumerate(self.states) if state == "granted"]
        self.deadline_ns = reply.deadline_ns
        self.is_open = bool(reply.lease)
        self._id = reply.lease
        self._connection = connection
        self._num_tokens = num_tokens
        extents = zip(reply.offsets, reply.sizes, strict=True)
        self._extents = dict(zip(self.granted, extents, strict=True))
        self._positions = {index: position for position, index in enumerate(self.granted)}
        self._checksums: dict[int, int] = {}
        self._is_verified = is_verified
        self._timeout_s = timeout_s
        if self.is_open:
            connection.hold_open()

    def __len__(self) -> int:
        return len(self.granted)

    @property
    def size(self) -> int:
        """Bytes of all granted chunks together."""
        return sum(size for _, size in self._extents.values())

    def __iter__(self) -> Iterator[int]:
        """The indices of the granted keys."""
        return iter(self.granted)

    def raw(self, index: int) -> NDArray[np.uint8]:
        """`uint8 [size]` of granted key `index`, to be written. Never touch it after `commit` or
        `release`.
        """
        self._check_open()
        if self._connection.arena is None:
            raise InvalidRequest("a session without shared memory has no views; use write()")
        return self._connection.arena.view(*self._extents[index])

    def array(self, index: int) -> NDArray[Any]:
        """The extent as `dtype [layers, planes, tokens, kv_heads, head_dim]`; bfloat16 shows as
        uint16.
        """
        return as_array(
            self.raw(index), self.layout.dtype, self.layout.shape(self._num_tokens[index])
        )

    def tensor(self, index: int) -> torch.Tensor:
        """The extent as a torch tensor `dtype [layers, planes, tokens, kv_heads, head_dim]`."""
        return as_tensor(
            self.raw(index), self.layout.dtype, self.layout.shape(self._num_tokens[index])
        )

    def write(self, index: int, source: Any) -> None:
        """Copy `source`, an array or tensor of the chunk's shape and dtype or its bytes, into
        granted key `index`.
        """
        self._check_open()
        shape = self.layout.shape(self._num_tokens[index])
        offset, size = self._extents[index]
        arena = self._connection.arena
        if arena is not None:
            raw = arena.view(offset, size)
            arena.map_in(offset, size)
        else:
            raw = np.empty(size, dtype=np.uint8)
        copy_in(raw, self.layout.dtype, shape, source)
        if self._is_verified:
            self._checksums[index] = xxhash.xxh3_64_intdigest(raw)
        if arena is None:
            self._send(index, raw)

    def _send(self, index: int, raw: NDArray[np.uint8]) -> None:
        for offset in range(0, raw.size, DATA_SIZE_MAX):
            data = raw[offset : offset + DATA_SIZE_MAX].tobytes()
            message = pb.WriteRequest(
                lease=self._id, index=self._positions[index], offset=offset, data=data
            )
            self._connection.call(pb.Request(write=message), self._timeout_s)

    def commit(self, *, timeout_s: float | None = None) -> int:
        """List all granted chunks; how many. Everything must have been written.

        Raises `UnknownLease` the second time, `LeaseExpired` past the deadline: nothing is listed
        then. After `DeadlineExceeded` or `Unavailable` the chunks may be listed or not, whole in
        either case.
        """
        if not self.granted:
            return 0
        self._check_open()
        checksums = []
        if self._is_verified:
            checksums = [
                self._checksums[index]
                if index in self._checksums
                else xxhash.xxh3_64_intdigest(self.raw(index))
                for index in self.granted
            ]
        message = pb.CommitRequest(lease=self._id, checksums=checksums)
        try:
            response = self._connection.call(
                pb.Request(commit=message), timeout_s or self._timeout_s
            )
        except BaseException:
            self.release()
            raise
        self._end()
        return response.commit.count

    def release(self) -> None:
        """Give the extents back unlisted. Raises `UnknownLease` if the reservation has ended
        already.
        """
        self._check_open()
        self._connection.release(self._id)
        self._end()

    def _end(self) -> None:
        self.is_open = False
        self._connection.let_close()

    def _check_open(self) -> None:
        if not self.is_open:
            raise UnknownLease("the reservation was committed or released already")

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_open:
            self.release()

    def __del__(self) -> None:
        if getattr(self, "is_open", False):
            self.release()
