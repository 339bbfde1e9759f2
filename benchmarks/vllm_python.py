"""The Python that has vLLM: a benchmark starts again with it before it imports anything else, so
that any Python will do to begin with.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv-vllm" / "bin" / "python"


def run_with_vllm() -> None:
    """Start this program again with the Python that `--lmcache` names, or else with that of `make
    test-vllm`, unless it runs with it, or with another that has vLLM.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--lmcache", type=Path)
    chosen = parser.parse_known_args()[0].lmcache
    if chosen is None and importlib.util.find_spec("vllm"):
        return
    python = Path(chosen or ENVIRONMENT).absolute()
    if not python.exists():
        raise SystemExit(f"no {python}: `make test-vllm` makes {ENVIRONMENT}, which has vLLM")
    if python != Path(sys.executable):
        os.execv(python, [str(python), *sys.argv])
