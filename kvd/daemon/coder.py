"""Coder: a daemon's codecs. It encodes chunks for a tier as the operator's rules say, and decodes
what a tier has, on threads of its own.

    memory, raw ─► encode ─► a tier keeps the bitstream          raw where no rule or codec fits
    memory, raw ◄─ decode ◄─ a tier has a bitstream              the first layers first

What is approximate stays so: it is never encoded lossily again, and whoever asks for exact bytes
does not get it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvd.chunk import ChunkMeta, Placement
from kvd.codecs.base import Codec, Part, Span
from kvd.codecs.bitstream import read_header
from kvd.codecs.registry import open_codec
from kvd.codecs.warm import warm
from kvd.daemon.codec_rules import RAW, TIERS, CodecRules
from kvd.daemon.config import Config
from kvd.errors import ConfigError, Corrupt, Unsupported
from kvd.keys import short
from kvd.layout import KVLayout
from kvd.tiers.settled import settled

if TYPE_CHECKING:
    from kvd.codecs.kvq import ProfileBook
    from kvd.codecs.profile import Profile
    from kvd.codecs.profile_folder import ProfileFolder

log = logging.getLogger("kvd.codec")

T = TypeVar("T")

# Layers decoded before the first is told of, then twice as many each time: a client that reads
# layer by layer can begin early, and the header is not read once for each layer.
LAYERS_FIRST = 1

# A layout that could not be encoded is tried again after this long: its profile may have come.
REFUSED_S = 30.0


class Encoded(NamedTuple):
    """A chunk as a tier keeps it: `uint8 [size]`, by which codec, and whether bit for bit."""

    data: NDArray[np.uint8]
    codec: str
    is_exact: bool


class Coder:
    """Codecs by `rules`, with what `profiles` knows of models, on `num_threads` threads."""

    def __init__(self, rules: CodecRules, profiles: ProfileBook, *, num_threads: int) -> None:
        self._rules = rules
        self._profiles = profiles
        self._threads = ThreadPoolExecutor(num_threads, "kvd-codec")
        # By spec, for encoding, and by the name that stands in a bitstream, for decoding.
        self._by_spec: dict[str, Codec] = {}
        self._by_name: dict[str, Codec] = {}
        # Layouts that a spec cannot keep, told once, and when they are tried again.
        self._refused: dict[tuple[str, bytes], float] = {}

    def open_all(self) -> None:
        """Open every codec that the rules name. Raises `ConfigError` for one that is not here."""
        for tier in TIERS:
            for spec in sorted(self._rules.specs_of(tier)):
                try:
                    self._codec(spec)
                except (Unsupported, ImportError) as error:
                    raise ConfigError(f"codec {tier}={spec}: {error}") from error

    async def warm_up(self) -> None:
        """Have all of them compiled: a first chunk must not wait for that."""
        started = time.monotonic()
        # Levels of a codec are compiled together.
        specs = {spec.partition(":")[0]: spec for spec in self._by_spec}
        for name, spec in specs.items():
            await self._on_thread(partial(warm, spec))
            seconds = time.monotonic() - started
            log.info("event=codec_ready codec=%s seconds=%.1f", name, seconds)

    def encodes(self, tier: str, meta: ChunkMeta, source: Placement) -> bool:
        """Whether the rules want a chunk encoded in a tier, and that can be, from `source`."""
        spec = self._rules.of(tier, meta.category)
        if spec == RAW or time.monotonic() < self._refused.get((spec, meta.layout), 0.0):
            return False
        return source.is_exact or self._codec(spec).is_exact

    def is_kept_as_packed(self, meta: ChunkMeta, source: Placement, packed: Placement) -> bool:
        """Whether disk has of a chunk what packed memory has: the rules say the same of both, or
        `source`, the raw copy, is no more than what `packed` decodes to.
        """
        if not source.is_exact:
            return True
        return self._rules.of("cpu", meta.category) == self._rules.of("nvme", meta.category)

    async def encode(
        self,
        tier: str,
        meta: ChunkMeta,
        layout: KVLayout | None,
        kv: NDArray[np.uint8],
        source: Placement,
    ) -> Encoded | None:
        """A chunk's bytes as the rules want them in a tier; None where they stay as they are.
        `kv` is the raw copy `source`. Raises `Corrupt` where it is not what was committed.
        """
        if layout is None or not self.encodes(tier, meta, source):
            return None
        spec = self._rules.of(tier, meta.category)
        codec = self._codec(spec)
        try:
            return await self._on_thread(lambda: _encode(codec, meta, layout, kv, source))
        except Unsupported as error:
            self._refuse(spec, meta, error)
            return None

    async def decode(
        self,
        bitstream: NDArray[np.uint8],
        meta: ChunkMeta,
        layout: KVLayout,
        out: NDArray[np.uint8],
        progress: Callable[[int], None],
    ) -> None:
        """Fill `out`, a raw chunk. `progress` hears on another thread how many leading bytes are
        there. Raises `Corrupt`, or `Unsupported` where a codec or profile is not here.
        """
        await self._on_thread(lambda: self._decode(bitstream, meta, layout, out, progress))

    def close(self) -> None:
        """Wait for what is under way."""
        self._threads.shutdown()

    def _refuse(self, spec: str, meta: ChunkMeta, error: Unsupported) -> None:
        # Several chunks of a layout may have been on their way.
        is_new = (spec, meta.layout) not in self._refused
        self._refused[spec, meta.layout] = time.monotonic() + REFUSED_S
        if is_new:
            layout = short(meta.layout)
            log.warning("event=not_encoded codec=%s layout=%s reason=%r", spec, layout, str(error))

    def _decode(
        self,
        bitstream: NDArray[np.uint8],
        meta: ChunkMeta,
        layout: KVLayout,
        out: NDArray[np.uint8],
        progress: Callable[[int], None],
    ) -> None:
        header = read_header(bitstream)
        codec = self._by_name.get(header.codec) or self._codec(header.codec.partition("/")[0])
        if codec.name != header.codec:
            raise Unsupported(f"a bitstream of {header.codec}; this daemon has {codec.name}")
        layer_size = out.size // layout.num_layers
        start, count = 0, max(LAYERS_FIRST, header.section_layers)
        while start < layout.num_layers:
            # Whole sections: half of one costs as much.
            end = start + -(-count // header.section_layers) * header.section_layers
            end = min(end, layout.num_layers)
            part = Part(layer_start=start, layer_end=end)
            codec.decode(bitstream, layout, _span(meta), out, part)
            start, count = end, 2 * count
            progress(end * layer_size)

    def _codec(self, spec: str) -> Codec:
        if spec not in self._by_spec:
            _keep_products_to_one_thread()
            codec = self._by_spec[spec] = open_codec(spec, self._profiles)
            self._by_name.setdefault(codec.name, codec)
        return self._by_spec[spec]

    async def _on_thread(self, work: Callable[[], T]) -> T:
        # The bytes that are read or written must not be anybody else's before the end.
        return await settled(asyncio.get_running_loop().run_in_executor(self._threads, work))


def open_coder(config: Config) -> Coder:
    """The coder that a daemon of this config has, all codecs that it encodes with opened. Raises
    `ConfigError` for one that is not here.
    """
    num_threads = config.codec_threads or max((os.cpu_count() or 1) // 2, 1)
    folder = Path(config.profiles) if config.profiles else None
    coder = Coder(config.codec_rules, _Profiles(folder), num_threads=num_threads)
    coder.open_all()
    return coder


class _Profiles:
    """The profiles of a folder and those that come with kvd; looked for when one is wanted."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._told: set[Path] = set()

    @cached_property
    def _book(self) -> ProfileFolder:
        from kvd.codecs.profile_folder import ProfileFolder

        return ProfileFolder(self._folder)

    def for_layout(self, layout: KVLayout) -> Profile | None:
        found = self._book.for_layout(layout)
        for path, reason in self._book.broken.items():
            if path not in self._told:
                self._told.add(path)
                log.warning("event=profile_unreadable path=%s reason=%r", path, reason)
        return found

    def by_hash(self, hash: bytes) -> Profile | None:
        return self._book.by_hash(hash)


def _keep_products_to_one_thread() -> None:
    # Chunks are coded side by side: products that spread over all cores stand in each other's way
    # (decoding with a transform on a busy machine: 0.08 GB/s instead of 0.22).
    with suppress(ImportError):
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        threadpool_limits(1, user_api="blas")


def _encode(
    codec: Codec, meta: ChunkMeta, layout: KVLayout, kv: NDArray[np.uint8], source: Placement
) -> Encoded | None:
    if source.checksum is not None and xxhash.xxh3_64_intdigest(kv) != source.checksum:
        raise Corrupt(f"chunk {short(meta.key)} is not what was committed")
    room = np.empty(codec.size_bytes_max(layout, meta.num_tokens), np.uint8)
    size = codec.encode(kv, layout, _span(meta), room)
    if size >= kv.size:
        return None
    # What is kept for longer does not keep the room that might have been needed.
    return Encoded(room[:size].copy(), codec.name, source.is_exact and codec.is_exact)


def _span(meta: ChunkMeta) -> Span:
    return Span(start=meta.start, num_tokens=meta.num_tokens)
