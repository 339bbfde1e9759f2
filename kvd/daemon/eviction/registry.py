"""Registry: eviction policies by name, our own and those of other packages."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from kvd.daemon.eviction.base import EvictionPolicy
from kvd.daemon.eviction.lru import Lru
from kvd.errors import ConfigError

# A package adds policies by entry points of this group: a name, and what makes a policy.
GROUP = "kvd.eviction"

_OWN: dict[str, Callable[[], EvictionPolicy]] = {"lru": Lru}


def policy_names() -> list[str]:
    """All policies that this installation has."""
    return sorted({*_OWN, *entry_points(group=GROUP).names})


def make_policy(name: str) -> EvictionPolicy:
    """A new policy. Raises `ConfigError` for a name that is none, or whose package is broken."""
    if name in _OWN:
        return _OWN[name]()
    found = entry_points(group=GROUP, name=name)
    if not found:
        raise ConfigError(
            f"eviction policy {name!r} does not exist here; there is: {', '.join(policy_names())} "
            f"(packages add more by the entry point group {GROUP})"
        )
    try:
        policy: EvictionPolicy = next(iter(found)).load()()
    except Exception as error:
        raise ConfigError(f"eviction policy {name!r} cannot be loaded: {error!r}") from error
    return policy
