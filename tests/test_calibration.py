"""Calibration: from a model to a profile that the codec takes, and what the gate says of it."""

# ruff: noqa: E402  What is set first decides how torch is loaded.

from __future__ import annotations

import json
import os
import random
import string
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

import kvd
from kvd.cli.calibrate import calibrate as command
from kvd.client.calibration import calibrate as calibration
from kvd.client.calibration.calibrate import Settings, calibrate, coarsest_safe
from kvd.client.calibration.facts import TOKENS_A_FACT, facts_among, recited
from kvd.client.calibration.gate import Case, Gate
from kvd.client.calibration.model import HuggingFaceSubject, load_subject
from kvd.client.calibration.statistics import KL_AT_SCALE_1, NUM_SINKS, Statistics, grouped
from kvd.client.connectors.transformers_model import weights_digest
from kvd.codecs.attention_score import token_classes
from kvd.codecs.base import Span
from kvd.codecs.kvq import Kvq
from kvd.codecs.profile import Level, Profile, Rope
from kvd.codecs.profile_file import Judged, StoredProfile, content_hash, named, pack, parse
from kvd.codecs.profile_folder import LOOK_EVERY_S, ProfileFolder
from kvd.codecs.rope import rotation, unrotate
from kvd.errors import Corrupt, InvalidRequest, Unsupported
from kvd.layout import KVLayout

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}

SETTINGS = Settings(tokens=192, context_tokens=64, next_tokens=24, judged_windows=2)

TEXT = "".join(random.Random(5).choices(string.ascii_letters + " .,", k=1000))


class Letters:
    """A tokenizer with a token for each character."""

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoded", (), {"input_ids": [ord(letter) % 128 for letter in text]})


def tiny(dtype: Any = None, *, seed: int = 7, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**TINY | options)
    )
    return model.to(dtype or torch.float32).eval()


@pytest.fixture(scope="module")
def subject() -> HuggingFaceSubject:
    return HuggingFaceSubject(tiny(), Letters())


@pytest.fixture(scope="module")
def calibrated(subject: HuggingFaceSubject) -> tuple[bytes, StoredProfile]:
    return calibrate(subject, [TEXT], replace(SETTINGS, joint=("head", "layer")))


def kl_by_hand(subject: HuggingFaceSubject, case: Case, kv: Any) -> Any:
    exact = subject.log_probs(subject.kv_of(case.context), case.following)
    found = subject.log_probs(kv, case.following)
    return (np.exp(exact) * (exact - found)).sum(-1)


def case_of(subject: HuggingFaceSubject, start: int = 0) -> Case:
    ids = subject.encode(TEXT)[start:]
    return Case(context=ids[:64], following=ids[64:88])


# The whole way.


def test_what_the_gate_says_is_what_the_codec_costs(
    subject: HuggingFaceSubject, calibrated: tuple[bytes, StoredProfile], tmp_path: Path
) -> None:
    (tmp_path / "tiny.safetensors").write_bytes(calibrated[0])
    folder = ProfileFolder(tmp_path)
    case = case_of(subject)
    for level in ("6", "7-head", "5-layer"):
        judged = Gate(subject, [case]).judge(calibrated[1].profile, level)
        layout = replace(subject.layout, dtype="bfloat16")
        codec = Kvq(level, folder, token_classes=token_classes)
        kv = subject.kv_of(case.context)
        raw = (kv.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
        span = Span(start=0, num_tokens=64)
        out = np.empty(codec.size_bytes_max(layout, 64), np.uint8)
        size = codec.encode(raw, layout, span, out)
        back = np.zeros_like(raw)
        codec.decode(out[:size], layout, span, back)
        restored = (back.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(kv.shape)
        assert judged.kl == pytest.approx(kl_by_hand(subject, case, restored).mean(), rel=1e-5)
        assert judged.bits == 8 * size / kv.size
        assert judged.kl > 0


def test_coarser_levels_take_fewer_bits_and_lose_more(
    calibrated: tuple[bytes, StoredProfile],
) -> None:
    for suffix in ("", "-head", "-layer"):
        judged = {found.level: found for found in calibrated[1].judged}
        fine, coarse = judged[f"0{suffix}"], judged[f"7{suffix}"]
        assert fine.bits > coarse.bits + 1
        assert fine.kl < coarse.kl / 8
        assert fine.top1 >= coarse.top1


def test_a_calibration_gives_the_same_file_again(
    subject: HuggingFaceSubject, calibrated: tuple[bytes, StoredProfile]
) -> None:
    again, _ = calibrate(subject, [TEXT], replace(SETTINGS, joint=("head", "layer")))
    assert again == calibrated[0]


def test_the_gate_never_sees_what_calibration_saw(
    subject: HuggingFaceSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated_on: list[Case] = []
    judged_on: list[tuple[Sequence[Case], str]] = []

    class Recorder:
        def __init__(self, _: Any, cases: Sequence[Case], texts: Sequence[str] = ()) -> None:
            judged_on.append((cases, texts))

        def judge(self, profile: Profile, level: str) -> Judged:
            return judged_of(level=level)

    add = calibration._add

    def record(one: Any, window: Case, *rest: Any, **options: Any) -> None:
        calibrated_on.append(window)
        add(one, window, *rest, **options)

    monkeypatch.setattr(calibration, "Gate", Recorder)
    monkeypatch.setattr(calibration, "_add", record)
    calibrate(subject, [TEXT], SETTINGS)
    cases, texts = judged_on[-1]
    seen, unseen = (Letters()(part).input_ids for part in (TEXT[:800], TEXT[800:]))
    assert texts[0] == TEXT[800:]
    assert [within(case, unseen) for case in cases] == [True] * 2
    assert [within(window, seen) for window in calibrated_on] == [True, False, True]
    assert not any(within(window, unseen) for window in calibrated_on)


def within(case: Case, ids: list[int]) -> bool:
    wanted = [*case.context.tolist(), *case.following.tolist()]
    return any(ids[at : at + len(wanted)] == wanted for at in range(len(ids)))


def test_a_text_that_is_too_short_is_told(subject: HuggingFaceSubject) -> None:
    with pytest.raises(InvalidRequest, match="88 tokens long"):
        calibrate(subject, [TEXT[:60]], SETTINGS)


# Sensitivity.


def test_gradients_tell_what_an_error_costs(subject: HuggingFaceSubject) -> None:
    """1/2 sum F e^2, F from many draws, is the KL of a small random error."""
    case = case_of(subject)
    kv = subject.kv_of(case.context)
    fisher = np.mean(
        [np.square(subject.gradients(kv, case.following, seed=seed)) for seed in range(24)], axis=0
    )
    # Each draw is another, the same for one seed.
    first, second, again = (subject.gradients(kv, case.following, seed=n) for n in (0, 1, 0))
    assert np.array_equal(first, again)
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] < 0.5
    dice = np.random.default_rng(1)
    error = 0.01 * dice.choice([-1.0, 1.0], (12, *kv.shape)).astype(np.float32)
    costs = [kl_by_hand(subject, case, kv + each).sum() for each in error]
    assert 0.5 * 1e-4 * fisher.sum() == pytest.approx(np.mean(costs), rel=0.25)


def test_steps_cost_what_was_asked_for(subject: HuggingFaceSubject) -> None:
    statistics = Statistics()
    dice = np.random.default_rng(2)
    kv = dice.normal(3, 2, (2, 2, 104, 2, 16)).astype(np.float32)
    gradients = dice.normal(0, 1, kv.shape).astype(np.float32)
    gradients[:, :, :, :, :8] *= 16
    statistics.add(kv, gradients, 25)
    found = statistics.found()
    kept = np.square(gradients[:, :, NUM_SINKS:]).sum(2)
    assert 0.5 * (kept * found.steps**2 / 12).sum() / 25 == pytest.approx(KL_AT_SCALE_1, rel=1e-4)
    assert np.allclose(found.means, kv[:, :, NUM_SINKS:].mean(2), atol=1e-5)
    # A channel that is 16 times as sensitive has nearly as much finer a step.
    ratio = np.log2(found.steps[..., 8:].mean() / found.steps[..., :8].mean())
    assert 3 < ratio < 4


def test_bases_take_out_what_channels_share() -> None:
    dice = np.random.default_rng(3)
    shared = dice.normal(0, 1, (2, 1, 512, 2, 1))
    kv = (shared + 0.1 * dice.normal(0, 1, (2, 2, 512, 2, 8)) + 200).astype(np.float32)
    statistics = Statistics(("head", "layer"))
    statistics.add(kv, np.ones_like(kv), 1)
    found = statistics.found()
    assert found.bases["head"].shape == (2, 2, 16, 16)
    assert found.bases["layer"].shape == (2, 1, 32, 32)
    for kind in ("head", "layer"):
        rows = grouped((kv - found.means[:, :, None]) / found.steps[:, :, None], kind)
        components = rows @ found.bases[kind].swapaxes(-1, -2)
        identity = found.bases[kind] @ found.bases[kind].swapaxes(-1, -2)
        assert np.abs(identity - np.eye(identity.shape[-1])).max() < 2e-3
        assert (components[..., 0].std(2) > 10 * components[..., 2:].std(2).max(-1)).all()


def test_scores_find_the_tokens_that_matter() -> None:
    dice = np.random.default_rng(4)
    kv = dice.normal(5, 1, (1, 2, 2000, 1, 16)).astype(np.float32)
    matters = kv[0, 0, :, 0, 3] > 6.5
    gradients = np.ones_like(kv) * np.exp2(3 * (kv[:, :1, :, :, 3:4] - 5))
    statistics = Statistics()
    statistics.add(kv, gradients, 1)
    found = statistics.found()
    profile = replace(profile_of(), scores=found.scores)
    classes = token_classes(kv[0, 0], profile, 0)[:, 0]
    assert classes[matters].min() >= 1
    assert 0.5 < (classes == 0).mean() < 0.95
    assert classes.dtype == np.uint8
    assert set(np.unique(classes)) <= {0, 1, 2}


def test_a_profile_without_scores_has_one_class() -> None:
    keys = np.full((5, 2, 16), 1e9, np.float32)
    assert not token_classes(keys, profile_of(), 0).any()


# The model.


def test_the_rotation_is_taken_out_of_keys(subject: HuggingFaceSubject) -> None:
    ids = np.full(40, 9, np.int64)
    keys = subject.kv_of(ids)[0, 0]
    plain = unrotate(keys, rotation(subject.rope, Span(start=0, num_tokens=40)))
    assert np.abs(plain - plain[0]).max() < 0.02 * np.abs(plain).max()
    assert np.abs(keys - keys[0]).max() > 0.5 * np.abs(keys).max()


def test_a_rotation_that_cannot_be_taken_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    frequencies = np.linspace(2, 1, 8)
    monkeypatch.setattr("kvd.client.calibration.model._frequencies", lambda _: frequencies)
    with pytest.raises(Unsupported, match="rotation"):
        HuggingFaceSubject(model, Letters())


def test_rope_that_depends_on_the_prompt_is_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(Unsupported, match="dynamic"):
        HuggingFaceSubject(tiny(rope_parameters=rope), Letters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_profile_serves_the_same_weights_in_any_dtype(
    calibrated: tuple[bytes, StoredProfile], dtype: str, tmp_path: Path
) -> None:
    model = tiny()
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, dtype))
    assert f"weights={weights_digest(model)}" in calibrated[1].weights
    (tmp_path / "tiny.safetensors").write_bytes(calibrated[0])
    known = calibrated[1].profile.layout
    asked = replace(
        known, revision=f"weights={weights_digest(model)} torch=9.9", dtype=dtype, model="elsewhere"
    )
    assert ProfileFolder(tmp_path).for_layout(asked) is not None
    assert ProfileFolder(tmp_path).for_layout(replace(asked, rope="other")) is None
    assert ProfileFolder(tmp_path).for_layout(replace(asked, revision="weights=00")) is None


# Files.


def layout_of(**options: Any) -> KVLayout:
    given: dict[str, Any] = {
        "model": "m",
        "revision": "weights=1",
        "dtype": "bfloat16",
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_dim": 16,
    }
    return KVLayout(**given | options)


def profile_of(**options: Any) -> Profile:
    given: dict[str, Any] = {
        "hash": bytes(32),
        "layout": layout_of(),
        "rope": Rope(frequencies=np.linspace(1, 0.1, 8)),
        "means": np.zeros((1, 2, 1, 16), np.float32),
        "steps": np.ones((1, 2, 1, 16), np.float32),
        "levels": (
            Level(name="0", scale=1.0, is_dithered=True),
            Level(name="0-head", scale=1.0, transform="head"),
        ),
        "bases": {"head": np.eye(32, dtype=np.float32)[None, None]},
    }
    return Profile(**given | options)


def judged_of(**options: Any) -> Judged:
    given: dict[str, Any] = {
        "level": "0",
        "bits": 2.5,
        "kl": 0.001,
        "kl_se": 0.0001,
        "dnll": 0.0,
        "top1": 0.99,
        "num_next": 256,
        "num_codes": 16,
        "codes_exact": 10,
        "codes_lost": 1,
        "codes_gained": 0,
    }
    return Judged(**given | options)


def test_a_profile_comes_back_from_its_file() -> None:
    scores = np.arange(17, dtype=np.float32).reshape(1, 1, 17)
    stored = StoredProfile(
        profile=profile_of(scores=scores), weights=("weights=1",), judged=(judged_of(),)
    )
    content, renamed = named(stored)
    found = parse(content)
    assert found.profile.hash == renamed.profile.hash == content_hash(content)
    assert found.weights == stored.weights
    assert found.judged == stored.judged
    assert found.profile.levels == stored.profile.levels
    assert found.profile.layout == stored.profile.layout
    assert found.profile.rope.style == "half"
    for name in ("means", "steps", "scores"):
        assert np.array_equal(getattr(found.profile, name), getattr(stored.profile, name))
    assert np.array_equal(found.profile.rope.frequencies, stored.profile.rope.frequencies)
    assert np.array_equal(found.profile.bases["head"], stored.profile.bases["head"])
    assert pack(found) == content


def test_a_basis_that_float16_would_change_stays_as_it_is() -> None:
    basis = np.full((1, 1, 32, 32), 0.1, np.float32)
    content = pack(StoredProfile(profile=profile_of(bases={"head": basis})))
    assert np.array_equal(parse(content).profile.bases["head"], basis)


def with_steps(value: float) -> Profile:
    steps = np.ones((1, 2, 1, 16), np.float32)
    steps[0, 1, 0, 7] = value
    return profile_of(steps=steps)


BAD = [
    pytest.param(with_steps(0), id="step 0"),
    pytest.param(with_steps(-1), id="negative step"),
    pytest.param(with_steps(float("nan")), id="step nan"),
    pytest.param(with_steps(float("inf")), id="step inf"),
    pytest.param(
        profile_of(means=np.zeros((1, 2, 1, 15), np.float32)), id="means of another shape"
    ),
    pytest.param(profile_of(scores=np.zeros((1, 1, 16), np.float32)), id="scores without constant"),
    pytest.param(profile_of(levels=()), id="no level"),
    pytest.param(profile_of(bases={}), id="no basis"),
    pytest.param(
        profile_of(bases={"head": np.zeros((1, 1, 16, 16), np.float32)}), id="a smaller basis"
    ),
    pytest.param(
        profile_of(bases={"head": np.full((1, 1, 32, 32), np.nan, np.float32)}), id="basis nan"
    ),
    pytest.param(
        profile_of(levels=(Level(name="a", scale=1.0),) * 2, bases={}), id="one name twice"
    ),
    pytest.param(profile_of(levels=(Level(name="a", scale=0.0),), bases={}), id="scale 0"),
    pytest.param(
        profile_of(levels=(Level(name="a", scale=1e300),), bases={}), id="scale too large"
    ),
    pytest.param(
        profile_of(levels=(Level(name="a", scale=1.0, section_layers=2),), bases={}),
        id="a section of more layers than there are",
    ),
    pytest.param(profile_of(levels=(Level(name="a", scale=1.0),)), id="a basis for no level"),
    pytest.param(profile_of(rope=Rope(frequencies=np.ones(9))), id="a rope wider than keys"),
    pytest.param(profile_of(rope=Rope(frequencies=np.full(4, np.inf))), id="frequency inf"),
    pytest.param(profile_of(rope=Rope(frequencies=np.ones(8), offset=1)), id="a rope beyond keys"),
]


@pytest.mark.parametrize("profile", BAD)
def test_a_profile_that_cannot_be_is_corrupt(profile: Profile) -> None:
    with pytest.raises(Corrupt):
        parse(pack(StoredProfile(profile=profile)))


def retold(change: Any) -> bytes:
    """A file whose metadata says something else."""
    from safetensors.numpy import load, save

    content = pack(StoredProfile(profile=profile_of(), judged=(judged_of(),)))
    size = int.from_bytes(content[:8], "little")
    told = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["kvd.profile"])
    change(told)
    return save(load(content), {"kvd.profile": json.dumps(told)})


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(format=2),
        lambda told: told.pop("layout"),
        lambda told: told["layout"].update(num_layers="1"),
        lambda told: told["layout"].update(num_layers=1.0),
        lambda told: told["layout"].update(head_dim=0),
        lambda told: told["layout"].update(colour="red"),
        lambda told: told["layout"].pop("salt"),
        lambda told: told["rope"].update(style="spiral"),
        lambda told: told["rope"].update(offset=-1),
        lambda told: told["rope"].update(offset=0.0),
        lambda told: told["levels"].append("x"),
        lambda told: told["levels"][0].update(name=["a"]),
        lambda told: told["levels"][0].update(scale="1"),
        lambda told: told["levels"][0].update(transform="wavelet"),
        lambda told: told["levels"][0].update(transform=["head"]),
        lambda told: told["levels"][0].update(is_dithered=1),
        lambda told: told["judged"][0].update(kl="0"),
        lambda told: told["judged"][0].update(colour="red"),
        lambda told: told.update(weights=[1]),
        lambda told: told.update(levels=None),
    ],
)
def test_metadata_that_cannot_be_is_corrupt(change: Any) -> None:
    assert parse(retold(lambda told: None)).profile.layout == layout_of()
    with pytest.raises(Corrupt):
        parse(retold(change))


def test_a_file_cut_anywhere_is_corrupt() -> None:
    content = pack(StoredProfile(profile=profile_of()))
    for size in [*range(0, 2000, 7), len(content) - 1]:
        with pytest.raises(Corrupt):
            parse(content[:size])


def test_a_flipped_byte_is_corrupt_or_another_profile() -> None:
    content = pack(StoredProfile(profile=profile_of()))
    header = 8 + int.from_bytes(content[:8], "little")
    for index in range(header):
        flipped = bytearray(content)
        flipped[index] ^= 0x11
        try:
            found = parse(bytes(flipped))
        except Corrupt:
            continue
        assert found.profile.hash != content_hash(content)


# The folder.


def test_a_folder_is_looked_at_again_after_a_second(tmp_path: Path) -> None:
    now = [0.0]
    folder = ProfileFolder(tmp_path, shipped=tmp_path / "none", clock_s=lambda: now[0])
    layout = layout_of(dtype="float16", salt="tenant", chunk_tokens=16)
    assert folder.for_layout(layout) is None
    content, first = named(StoredProfile(profile=profile_of()))
    (tmp_path / "a.safetensors").write_bytes(content)
    assert folder.for_layout(layout) is None
    now[0] += LOOK_EVERY_S
    found = folder.for_layout(layout)
    assert found is not None
    assert found.hash == first.profile.hash
    # Another takes its place; what was written with the old one decodes all the same.
    content, second = named(StoredProfile(profile=with_steps(2)))
    (tmp_path / "a.safetensors").write_bytes(content)
    now[0] += LOOK_EVERY_S
    found = folder.for_layout(layout)
    assert found is not None
    assert found.hash == second.profile.hash
    assert folder.by_hash(first.profile.hash) is not None
    (tmp_path / "a.safetensors").unlink()
    now[0] += LOOK_EVERY_S
    assert folder.for_layout(layout) is None
    assert folder.by_hash(bytes(32)) is None


def test_a_broken_file_stands_in_nobodys_way(tmp_path: Path) -> None:
    content, stored = named(StoredProfile(profile=profile_of()))
    (tmp_path / "a.safetensors").write_bytes(content)
    (tmp_path / "b.safetensors").write_bytes(content[:100])
    folder = ProfileFolder(tmp_path, shipped=tmp_path / "none")
    found = folder.for_layout(layout_of())
    assert found is not None
    assert found.hash == stored.profile.hash
    assert [path.name for path in folder.broken] == ["b.safetensors"]


def test_ones_own_profile_goes_before_a_shipped_one(tmp_path: Path) -> None:
    for name, profile in (("shipped", with_steps(3)), ("own", with_steps(2))):
        (tmp_path / name).mkdir()
        content, _ = named(StoredProfile(profile=profile))
        (tmp_path / name / "m.safetensors").write_bytes(content)
    found = ProfileFolder(tmp_path / "own", shipped=tmp_path / "shipped").for_layout(layout_of())
    assert found is not None
    assert found.steps[0, 1, 0, 7] == 2


# Which level is safe.


def test_the_coarsest_safe_level_is_chosen() -> None:
    judged = [
        judged_of(level="fine", bits=4.0, kl=0.0001),
        judged_of(level="good", bits=2.0, kl=0.0045, kl_se=0.0005),
        judged_of(level="loses facts", bits=1.5, kl=0.002, codes_lost=8),
        judged_of(level="doubtful", bits=1.2, kl=0.0045, kl_se=0.0006),
        judged_of(level="coarse", bits=1.0, kl=0.0051, kl_se=0.0),
    ]
    chosen = coarsest_safe(judged, 0.005)
    assert chosen is not None
    assert chosen.level == "good"
    assert coarsest_safe(judged, 1e-6) is None


# The command.


def test_the_command_writes_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kvd.client.calibration.model.load_subject",
        lambda name, revision: HuggingFaceSubject(tiny(), Letters(), revision=revision),
    )
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = tmp_path / "tiny.safetensors"
    arguments = ["--model", "m", "--text", str(text), "--out", str(out), "--tokens", "192"]
    code = command.main(
        [*arguments, "--window", "64", "--kl", "9", "--json"], standalone_mode=False
    )
    told = json.loads(capsys.readouterr().out)
    stored = parse(out.read_bytes())
    assert code == 0
    assert told["hash"] == stored.profile.hash.hex()
    assert [found["level"] for found in told["levels"]] == [
        level.name for level in stored.profile.levels
    ]
    assert told["level"] == min(told["levels"], key=lambda found: found["bits"])["level"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be loaded"):
        load_subject(str(tmp_path))


# Facts.


def test_facts_stand_in_the_text_and_are_asked_for(subject: HuggingFaceSubject) -> None:
    filler = subject.encode(TEXT)[:512]
    context, questions = facts_among(subject, filler, "The number of {} is", seed=3)
    assert len(context) == len(filler)
    told = "".join(map(chr, context))
    assert len(questions) == 512 // TOKENS_A_FACT
    for question in questions:
        text = "".join(map(chr, question.ids))
        assert f"{text}.\n" in told
        assert text[question.code_start :].strip().isdigit()
        assert not any(letter.isdigit() for letter in text[: question.code_start])
    asked = [told.index("".join(map(chr, question.ids))) for question in questions]
    assert asked != sorted(asked)
    assert len(recited(questions, 40)) == 40


def test_half_of_the_windows_recite_facts(
    subject: HuggingFaceSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[Case] = []
    monkeypatch.setattr(calibration, "_add", lambda _, window, *__, **___: windows.append(window))
    monkeypatch.setattr(calibration, "_profile", stop)
    with pytest.raises(InterruptedError):
        calibrate(subject, [TEXT], SETTINGS)
    texts = ["".join(map(chr, window.context)) for window in windows]
    assert ["lives at number" in text for text in texts] == [False, True, False]
    assert "".join(map(chr, windows[1].following)).startswith("\n")


def test_every_text_is_judged(subject: HuggingFaceSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    judged_on: list[Sequence[Case]] = []

    def record(_: Any, cases: Sequence[Case], *__: Any) -> Any:
        judged_on.append(cases)
        raise InterruptedError

    monkeypatch.setattr(calibration, "_choose_dither", lambda _, profile, *__: profile)
    monkeypatch.setattr(calibration, "Gate", record)
    held_out = [letter * 100 for letter in "abcde"]
    with pytest.raises(InterruptedError):
        calibrate(subject, [TEXT], SETTINGS, held_out=held_out)
    assert {chr(case.context[0]) for case in judged_on[0]} == set("abcde")


def test_dither_is_chosen_for_each_level_by_what_it_costs_there(
    subject: HuggingFaceSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finest level too: on SmolLM2 dither halves the KL there."""

    class Told:
        """At level "1" dither costs more, at the others less."""

        def __init__(self, *_: Any) -> None: ...

        def judge(self, profile: Profile, name: str) -> Judged:
            (level,) = profile.levels
            kl = 0.02 if level.is_dithered == (name == "1") else 0.01
            return replace(judged_of(), kl=kl, bits=3.0)

    monkeypatch.setattr(calibration, "Gate", Told)
    levels = tuple(Level(name=str(index), scale=2.0**index) for index in range(4))
    joint = Level(name="0-head", scale=1.0, transform="head")
    profile = profile_of(levels=(*levels, joint))
    chosen = calibration._choose_dither(subject, profile, [], lambda *_: None)
    assert [level.is_dithered for level in chosen.levels] == [True, False, True, True, False]


def stop(*_: Any) -> Any:
    raise InterruptedError


def test_the_shipped_profiles_are_profiles() -> None:
    folder = Path(kvd.__file__).parent / "profiles"
    files = sorted(folder.glob("*.safetensors"))
    assert files
    for file in files:
        stored = parse(file.read_bytes())
        assert file.stat().st_size < 3_500_000
        assert {found.level for found in stored.judged} == {
            level.name for level in stored.profile.levels
        }
        assert coarsest_safe(stored.judged, 0.005) is not None
        book = ProfileFolder()
        assert book.by_hash(stored.profile.hash) is not None
        assert book.for_layout(replace(stored.profile.layout, salt="tenant")) is not None
