"""The package as a whole: what an import costs, and what the wheel holds."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kvd

HEAVY = ("torch", "transformers", "grpc", "numba", "vllm", "sglang", "nixl", "redis")


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys; print(chr(10).join({name.split('.')[0] for name in sys.modules}))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(output.stdout.split())


def test_importing_kvd_loads_nothing_heavy() -> None:
    loaded = modules_after("import kvd")
    assert not loaded & {*HEAVY, "numpy", "google", "rich", "uvloop"}


def test_the_help_loads_nothing_heavy() -> None:
    code = """
import sys
sys.argv = ["kvd", "--help"]
import io, contextlib
from kvd.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
"""
    assert not modules_after(code) & {*HEAVY, "numpy", "google", "uvloop", "rich"}


def test_a_local_client_loads_neither_torch_nor_grpc() -> None:
    assert not modules_after("import kvd; kvd.connect") & set(HEAVY)


@pytest.mark.parametrize("name", kvd.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(kvd, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = kvd.nonsense
