"""Tests with real vLLM engines: `environment.py` makes what they run in.

Where vLLM is not installed there is nothing to collect; `make test` runs in such a place. An engine
takes 20 s to start, so those that several tests can use are started once: tests tell their prompts
apart by seeds of their own.

The same tests run with the oldest vLLM that is supported. What is not so in all versions says in
which: `@pytest.mark.vllm(since="0.30", why="...")`, or `before`; `FILES` says it of whole files.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.vllm.daemon import Daemon
    from tests.vllm.harness import Engine
    from tests.vllm.reference import Reference

HAS_VLLM = importlib.util.find_spec("vllm") is not None

collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]

# What of these files cannot even be imported otherwise.
_TIERS = {"since": "0.29", "why": "an older one does not tell its tiers how KV lies in a row"}
FILES = {
    "test_offloading_engine.py": _TIERS,
    "test_offloading_faults.py": _TIERS,
    "test_offloading_identity.py": _TIERS,
    "test_offloading_tier.py": _TIERS,
}


def pytest_configure(config: pytest.Config) -> None:
    line = "vllm(since=, before=, why=): skipped with other versions of vLLM"
    config.addinivalue_line("markers", line)


def pytest_report_header() -> str | None:
    return f"vLLM {vllm_version()}" if HAS_VLLM else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("vllm"):
        skip_unless(**mark.kwargs)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> object:
    return Module.from_parent(parent, path=module_path) if module_path.name in FILES else None


class Module(pytest.Module):
    """A file of `FILES`."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        skip_unless(**FILES[self.path.name])
        return super().collect()


def skip_unless(*, why: str, since: str = "0.0", before: str = "999.0") -> None:
    """Skip a test, or a file that is collected, unless vLLM is one of these versions."""
    version = vllm_version()
    if numbers(version) < numbers(since):
        pytest.skip(f"vLLM {version} is before {since}: {why}", allow_module_level=True)
    if numbers(version) >= numbers(before):
        pytest.skip(f"vLLM {version} is not before {before}: {why}", allow_module_level=True)


def vllm_version() -> str:
    # Type checkers would take the package for this folder.
    version: str = importlib.import_module("vllm").__version__
    return version


def numbers(version: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in version.split(".")[:2])


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    """What an engine says that has no connector and caches nothing."""
    from tests.vllm.harness import Engine
    from tests.vllm.reference import Reference

    folder = tmp_path_factory.mktemp("reference")
    with Engine(folder, "qwen3", enable_prefix_caching=False) as engine:
        yield Reference(engine)


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that no test kills."""
    from tests.vllm.daemon import Daemon

    with Daemon(tmp_path_factory.mktemp("node"), size="1GiB") as daemon:
        yield daemon


@pytest.fixture(scope="session")
def engine(node: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with that daemon, and all defaults."""
    from tests.vllm.harness import Engine

    folder = tmp_path_factory.mktemp("engine")
    with Engine(folder, "qwen3", **node.transfer()) as engine:
        yield engine
