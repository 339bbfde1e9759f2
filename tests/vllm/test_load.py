"""Many requests at once, few blocks, blocks of several sizes: the right tokens still."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.counts import Since, hit_tokens, num_pieces
from tests.vllm.daemon import Daemon
from tests.vllm.harness import Answer, Engine, Request, prompt
from tests.vllm.holds import SETTING, held
from tests.vllm.reference import Reference

NUM_REQUESTS = 32

# Four beginnings, each with eight ends; every eighth request is shorter than a chunk, every
# sixteenth than a block.
REQUESTS: list[Request] = [
    {
        "prompt": prompt(300 + n % 4, 256 if n % 8 else 10) + prompt(310 + n, (n * 37) % 200 + 4),
        "new_tokens": 24,
    }
    for n in range(NUM_REQUESTS)
]

# All of them at once would want some 350 blocks.
FEW_BLOCKS = {
    "num_gpu_blocks_override": 50,
    "max_num_batched_tokens": 96,
    "max_num_seqs": NUM_REQUESTS,
    "max_model_len": 1024,
}


@pytest.fixture(scope="module")
def crowded(node: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine that preempts, and computes prompts a few tokens at a time."""
    folder = tmp_path_factory.mktemp("crowded")
    transfer = node.transfer(salt="crowded")
    transfer["kv_transfer_config"]["kv_load_failure_policy"] = "recompute"
    settings = {SETTING: str(folder)}
    with Engine(folder, "qwen3", settings=settings, **FEW_BLOCKS, **transfer) as engine:
        yield engine


def num_preemptions(engine: Engine) -> float:
    return sum(engine.metrics("vllm:num_preemptions_total").values())


def test_32_requests_and_few_blocks(node: Daemon, crowded: Engine, reference: Reference) -> None:
    since = Since(crowded)
    # The first time they are stored, the second they are loaded; loaded blocks are few as well.
    for is_stored in (False, True):
        crowded.forget()
        before = num_preemptions(crowded)
        answers = crowded.generate(*REQUESTS)
        for request, answer in zip(REQUESTS, answers, strict=True):
            reference.check(request, answer)
        assert num_preemptions(crowded) > before
        if is_stored:
            assert since()["hits"] > NUM_REQUESTS / 2
    node.until_idle()


def test_what_was_preempted_was_stored_right(
    node: Daemon, crowded: Engine, reference: Reference
) -> None:
    crowded.generate(*REQUESTS)
    node.until_idle()
    for request in REQUESTS[1:8]:
        crowded.forget()
        since = Since(crowded)
        (answer,) = crowded.generate(request)
        reference.check(request, answer)
        assert since()["hit_tokens"] >= 256


def test_what_is_computed_after_a_preemption_is_stored_right(
    node: Daemon, crowded: Engine, reference: Reference
) -> None:
    requests = [{"prompt": prompt(370 + n, 400), "new_tokens": 150} for n in range(4)]
    before = num_preemptions(crowded)
    answers: list[Answer] = []
    crowded.forget()
    # For each 256 and 384 tokens of the prompt, and 512 of all.
    node.new_keys(lambda: answers.extend(crowded.generate(*requests)), 3 * len(requests))
    assert num_preemptions(crowded) > before
    for request, answer in zip(requests, answers, strict=True):
        reference.check(request, answer)
        longer = {"prompt": request["prompt"] + answer.tokens, "new_tokens": 8}
        crowded.forget()
        since = Since(crowded)
        reference.check(longer, *crowded.generate(longer))
        assert since()["hit_tokens"] == 512


def test_aborts_among_others(node: Daemon, crowded: Engine, reference: Reference) -> None:
    crowded.forget()
    mixed = [
        {**request, "abort_at": 2 + n} if n % 3 == 0 else request
        for n, request in enumerate(REQUESTS)
    ]
    for request, answer in zip(mixed, crowded.generate(*mixed), strict=True):
        if "abort_at" in request:
            assert answer.finish == "abort"
        else:
            reference.check(request, answer)
    assert crowded.settle()
    # This fails while any block is in use.
    crowded.forget()
    node.until_idle()


def test_a_save_gives_up_blocks_that_are_written_anew(
    node: Daemon, crowded: Engine, reference: Reference
) -> None:
    request = {"prompt": prompt(360, 600), "new_tokens": 8}
    crowded.forget()
    with held(crowded.log.parent, "reserve") as hold:
        reference.check(request, *crowded.generate(request))
        hold.until_reached()
        # Two of them need more blocks than there are.
        since = Since(crowded)
        for seed in (361, 362):
            last = {"kv_transfer_params": {"kvd": {"category": f"{seed}"}}}
            other = {"prompt": prompt(seed, 900), "new_tokens": 8} | last
            reference.check(other, *crowded.generate(other))
    # Saves are made in order: with the last there, the first has come to its end.
    node.until(
        lambda: [chunk.category for chunk in node.chunks()].count("362") == num_pieces(900),
        "the last save was not made",
    )
    # What was stored in spite of it would be others' KV.
    crowded.forget()
    reference.check(request, *crowded.generate(request))
    assert since()["saves_given_up"] >= 1


@pytest.mark.parametrize("block_size", [64, 128])
def test_blocks_of_other_sizes(
    node: Daemon, reference: Reference, tmp_path: Path, block_size: int
) -> None:
    lengths = (block_size - 1, block_size, 250, 600, 900)
    requests = [{"prompt": prompt(350 + n, n), "new_tokens": 4} for n in lengths]
    transfer = node.transfer(salt=f"blocks of {block_size}")
    with Engine(tmp_path, "qwen3", block_size=block_size, **transfer) as engine:
        pieces = sum(num_pieces(n, block_size=block_size) for n in lengths)
        node.new_keys(lambda: engine.generate(*requests), pieces)
        for request, length in zip(requests, lengths, strict=True):
            engine.forget()
            since = Since(engine)
            (answer,) = engine.generate(request)
            reference.check(request, answer)
            assert since()["hit_tokens"] == hit_tokens(length, block_size=block_size)
