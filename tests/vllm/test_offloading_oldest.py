"""The second door of a vLLM that is too old for it."""

from __future__ import annotations

import importlib

import pytest

from tests.vllm.conftest import vllm_version


@pytest.mark.vllm(before="0.29", why="from then on there is a second door")
def test_a_vllm_that_is_too_old_is_told_so() -> None:
    wanted = f"needs vLLM 0.29 or later, found {vllm_version()}: use KvdConnector"
    with pytest.raises(ImportError, match=wanted):
        importlib.import_module("kvd.client.connectors.vllm_offloading")
