"""Where profiles are found: a folder that may change while it is used, and those of the package."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from kvd.codecs.profile import Profile, canonical
from kvd.codecs.profile_file import SIZE_MAX, StoredProfile, parse
from kvd.errors import Corrupt
from kvd.layout import KVLayout

SUFFIX = ".safetensors"
# A lookup asks the file system this often at most.
LOOK_EVERY_S = 1.0

_Version = tuple[int, int]


class ProfileFolder:
    """The profiles of `path`, and those that come with kvd. Nothing is read before the first
    lookup; a file that appears or changes is read again. What was known by its hash stays known.

    Any thread may ask.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        shipped: Path | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        package = shipped or Path(str(files("kvd").joinpath("profiles")))
        # The last wins where two have a profile of one model.
        self._folders = [package, *([path] if path else [])]
        self._clock_s = clock_s
        self._looked_s: float | None = None
        self._lock = threading.Lock()
        self._versions: dict[Path, _Version] = {}
        self._found: dict[Path, StoredProfile] = {}
        self._by_hash: dict[bytes, StoredProfile] = {}
        self._broken: dict[Path, str] = {}

    @property
    def broken(self) -> dict[Path, str]:
        """Files that are no profiles, and why: for whoever logs."""
        return dict(self._broken)

    def for_layout(self, layout: KVLayout) -> Profile | None:
        """The profile to encode with: of the same weights, whatever computes with them."""
        stored = self.stored_for(layout)
        return stored.profile if stored else None

    def stored_for(self, layout: KVLayout) -> StoredProfile | None:
        """As `for_layout`, with what the gate measured."""
        with self._lock:
            self._look()
            for stored in reversed(self._found.values()):
                if _is_of(stored, layout):
                    return stored
        return None

    def by_hash(self, hash: bytes) -> Profile | None:
        """The profile that a bitstream names."""
        with self._lock:
            if hash not in self._by_hash:
                self._look()
            stored = self._by_hash.get(hash)
        return stored.profile if stored else None

    def _look(self) -> None:
        now_s = self._clock_s()
        if self._looked_s is not None and now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now_s
        versions = {
            path: version
            for folder in self._folders
            for path in sorted(folder.glob(f"*{SUFFIX}"))
            if (version := _version(path)) is not None
        }
        for path, version in versions.items():
            if self._versions.get(path) != version:
                self._read(path)
        self._versions = versions
        self._broken = {path: why for path, why in self._broken.items() if path in versions}
        # In the order of the folders, whenever each was read.
        self._found = {path: self._found[path] for path in versions if path in self._found}

    def _read(self, path: Path) -> None:
        self._found.pop(path, None)
        self._broken.pop(path, None)
        try:
            with path.open("rb") as file:
                stored = parse(file.read(SIZE_MAX + 1))
        except (Corrupt, OSError) as error:
            self._broken[path] = str(error)
            return
        self._found[path] = stored
        self._by_hash[stored.profile.hash] = stored


def _version(path: Path) -> _Version | None:
    """None for what went away in the meantime."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _is_of(stored: StoredProfile, layout: KVLayout) -> bool:
    """Whether the layout is of a model that the profile was measured with. Where its revision names
    the weights, no more of it counts, nor the model's label: what computes with them, and where,
    moves KV by less than any step.
    """
    known, asked = canonical(stored.profile.layout), canonical(layout)
    if known == asked:
        return True
    words = set(asked.revision.split(" "))
    if not words.intersection(stored.weights):
        return False
    return replace(known, model="", revision="") == replace(asked, model="", revision="")
