"""Facts hidden in a text, and questions after them: an answer hangs on single tokens, which text
that merely goes on seldom needs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvd.client.calibration.subject import Subject, Tokens

NUM_DIGITS = 5
# A fact has about 16 tokens: a quarter of the text.
TOKENS_A_FACT = 64
_SYLLABLES = ("bar", "den", "fal", "gor", "hul", "jan", "kel", "lom", "mir", "nor", "pel", "ras")
NUM_FACTS_MAX = len(_SYLLABLES) ** 2


@dataclass(frozen=True, kw_only=True)
class Question:
    """Tokens that end with a code, and where it begins in them."""

    ids: Tokens
    code_start: int


def facts_among(
    subject: Subject, filler: Tokens, template: str, *, seed: int
) -> tuple[Tokens, list[Question]]:
    """As many tokens as `filler` has, with a fact every so often; a question for each fact.
    `template` has a place for a name, and the code goes behind it.
    """
    dice = random.Random(seed)
    names = [one + other for one in _SYLLABLES for other in _SYLLABLES]
    names = dice.sample(names, min(NUM_FACTS_MAX, max(1, len(filler) // TOKENS_A_FACT)))
    facts = [
        (
            f"\n{template.format(name.capitalize())}",
            " " + "".join(dice.choices("0123456789", k=NUM_DIGITS)),
        )
        for name in names
    ]
    told = [subject.encode(f"{asked}{code}.\n") for asked, code in facts]
    room = max(0, len(filler) - sum(map(len, told))) // len(told)
    parts = []
    for index, fact in enumerate(told):
        parts += [filler[index * room : (index + 1) * room], fact]
    # Asked for in another order than told.
    questions = [_question(subject, asked, code) for asked, code in facts]
    dice.shuffle(questions)
    return np.concatenate([*parts, filler])[: len(filler)], questions


def recited(questions: Sequence[Question], num_tokens: int) -> Tokens:
    """Questions and answers one behind the other, `num_tokens` at most."""
    return np.concatenate([question.ids for question in questions])[:num_tokens]


def _question(subject: Subject, asked: str, code: str) -> Question:
    whole, start = subject.encode(asked + code), len(subject.encode(asked))
    return Question(ids=whole, code_start=min(start, len(whole) - 1))
