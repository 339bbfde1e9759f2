"""KV in more than one part: ranks, groups with a window, and the one plane of latent attention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.counts import Since, counts, hit_tokens, num_pieces
from tests.vllm.daemon import Daemon
from tests.vllm.harness import Answer, Engine, Request, prompt
from tests.vllm.reference import Reference, assert_same

NEW_TOKENS = 16
# A window has 128 tokens.
LENGTHS = (40, 100, 140, 300, 512, 600, 1500)
SEVERAL_GROUPS = {"since": "0.30", "why": "a failed load of several groups cannot be told"}
TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def request_of(seed: int, num_tokens: int, new_tokens: int = NEW_TOKENS) -> Request:
    return {"prompt": prompt(seed, num_tokens), "new_tokens": new_tokens}


def test_two_ranks_load_what_two_ranks_stored(
    node: Daemon, engine: Engine, reference: Reference, tmp_path: Path
) -> None:
    requests = [request_of(500 + n, n) for n in (100, 600)]
    pieces = num_pieces(100) + num_pieces(600)
    node.new_keys(lambda: engine.generate(*requests), pieces)
    with Engine(tmp_path, "qwen3", **TWO_RANKS, **node.transfer()) as two:
        # Each rank has half of the heads: what one rank alone stored is nothing to them.
        node.new_keys(lambda: _check(two, reference, requests), 2 * pieces)
        assert counts(two)["hits"] == 0
        two.forget()
        _check(two, reference, requests)
        found = counts(two)
        assert found["hit_tokens"] == hit_tokens(100) + hit_tokens(600)
        # Each rank has loaded once.
        assert found["loads"] == 2 * found["hits"] == 4
        # What one rank lacks, the other has in vain.
        ranks = node.layouts()
        with node.connect() as client:
            client.clear(layout=next(key for key, each in ranks.items() if each.rank == 1))
        two.forget()
        _check(two, reference, requests)
        assert counts(two)["hits"] == found["hits"]
    node.until_idle()


def _check(engine: Engine, reference: Reference, requests: list[Request]) -> None:
    for request, answer in zip(requests, engine.generate(*requests), strict=True):
        reference.check(request, answer)


# Layers with a window and layers without.


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Answer], Daemon]]:
    """What an engine said that stored prompts of all lengths, and a conversation."""
    folder = tmp_path_factory.mktemp("hybrid")
    with Daemon(folder) as daemon:
        with Engine(folder, "gemma3", **daemon.transfer()) as first:
            answers = [first.generate(request_of(620 + n, n))[0] for n in LENGTHS]
            answers += first.generate(request_of(600, 300, new_tokens=400))
            first.stop()
        yield answers, daemon


@pytest.fixture(scope="module")
def gemma(
    hybrid: tuple[list[Answer], Daemon], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """A new process, which has nothing itself."""
    transfer = hybrid[1].transfer()
    with Engine(tmp_path_factory.mktemp("gemma"), "gemma3", **transfer) as engine:
        yield engine


@pytest.mark.vllm(**SEVERAL_GROUPS)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_groups_load_what_they_need(
    hybrid: tuple[list[Answer], Daemon], gemma: Engine, num_tokens: int
) -> None:
    since = Since(gemma)
    (answer,) = gemma.generate(request_of(620 + num_tokens, num_tokens))
    assert_same(answer, hybrid[0][LENGTHS.index(num_tokens)])
    assert since()["hit_tokens"] == hit_tokens(num_tokens)


@pytest.mark.vllm(**SEVERAL_GROUPS)
def test_groups_continue_far_beyond_the_window(
    hybrid: tuple[list[Answer], Daemon], gemma: Engine
) -> None:
    said = hybrid[0][-1]
    assert len(set(said.tokens)) > NEW_TOKENS, "a model that repeats itself proves nothing"
    tokens = prompt(600, 300) + said.tokens + prompt(7, 50)
    request: Request = {"prompt": tokens, "new_tokens": NEW_TOKENS}
    since = Since(gemma)
    (warm,) = gemma.generate(request)
    # 699 tokens were computed there.
    assert since()["hit_tokens"] == 512
    gemma.forget()
    (cold,) = gemma.generate(request | {"kv_transfer_params": {"kvd": {"load": False}}})
    assert_same(warm, cold)


@pytest.mark.vllm(**SEVERAL_GROUPS)
def test_a_window_that_is_gone_is_no_hit(
    hybrid: tuple[list[Answer], Daemon], gemma: Engine
) -> None:
    daemon = hybrid[1]
    request = request_of(8, 600)
    gemma.forget()
    said: list[Answer] = []
    daemon.new_keys(lambda: said.extend(gemma.generate(request)), 3 * num_pieces(600))
    with daemon.connect() as client:
        windows = [key for key, each in daemon.layouts().items() if " window " in each.group]
        assert len(windows) == 2
        client.clear(layout=windows[0])
    gemma.forget()
    since = Since(gemma)
    (answer,) = gemma.generate(request)
    assert_same(answer, said[0])
    assert since()["hits"] == 0
    daemon.until_idle()


@pytest.mark.vllm(since="0.29", why="no latent attention on a CPU, or in blocks of 16 alone")
def test_latent_attention_loads_what_the_engines_own_cache_would_have(tmp_path: Path) -> None:
    # Chunks of a block: see `test_engine.py`.
    chunked = {"dtype": "bfloat16", "block_size": 128, "max_num_batched_tokens": 128}
    request = request_of(9, 600)
    with Daemon(tmp_path) as daemon:
        with Engine(tmp_path, "deepseek", **chunked, **daemon.transfer()) as first:
            (cold,), (own,) = first.generate(request), first.generate(request)
            if own.cached_tokens == 0:
                pytest.skip("without AMX the CPU's latent attention has no prefix cache")
            daemon.until_stored(num_pieces(600, block_size=128))
            stored = counts(first)
        with Engine(tmp_path, "deepseek", **chunked, **daemon.transfer()) as second:
            (warm,) = second.generate(request)
            loaded = counts(second)
    assert len(set(cold.tokens)) > NEW_TOKENS / 2
    # 512 tokens are whole blocks, as in the engine's own cache.
    assert warm.cached_tokens == own.cached_tokens == loaded["hit_tokens"] == 512
    assert_same(warm, own)
    # One plane of 576 numbers, 3 layers, bfloat16.
    assert loaded["loaded_bytes"] == stored["stored_bytes"] == 512 * 576 * 3 * 2
