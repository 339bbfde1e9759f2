"""Eviction policies by name."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from kvd.daemon.eviction import registry
from kvd.daemon.eviction.lru import Lru
from kvd.errors import ConfigError


def installed(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    """Another package's entry points, as the installer would have put them."""
    found = EntryPoints(points)
    monkeypatch.setattr(registry, "entry_points", lambda **by: found.select(**by))


def test_our_own_policies_are_there() -> None:
    assert isinstance(registry.make_policy("lru"), Lru)


def test_a_policy_of_another_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", "kvd.daemon.eviction.lru:Lru", registry.GROUP)
    installed(monkeypatch, point)
    assert registry.policy_names() == ["lru", "theirs"]
    assert isinstance(registry.make_policy("theirs"), Lru)


def test_a_name_that_is_none_lists_those_that_are() -> None:
    with pytest.raises(ConfigError, match="'mru' does not exist here; there is: lru"):
        registry.make_policy("mru")


def test_a_broken_package_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, EntryPoint("broken", "kvd.nowhere:Policy", registry.GROUP))
    with pytest.raises(ConfigError, match="'broken' cannot be loaded"):
        registry.make_policy("broken")
