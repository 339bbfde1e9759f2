"""Tests with real vLLM engines: `environment.py` makes what they run in.

Where vLLM is not installed there is nothing to collect; `make test` runs in such a place. An engine
takes 20 s to start, so those that several tests can use are started once: tests tell their prompts
apart by seeds of their own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.vllm.daemon import Daemon
    from tests.vllm.harness import Engine
    from tests.vllm.reference import Reference

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


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
