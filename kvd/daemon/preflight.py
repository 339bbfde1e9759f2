"""Preflight: whether a config that is valid can be on this machine, before anything is touched."""

from __future__ import annotations

from pathlib import Path

from kvd.daemon import machine
from kvd.daemon.config import Config
from kvd.daemon.eviction.registry import make_policy
from kvd.errors import ConfigError
from kvd.sizes import format_size

TIERS = ("cpu", "nvme")


def check_machine(config: Config, root: Path = machine.ROOT) -> None:
    """Raise `ConfigError` for what cannot be on this machine: tiers, sizes, files, groups."""
    for name in config.tiers:
        if name not in TIERS:
            raise ConfigError(f"tier {name!r} does not exist here; there is: {', '.join(TIERS)}")
    if "cpu" not in config.tiers:
        raise ConfigError(
            "tier cpu is missing, where clients read and write: give tiers cpu,nvme; "
            f"found {','.join(config.tiers)}"
        )
    make_policy(config.eviction)
    _check_memory(config, root)
    for name in ("tls_cert", "tls_key", "tls_client_ca"):
        _check_readable(name, getattr(config, name))
    _check_readable("nvme_key_file", config.nvme_key_file)
    if config.log_file and not Path(config.log_file).absolute().parent.is_dir():
        raise ConfigError(f"log_file: {config.log_file} has no directory; make it first")
    if config.socket_group:
        _check_group(config.socket_group)


def _check_memory(config: Config, root: Path) -> None:
    memory = machine.read_memory(root)
    reserved = machine.read_huge_pages(root).num_free * (2 << 20)
    # Explicit huge pages come from a pool of their own, which a memory cgroup does not count.
    is_pooled = config.huge_pages == "require" or (
        config.huge_pages == "auto" and reserved >= config.cpu_size
    )
    usable = memory.total if is_pooled else memory.usable
    if usable and config.cpu_size > usable:
        whose = "this machine has" if usable == memory.total else "its cgroup allows this process"
        raise ConfigError(
            f"cpu_size is {format_size(config.cpu_size)}, but {whose} {format_size(usable)} of "
            "memory; `kvd doctor` suggests a size"
        )


def _check_readable(name: str, path: str) -> None:
    if not path:
        return
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise ConfigError(f"{name}: {path}: {error.strerror}") from None


def _check_group(name: str) -> None:
    import grp

    try:
        grp.getgrnam(name)
    except KeyError:
        raise ConfigError(f"socket_group: there is no group {name!r} on this machine") from None
