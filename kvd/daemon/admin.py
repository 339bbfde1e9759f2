"""What operators ask: status, list, clear, hold. Each answer is bounded, so none keeps other
clients waiting.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from uuid import uuid4

from kvd import __version__
from kvd.chunk import Fingerprint
from kvd.daemon.directory import Entry
from kvd.daemon.roles import Lower
from kvd.daemon.store import ChunkStore
from kvd.errors import InvalidRequest, KvdError, Unavailable
from kvd.keys import split_keys
from kvd.layout import KVLayout
from kvd.proto import kvd_pb2 as pb
from kvd.proto.convert import layout_to_message
from kvd.proto.limits import CLEAR_LIMIT_MAX, LIST_LIMIT_MAX, LIST_SIZE_MAX, WAIT_NS_MAX


@dataclass
class Facts:
    """What a daemon is and what it is doing: starting, serving, draining."""

    pid: int
    version: str = __version__
    instance: str = field(default_factory=lambda: uuid4().hex)
    started_ns: int = field(default_factory=time.monotonic_ns)
    state: str = "starting"
    num_sessions: int = 0
    pages: str = "small"

    def check_serving(self) -> None:
        """Raise `Unavailable` unless new leases are given out."""
        if self.state != "serving":
            raise Unavailable(f"the daemon is {self.state} and gives out no new leases")


def status(store: ChunkStore, facts: Facts, message: pb.StatusRequest) -> pb.StatusReply:
    """The daemon in numbers; with `audit`, after a check of all invariants."""
    if message.audit:
        try:
            store.check()
        except AssertionError as error:
            raise KvdError(f"audit failed: {error}") from error
    tier = store.tier
    return pb.StatusReply(
        version=facts.version,
        pid=facts.pid,
        instance=facts.instance,
        state=facts.state,
        uptime_ns=time.monotonic_ns() - facts.started_ns,
        num_chunks=len(store.directory),
        num_layouts=len(store.layouts),
        num_sessions=facts.num_sessions,
        num_pinned=store.num_pinned,
        num_reserved=store.num_reserved,
        tiers=[
            pb.TierStatus(
                name=tier.name,
                size=tier.size,
                used=tier.used,
                largest_free=tier.largest_free,
                num_extents=tier.num_extents,
                pages=facts.pages,
            ),
            *(pb.TierStatus(**below.facts()) for below in store.below),
        ],
        counters=dict(store.counters),
    )


def list_chunks(store: ChunkStore, message: pb.ListRequest) -> pb.ListReply:
    """A page of chunks that match, in the order they came; the cursor is a position, so pages may
    shift under writes.
    """
    limit = min(message.limit or LIST_LIMIT_MAX, LIST_LIMIT_MAX)
    reply = pb.ListReply()
    layouts: dict[bytes, pb.Layout] = {}
    size = 0
    at = min(message.cursor, len(store.directory))
    # A page looks at a bounded number of chunks too, however few of them match.
    expiries, now_ns = store.directory.expiries, time.monotonic_ns()
    for entry in islice(store.directory, at, at + CLEAR_LIMIT_MAX):
        at += 1
        if expiries.is_over(entry, now_ns):
            continue
        if _matches(entry, message.category, message.layout):
            info = _info(entry)
            if (expiry := expiries.get(entry)) is not None:
                info.expires_in_ns = expiry.expires_ns - now_ns
            known = store.layouts.get(Fingerprint(info.layout))
            # One from before the last start, of an index that was lost, is described when declared.
            if known is not None and info.layout not in layouts:
                layouts[info.layout] = _described(known)
                size += layouts[info.layout].ByteSize()
            reply.chunks.append(info)
            size += info.ByteSize()
            if len(reply.chunks) == limit or size > LIST_SIZE_MAX:
                break
    reply.cursor = at if at < len(store.directory) else 0
    reply.layouts.extend(layouts.values())
    return reply


def clear(store: ChunkStore, message: pb.ClearRequest) -> pb.ClearReply:
    """Drop chunks that match, and what continues them; families with a pinned chunk stay.

    One call looks at a bounded number of chunks; the cursor of its answer goes on from there.
    """
    if message.keys:
        found = (store.directory.get(key) for key in split_keys(message.keys))
        entries = [entry for entry in found if entry is not None]
        at = len(store.directory)
    else:
        limit = min(message.limit or CLEAR_LIMIT_MAX, CLEAR_LIMIT_MAX)
        start = min(message.cursor, len(store.directory))
        entries = list(islice(store.directory, start, start + limit))
        at = start + len(entries)
    matching = [e for e in entries if _matches(e, message.category, message.layout)]
    count, size = store.drop(matching)
    # What is gone has moved the rest to the front, by at most this much.
    at = max(at - count, 0)
    is_done = bool(message.keys) or at >= len(store.directory)
    return pb.ClearReply(count=count, size=size, is_partial=not is_done, cursor=at)


def hold(store: ChunkStore, message: pb.HoldRequest) -> pb.HoldReply:
    """Pin chunks until an operator takes it back."""
    keys = split_keys(message.keys)
    if not keys:
        raise InvalidRequest("no keys named")
    count = store.hold(keys, message.is_held, now_ns=time.monotonic_ns())
    return pb.HoldReply(count=count)


def persist(store: ChunkStore, message: pb.PersistRequest) -> Awaitable[pb.PersistReply]:
    """Write chunks to disk now, within a bound of time."""
    if store.lower is None:
        raise InvalidRequest("this daemon has no tier on disk; start it with --tiers cpu,nvme")
    return _persist(store, store.lower, message)


async def _persist(store: ChunkStore, lower: Lower, message: pb.PersistRequest) -> pb.PersistReply:
    keys = split_keys(message.keys) or [entry.meta.key for entry in store.directory]
    find = store.directory.finder(time.monotonic_ns())
    entries = [entry for key in keys if (entry := find(key)) is not None]
    timeout_ns = min(message.timeout_ns or WAIT_NS_MAX, WAIT_NS_MAX)
    done = await lower.persist(entries, timeout_ns / 1e9)
    return pb.PersistReply(**done._asdict())


def scrub(store: ChunkStore, message: pb.ScrubRequest) -> pb.ScrubReply:
    """Begin a pass over everything on disk, or ask how far it is."""
    if store.lower is None:
        raise InvalidRequest("this daemon has no tier on disk; there is nothing to scrub")
    if message.start:
        store.lower.scrub(message.rate)
    return pb.ScrubReply(**store.lower.scrubbed._asdict())


def _described(layout: KVLayout) -> pb.Layout:
    # A salt keeps tenants apart because others cannot guess it: listings show which, not what.
    digest = blake2b(layout.salt.encode(), digest_size=4).hexdigest()
    return layout_to_message(replace(layout, salt=f"#{digest}" if layout.salt else ""))


def _matches(entry: Entry, category: str, layout: bytes) -> bool:
    meta = entry.meta
    return (not category or meta.category == category) and (not layout or meta.layout == layout)


def _info(entry: Entry) -> pb.ChunkInfo:
    meta, placement = entry.meta, entry.placement
    return pb.ChunkInfo(
        key=meta.key,
        parent=meta.parent or b"",
        layout=meta.layout,
        start=meta.start,
        num_tokens=meta.num_tokens,
        category=meta.category,
        size=placement.extent.size,
        tier=placement.extent.tier,
        codec=placement.codec,
        pins=entry.pins,
        is_held=entry.is_held,
        is_exact=placement.is_exact,
    )
