"""The rivals of nvme_streams.py: other ways of keeping the same records on the same disk.

They stand in the table to compare; no figure is made of them. Each does what its users do to have a
record acknowledged when it is durable.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np

from benchmarks.nvme_disk import Records, can_bypass_cache, drop_cache
from kvd.tiers.nvme import READERS, WRITERS

# fio goes over its file again and again for so long.
FIO_S = 3


class LmdbValues:
    """A value a record, each in a synced transaction of its own."""

    name = "LMDB values"

    def __init__(self, folder: Path, records: Records) -> None:
        self._path = folder / "lmdb"
        self._records = records
        self._map_size = 4 * records.source.size + (64 << 20)

    def prepare(self, verb: str) -> None:
        if verb == "read":
            drop_cache([self._path])

    def write(self) -> None:
        with lmdb.open(str(self._path), map_size=self._map_size, subdir=False) as values:
            for index, source in enumerate(self._records.sources):
                with values.begin(write=True) as transaction:
                    transaction.put(index.to_bytes(8, "big"), source.data)

    def read(self) -> None:
        with (
            lmdb.open(str(self._path), map_size=self._map_size, subdir=False) as values,
            values.begin(buffers=True) as transaction,
        ):
            for index, out in enumerate(self._records.targets):
                value = transaction.get(index.to_bytes(8, "big"))
                assert value is not None
                out[:] = np.frombuffer(value, dtype=np.uint8)

    def close(self) -> None:
        """Nothing is open between two samples."""


class FilePerObject:
    """What most stores do: a buffered file a record, fsynced and renamed into its place."""

    name = "a file per object"

    def __init__(self, folder: Path, records: Records) -> None:
        self._folder = folder / "objects"
        self._folder.mkdir()
        self._records = records
        self._round = 0

    def prepare(self, verb: str) -> None:
        if verb == "read":
            drop_cache([self._folder])
            return
        for path in self._folder.iterdir():
            path.unlink()

    def write(self) -> None:
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(self._write_one, range(len(self._records.sources))))

    def read(self) -> None:
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(self._read_one, range(len(self._records.targets))))

    def close(self) -> None:
        """Nothing is open between two samples."""

    def _write_one(self, index: int) -> None:
        path = self._folder / f"{index}.new"
        with path.open("wb", buffering=0) as file:
            file.write(self._records.sources[index].data)
            os.fsync(file.fileno())
        path.rename(path.with_suffix(""))
        fd = os.open(self._folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    def _read_one(self, index: int) -> None:
        out = self._records.targets[index]
        with (self._folder / str(index)).open("rb", buffering=0) as file:
            assert file.readinto(out.data) == out.size


def fio_speeds(path: Path, size: int, count: int) -> dict[str, float]:
    """GB/s of "write" and "read" by fio, `count` records a thread; nothing where it is missing."""
    if shutil.which("fio") is None:
        return {}
    found = {}
    for verb, threads in (("write", WRITERS), ("read", READERS)):
        job = [
            *("fio", "--name=kvd", f"--filename={path}", f"--rw={verb}", "--ioengine=psync"),
            *(f"--direct={can_bypass_cache(path.parent):d}", f"--bs={size}"),
            *(f"--numjobs={threads}", "--group_reporting", "--output-format=json"),
            *(f"--size={size * count}", "--time_based", f"--runtime={FIO_S}"),
            *(("--end_fsync=1",) if verb == "write" else ()),
        ]
        report = json.loads(subprocess.run(job, capture_output=True, check=True).stdout)
        found[verb] = report["jobs"][0][verb]["bw_bytes"] / 1e9
    path.unlink()
    return found
