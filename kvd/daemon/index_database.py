"""The index's LMDB file. Only the index's own process imports this: LMDB maps its file, and what is
wrong with the file or its disk ends whoever maps it.

    data.mdb    the database in place
    fresh.mdb   one that is being filled; it takes the other's place by one rename

The one idea: a database is only ever written to by the process that made it. What an earlier
process left is read, once, and its good entries are copied. So no damaged free list or page is
built upon.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import lmdb

from kvd.daemon.index_format import (
    ENTRY_SIZE_MAX,
    HEADER_NAME,
    NAME_SIZE,
    Header,
    checksum_of,
    is_sealed,
    pack_header,
    parse_header,
    record_offset,
)
from kvd.daemon.index_frames import (
    BODY_SIZE,
    DELETE,
    PUT,
    SYNC,
    changes,
    parse_delete,
)
from kvd.errors import Corrupt, Unsupported

DATA_NAME = "data.mdb"
FRESH_NAME = "fresh.mdb"

# Address space, not bytes on the disk: doubled when it is full.
MAP_SIZE_START = 1 << 30
# A hundred million records: ten times what a node's disks hold. More would be a fault.
MAP_SIZE_MAX = 64 << 30

# While a database is filled it is synced each so many bytes, for no single sync to take long.
FILL_SIZE = 64 << 20


class Database:
    """An empty database beside the one that may be there, until `place` puts it there.

    Raises `lmdb.Error` and `OSError` from every method; then it is of no more use.
    """

    def __init__(
        self,
        folder: Path,
        log_id: bytes,
        *,
        map_size: int = MAP_SIZE_START,
        map_size_max: int = MAP_SIZE_MAX,
    ) -> None:
        self._target = folder / DATA_NAME
        self._path = folder / FRESH_NAME
        self._map_size = map_size
        self._map_size_max = map_size_max
        self._header = Header(log_id)
        self._unsynced_size = 0
        self._is_in_place = False
        with suppress(FileNotFoundError):
            self._path.unlink()
        self._env = self._open()

    def append(self, entries: list[bytes]) -> None:
        """Put entries in, in rising order and above all that is there."""
        pairs = [(entry[:NAME_SIZE], entry[NAME_SIZE:]) for entry in entries]
        self._transact(lambda txn: _append(txn, pairs))
        self._filled(sum(map(len, entries)))

    def write(self, body: bytes) -> None:
        """Apply changes, all or none. In place they are durable then; but a power cut may take all
        of the last ones, unless a SYNC is among them.
        """
        self._transact(lambda txn: _apply(txn, body))
        self._filled(len(body))
        if any(kind == SYNC for kind, _ in changes(body)):
            self.sync()

    def place(self, *, is_complete: bool) -> None:
        """Become the database that is there. A crash leaves the old one or this one, whole."""
        self._header = self._header._replace(is_complete=is_complete)
        self._transact(lambda txn: 0)
        self._env.sync(True)
        self._env.close()
        self._path.rename(self._target)
        self._path = self._target
        _sync_folder(self._target.parent)
        self._is_in_place = True
        self._env = self._open()

    def sync(self) -> None:
        """Make the last transaction safe from a power cut too."""
        self._env.sync(True)

    def close(self) -> None:
        """After `sync`, or where nothing is to be kept."""
        self._env.close()

    def _open(self) -> lmdb.Environment:
        # Never writemap or map_async: no power cut was survived with them. Without metasync a cut
        # takes the last transaction at most. No lock file: the process holds a lock of its own.
        return lmdb.open(
            str(self._path),
            subdir=False,
            map_size=self._map_size,
            metasync=False,
            sync=self._is_in_place,
            lock=False,
            mode=0o600,
        )

    def _transact(self, change: Callable[[lmdb.Transaction[bytes]], int]) -> None:
        # A change says by how much the sum of all checksums rises.
        while True:
            try:
                with self._env.begin(write=True) as txn:
                    total = (self._header.total + change(txn)) % (1 << 64)
                    header = self._header._replace(total=total)
                    txn.put(HEADER_NAME, pack_header(header))
                self._header = header
                return
            except lmdb.MapFullError:
                # The transaction is undone, and nothing else uses the map.
                if self._map_size >= self._map_size_max:
                    raise
                self._map_size = min(2 * self._map_size, self._map_size_max)
                self._env.set_mapsize(self._map_size)

    def _filled(self, size: int) -> None:
        self._unsynced_size += size
        if not self._is_in_place and self._unsynced_size >= FILL_SIZE:
            self._env.sync(True)
            self._unsynced_size = 0


class OldDatabase:
    """What an earlier process left of the log's index. It may be damaged: to walk it can raise
    nothing but may end the process, or take for ever; the daemon watches.
    """

    def __init__(self, folder: Path, log_id: bytes) -> None:
        self._path = folder / DATA_NAME
        self._log_id = log_id
        # Why the index must be rebuilt; to be looked at when `batches` has ended.
        self.reason = ""

    def batches(self) -> Iterator[list[bytes]]:
        """The good entries in rising order, each list about as large as a frame."""
        if not self._path.exists():
            self.reason = "missing: no index was found"
            return
        try:
            env = lmdb.open(str(self._path), subdir=False, readonly=True, lock=False)
            with env, env.begin(buffers=True) as txn:
                header = self._find_header(txn)
                if header is not None:
                    yield from self._walk(txn, header.total)
        except (lmdb.Error, OSError) as error:
            self.reason = f"damaged: {error}"

    def _find_header(self, txn: lmdb.Transaction[memoryview]) -> Header | None:
        try:
            header = parse_header(bytes(txn.get(HEADER_NAME, memoryview(b""))[:ENTRY_SIZE_MAX]))
        except Unsupported as error:
            self.reason = f"version: {error}"
            return None
        except Corrupt as error:
            self.reason = f"damaged: {error}"
            return None
        if header.log_id != self._log_id:
            self.reason = "other log: the index is of another segment log"
            return None
        if not header.is_complete:
            self.reason = "incomplete: a rebuild of the index did not end"
        return header

    def _walk(self, txn: lmdb.Transaction[memoryview], total: int) -> Iterator[list[bytes]]:
        batch: list[bytes] = []
        size = num_good = 0
        last = HEADER_NAME
        for name, value in txn.cursor().iternext():
            if name == HEADER_NAME:
                continue
            found = bytes(name)
            if found <= last:
                # What goes in circles has no end.
                break
            last = found
            entry = _entry(name, value)
            if not is_sealed(entry):
                continue
            num_good += 1
            total -= checksum_of(entry)
            batch.append(entry)
            size += len(entry)
            if size >= BODY_SIZE:
                yield batch
                batch, size = [], 0
        yield batch
        if total % (1 << 64):
            # Some are bad or gone, or a page shows what was there before.
            self.reason = f"damaged: {num_good} good entries, not those of the last transaction"


def _entry(name: memoryview, value: memoryview) -> bytes:
    # A damaged length is not believed: the bytes it names may not be there.
    is_possible = len(name) == NAME_SIZE and len(value) <= ENTRY_SIZE_MAX - NAME_SIZE
    return b"".join((name, value)) if is_possible else b""


def _append(txn: lmdb.Transaction[bytes], pairs: list[tuple[bytes, bytes]]) -> int:
    num_put, _ = txn.cursor().putmulti(pairs, append=True)
    assert num_put == len(pairs)
    return sum(checksum_of(value) for _, value in pairs)


def _apply(txn: lmdb.Transaction[bytes], body: bytes) -> int:
    total = 0
    for kind, change in changes(body):
        if kind == PUT:
            replaced = txn.replace(change[:NAME_SIZE], change[NAME_SIZE:])
            total += checksum_of(change) - (checksum_of(replaced) if replaced else 0)
        elif kind == DELETE:
            name, offset = parse_delete(change)
            value = txn.get(name)
            # A newer copy at another place stays.
            if value is not None and record_offset(value) == offset:
                txn.delete(name)
                total -= checksum_of(value)
    return total


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
