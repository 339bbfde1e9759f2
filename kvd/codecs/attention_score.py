"""Which tokens get finer steps: those whose keys say that much attention will fall on them.

One per cent of the tokens takes most of the attention, and an error in their keys or values reaches
every later token. How much a token matters is to 60 % a linear function of its un-rotated key, so a
product tells it when the chunk is encoded. Decoders read classes from the bitstream and need none
of this.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.profile import Profile

# 0: the step; 1: a quarter of it; 2: a sixteenth.
CLASS_MAX = 2


def token_classes(
    keys_unrotated: NDArray[np.float32], profile: Profile, layer: int
) -> NDArray[np.uint8]:
    """`uint8 [tokens, heads]` for keys of a layer, `[tokens, heads, head_dim]`; 0 wherever the
    profile has no scores. Two FLOP an element, the same on every call.
    """
    if not profile.scores.size:
        return np.zeros(keys_unrotated.shape[:2], np.uint8)
    weights, bias = profile.scores[layer, :, :-1], profile.scores[layer, :, -1]
    # No matrix product: its order of adding is the library's own, a sum's is numpy's.
    score = (keys_unrotated * weights).sum(axis=-1) + bias
    classes: NDArray[np.uint8] = np.clip(np.rint(score), 0, CLASS_MAX).astype(np.uint8)
    return classes
