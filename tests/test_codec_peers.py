"""The published codecs of the benchmark: their rates are exact, their errors what theory says."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.codec_peers import kivi, lloyd_max, lmcache_cachegen, turboquant
from tests.codec_chunks import bell


def kv_of(tokens: int = 256) -> NDArray[np.float32]:
    return bell(3 * 2 * tokens * 2 * 64, 11).reshape(3, 2, tokens, 2, 64)


def error(found: NDArray[np.float32], kv: NDArray[np.float32]) -> float:
    return float(((found - kv) ** 2).sum() / (kv**2).sum())


@pytest.mark.parametrize(("num_bits", "bits"), [(4, 5.0), (2, 3.0)])
def test_kivi_counts_a_scale_and_a_zero_a_group(num_bits: int, bits: float) -> None:
    kv = kv_of()
    found, rate = kivi(kv, num_bits)
    assert rate == bits
    # A range of about 4.1 deviations in 2^b - 1 steps, uniform error.
    step = 4.1 / ((1 << num_bits) - 1)
    assert error(found, kv) == pytest.approx(step**2 / 12, rel=0.15)


def test_a_short_group_of_kivi_has_its_own_scale() -> None:
    kv = kv_of(33)
    _, rate = kivi(kv, 4)
    # Keys have two groups of 33 tokens.
    assert rate == pytest.approx(4 + (32 * 2 / 33 + 32 / 32) / 2)


@pytest.mark.parametrize(("num_bits", "distortion"), [(4, 0.009497), (3, 0.03454)])
def test_turboquant_reaches_the_distortion_of_lloyd_and_max(
    num_bits: int, distortion: float
) -> None:
    kv = kv_of()
    found, rate = turboquant(kv, num_bits)
    assert rate == num_bits + 16 / 64
    assert error(found, kv) == pytest.approx(distortion, rel=0.05)


def test_the_levels_are_those_of_max() -> None:
    assert lloyd_max(2) == pytest.approx([-0.7979, 0.7979], abs=1e-4)
    assert lloyd_max(4) == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=1e-3)


def test_most_of_what_lmcache_stores_of_a_chunk_are_tables() -> None:
    kv = kv_of()
    found, rate = lmcache_cachegen(kv)
    tables = (33 * 16 + 32) / 256
    # Between 15 and 31 steps up to about 3.1 deviations.
    assert 2.3 + tables < rate < 4.6 + tables
    assert error(found[:, 0], kv[:, 0]) < error(found[2:, 1], kv[2:, 1])
    assert error(found[:, 0], kv[:, 0]) == pytest.approx((3.1 / 15) ** 2 / 12, rel=0.3)


def test_zeros_stay_zeros() -> None:
    zeros = np.zeros((1, 2, 3, 2, 64), np.float32)
    for found, _ in (kivi(zeros, 4), turboquant(zeros, 3), lmcache_cachegen(zeros)):
        assert not found.any()
