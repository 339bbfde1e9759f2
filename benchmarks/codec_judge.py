"""What a model says with KV that went through a codec, beside what it says with exact KV.

    kl      mean KL(exact || codec) of the next-token distributions of real text, nats a token
    dnll    mean rise of the next token's negative log likelihood
    top1    how often both put the same token first
    codes   "The access code of NAME is NNNNN", hidden in prose and asked for; right if each digit
            is the likeliest token. Digits' likelihood moves before codes are lost.

KL is the number to trust: dNLL of a few hundred tokens is mostly noise. Both sides get KV rounded
to bfloat16; forwards are float32. Tokens go together, so intervals are over blocks of 16.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from benchmarks.common import BOOTSTRAP_ROUNDS

if TYPE_CHECKING:
    from kvd.client.calibration.subject import Floats, Subject, Tokens

BLOCK_TOKENS = 16
NUM_DIGITS = 5

# No two begin alike: small models take names for one another that do.
NAMES = (
    *("Abernathy", "Birkeland", "Castellano", "Drummond", "Eastwick", "Ferreira", "Goldberg"),
    *("Hawthorne", "Ishikawa", "Jorgensen", "Kilpatrick", "Lombardi", "MacAllister", "Novak"),
    *("Oyelaran", "Prescott", "Quimby", "Rasmussen", "Stravinsky", "Tolliver", "Ulrich"),
    *("Vandermeer", "Wexford", "Yamamoto", "Zielinski"),
)

# KV float32 as the cache holds it -> as it comes back, and bits an element.
Restore = Callable[["Floats"], tuple["Floats", float]]


@dataclass(frozen=True, kw_only=True)
class Continued:
    """What is scored behind one context: KL and dNLL of each token, whether the top token is the
    same, and the bits of an element of the context.
    """

    bits: float
    kl: Floats
    dnll: Floats
    is_same: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Codes of one context: which were right, and the mean NLL of their digits."""

    is_right: NDArray[np.bool_]
    digit_nll: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What a codec costs, over all contexts."""

    bits: float
    kl: float
    kl_low: float
    kl_high: float
    dnll: float
    top1: float
    num_next: int
    codes_exact: int
    codes_lost: int
    codes_gained: int
    num_codes: int
    digit_dnll: float

    @property
    def ratio(self) -> float:
        """Against bfloat16."""
        return 16 / self.bits

    @property
    def has_lost_codes(self) -> bool:
        """Whether more are lost, net, than two standard deviations of a fair coin explain."""
        changed = self.codes_lost + self.codes_gained
        return self.codes_lost - self.codes_gained > max(1.0, 2 * math.sqrt(changed))

    def is_safe(self, kl_max: float) -> bool:
        """Within the bound, and no measurable loss of retrieval."""
        return self.kl <= kl_max and not self.has_lost_codes


class Document:
    """A context and the tokens behind it, with what the model says to them."""

    def __init__(self, subject: Subject, ids: Tokens, *, num_context: int, num_next: int) -> None:
        if len(ids) < num_context + num_next + 1:
            raise ValueError(f"{num_context + num_next + 1} tokens expected, found {len(ids)}")
        self._subject = subject
        self.following = ids[num_context : num_context + num_next]
        self._targets = ids[num_context + 1 : num_context + num_next + 1]
        self.kv = subject.kv_of(ids[:num_context])
        self._wanted = subject.log_probs(self.kv, self.following)

    def score(self, restore: Restore) -> Continued:
        """All tokens behind the context, in one forward."""
        kv, bits = restore(self.kv)
        found = self._subject.log_probs(rounded(kv), self.following)
        rows = np.arange(len(found)), self._targets
        return Continued(
            bits=bits,
            kl=(np.exp(self._wanted) * (self._wanted - found)).sum(-1),
            dnll=self._wanted[rows] - found[rows],
            is_same=self._wanted.argmax(-1) == found.argmax(-1),
        )


class Quiz:
    """Codes among prose: a context of exactly `num_context` tokens, and a question for each."""

    def __init__(
        self, subject: Subject, model: Any, prose: Tokens, *, num_context: int, seed: int
    ) -> None:
        self._model = model
        dice = random.Random(seed)
        names = dice.sample(NAMES, len(NAMES))
        codes = ["".join(dice.choices("0123456789", k=NUM_DIGITS)) for _ in names]
        told = [f"\nThe access code of {name} is" for name in names]
        facts = [f"{text} {code}.\n" for text, code in zip(told, codes, strict=True)]
        self.questions = [
            _question(subject, text, code) for text, code in zip(told, codes, strict=True)
        ]
        self.context = _among(prose, [subject.encode(fact) for fact in facts], num_context)
        self.kv = subject.kv_of(self.context)
        self.exact = self.ask(self.kv)

    def score(self, restore: Restore) -> Asked:
        """The questions, with restored KV."""
        return self.ask(rounded(restore(self.kv)[0]))

    def ask(self, kv: Floats) -> Asked:
        """All questions in one forward, blind to one another."""
        log_probs = _log_probs_apart(self._model, kv, [ids for ids, _ in self.questions])
        is_right, nll = [], []
        for (ids, start), rows in zip(self.questions, log_probs, strict=True):
            # Row i is what the model expects behind token i.
            digits, guesses = ids[start:], rows[start - 1 : -1]
            is_right.append(bool((guesses.argmax(-1) == digits).all()))
            nll.append(-guesses[np.arange(len(digits)), digits].mean())
        return Asked(is_right=np.array(is_right), digit_nll=np.array(nll, np.float32))


def quality(scores: Sequence[Continued], asked: Sequence[tuple[Asked, Asked]]) -> Quality:
    """All of one codec; `asked` are pairs with exact KV and with the codec's."""
    kl = np.concatenate([score.kl for score in scores])
    low, high = interval([score.kl for score in scores])
    exact = _joined([pair[0].is_right for pair in asked])
    right = _joined([pair[1].is_right for pair in asked])
    rises = [pair[1].digit_nll - pair[0].digit_nll for pair in asked]
    return Quality(
        bits=float(np.mean([score.bits for score in scores])),
        kl=float(kl.mean()),
        kl_low=low,
        kl_high=high,
        dnll=float(np.concatenate([score.dnll for score in scores]).mean()),
        top1=float(np.concatenate([score.is_same for score in scores]).mean()),
        num_next=len(kl),
        codes_exact=int(exact.sum()),
        codes_lost=int((exact & ~right).sum()),
        codes_gained=int((~exact & right).sum()),
        num_codes=len(exact),
        digit_dnll=float(np.concatenate(rises).mean()) if rises else 0.0,
    )


def interval(parts: Sequence[Floats], *, seed: int = 0) -> tuple[float, float]:
    """The mean's 95 % interval, by a bootstrap over blocks of neighbours within each part."""
    sums, sizes = [], []
    for part in parts:
        for block in np.array_split(part, max(1, len(part) // BLOCK_TOKENS)):
            sums.append(block.sum())
            sizes.append(len(block))
    drawn = np.random.default_rng(seed).integers(len(sums), size=(BOOTSTRAP_ROUNDS, len(sums)))
    means = np.array(sums, np.float64)[drawn].sum(1) / np.array(sizes)[drawn].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def rounded(kv: Floats) -> Floats:
    """The nearest bfloat16 of each number."""
    nearest: Floats = torch.from_numpy(np.ascontiguousarray(kv)).bfloat16().float().numpy()
    return nearest


def _question(subject: Subject, told: str, code: str) -> tuple[Tokens, int]:
    """Tokens that end with the code, and where its digits begin in them."""
    whole, head = subject.encode(f"{told} {code}"), subject.encode(f"{told} ")
    same = next((i for i, (a, b) in enumerate(zip(whole, head, strict=False)) if a != b), len(head))
    return whole, max(1, min(same, len(whole) - 1))


def _among(prose: Tokens, facts: Sequence[Tokens], num_tokens: int) -> Tokens:
    """Facts at even distances in prose, `num_tokens` in all."""
    room = num_tokens - sum(map(len, facts))
    if not len(facts) <= room <= len(prose):
        raise ValueError(f"{len(facts)} facts do not fit {num_tokens} tokens of this prose")
    parts: list[Tokens] = []
    for index, fact in enumerate(facts):
        start, end = (room * at // len(facts) for at in (index, index + 1))
        parts += [prose[start:end], fact]
    return np.concatenate(parts)


@torch.inference_mode()
def _log_probs_apart(model: Any, kv: Floats, asked: Sequence[Tokens]) -> Iterator[Floats]:
    """`[tokens, vocabulary]` of each sequence, as if it alone stood behind `kv`."""
    num_context = kv.shape[2]
    lengths = [len(ids) for ids in asked]
    owner = np.repeat(np.arange(len(asked)), lengths)
    place = np.concatenate([np.arange(length) for length in lengths])
    sees = (owner[:, None] == owner) & (place[:, None] >= place)
    sees = np.concatenate([np.ones((len(owner), num_context), bool), sees], axis=1)
    mask = torch.zeros(sees.shape).masked_fill_(~torch.from_numpy(sees), -math.inf)[None, None]
    cache = DynamicCache(config=model.config)
    for layer, planes in enumerate(torch.from_numpy(kv)):
        keys, values = (plane.transpose(0, 1)[None].contiguous() for plane in planes)
        cache.update(keys, values, layer)
    output = model(
        input_ids=torch.from_numpy(np.concatenate(asked))[None],
        past_key_values=cache,
        use_cache=True,
        attention_mask=mask,
        position_ids=torch.from_numpy(num_context + place)[None],
    )
    logits = output.logits[0].float().log_softmax(-1).numpy()
    return iter(np.split(logits, np.cumsum(lengths)[:-1]))


def _joined(parts: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    return np.concatenate([np.zeros(0, bool), *parts])
