"""What a profile is made of, from KV and gradients of calibration windows.

An error e in the cache costs about 1/2 sum F e^2 nats, F the Fisher information (`Subject`). At
equal cost of each channel a step is F^-1/2: reverse water-filling with the KL as its measure.

    means      of each channel, keys un-rotated
    steps      F^-1/2, F drawn a fifth of the way to its head's mean, which has less noise
    bases      eigenvectors of the covariance of what the steps have scaled
    scores     the regression of a token's log2 F on its key
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvd.client.calibration.subject import Floats

Doubles = NDArray[np.float64]
Joint = Literal["head", "layer"]

# The first tokens are kept raw.
NUM_SINKS = 4

# What of log F is a channel's own.
CHANNEL_SHARE = 0.8
# Predicted KL of a next token at scale 1.
KL_AT_SCALE_1 = 0.0025 / 16
# A token's score: tokens above this quantile of a normal law (60 %) have finer steps, 2^(SLOPE/2)
# times for each factor of 2 in F; a class is two octaves.
SCORE_QUANTILE = 0.2533
SCORE_SLOPE = 0.7

# Of diagonals, so that few tokens make no wild eigenvectors and weights.
_SHRINK_BASIS = 0.02
_SHRINK_SCORES = 0.03
# Bounds of what is divided by, relative to its mean: constant channels, channels without effect.
_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class Found:
    """Arrays as `Profile` wants them; `bases` by transform."""

    means: Floats
    steps: Floats
    scores: Floats
    bases: dict[str, Floats]


class Statistics:
    """Sums over windows. `joint`: the transforms that are wanted."""

    def __init__(self, joint: Iterable[Joint] = ("head",)) -> None:
        self._joint = tuple(joint)
        self._num_tokens = 0
        self._num_next = 0
        # Near the means: sums of squares around 0 would lose what is small beside a mean.
        self._origin: Floats | None = None
        self._sum: Doubles = np.zeros(())
        self._squares: Doubles = np.zeros(())
        self._fisher: Doubles = np.zeros(())
        self._keys_by_score: Doubles = np.zeros(())
        self._moments: dict[Joint, Doubles] = {}
        self._key_moments: Doubles = np.zeros(())

    def add(self, kv: Floats, gradients: Floats, num_next: int) -> None:
        """One window, keys un-rotated in both: `[layers, planes, tokens, kv_heads, head_dim]`."""
        kv = kv[:, :, NUM_SINKS:]
        origin: Floats = kv.mean(2, keepdims=True) if self._origin is None else self._origin
        self._origin = origin
        kv = kv - origin
        fisher = np.square(gradients[:, :, NUM_SINKS:])
        self._num_tokens += kv.shape[2]
        self._num_next += num_next
        self._sum = self._sum + kv.sum(2, dtype=np.float64)
        self._squares = self._squares + np.square(kv).sum(2, dtype=np.float64)
        self._fisher = self._fisher + fisher.sum(2, dtype=np.float64)
        for kind in self._joint:
            rows = grouped(kv, kind)
            self._moments[kind] = self._moments.get(kind, 0.0) + _products(rows, rows)
        keys = kv[:, 0].transpose(0, 2, 1, 3)
        self._key_moments = self._key_moments + _products(keys, keys)
        importance = _importance(fisher)[..., None]
        self._keys_by_score = self._keys_by_score + _products(keys, importance)[..., 0]

    def found(self) -> Found:
        """What the windows say."""
        assert self._origin is not None
        offsets = self._sum / self._num_tokens
        variances = self._squares / self._num_tokens - offsets**2
        variances = np.maximum(variances, _FLOOR * variances.mean() + np.finfo(np.float64).tiny)
        steps = self._steps(variances)
        means = (self._origin[:, :, 0] + offsets).astype(np.float32)
        return Found(
            means=means,
            steps=steps.astype(np.float32),
            scores=self._scores(offsets[:, 0], means[:, 0]),
            bases={kind: self._basis(kind, offsets, steps) for kind in self._joint},
        )

    def _steps(self, variances: Doubles) -> Doubles:
        fisher = self._fisher / self._num_tokens
        fisher = np.maximum(fisher, _FLOOR * fisher.mean() + np.finfo(np.float64).tiny)
        heads = (fisher * variances).mean(-1, keepdims=True) / variances.mean(-1, keepdims=True)
        smooth = fisher**CHANNEL_SHARE * heads ** (1 - CHANNEL_SHARE)
        steps = smooth**-0.5
        # A uniform error has variance step^2 / 12.
        kl = 0.5 * (fisher * steps**2 / 12).sum() * self._num_tokens / self._num_next
        scaled: Doubles = steps * np.sqrt(KL_AT_SCALE_1 / kl)
        return scaled

    def _basis(self, kind: Joint, offsets: Doubles, steps: Doubles) -> Floats:
        """Rows by falling variance; float16 numbers: they lose nothing that shows."""
        mean = grouped(offsets[:, :, None], kind)
        inverse = 1 / grouped(steps[:, :, None], kind)
        covariance = self._moments[kind] / self._num_tokens - _products(mean, mean)
        covariance *= inverse.swapaxes(-1, -2) * inverse
        axes = np.linalg.eigh(_loaded(covariance, _SHRINK_BASIS))[1]
        return axes[..., ::-1].swapaxes(-1, -2).astype(np.float16).astype(np.float32)

    def _scores(self, offsets: Doubles, means: Floats) -> Floats:
        """`[layers, kv_heads, head_dim + 1]`; both of keys."""
        outer = offsets[..., None] * offsets[..., None, :]
        covariance = self._key_moments / self._num_tokens - outer
        floor = _FLOOR * np.abs(covariance).max() + np.finfo(np.float64).tiny
        covariance += floor * np.eye(means.shape[-1])
        target = (self._keys_by_score / self._num_tokens)[..., None]
        columns = np.linalg.solve(_loaded(covariance, _SHRINK_SCORES), target)
        spread = np.sqrt(columns.swapaxes(-1, -2) @ covariance @ columns)[..., 0]
        weights = columns[..., 0]
        bias = -(weights * means).sum(-1, keepdims=True) - SCORE_QUANTILE * spread
        scores: Floats = np.concatenate([weights, bias], -1).astype(np.float32)
        return scores * np.float32(SCORE_SLOPE / 4)


def grouped(kv: NDArray[np.floating], kind: Joint) -> NDArray[np.floating]:
    """Channels of sections: `[layers, head groups, tokens, channels]` of `[layers, planes, tokens,
    kv_heads, head_dim]`.
    """
    layers, planes, tokens, heads, dim = kv.shape
    if kind == "head":
        return kv.transpose(0, 3, 2, 1, 4).reshape(layers, heads, tokens, planes * dim)
    return kv.transpose(0, 2, 1, 3, 4).reshape(layers, 1, tokens, planes * heads * dim)


def _importance(fisher: Floats) -> Floats:
    """log2 F of each token, `[layers, heads, tokens]`, its mean over a window 0."""
    by_token = fisher.sum(-1)
    floor = _FLOOR * by_token.mean(2, keepdims=True) + np.finfo(np.float32).tiny
    logarithm = np.log2(np.maximum(by_token, floor)).mean(1)
    centred: Floats = logarithm - logarithm.mean(1, keepdims=True)
    return centred.swapaxes(1, 2)


def _products(one: NDArray[np.floating], other: NDArray[np.floating]) -> Doubles:
    """The sum over tokens: `[..., tokens, a]`, `[..., tokens, b]` -> `[..., a, b]`."""
    found: Doubles = one.astype(np.float64).swapaxes(-1, -2) @ other.astype(np.float64)
    return found


def _loaded(matrix: Doubles, share: float) -> Doubles:
    """With more on the diagonal."""
    diagonal = np.diagonal(matrix, axis1=-2, axis2=-1)
    loaded: Doubles = matrix + share * diagonal[..., None] * np.eye(matrix.shape[-1])
    return loaded
