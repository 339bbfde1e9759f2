"""A name for a checkpoint's weights that another machine finds for the same files.

Reading all of them takes minutes for a large model. Every tensor is named, and looked at in three
places: weights that were trained further differ in all tensors that were, nearly everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from kvd.errors import Unsupported

SAMPLE_SIZE = 4096

# Of files without a directory of tensors, so many samples each.
SAMPLES = 256

_HEADER_SIZE_MAX = 100 << 20
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")


def digest_of(path: Path) -> str:
    """32 hexadecimal digits for the weights in a folder, or in one file. Raises `Unsupported` where
    there are none.
    """
    files = sorted(weights_in(path))
    if not files:
        raise Unsupported(f"{path} has no weights: one of {', '.join(_SUFFIXES)} expected")
    digest = blake2b(b"kvd.weights.1", digest_size=16)
    for file in files:
        for part in (file.name.encode(), file.stat().st_size.to_bytes(8, "little")):
            digest.update(len(part).to_bytes(4, "little") + part)
        with file.open("rb") as content:
            for offset, size in _places(file):
                content.seek(offset)
                digest.update(content.read(size))
    return digest.hexdigest()


def weights_in(path: Path) -> list[Path]:
    """The files of weights; safetensors alone where there are both."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        return []
    found = [file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file()]
    return [file for file in found if file.suffix == ".safetensors"] or found


def _places(file: Path) -> Iterator[tuple[int, int]]:
    """What is read of a file: (offset, size)."""
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        yield from _tensor_places(file, size)
        return
    step = max(size // SAMPLES, SAMPLE_SIZE)
    yield from ((offset, SAMPLE_SIZE) for offset in range(0, size, step))


def _tensor_places(file: Path, size: int) -> Iterator[tuple[int, int]]:
    with file.open("rb") as content:
        header_size = int.from_bytes(content.read(8), "little")
        if not 0 < header_size <= min(_HEADER_SIZE_MAX, size):
            raise Unsupported(f"{file} is no safetensors file")
        try:
            header = json.loads(content.read(header_size))
            tensors = [told["data_offsets"] for name, told in header.items() if name[:2] != "__"]
            places = [(int(start), int(end)) for start, end in tensors]
            if any(not 0 <= start <= end for start, end in places):
                raise ValueError("a tensor ends before it begins")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unsupported(f"{file} is no safetensors file: {error!r}") from error
    yield 0, 8 + header_size
    for start, end in places:
        last = max(end - SAMPLE_SIZE, start)
        for offset in {start, (start + last) // 2, last}:
            yield 8 + header_size + offset, min(SAMPLE_SIZE, end - offset)
