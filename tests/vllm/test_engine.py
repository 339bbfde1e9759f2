"""The engine alone, without a connector: what other tests compare with must itself be reliable."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.harness import Engine, EngineDied, prompt

NEW_TOKENS = 16
# float32, whole prompt against cached prefix, prompts of 40 to 3,000 tokens: 4e-6 at most was seen.
LOGPROB_ERROR_MAX = 1e-4


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("engine"), "qwen3") as engine:
        yield engine


def test_two_processes_say_the_same(engine: Engine, tmp_path: Path) -> None:
    requests = [{"prompt": prompt(seed, 600), "new_tokens": NEW_TOKENS} for seed in range(2)]
    engine.forget()
    ones = engine.generate(*requests)
    with Engine(tmp_path, "qwen3") as second:
        twos = second.generate(*requests)
    for one, two in zip(ones, twos, strict=True):
        assert len(set(one.tokens)) > NEW_TOKENS / 2, "a model that repeats itself proves nothing"
        assert one.logprob_error(two) <= LOGPROB_ERROR_MAX
    assert ones[0].tokens != ones[1].tokens


@pytest.mark.parametrize("num_tokens", [100, 600, 1500, 3000])
def test_a_prefix_hit_changes_nothing(engine: Engine, num_tokens: int) -> None:
    request = {"prompt": prompt(num_tokens, num_tokens), "new_tokens": NEW_TOKENS}
    engine.forget()
    (cold,), (warm,) = engine.generate(request), engine.generate(request)
    assert cold.cached_tokens == 0
    # Whole blocks, and never the last token.
    assert warm.cached_tokens == (num_tokens - 1) // 32 * 32
    assert cold.logprob_error(warm) <= LOGPROB_ERROR_MAX


def test_without_a_prefix_cache_the_answer_is_the_same(engine: Engine, tmp_path: Path) -> None:
    request = {"prompt": prompt(7, 600), "new_tokens": NEW_TOKENS}
    engine.forget()
    engine.generate(request)
    (warm,) = engine.generate(request)
    with Engine(tmp_path, "qwen3", enable_prefix_caching=False) as plain:
        plain.generate(request)
        (cold,) = plain.generate(request)
    assert warm.cached_tokens
    assert not cold.cached_tokens
    assert cold.logprob_error(warm) <= LOGPROB_ERROR_MAX


def test_a_salt_shares_no_prefix(engine: Engine) -> None:
    request = {"prompt": prompt(3, 200), "new_tokens": NEW_TOKENS}
    engine.forget()
    (plain,) = engine.generate(request)
    (salted,) = engine.generate({**request, "cache_salt": "pepper"})
    assert salted.cached_tokens == 0
    assert plain.logprob_error(salted) <= LOGPROB_ERROR_MAX


def test_requests_at_once_answer_as_alone(engine: Engine) -> None:
    requests = [{"prompt": prompt(seed, 70 + 9 * seed), "new_tokens": 8} for seed in range(16)]
    engine.forget()
    together = engine.generate(*requests)
    engine.forget()
    for request, shared in zip(requests, together, strict=True):
        (alone,) = engine.generate(request)
        assert alone.logprob_error(shared) <= LOGPROB_ERROR_MAX


def test_an_aborted_request_ends_and_others_go_on(engine: Engine) -> None:
    stopped = {"prompt": prompt(4, 100), "new_tokens": 200, "abort_after": 3}
    whole = {"prompt": prompt(5, 100), "new_tokens": NEW_TOKENS}
    first, second = engine.generate(stopped, whole)
    assert (first.finish, len(first.tokens)) == ("abort", 3)
    assert (second.finish, len(second.tokens)) == ("length", NEW_TOKENS)
    assert engine.settle()


def test_hybrid_layers_and_a_prefix_hit(tmp_path: Path) -> None:
    request = {"prompt": prompt(6, 600), "new_tokens": NEW_TOKENS}
    with Engine(tmp_path, "gemma3") as engine:
        (cold,), (warm,) = engine.generate(request), engine.generate(request)
    assert warm.cached_tokens == 576
    assert len(set(cold.tokens)) > NEW_TOKENS / 2
    assert cold.logprob_error(warm) <= LOGPROB_ERROR_MAX


@pytest.mark.vllm(since="0.29", why="no latent attention on a CPU, or in blocks of 16 alone")
def test_latent_attention_and_a_prefix_hit(tmp_path: Path) -> None:
    # The CPU's latent attention runs in bfloat16 alone, and computes a chunk after the first one
    # otherwise: chunks of a block make the cold run do as the warm one does.
    request = {"prompt": prompt(8, 600), "new_tokens": NEW_TOKENS}
    chunked = Engine(
        tmp_path, "deepseek", dtype="bfloat16", block_size=128, max_num_batched_tokens=128
    )
    with chunked as engine:
        (cold,), (warm,) = engine.generate(request), engine.generate(request)
    if warm.cached_tokens == 0:
        pytest.skip("without AMX the CPU's latent attention has no prefix cache")
    assert warm.cached_tokens == 512
    assert len(set(cold.tokens)) > NEW_TOKENS / 2
    assert cold.logprob_error(warm) <= LOGPROB_ERROR_MAX


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineDied, match="max_model_len"):
        Engine(tmp_path, "qwen3", max_model_len=1_000_000).__enter__()


def test_a_killed_engine_is_noticed_at_once(tmp_path: Path) -> None:
    with Engine(tmp_path, "qwen3") as engine:
        engine.process.kill()
        begun = time.monotonic()
        with pytest.raises(EngineDied):
            engine.generate({"prompt": prompt(9, 100)})
        assert time.monotonic() - begun < 10
        engine.process.wait()
