"""Images and embeddings are part of what KV is: two prompts with the same tokens are not one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.counts import Since, hit_tokens, num_pieces
from tests.vllm.daemon import Daemon
from tests.vllm.harness import Answer, Engine, Request, prompt
from tests.vllm.models import IMAGE, IMAGE_TOKENS, model_path
from tests.vllm.reference import assert_same

# The processor of images writes its part of a prompt by the tokenizer.
SEES: dict[str, Any] = {"skip_tokenizer_init": False}
ALONE: dict[str, Any] = {"enable_prefix_caching": False}
COLD = {"kv_transfer_params": {"kvd": {"load": False, "store": False}}}

NUM_BEFORE, NUM_BEHIND = 20, 500
NUM_TOKENS = NUM_BEFORE + IMAGE_TOKENS + NUM_BEHIND


def request_of(*images: int, seed: int = 900, num_before: int = NUM_BEFORE) -> Request:
    """Text, one image after the other, text."""
    text = prompt(seed, num_before), prompt(seed + 1, NUM_BEHIND)
    tokens = [*text[0], *[IMAGE] * len(images), *text[1]]
    return {"prompt": tokens, "new_tokens": 16, "images": images}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine without a connector, which caches nothing."""
    with Engine(tmp_path_factory.mktemp("plain"), "idefics3", **SEES, **ALONE) as plain:
        yield plain


@pytest.fixture(scope="module")
def stored(node: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """What an engine said of the first image; another process than those that load."""
    folder = tmp_path_factory.mktemp("first")
    with Engine(folder, "idefics3", **SEES, **node.transfer()) as first:
        return stores(node, first, request_of(1), num_pieces(NUM_TOKENS))


@pytest.fixture(scope="module")
def second(
    node: Daemon, stored: Answer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """A process that was started later."""
    folder = tmp_path_factory.mktemp("second")
    with Engine(folder, "idefics3", **SEES, **node.transfer()) as second:
        yield second


def stores(node: Daemon, engine: Engine, request: Request, num_chunks: int) -> Answer:
    """The answer to a request whose KV is so many new chunks."""
    answers: list[Answer] = []
    node.new_keys(lambda: answers.extend(engine.generate(request)), num_chunks)
    return answers[0]


def check(engine: Engine, request: Request, right: Answer, *, num_hit: int) -> None:
    """Assert that the engine finds so many tokens and says what is right."""
    since = Since(engine)
    (answer,) = engine.generate(request)
    assert_same(answer, right)
    found = since()
    assert answer.cached_tokens == found["hit_tokens"] == num_hit
    assert found["miss_absent"] == (not num_hit)


def test_a_new_process_loads_a_prompt_with_the_same_image(
    second: Engine, stored: Answer, plain: Engine
) -> None:
    (right,) = plain.generate(request_of(1))
    assert_same(stored, right)
    check(second, request_of(1), right, num_hit=hit_tokens(NUM_TOKENS))


def test_another_image_in_the_same_place_is_not_found(
    second: Engine, stored: Answer, plain: Engine
) -> None:
    (right,) = plain.generate(request_of(2))
    assert right.tokens != stored.tokens, "images that change nothing prove nothing"
    check(second, request_of(2), right, num_hit=0)


def test_text_before_an_image_is_found_and_no_more(
    node: Daemon, second: Engine, plain: Engine
) -> None:
    one, other = (request_of(image, seed=910, num_before=300) for image in (1, 2))
    stores(node, second, one, num_pieces(300 + IMAGE_TOKENS + NUM_BEHIND))
    second.forget()
    right = plain.generate(one, other)
    assert right[0].tokens != right[1].tokens
    check(second, other, right[1], num_hit=256)


def test_the_same_images_in_another_order_are_not_found(
    node: Daemon, second: Engine, plain: Engine
) -> None:
    one, other = request_of(3, 4, seed=920), request_of(4, 3, seed=920)
    stores(node, second, one, num_pieces(NUM_TOKENS + IMAGE_TOKENS))
    second.forget()
    right = plain.generate(one, other)
    assert right[0].tokens != right[1].tokens
    check(second, other, right[1], num_hit=0)
    second.forget()
    check(second, one, right[0], num_hit=hit_tokens(NUM_TOKENS + IMAGE_TOKENS))


OTHERS: dict[str, dict[str, Any]] = {
    "an option of the processor": {"mm_processor_kwargs": {"do_normalize": False}},
    "a vision tower": {"hf_overrides": {"vision_config": {"hidden_act": "relu"}}},
}


@pytest.mark.parametrize("what", OTHERS)
def test_an_engine_that_makes_something_else_of_an_image_finds_nothing(
    node: Daemon, stored: Answer, tmp_path: Path, what: str
) -> None:
    with Engine(tmp_path, "idefics3", **SEES, **OTHERS[what], **node.transfer()) as other:
        check_differs(other, stored)


def test_a_processor_that_was_changed_in_its_file_finds_nothing(
    node: Daemon, tmp_path: Path
) -> None:
    # In the same folder: vLLM's hash of an image has the model's path in it.
    model = tmp_path / model_path("idefics3").name
    shutil.copytree(model_path("idefics3"), model)
    with Engine(tmp_path, model, **SEES, **node.transfer()) as first:
        said = stores(node, first, request_of(1), num_pieces(NUM_TOKENS))
    file = model / "processor_config.json"
    told = json.loads(file.read_text())
    told["image_processor"]["image_mean"] = [0.0, 0.0, 0.0]
    file.write_text(json.dumps(told))
    with Engine(tmp_path, model, **SEES, **node.transfer()) as other:
        check_differs(other, said)


def check_differs(other: Engine, said: Answer) -> None:
    """Assert that the engine finds nothing of what was stored for the first image, for which it
    says something else. Its own it finds.
    """
    (right,) = other.generate(request_of(1) | COLD)
    assert right.tokens != said.tokens
    other.forget()
    check(other, request_of(1), right, num_hit=0)
    other.forget()
    check(other, request_of(1), right, num_hit=hit_tokens(NUM_TOKENS))


def test_an_image_is_known_without_a_cache_of_images(
    node: Daemon, stored: Answer, tmp_path: Path
) -> None:
    uncached = {"mm_processor_cache_gb": 0}
    with Engine(tmp_path, "idefics3", **SEES, **uncached, **node.transfer()) as other:
        check(other, request_of(1), stored, num_hit=hit_tokens(NUM_TOKENS))


def test_images_that_vllm_only_numbers_are_not_taken_for_each_other(
    node: Daemon, plain: Engine, tmp_path: Path
) -> None:
    # Each is the first of its process, and so has the same number.
    numbered = {"mm_processor_cache_gb": 0, **ALONE}
    for image in (5, 6):
        with Engine(tmp_path, "idefics3", **SEES, **numbered, **node.transfer()) as engine:
            (answer,) = engine.generate(request_of(image))
            assert_same(answer, plain.generate(request_of(image))[0])
            assert engine.settle()


def test_embeddings_are_found_by_themselves_alone(node: Daemon, tmp_path: Path) -> None:
    takes: dict[str, Any] = {"enable_prompt_embeds": True}
    one, other = (
        {"prompt": prompt(930, NUM_TOKENS), "new_tokens": 16, "embeds": seed} for seed in (1, 2)
    )
    with Engine(tmp_path, "qwen3", **takes, **ALONE) as plain:
        right = plain.generate(one, other)
    assert right[0].tokens != right[1].tokens
    with Engine(tmp_path, "qwen3", **takes, **node.transfer()) as first:
        assert_same(stores(node, first, one, num_pieces(NUM_TOKENS)), right[0])
    with Engine(tmp_path, "qwen3", **takes, **node.transfer()) as second:
        check(second, other, right[1], num_hit=0)
        check(second, one, right[0], num_hit=hit_tokens(NUM_TOKENS))
