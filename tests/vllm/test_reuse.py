"""What one engine stores, others load: the same tokens as if they had computed everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.counts import Since, counts, hit_tokens, num_pieces
from tests.vllm.daemon import Daemon
from tests.vllm.harness import ROOT, Answer, Engine, Request, prompt
from tests.vllm.models import model_path
from tests.vllm.reference import Reference, assert_same

NEW_TOKENS = 16
# Less than a block, than a chunk, more than one, and whole chunks with nothing behind them.
LENGTHS = (20, 40, 300, 512, 600, 1500)
# float32: 8 layers, K and V, 2 heads of 64.
TOKEN_SIZE = 8 * 2 * 2 * 64 * 4


def request_of(seed: int, num_tokens: int) -> Request:
    return {"prompt": prompt(seed, num_tokens), "new_tokens": NEW_TOKENS}


@pytest.fixture(scope="module")
def stored(node: Daemon, engine: Engine) -> list[Answer]:
    """The answers of the engine that stored prompts of all lengths."""
    before = node.status().num_chunks
    answers = [engine.generate(request_of(1000 + n, n))[0] for n in LENGTHS]
    node.until_stored(before + sum(map(num_pieces, LENGTHS)))
    return answers


@pytest.fixture(scope="module")
def second(
    node: Daemon, stored: list[Answer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """A process that was started later."""
    with Engine(tmp_path_factory.mktemp("second"), "qwen3", **node.transfer()) as second:
        yield second


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_a_new_process_loads_what_another_stored(
    second: Engine, stored: list[Answer], reference: Reference, num_tokens: int
) -> None:
    request, since = request_of(1000 + num_tokens, num_tokens), Since(second)
    (answer,) = second.generate(request)
    reference.check(request, answer)
    reference.check(request, stored[LENGTHS.index(num_tokens)])
    assert len(set(answer.tokens)) > NEW_TOKENS / 2, "a model that repeats itself proves nothing"
    found, loaded = since(), hit_tokens(num_tokens)
    assert answer.cached_tokens == found["hit_tokens"] == loaded
    assert found["loaded_bytes"] == loaded * TOKEN_SIZE
    assert found["hits"] == found["loads"] == (loaded > 0)
    assert found["miss_short"] == (loaded == 0)


def test_noise_in_place_of_what_was_stored_changes_the_answer(
    node: Daemon, engine: Engine, reference: Reference
) -> None:
    request = request_of(1, 600)
    keys = node.new_keys(lambda: engine.generate(request), num_pieces(600))
    engine.forget()
    node.overwrite(keys, lambda chunk: chunk.normal_())
    since = Since(engine)
    (answer,) = engine.generate(request)
    assert since()["hit_tokens"] == 576
    assert answer.tokens != reference(request).tokens


def test_a_shared_beginning_is_loaded(node: Daemon, engine: Engine, reference: Reference) -> None:
    node.new_keys(lambda: engine.generate(request_of(2, 600)), num_pieces(600))
    engine.forget()
    request = {"prompt": prompt(2, 400) + prompt(3, 300), "new_tokens": NEW_TOKENS}
    since = Since(engine)
    (answer,) = engine.generate(request)
    reference.check(request, answer)
    # Whole chunks: a tail is found by those alone who go on behind it.
    assert since()["hit_tokens"] == 256


def test_a_longer_prompt_goes_on_behind_the_end_of_a_shorter_one(
    node: Daemon, engine: Engine, reference: Reference
) -> None:
    node.new_keys(lambda: engine.generate(request_of(60, 600)), num_pieces(600))
    engine.forget()
    request, since = request_of(60, 900), Since(engine)
    (answer,) = engine.generate(request)
    reference.check(request, answer)
    assert since()["hit_tokens"] == 576


def test_a_load_goes_on_where_the_engines_own_cache_ends(
    node: Daemon, engine: Engine, reference: Reference
) -> None:
    node.new_keys(lambda: engine.generate(request_of(4, 1500)), num_pieces(1500))
    engine.forget()
    # 288 tokens are the engine's then, of which 256 are the first chunk.
    engine.generate(request_of(4, 300))
    request, since = request_of(4, 1500), Since(engine)
    (answer,) = engine.generate(request)
    reference.check(request, answer)
    assert since()["hit_tokens"] == 1472 - 288
    # What was not written then is still as it was.
    reference.check(request_of(4, 300), engine.generate(request_of(4, 300))[0])


def test_a_new_process_continues_a_conversation(
    node: Daemon, engine: Engine, second: Engine, reference: Reference
) -> None:
    opening = {"prompt": prompt(5, 300), "new_tokens": 300}
    # 256 and 288 tokens of the prompt, and 512 of all.
    said: list[Answer] = []
    node.new_keys(lambda: said.extend(engine.generate(opening)), 3)
    reference.check(opening, said[0])
    request = {
        "prompt": opening["prompt"] + said[0].tokens + prompt(6, 50),
        "new_tokens": NEW_TOKENS,
    }
    since = Since(second)
    (answer,) = second.generate(request)
    reference.check(request, answer)
    assert since()["hit_tokens"] == 512


def test_two_engines_share_a_daemon_at_the_same_time(
    node: Daemon, engine: Engine, second: Engine, reference: Reference
) -> None:
    requests = [
        {"prompt": prompt(7, 256) + prompt(10 + n, 40 * n), "new_tokens": NEW_TOKENS}
        for n in range(1, 9)
    ]
    engines = (engine, second)
    for each in engines:
        each.forget()

    def store() -> None:
        for each in engines:
            each.ask({"generate": requests})
        for each in engines:
            for request, answer in zip(requests, each.answers(), strict=True):
                reference.check(request, answer)

    # Each chunk was stored once, by whoever came first, and the first of them is all requests'.
    node.new_keys(store, 1 + sum(num_pieces(len(each["prompt"])) - 1 for each in requests))
    for each in engines:
        each.forget()
        since = Since(each)
        for request, answer in zip(requests, each.generate(*requests), strict=True):
            reference.check(request, answer)
        assert since()["hits"] == len(requests)
    node.until_idle()


def test_smollm2_and_real_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(model_path("smollm2") / "tokenizer.json"))
    text = words.encode((ROOT / "LICENSE").read_text()).ids[:1100]
    assert len(text) == 1100
    request = {"prompt": text, "new_tokens": NEW_TOKENS}
    with Daemon(tmp_path) as daemon:
        with Engine(tmp_path, "smollm2", **daemon.transfer()) as first:
            (cold,) = first.generate(request)
            daemon.until_stored(num_pieces(1100))
        with Engine(tmp_path, "smollm2", **daemon.transfer()) as second:
            (warm,) = second.generate(request)
            found = counts(second)
    assert found["hit_tokens"] == 1088
    assert_same(cold, warm)
