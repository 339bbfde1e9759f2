"""The second door with engines: native offloading, its host memory, and kvd below."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvd.keys import ChunkKey
from tests.vllm.daemon import Daemon
from tests.vllm.harness import Answer, Engine, Request, prompt
from tests.vllm.offloading_tier import TIER
from tests.vllm.reference import Reference, assert_same

# A row of an engine: 8 layers, K and V, 2 heads of 64, 32 tokens of float32.
ROW_SIZE = 8 * 2 * 2 * 64 * 32 * 4
NEW_TOKENS = 16
NUM_TOKENS = 600
# Whole blocks.
PROMPT_ROWS = NUM_TOKENS // 32


def offloading(daemon: Daemon, *, size: int = 64 << 20) -> dict[str, Any]:
    """The engine's argument for native offloading into so many bytes, and from there to kvd."""
    config = {
        "kv_connector": "KvdOffloadingConnector",
        "kv_connector_module_path": TIER["module_path"],
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuSpec",
            "spec_module_path": "tests.vllm.offloading_spec",
            "cpu_bytes_to_use": size,
            "secondary_tiers": [{**TIER, "socket": str(daemon.socket)}],
        },
    }
    return {"kv_transfer_config": config}


def request_of(seed: int) -> Request:
    return {"prompt": prompt(seed, NUM_TOKENS), "new_tokens": NEW_TOKENS}


def moved(engine: Engine, way: str) -> int:
    """Rows that vLLM counted between its primary tier and kvd, `read` or `write`."""
    assert engine.settle()
    found = engine.metrics(f"vllm:kv_offload_tiering_{way}_bytes_total")
    return round(sum(found.values()) / ROW_SIZE)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One that engines of this file share, and that the last test kills."""
    with Daemon(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def stored(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """The answers of an engine that stored three prompts in kvd, and is gone."""
    with Engine(tmp_path_factory.mktemp("first"), "qwen3", **offloading(daemon)) as first:
        answers = [first.generate(request_of(seed))[0] for seed in range(3)]
        assert moved(first, "write") == 3 * PROMPT_ROWS
        assert moved(first, "read") == 0
        first.stop()
    daemon.until_stored(3 * PROMPT_ROWS)
    return answers


@pytest.fixture(scope="module")
def second(
    daemon: Daemon, stored: list[Answer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """A later engine, whose primary tier has room for one prompt and a little more."""
    folder = tmp_path_factory.mktemp("second")
    size = (PROMPT_ROWS + 4) * ROW_SIZE
    with Engine(folder, "qwen3", **offloading(daemon, size=size)) as second:
        yield second


def test_a_new_engine_loads_what_another_stored(
    second: Engine, stored: list[Answer], daemon: Daemon, reference: Reference
) -> None:
    request, before = request_of(0), moved(second, "read")
    (answer,) = second.generate(request)
    assert moved(second, "read") == before + PROMPT_ROWS
    assert answer.cached_tokens == PROMPT_ROWS * 32
    reference.check(request, answer)
    assert_same(stored[0], answer)
    assert len(set(answer.tokens)) > NEW_TOKENS / 2, "a model that repeats itself proves nothing"
    (layout,) = daemon.layouts().values()
    assert layout.revision, "the connector knows the weights"
    daemon.until_idle()


def test_what_left_host_memory_comes_back(second: Engine, reference: Reference) -> None:
    # Two prompts drive one out of the primary tier, whichever rows vLLM drops first.
    for seed in (20, 21, 22):
        second.generate(request_of(seed))
        assert second.settle()
    second.forget()
    before = moved(second, "read")
    (answer,) = second.generate(request_of(20))
    assert moved(second, "read") == before + PROMPT_ROWS
    assert answer.cached_tokens == PROMPT_ROWS * 32
    reference.check(request_of(20), answer)


def test_the_loaded_kv_is_what_the_answer_comes_from(
    second: Engine, stored: list[Answer], daemon: Daemon
) -> None:
    keys = [ChunkKey(chunk.key) for chunk in daemon.chunks()]
    daemon.overwrite(keys, lambda tensor: tensor.zero_())
    (answer,) = second.generate(request_of(1))
    assert answer.tokens != stored[1].tokens


def test_with_the_daemon_killed_answers_are_right_and_in_time(
    second: Engine, daemon: Daemon, reference: Reference
) -> None:
    # Rows of before are noise, in kvd and in the primary tier: these prompts are new.
    requests = [request_of(seed) for seed in (30, 31, 32)]
    for request in requests:
        reference(request)
    second.ask({"generate": requests})
    daemon.kill()
    begun = time.monotonic()
    answers = second.answers()
    answers += second.generate(request_of(33), request_of(2))
    assert time.monotonic() - begun < 30
    for request, answer in zip([*requests, request_of(33), request_of(2)], answers, strict=True):
        reference.check(request, answer)
    assert second.settle()
    daemon.start()
    before = daemon.status().num_chunks
    second.generate(request_of(34))
    daemon.until_stored(before + PROMPT_ROWS)
    second.stop()
