"""How much smaller does KV get, and what does the model lose by it?

The answer on the back of an envelope. A value that is rounded to a step of a third of its deviation
costs log2(sqrt(2 pi e) * 3) = 3.6 bits, less what a transform knows of its neighbours, so 4.5 times
against bfloat16 and more where the model allows a coarser step. Lossless, a mantissa of 7 bits and
a sign are noise and an exponent has 2.6 bits of entropy: 10.6 of 16, 1.5 times. CacheGen as LMCache
ships it adds 560 bits of tables a channel and chunk, 2.2 bits a value of 256 tokens.

    ratio_at_kl005_MODEL            >= 4.4, Qwen 5.5: the coarsest safe level without transform
    ratio_at_kl005_transform_MODEL  >= 5.5, Qwen 7.5: of all levels
    ratio_lossless_MODEL            >= 1.48 bf16
    cachegen_ratio_MODEL            <= ours what LMCache's CacheGen reaches
    cachegen_kl_MODEL               >= .005 and what it costs
    decode_GBps_core and others     as codec_speed.py and codecs_gpu.py measure them, short runs

Safe: a mean KL of 0.005 nats at most, and no measurable loss of codes that are hidden in a text
(codec_judge.py). Bits are those of whole bitstreams or, of published codecs, of all that they keep.
Texts are prose, code and dialogue that no profile has seen (texts/SOURCES.md). The GB/s in the
table are of a core, on these chunks, by CPU time, while other work may run.

    python benchmarks/codecs.py [--quick] [--models smollm2,qwen] [--plot FILE] [--json FILE]

Qwen's weights are 480 MB that pip brings once, and its profile takes some minutes, once.
"""

from __future__ import annotations

import os

# Threads that spin while they wait cost several times the CPU as soon as anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Numpy's products too: what is timed is one core.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from benchmarks.codec_contenders import (
    LMCACHE,
    LOSSLESS,
    NO_TRANSFORM,
    PLAIN,
    TRANSFORM,
    Contender,
    coded,
    contenders,
    more_contenders,
)
from benchmarks.codec_models import (
    MODELS,
    Loaded,
    Missing,
    Text,
    calibration_texts,
    load,
    profile_of,
    test_texts,
)
from benchmarks.common import (
    Figure,
    Row,
    arguments,
    console_for,
    host_facts,
    print_figures,
    print_rows,
    significant,
    write_json,
)

if TYPE_CHECKING:
    from benchmarks.codec_judge import Continued, Document, Quality, Quiz

KL_MAX = 0.005
TARGETS = {"none": 4.4, "any": 5.5, "lossless": 1.48}
# Keys with large means leave more to gain.
TARGETS_OF = {"qwen": {"none": 5.5, "any": 7.5, "lossless": 1.48}}

# In the JSON only.
HIDDEN = (
    *("model", "group", "KL low", "KL high", "dNLL", "digit dNLL", "scored", "asked"),
    *("enc s/GB", "dec s/GB"),
)

# What prose the codes are hidden in, and from which token on: behind what is scored of it.
QUIZ_TEXT = "prose_persuasion"
QUIZ_START = 1600
QUIZ_TOKENS = 1280

FOLDER = Path(__file__).parent
SPEED, SPEED_GPU = "codec_speed.py", "codecs_gpu.py"
# Our figure: what it is called there, and its target.
SPEED_FIGURES = {
    "entropy_decode_GBps_core": ("kvq_entropy_smollm2_decode", 0.8),
    "decode_GBps_core": ("kvq_none_smollm2_decode", 0.5),
    "encode_GBps_core": ("kvq_none_smollm2_encode", 0.3),
    "lossless_decode_GBps_core": ("bf16_qwen_decode", 1.5),
}
GPU_FIGURES = {"gpu_decode_GBps": ("kvq_gpu_decode_gbps", 100.0)}
SPEED_S_MAX = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is judged. Documents have `num_context` tokens; `long_texts` are judged once more
    with `long_context`.
    """

    num_texts: int = 8
    num_context: int = 1280
    num_next: int = 256
    long_texts: tuple[str, ...] = ("prose_frankenstein",)
    long_context: int = 4096
    num_quizzes: int = 2
    levels: tuple[str, ...] = ("3", "4", "5", "6", "4-head", "5-head", "6-head", "7-head")
    has_all: bool = True


QUICK = Scale(
    num_texts=2,
    long_texts=(),
    num_quizzes=1,
    levels=("4", "5", "5-head", "6-head"),
    has_all=False,
)


class Told:
    """Lines on standard error: when, what."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._console = Console(stderr=True, highlight=False)

    def __call__(self, line: str) -> None:
        self._console.print(f"[dim]{time.monotonic() - self._started_s:6.0f} s[/]  {line}")


def measure_model(name: str, scale: Scale, tell: Told) -> tuple[list[Figure], list[Row], str]:
    """Figures and rows of one model, and a line about its profile. Raises `Missing`."""
    loaded = load(name, tell)
    stored, origin = profile_of(loaded, tell)
    texts = test_texts()[: scale.num_texts]
    layout = loaded.subject.layout
    lossy = contenders(layout, stored.profile, scale.levels)
    if scale.has_all:
        lossy += more_contenders(layout, _cachegen_profile(loaded, tell))
    lossless = coded(LOSSLESS, PLAIN, layout)
    found = _judged(loaded, texts, scale, lossy, lossless, tell)
    rows = [_row(name, each, found[each.name]) for each in (lossless, *lossy)]
    about = (
        f"{name}: {len(texts)} texts, profile {stored.profile.hash.hex()[:8]} ({origin}), "
        f"{_profile_size(stored) / 1e6:.1f} MB, beside the bits"
    )
    return _figures(name, [lossless, *lossy], found), rows, about


def _judged(
    loaded: Loaded,
    texts: Sequence[Text],
    scale: Scale,
    lossy: Sequence[Contender],
    lossless: Contender,
    tell: Told,
) -> dict[str, Quality]:
    """By contender. A text is held in memory while all are judged on it."""
    from benchmarks.codec_judge import quality

    scores: dict[str, list[Continued]] = {each.name: [] for each in (lossless, *lossy)}
    asked: dict[str, list[Any]] = {each.name: [] for each in (lossless, *lossy)}
    for text, num_context in _contexts(texts, scale):
        document = _document(loaded, text, num_context, scale.num_next)
        scores[lossless.name].append(_unchanged(document, lossless))
        for number, each in enumerate(lossy, start=1):
            scores[each.name].append(document.score(each.restore))
            tell(_line(loaded, text.name, num_context, number, len(lossy), each.name))
    for number in range(scale.num_quizzes):
        quiz = _quiz(loaded, number)
        asked[lossless.name].append((quiz.exact, quiz.exact))
        for index, each in enumerate(lossy, start=1):
            asked[each.name].append((quiz.exact, quiz.score(each.restore)))
            tell(_line(loaded, f"codes {number + 1}", QUIZ_TOKENS, index, len(lossy), each.name))
    return {name: quality(scores[name], asked[name]) for name in scores}


def _line(loaded: Loaded, what: str, tokens: int, number: int, count: int, codec: str) -> str:
    return f"{loaded.name}: {what}, {tokens} tokens, {number}/{count} {codec}"


def _contexts(texts: Sequence[Text], scale: Scale) -> list[tuple[Text, int]]:
    found = [(text, scale.num_context) for text in texts]
    return found + [(text, scale.long_context) for text in texts if text.name in scale.long_texts]


def _document(loaded: Loaded, text: Text, num_context: int, num_next: int) -> Document:
    from benchmarks.codec_judge import Document

    ids = loaded.subject.encode(text.text)
    return Document(loaded.subject, ids, num_context=num_context, num_next=num_next)


def _quiz(loaded: Loaded, number: int) -> Quiz:
    from benchmarks.codec_judge import Quiz

    (text,) = (text for text in test_texts() if text.name == QUIZ_TEXT)
    # Each has prose of its own.
    start = QUIZ_START + number * QUIZ_TOKENS
    prose = loaded.subject.encode(text.text)[start:]
    return Quiz(loaded.subject, loaded.model, prose, num_context=QUIZ_TOKENS, seed=number)


def _unchanged(document: Document, lossless: Contender) -> Continued:
    """The score of what comes back bit for bit: no forward is needed, and it is checked."""
    from benchmarks.codec_judge import Continued

    kv, bits = lossless.restore(document.kv)
    if not np.array_equal(kv.view(np.uint32), document.kv.view(np.uint32)):
        raise SystemExit(f"{lossless.name} changed KV: it is not lossless")
    nothing = np.zeros(len(document.following), np.float32)
    return Continued(bits=bits, kl=nothing, dnll=nothing, is_same=np.ones(len(nothing), bool))


def _cachegen_profile(loaded: Loaded, tell: Told) -> Any:
    """Of the paper's CacheGen, from the calibration texts."""
    from dataclasses import replace

    from kvd.codecs.cachegen_profile import calibrate

    layout = replace(loaded.subject.layout, dtype="bfloat16")
    chunks = []
    for number, text in enumerate(calibration_texts()[0], start=1):
        tell(f"{loaded.name}: CacheGen's tables, text {number}")
        kv = loaded.subject.kv_of(loaded.subject.encode(text)[: 4 * layout.chunk_tokens])
        bits = (np.ascontiguousarray(kv).view(np.uint32) >> 16).astype(np.uint16)
        chunks.append(bits.reshape(-1).view(np.uint8))
    return calibrate(chunks, layout)


def _profile_size(stored: Any) -> int:
    from kvd.codecs.profile_file import pack

    return len(pack(stored))


def _row(model: str, each: Contender, found: Quality) -> Row:
    return {
        "model": model,
        "group": each.group,
        "codec": each.name,
        "bits": significant(found.bits),
        "x bf16": significant(found.ratio),
        "KL": significant(found.kl),
        "KL low": significant(found.kl_low),
        "KL high": significant(found.kl_high),
        "95 %": f"{found.kl_low:.4f} .. {found.kl_high:.4f}",
        "dNLL": significant(found.dnll),
        "top-1": significant(found.top1),
        "codes": f"{found.codes_exact - found.codes_lost + found.codes_gained}/{found.codes_exact}",
        "-/+": f"{found.codes_lost}/{found.codes_gained}",
        "digit dNLL": significant(found.digit_dnll),
        "safe": "yes" if found.is_safe(KL_MAX) else "no",
        "enc GB/s": _rate(each.encode_gbps),
        "dec GB/s": _rate(each.decode_gbps),
        "enc s/GB": _rate(each.encode_gbps and 1 / each.encode_gbps),
        "dec s/GB": _rate(each.decode_gbps and 1 / each.decode_gbps),
        "scored": found.num_next,
        "asked": found.num_codes,
    }


def _rate(value: float | None) -> float | None:
    return None if value is None else significant(value, 3)


def _figures(model: str, each: Sequence[Contender], found: dict[str, Quality]) -> list[Figure]:
    """The figures of one model."""
    targets = TARGETS_OF.get(model, TARGETS)
    groups = {one.name: one.group for one in each}
    without = {name: found[name] for name in found if groups[name] == NO_TRANSFORM}
    levels = without | {name: found[name] for name in found if groups[name] == TRANSFORM}
    ours = _coarsest(f"ratio_at_kl005_{model}", without, targets["none"])
    lmcache = found[LMCACHE]
    return [
        ours,
        _coarsest(f"ratio_at_kl005_transform_{model}", levels, targets["any"]),
        _figure(f"ratio_lossless_{model}", found[LOSSLESS], targets["lossless"]),
        Figure(
            name=f"cachegen_ratio_{model}",
            value=lmcache.ratio,
            unit="ratio",
            # What has to be beaten: the target is our own.
            target=ours.value or targets["none"],
            at_least=False,
            samples=lmcache.num_next,
            ci95=None,
        ),
        Figure(
            name=f"cachegen_kl_{model}",
            value=lmcache.kl,
            unit="nats",
            target=KL_MAX,
            at_least=True,
            samples=lmcache.num_next,
            ci95=(lmcache.kl_low, lmcache.kl_high),
        ),
    ]


def _coarsest(name: str, found: dict[str, Quality], target: float) -> Figure:
    """The safe codec with the fewest bits; which one stands in the note."""
    safe = {codec: each for codec, each in found.items() if each.is_safe(KL_MAX)}
    if not safe:
        why = f"no level stays within KL {KL_MAX:g} without losing codes"
        return Figure.missing(name, why, target=target, at_least=True)
    best = min(safe, key=lambda codec: safe[codec].bits)
    return _figure(name, safe[best], target, note=f"{best}, KL {safe[best].kl:.4f}")


def _figure(name: str, found: Quality, target: float, note: str = "") -> Figure:
    return Figure(
        name=name,
        value=found.ratio,
        unit="ratio",
        target=target,
        at_least=True,
        samples=found.num_next,
        ci95=None,
        note=note,
    )


def speed_figures(tell: Told, *, folder: Path = FOLDER, has_gpu: bool) -> list[Figure]:
    """What the benches of speed say, each run in a process of its own; without a GPU nothing of
    one.
    """
    found = _figures_of(folder / SPEED, SPEED_FIGURES, tell)
    return found + (_figures_of(folder / SPEED_GPU, GPU_FIGURES, tell) if has_gpu else [])


def _figures_of(script: Path, wanted: Mapping[str, tuple[str, float]], tell: Told) -> list[Figure]:
    """Figures of another bench under our names; missing where it does not have them."""
    tell(f"{script.name} --quick")
    command = [sys.executable, str(script), "--quick", "--json", "-"]
    told: dict[str, Any] = {}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SPEED_S_MAX, check=False
        )
        told = {each["name"]: each for each in json.loads(done.stdout)["figures"]}
        why = f"{script.name} does not measure it"
    except (subprocess.TimeoutExpired, ValueError) as error:
        why = f"{script.name} failed: {error!r}"
    return [
        _told_figure(name, told[there], target)
        if there in told
        else Figure.missing(name, why, target=target, at_least=True, unit="GB/s")
        for name, (there, target) in wanted.items()
    ]


def _told_figure(name: str, told: Mapping[str, Any], target: float) -> Figure:
    ends = told["ci95"]
    return Figure(
        name=name,
        value=told["value"],
        unit=told["unit"],
        target=target,
        at_least=True,
        samples=told["samples"],
        ci95=(ends[0], ends[1]) if ends else None,
        note=told.get("note", ""),
    )


def measure(
    names: Sequence[str], scale: Scale, console: Console, tell: Told
) -> tuple[list[Figure], list[Row]]:
    """All figures, and all rows; a model's table is printed as soon as it is judged. A model that
    cannot be had is said to be missing.
    """
    figures: list[Figure] = []
    rows: list[Row] = []
    for name in names:
        try:
            found, table, about = measure_model(name, scale, tell)
        except Missing as error:
            console.print(f"[yellow]{name} is not judged[/]: {error}")
            continue
        print_rows(console, about, table, hidden=HIDDEN)
        figures += found
        rows += table
    if not rows:
        raise SystemExit("no model could be judged")
    return figures, rows


def main(arguments_given: Sequence[str] | None = None, *, scale: Scale | None = None) -> int:
    """Measure, print the tables, write JSON and plot. Missed targets are reported, not failed."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", default=",".join(MODELS), help="which (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG (needs matplotlib)")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    options = parser.parse_args(arguments_given)
    names = options.models.split(",")
    if unknown := set(names) - set(MODELS):
        parser.error(f"--models: {', '.join(sorted(unknown))} is none of {', '.join(MODELS)}")
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'kvd-cache[demo]'") from error
    torch.set_num_threads(options.threads)
    console = console_for(options.json)
    console.print(" | ".join(f"{name} {value}" for name, value in host_facts().items()))
    started, tell = time.monotonic(), Told()
    figures, rows = measure(names, scale or (QUICK if options.quick else Scale()), console, tell)
    figures += speed_figures(tell, has_gpu=host_facts()["gpu"] is not None)
    print_figures(console, figures)
    console.print(f"{time.monotonic() - started:.0f} s, load {os.getloadavg()[0]:.1f}")
    if options.plot:
        from benchmarks.codec_plot import draw

        draw(rows, options.plot, kl_max=KL_MAX)
    write_json(options.json, "codecs", figures, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
