"""From a model and texts to a profile with judged levels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from kvd.client.calibration.facts import facts_among, recited
from kvd.client.calibration.gate import Case, Gate
from kvd.client.calibration.statistics import Joint, Statistics
from kvd.client.calibration.subject import Floats, Subject, Tokens
from kvd.codecs.base import Span
from kvd.codecs.profile import Level, Profile, Rope, Transform, canonical
from kvd.codecs.profile_file import Judged, StoredProfile, named
from kvd.codecs.rope import rotation, unrotate
from kvd.errors import InvalidRequest

# Scales of levels 0, 1, 2, ...: each costs twice the KL of the one before, and half a bit less.
NUM_LEVELS = 8
# What dithered and plain rounding are compared on.
_COMPARED_WINDOWS = 2
# Every second window is one of facts to recite: steps chosen on text that merely goes on lose them.
_FACTS_EVERY = 2
_TEMPLATE = "{} lives at number"

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Calibration sees windows of `context_tokens`, and gradients of the `next_tokens` behind
    each, `tokens` of context in all; the gate `judged_windows` of the same size.
    """

    tokens: int = 8192
    context_tokens: int = 1024
    next_tokens: int = 256
    judged_windows: int = 4
    # Of each text, unless others are held out.
    held_out_share: float = 0.2
    joint: tuple[Joint, ...] = ("head",)


def calibrate(
    subject: Subject,
    texts: Sequence[str],
    settings: Settings,
    *,
    held_out: Sequence[str] = (),
    report: Report = lambda what, done, total: None,
) -> tuple[bytes, StoredProfile]:
    """The file of a profile, and what it says. `report` hears what is done, how much of how much.

    Raises `InvalidRequest` where there is too little text.
    """
    seen, unseen = _split(texts, held_out, settings)
    windows = _windows(subject, seen, settings, max(1, settings.tokens // settings.context_tokens))
    # One of each text at least: kinds of text differ more than windows of one.
    num_judged = max(settings.judged_windows, len(unseen))
    cases = _windows(subject, unseen, settings, num_judged)
    statistics = Statistics(settings.joint)
    for index, window in enumerate(windows):
        report("gradients", index, len(windows))
        if index % _FACTS_EVERY == _FACTS_EVERY - 1:
            window = _with_facts(subject, window, seed=index + 1)
        _add(subject, window, statistics, seed=index)
    report("gradients", len(windows), len(windows))
    profile = _profile(subject, statistics, settings)
    profile = _choose_dither(subject, profile, windows[-_COMPARED_WINDOWS:], report)
    judged = _judge(Gate(subject, cases, unseen), profile, report)
    return named(StoredProfile(profile=profile, weights=subject.weights, judged=judged))


def coarsest_safe(judged: Sequence[Judged], kl_max: float) -> Judged | None:
    """The level with the fewest bits that is safe."""
    safe = [found for found in judged if found.is_safe(kl_max)]
    return min(safe, key=lambda found: found.bits, default=None)


def _split(
    texts: Sequence[str], held_out: Sequence[str], settings: Settings
) -> tuple[list[str], list[str]]:
    """What calibration sees, and what it does not: other texts, or the end of each."""
    if held_out:
        return [*texts], [*held_out]
    cuts = [round(len(text) * (1 - settings.held_out_share)) for text in texts]
    seen = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    return seen, [text[cut:] for text, cut in zip(texts, cuts, strict=True)]


def _windows(subject: Subject, texts: Sequence[str], settings: Settings, count: int) -> list[Case]:
    """Up to `count` windows, by turns from each text."""
    queues = [_cut(subject.encode(text), settings) for text in texts]
    turns = zip_longest(*queues)
    found = [window for turn in turns for window in turn if window is not None][:count]
    if not found:
        wanted = settings.context_tokens + settings.next_tokens
        raise InvalidRequest(
            f"no text is {wanted} tokens long: give longer texts, or held-out ones"
        )
    return found


def _cut(ids: Tokens, settings: Settings) -> Iterator[Case]:
    size = settings.context_tokens + settings.next_tokens
    for start in range(0, len(ids) - size + 1, size):
        middle = start + settings.context_tokens
        yield Case(context=ids[start:middle], following=ids[middle : start + size])


def _with_facts(subject: Subject, window: Case, *, seed: int) -> Case:
    context, questions = facts_among(subject, window.context, _TEMPLATE, seed=seed)
    return Case(context=context, following=recited(questions, len(window.following)))


def _add(subject: Subject, window: Case, statistics: Statistics, *, seed: int) -> None:
    kv = subject.kv_of(window.context)
    gradients = subject.gradients(kv, window.following, seed=seed)
    # A rotation keeps lengths: gradients turn back as keys do.
    statistics.add(
        _unrotated(kv, subject.rope), _unrotated(gradients, subject.rope), len(window.following)
    )


def _unrotated(kv: Floats, rope: Rope) -> Floats:
    plain = kv.copy()
    plain[:, 0] = unrotate(kv[:, 0], rotation(rope, Span(start=0, num_tokens=kv.shape[2])))
    return plain


def _profile(subject: Subject, statistics: Statistics, settings: Settings) -> Profile:
    found = statistics.found()
    transforms: tuple[Transform, ...] = ("none", *settings.joint)
    levels = tuple(
        Level(
            name=str(index) if transform == "none" else f"{index}-{transform}",
            scale=2.0 ** (index / 2),
            transform=transform,
        )
        for transform in transforms
        for index in range(NUM_LEVELS)
    )
    return Profile(
        hash=bytes(32),
        layout=canonical(subject.layout),
        rope=subject.rope,
        means=found.means,
        steps=found.steps,
        levels=levels,
        bases=found.bases,
        scores=found.scores,
    )


def _choose_dither(
    subject: Subject, profile: Profile, windows: Sequence[Case], report: Report
) -> Profile:
    """The profile with dither at those levels without transform that are the better for it: on some
    models rounding errors of one channel add up. A transform spreads them already.
    """
    gate = Gate(subject, windows)
    levels: list[Level] = []
    for index, level in enumerate(profile.levels):
        report("rounding", index, len(profile.levels))
        if level.transform == "none":
            level = _better(gate, profile, level)
        levels.append(level)
    report("rounding", len(profile.levels), len(profile.levels))
    return replace(profile, levels=tuple(levels))


def _better(gate: Gate, profile: Profile, level: Level) -> Level:
    """The level with or without dither."""
    dithered = replace(level, is_dithered=True)
    costs = []
    for each in (level, dithered):
        judged = gate.judge(replace(profile, levels=(each,)), level.name)
        # A bit is a factor of four in KL.
        costs.append(judged.kl * 4**judged.bits)
    return dithered if costs[1] < costs[0] else level


def _judge(gate: Gate, profile: Profile, report: Report) -> tuple[Judged, ...]:
    judged = []
    for index, level in enumerate(profile.levels):
        report("levels", index, len(profile.levels))
        judged.append(gate.judge(profile, level.name))
    report("levels", len(profile.levels), len(profile.levels))
    return tuple(judged)
