"""LayoutBook: the layouts that a store knows, and what a new chunk of one may be."""

from __future__ import annotations

from kvd.chunk import ChunkMeta, Fingerprint, Placement
from kvd.daemon.codec_rules import RAW
from kvd.daemon.labels import NO_TENANT, tenant_of
from kvd.errors import InvalidRequest, LayoutMismatch, TooLarge
from kvd.keys import short
from kvd.layout import KVLayout
from kvd.tiers.cpu import CpuTier

# Layouts a daemon keeps in mind: every model, rank and tenant of a node, with room.
LAYOUTS_MAX = 65536


class LayoutBook:
    """Layouts by fingerprint, for chunks in `tier`."""

    def __init__(self, tier: CpuTier) -> None:
        self.layouts: dict[Fingerprint, KVLayout] = {}
        # Whose chunks they are; known of chunks from before even where their layout is not.
        self.tenants: dict[Fingerprint, bytes] = {}
        self._tier = tier
        # One int object a size, not one a chunk: a million chunks feel it.
        self._sizes: dict[int, int] = {}

    def declare(self, layout: KVLayout) -> Fingerprint:
        """Make a layout known; its fingerprint names it from now on. Twice is once."""
        fingerprint = Fingerprint(layout.fingerprint)
        if fingerprint not in self.layouts and len(self.layouts) >= LAYOUTS_MAX:
            raise InvalidRequest(
                f"{LAYOUTS_MAX} layouts are known already, and are kept until the daemon restarts"
            )
        self.layouts.setdefault(fingerprint, layout)
        self.tenants.setdefault(fingerprint, tenant_of(layout.salt))
        return fingerprint

    def size_of(self, meta: ChunkMeta) -> int:
        """Bytes of a chunk that somebody wants to store. Raises `LayoutMismatch`, `InvalidRequest`
        or `TooLarge` for one that cannot be.
        """
        layout = self.layouts.get(meta.layout)
        if layout is None:
            raise LayoutMismatch(f"layout {short(meta.layout)} is not known here; declare it first")
        if meta.num_tokens > layout.chunk_tokens:
            raise InvalidRequest(
                f"a chunk of layout {short(meta.layout)} has at most {layout.chunk_tokens} tokens, "
                f"found {meta.num_tokens}"
            )
        if meta.parent == meta.key:
            raise InvalidRequest(f"chunk {short(meta.key)} names itself as its parent")
        size = layout.size(meta.num_tokens)
        if size > self._tier.size:
            raise TooLarge(
                f"a chunk of {size} bytes, the {self._tier.name} tier has {self._tier.size}"
            )
        return self._sizes.setdefault(size, size)

    def whole_size(self, meta: ChunkMeta, placement: Placement) -> int | None:
        """Bytes of a chunk in memory, of which `placement` is a copy; None where nobody knows."""
        if placement.codec == RAW:
            return placement.extent.size
        layout = self.layouts.get(meta.layout)
        return None if layout is None else layout.size(meta.num_tokens)

    def tenant_of(self, meta: ChunkMeta) -> bytes:
        """Whose chunk it is, for quotas."""
        return self.tenants.get(meta.layout, NO_TENANT)
