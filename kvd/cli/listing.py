"""Listing: all pages of a daemon's chunks, keys by their first digits, and the rows of tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from kvd.cli.console import Failure
from kvd.errors import InvalidRequest, TooLarge
from kvd.proto.limits import LIST_LIMIT_MAX
from kvd.sizes import format_share, format_size

if TYPE_CHECKING:
    from kvd.client import Client
    from kvd.keys import ChunkKey
    from kvd.proto import kvd_pb2 as pb

# As many digits of a key as tables and logs show.
PREFIX_LENGTH_MIN = 8
KEY_LENGTH = 64

CHUNK_HEADERS = (
    "key",
    "layout",
    "start",
    "tokens",
    "size",
    "pins",
    "category",
    "tier",
    "codec",
    "exact",
    "model",
    "expires in",
)

# Counters that speak of trouble: shown only once there is some.
_TROUBLES = (
    "reserve_full",
    "leases_expired",
    "demote_missed_chunks",
    "quarantine_chunks",
    "damaged_chunks",
    "nvme_read_errors",
    "nvme_write_errors",
    "nvme_index_errors",
    "request_errors",
    "internal_errors",
)

# Candidates named when digits fit several.
_NAMED_MAX = 4


def pages(client: Client, category: str = "", layout: bytes = b"") -> Iterator[pb.ListReply]:
    """All pages of the list. Where one does not fit a message, smaller ones are asked for."""
    limit = LIST_LIMIT_MAX
    cursor = 0
    while True:
        try:
            reply = client.list_chunks(limit=limit, cursor=cursor, category=category, layout=layout)
        except TooLarge:
            if limit == 1:
                raise
            limit //= 2
            continue
        yield reply
        cursor = reply.cursor
        if not cursor:
            return


def resolve_keys(client: Client, texts: Sequence[str]) -> list[ChunkKey]:
    """The whole keys of the chunks that `texts` name, each once."""
    from kvd.keys import ChunkKey

    return [ChunkKey(key) for key in dict.fromkeys(_resolve(client, texts, "key"))]


def resolve_layout(client: Client, text: str) -> bytes:
    """The whole fingerprint that `text` names, none if it is empty."""
    return _resolve(client, (text,), "layout")[0] if text else b""


def layouts_of(reply: pb.ListReply) -> dict[bytes, pb.Layout]:
    """The layouts of a page by their fingerprints."""
    from kvd.proto.convert import layout_from_message

    return {layout_from_message(layout).fingerprint: layout for layout in reply.layouts}


def chunk_row(
    chunk: pb.ChunkInfo, layouts: dict[bytes, pb.Layout], *, is_short: bool
) -> tuple[object, ...]:
    """What `kvd ls` says of a chunk; `is_short` for people, whole keys and bytes for programs."""
    digits = PREFIX_LENGTH_MIN if is_short else KEY_LENGTH
    return (
        chunk.key.hex()[:digits],
        chunk.layout.hex()[:digits],
        chunk.start,
        chunk.num_tokens,
        format_size(chunk.size) if is_short else chunk.size,
        f"{chunk.pins}+held" if chunk.is_held else chunk.pins,
        chunk.category,
        chunk.tier,
        chunk.codec,
        "yes" if chunk.is_exact else "no",
        layouts[chunk.layout].model if chunk.layout in layouts else "",
        _expires_in(chunk, is_short=is_short),
    )


def status_rows(reply: pb.StatusReply) -> list[tuple[str, str]]:
    """What `kvd status` says."""
    counters = reply.counters
    open_now = f"{reply.num_pinned} pins and {reply.num_reserved} writes open"
    rows = [
        ("state", reply.state),
        ("version", f"{reply.version}, pid {reply.pid}, up {_duration(reply.uptime_ns // 10**9)}"),
        ("chunks", f"{reply.num_chunks} in {reply.num_layouts} layouts"),
        ("sessions", f"{reply.num_sessions}, {open_now}"),
    ]
    rows += [row for tier in reply.tiers for row in _tier_rows(tier)]
    asked, hits = counters["lookup_chunks"], counters["lookup_hits"]
    share = f" ({100 * hits / asked:.1f} %)" if asked else ""
    rows.append(("lookups", f"{hits} of {asked} chunks found{share}"))
    for name, num_chunks, size in (
        ("stored", counters["commit_chunks"], counters["commit_bytes"]),
        ("loaded", counters["pin_hits"], counters["pin_bytes"]),
        ("evicted", counters["evict_chunks"], counters["evict_bytes"]),
        ("written to disk", counters["demote_chunks"], counters["demote_bytes"]),
        ("read from disk", counters["promote_chunks"], counters["promote_bytes"]),
    ):
        rows.append((name, f"{num_chunks} chunks, {format_size(size)}"))
    if counters["expired_chunks"]:
        rows.append(("expired", f"{counters['expired_chunks']} chunks"))
    rows += [(name.replace("_", " "), str(counters[name])) for name in _TROUBLES if counters[name]]
    return rows


def chunk_dict(chunk: pb.ChunkInfo) -> dict[str, object]:
    """What `kvd ls --json` says of a chunk: `expires_in_s` is null where it has no end."""
    values = to_dict(chunk)
    del values["expires_in_ns"]
    return values | {"expires_in_s": chunk.expires_in_ns / 1e9 if chunk.expires_in_ns else None}


def _expires_in(chunk: pb.ChunkInfo, *, is_short: bool) -> str:
    if not chunk.expires_in_ns:
        return ""
    seconds = chunk.expires_in_ns // 10**9
    return _duration(seconds) if is_short else str(seconds)


def _tier_rows(tier: pb.TierStatus) -> list[tuple[str, str]]:
    name, used = f"tier {tier.name}", format_share(tier.used, tier.size)
    if not tier.path:
        free = format_size(tier.largest_free)
        return [(name, f"{used}, longest free {free}, {tier.pages} pages")]
    rows = [(name, f"{used} in {tier.path}, {format_size(tier.disk_size)} of files")]
    if tier.failure:
        rows.append((f"{name} FAILS", tier.failure))
    a_day = format_size(int(tier.written_a_day))
    amplification = f"amplification {tier.write_amplification:.2f}"
    rows.append(
        (f"{name} wear", f"{format_size(tier.written)} written, {a_day} a day, {amplification}")
    )
    if not tier.is_direct:
        rows.append((f"{name} note", "the file system refuses O_DIRECT: the page cache is used"))
    if tier.key_id:
        rows.append((f"{name} key", tier.key_id.hex()))
    return rows


def to_dict(message: Any) -> dict[str, object]:
    """A message's fields that are no lists; bytes as hexadecimal digits."""
    values = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    return {
        name: value.hex() if isinstance(value, bytes) else value
        for name, value in values.items()
        if isinstance(value, (str, int, float, bytes))
    }


def _resolve(client: Client, texts: Sequence[str], what: Literal["key", "layout"]) -> list[bytes]:
    """What `texts` name, one for each; for those that are not whole, all chunks are looked at."""
    digits = [_check_digits(text, what) for text in texts]
    found: dict[str, set[str]] = {text: set() for text in digits if len(text) < KEY_LENGTH}
    for reply in pages(client) if found else ():
        for chunk in reply.chunks:
            whole = chunk.key.hex() if what == "key" else chunk.layout.hex()
            for prefix, matches in found.items():
                if whole.startswith(prefix):
                    matches.add(whole)
    for prefix, matches in found.items():
        if not matches:
            raise Failure(f"no {what} here begins with {prefix}", code=InvalidRequest.code)
        if len(matches) > 1:
            named = ", ".join(sorted(matches)[:_NAMED_MAX])
            raise click.UsageError(
                f"{len(matches)} {what}s begin with {prefix}, give more digits: {named}"
            )
    return [bytes.fromhex(next(iter(found.get(text, (text,))))) for text in digits]


def _check_digits(text: str, what: str) -> str:
    lowered = text.lower()
    is_hex = set(lowered) <= set("0123456789abcdef")
    if not is_hex or not PREFIX_LENGTH_MIN <= len(text) <= KEY_LENGTH:
        wanted = f"{PREFIX_LENGTH_MIN} to {KEY_LENGTH} hexadecimal digits"
        raise click.UsageError(f"a {what} is {wanted}, found {text!r}")
    return lowered


def _duration(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
