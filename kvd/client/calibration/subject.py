"""The model that is calibrated, as the rest sees it: tokens in, KV, gradients and log probabilities
out, all in numpy.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.profile import Rope
from kvd.layout import KVLayout

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]


class Subject(Protocol):
    """KV is `float32 [layers, planes, tokens, kv_heads, head_dim]`, as the model's cache holds it
    (keys rotated), rounded to bfloat16.
    """

    @property
    def layout(self) -> KVLayout:
        """What the connector declares for the model."""
        ...

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the model's weights, in each dtype that they may be loaded in."""
        ...

    @property
    def rope(self) -> Rope:
        """The position encoding in its keys."""
        ...

    def encode(self, text: str) -> Tokens:
        """Tokens, without special ones."""
        ...

    def kv_of(self, ids: Tokens) -> Floats:
        """KV of a prompt."""
        ...

    def log_probs(self, kv: Floats, ids: Tokens) -> Floats:
        """`[tokens, vocabulary]`: after each of `ids`, fed behind `kv`."""
        ...

    def gradients(self, kv: Floats, ids: Tokens, *, seed: int) -> Floats:
        """Of the sum of log p(y) with respect to `kv`, with one y drawn after each of `ids` from
        the model's own distribution. The mean of their squares is the diagonal of the Fisher
        information, the second-order term of the KL that an error in `kv` makes.
        """
        ...
