"""What the small engine's clients can be made to do, and what the daemon has from it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Container, Iterable
from contextlib import AbstractContextManager
from functools import partial
from hashlib import blake2b
from typing import Any, cast

import torch

import kvd
from kvd.client.client import Client
from kvd.client.connectors.late_client import LateClient
from kvd.client.connectors.vllm_plan import key_of
from kvd.client.lease import Lease, Reservation
from kvd.errors import Unavailable
from kvd.keys import ChunkKey
from kvd.layout import KVLayout
from kvd.proto.limits import KEYS_MAX
from tests.vllm_caches import TokenHashes, content
from tests.vllm_engine import SmallEngine
from tests.vllm_fakes import Model

# Chunks that may be stored: what makes their bytes, and how many tokens they have.
# What a piece holds, and from where to where it goes.
Pieces = dict[ChunkKey, tuple[Callable[[], bytes], int, int]]

# What stands for vLLM's algorithm and seed.
SPACE = b"the name space of the hashes"


class Gate:
    """What clients do waits while it is shut: pins, reservations, and copies of what is saved. Pins
    fail while `is_failing`; of the chunks of a load, those at the places in `gone` are gone.
    """

    def __init__(self) -> None:
        self.pins, self.reservations = threading.Event(), threading.Event()
        self.copies, self.is_copying = threading.Event(), threading.Event()
        self.num_pins = 0
        self.open()

    def open(self) -> None:
        for event in (self.pins, self.reservations, self.copies):
            event.set()
        self.is_failing = False
        self.gone: Container[int] = ()


class GatedClient(LateClient):
    """A client behind a gate."""

    def __init__(self, attach: Callable[[], Client], gate: Gate) -> None:
        super().__init__(attach)
        self._gate = gate

    def pin(self, *args: Any, **options: Any) -> Lease:
        self._gate.num_pins += 1
        self._gate.pins.wait()
        if self._gate.is_failing:
            raise Unavailable("as the test wants it")
        layout, keys = args
        gone = self._gate.gone if options["standalone"] else ()
        keys = [os.urandom(32) if at in gone else key for at, key in enumerate(keys)]
        return super().pin(layout, keys, **options)

    def reserve(self, *args: Any, **options: Any) -> Reservation:
        self._gate.reservations.wait()
        return cast(Reservation, _Gated(super().reserve(*args, **options), self._gate))


class _Gated:
    """A reservation whose extents are slow to write."""

    def __init__(self, reservation: Reservation, gate: Gate) -> None:
        self._reservation, self._gate = reservation, gate

    def tensor(self, index: int) -> torch.Tensor:
        self._gate.is_copying.set()
        self._gate.copies.wait()
        return self._reservation.tensor(index)

    def __enter__(self) -> _Gated:
        self._reservation.__enter__()
        return self

    def __exit__(self, *why: object) -> None:
        cast(AbstractContextManager[Any], self._reservation).__exit__(None, None, None)

    def __iter__(self) -> Iterable[int]:
        return iter(self._reservation)

    def __len__(self) -> int:
        return len(self._reservation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reservation, name)


def stored_starts(client: kvd.Client, layout: KVLayout) -> dict[ChunkKey, int]:
    """All chunks of a layout, and the positions of their first tokens."""
    found: dict[ChunkKey, int] = {}
    cursor = 0
    while True:
        page = client.list_chunks(cursor=cursor, layout=layout.fingerprint, limit=500)
        found |= {ChunkKey(chunk.key): chunk.start for chunk in page.chunks}
        if not (cursor := page.cursor):
            return found


def assert_stored_right(client: kvd.Client, *engines: SmallEngine) -> int:
    """All that the daemon has of these engines is what they should have computed, to the last
    byte, and it has nothing else; how many chunks that is.
    """
    count = 0
    for group in engines[0].engine.groups:
        for rank, layout in enumerate(group.layouts):
            known = _pieces(engines, group.index, rank)
            starts = stored_starts(client, layout)
            assert known.keys() >= starts.keys(), "there is a chunk that nobody can have stored"
            for key, start in starts.items():
                assert start == known[key][1], "a piece is said to be at another place"
            stored = list(starts)
            for start in range(0, len(stored), KEYS_MAX):
                _assert_right(client, layout, stored[start : start + KEYS_MAX], known)
            count += len(stored)
    return count


def _assert_right(
    client: kvd.Client, layout: KVLayout, stored: list[ChunkKey], known: Pieces
) -> None:
    with client.pin(layout, stored, standalone=True) as lease:
        assert list(lease.keys) == stored
        for index, key in enumerate(stored):
            make, start, end = known[key]
            assert lease.chunk_tokens(index) == end - start, "a piece has another length"
            assert lease.array(index).tobytes() == make(), "a chunk is not what was computed"


def _pieces(engines: Iterable[SmallEngine], group: int, rank: int) -> Pieces:
    """All pieces that may be stored for a rank."""
    found: Pieces = {}
    for engine in engines:
        layout = engine.engine.groups[group].layout(rank)
        for request in engine.ever:
            for index, block_hash in enumerate(request.block_hashes):
                end = (index + 1) * engine.model.block_size
                start = engine.engine.groups[group].first_useful(end)
                name = blake2b(SPACE + block_hash, digest_size=32).digest()
                hashes = request.hashes(start, end)
                make = partial(_chunk, engine.model, group, rank, hashes)
                found[key_of(layout, name)] = make, start, end
    return found


def _chunk(model: Model, group: int, rank: int, hashes: TokenHashes) -> bytes:
    layers, heads = model.layers(group), model.heads(rank)
    return content(hashes, layers=layers, planes=model.num_planes, heads=heads).tobytes()
