"""Eviction: the policy's order, and the window that no order can find."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.daemon.eviction.lru import Lru
from kvd.daemon.eviction.window import Run, cheapest_window
from tests.contracts.eviction import EvictionPolicyContract, meta


class TestLru(EvictionPolicyContract):
    @pytest.fixture
    def policy(self) -> Lru:
        return Lru()

    def test_the_least_recently_used_goes_first(self, policy: Lru) -> None:
        metas = [meta(index) for index in range(200)]
        for at, value in enumerate(metas):
            policy.insert(value, at)
        policy.touch(metas[0].key, 300)
        expected = [value.key for value in [*metas[1:], metas[0]]]
        assert list(policy.victims()) == expected


@st.composite
def tilings(draw: st.DrawFn) -> list[tuple[int, str]]:
    kinds = st.sampled_from(["free", "used", "pinned"])
    return draw(st.lists(st.tuples(st.integers(1, 5), kinds), max_size=9))


@given(tilings(), st.integers(1, 12))
def test_the_window_is_the_cheapest_of_all(tiling: list[tuple[int, str]], size: int) -> None:
    runs, at = [], 0
    for index, (length, kind) in enumerate(tiling):
        if kind != "pinned":
            runs.append(Run(at, length, index if kind == "used" else None))
        at += length
    costs = []
    for first, last in combinations(range(len(tiling) + 1), 2):
        part = tiling[first:last]
        if all(kind != "pinned" for _, kind in part) and sum(length for length, _ in part) >= size:
            costs.append(sum(length for length, kind in part if kind == "used"))
    found = cheapest_window(reversed(runs), size)
    if not costs:
        assert found is None
    else:
        assert found is not None
        assert sum(tiling[label][0] for label in found) == min(costs)  # type: ignore[index]
