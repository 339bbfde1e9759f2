"""The gate: what a level costs on text that calibration has not seen, through the codec itself.

KL, because it is the error that steps were chosen for; facts in a long text, because they hang on
single tokens that a mean does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvd.client.calibration.facts import Question, facts_among
from kvd.client.calibration.subject import Floats, Subject, Tokens
from kvd.codecs.attention_score import token_classes
from kvd.codecs.base import Codec, Span
from kvd.codecs.kvq import Kvq
from kvd.codecs.profile import Profile
from kvd.codecs.profile_file import Judged
from kvd.layout import KVLayout

# Tokens go together: the standard error is that of means over so many.
BLOCK_TOKENS = 16

# Texts that facts are hidden in, each with one for every 64 tokens: fewer facts tell nothing.
QUIZZES_MAX = 3

# Calibration learns from facts in other words.
_TEMPLATE = "The access code of {} is"

MakeCodec = Callable[[Profile, str], Codec]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A context and the tokens behind it."""

    context: Tokens
    following: Tokens


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """What the model says with exact KV."""

    kv: Floats
    following: Tokens
    log_probs: Floats


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """Of the tokens behind one context, each; `bits` of the context's bitstreams."""

    bits: float
    kl: Floats
    dnll: Floats
    is_same: NDArray[np.bool_]


class OneProfile:
    """A book of one profile, whatever is asked for."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    def for_layout(self, layout: KVLayout) -> Profile:
        """The profile."""
        return self._profile

    def by_hash(self, hash: bytes) -> Profile:
        """The profile."""
        return self._profile


def kvq_of(profile: Profile, level: str) -> Codec:
    """The codec at a level of the profile."""
    return Kvq(level, OneProfile(profile), token_classes=token_classes)


class Gate:
    """Judges levels on `cases`; references are computed once. `texts` are what facts are hidden in;
    empty for no facts.
    """

    def __init__(
        self,
        subject: Subject,
        cases: Sequence[Case],
        texts: Sequence[str] = (),
        *,
        codec: MakeCodec = kvq_of,
    ) -> None:
        assert cases
        self._subject = subject
        self._cases = cases
        self._texts = texts[:QUIZZES_MAX]
        self._codec = codec

    @cached_property
    def _references(self) -> list[_Reference]:
        found = []
        for case in self._cases:
            kv = self._subject.kv_of(case.context)
            log_probs = self._subject.log_probs(kv, case.following)
            found.append(_Reference(kv=kv, following=case.following, log_probs=log_probs))
        return found

    @cached_property
    def _quizzes(self) -> list[tuple[Floats, list[Question], NDArray[np.bool_]]]:
        """Contexts full of facts, questions, and which are answered with exact KV."""
        num_tokens = len(self._cases[0].context)
        found = []
        for seed, text in enumerate(self._texts):
            filler = self._subject.encode(text)[:num_tokens]
            context, questions = facts_among(self._subject, filler, _TEMPLATE, seed=seed)
            kv = self._subject.kv_of(context)
            found.append((kv, questions, self._answers(kv, questions)))
        return found

    def judge(self, profile: Profile, level: str) -> Judged:
        """What a level of the profile costs."""
        codec = self._codec(profile, level)
        scores = [self._score(reference, codec) for reference in self._references]
        kl = np.concatenate([score.kl for score in scores])
        is_same = np.concatenate([score.is_same for score in scores])
        judged = Judged(
            level=level,
            bits=float(np.mean([score.bits for score in scores])),
            kl=float(kl.mean()),
            kl_se=_standard_error(kl),
            dnll=float(np.concatenate([score.dnll for score in scores]).mean()),
            top1=float(is_same.mean()),
            num_next=len(kl),
            num_codes=0,
            codes_exact=0,
            codes_lost=0,
            codes_gained=0,
        )
        return self._with_codes(judged, codec)

    def _score(self, reference: _Reference, codec: Codec) -> _Scores:
        kv, bits = through(codec, reference.kv, self._subject.layout)
        found = self._subject.log_probs(kv, reference.following)
        wanted = reference.log_probs
        # The next token of the last one is not known.
        rows = np.arange(len(found) - 1), reference.following[1:]
        return _Scores(
            bits=bits,
            kl=(np.exp(wanted) * (wanted - found)).sum(-1),
            dnll=wanted[rows] - found[rows],
            is_same=wanted.argmax(-1) == found.argmax(-1),
        )

    def _with_codes(self, judged: Judged, codec: Codec) -> Judged:
        for kv, questions, exact in self._quizzes:
            found = self._answers(through(codec, kv, self._subject.layout)[0], questions)
            judged = replace(
                judged,
                num_codes=judged.num_codes + len(questions),
                codes_exact=judged.codes_exact + int(exact.sum()),
                codes_lost=judged.codes_lost + int((exact & ~found).sum()),
                codes_gained=judged.codes_gained + int((found & ~exact).sum()),
            )
        return judged

    def _answers(self, kv: Floats, questions: Sequence[Question]) -> NDArray[np.bool_]:
        """Whether each token of a code is the likeliest after those before it."""
        answers = []
        for question in questions:
            guesses = self._subject.log_probs(kv, question.ids[:-1]).argmax(-1)
            start = question.code_start
            answers.append(bool((guesses[start - 1 :] == question.ids[start:]).all()))
        return np.array(answers, bool)


def through(codec: Codec, kv: Floats, layout: KVLayout) -> tuple[Floats, float]:
    """KV as it comes back from its bitstreams, chunk by chunk, and bits an element."""
    layout = replace(layout, dtype="bfloat16")
    restored, size = np.empty_like(kv), 0
    for span in _spans(kv.shape[2], layout.chunk_tokens):
        tokens = slice(span.start, span.start + span.num_tokens)
        chunk = (np.ascontiguousarray(kv[:, :, tokens]).view(np.uint32) >> 16).astype(np.uint16)
        raw = chunk.reshape(-1).view(np.uint8)
        bitstream = np.empty(codec.size_bytes_max(layout, span.num_tokens), np.uint8)
        written = codec.encode(raw, layout, span, bitstream)
        back = np.zeros_like(raw)
        codec.decode(bitstream[:written], layout, span, back)
        bits = back.view(np.uint16).astype(np.uint32) << 16
        restored[:, :, tokens] = bits.view(np.float32).reshape(chunk.shape)
        size += written
    return restored, 8 * size / kv.size


def _spans(num_tokens: int, chunk_tokens: int) -> Iterator[Span]:
    for start in range(0, num_tokens, chunk_tokens):
        yield Span(start=start, num_tokens=min(chunk_tokens, num_tokens - start))


def _standard_error(kl: Floats) -> float:
    blocks = [block.mean() for block in np.array_split(kl, max(1, len(kl) // BLOCK_TOKENS))]
    return float(np.std(blocks, ddof=1) / np.sqrt(len(blocks))) if len(blocks) > 1 else 0.0
