"""Whose KV is whose: nothing is loaded that another prompt, model, tenant or format has stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vllm.counts import CHUNK_TOKENS, Since, num_pieces
from tests.vllm.daemon import Daemon
from tests.vllm.harness import Answer, Engine, Request, prompt
from tests.vllm.models import model_path
from tests.vllm.reference import Reference, assert_same

NUM_TOKENS = 600
NUM_PIECES = num_pieces(NUM_TOKENS)
NUM_HIT = 576
REQUEST: Request = {"prompt": prompt(400, NUM_TOKENS), "new_tokens": 16}
COLD = {"kv_transfer_params": {"kvd": {"load": False, "store": False}}}


@pytest.fixture(scope="module")
def stored(node: Daemon, engine: Engine) -> Answer:
    """What the engine said whose KV others must not find."""
    answers: list[Answer] = []
    node.new_keys(lambda: answers.extend(engine.generate(REQUEST)), NUM_PIECES)
    # It is there to be found.
    engine.forget()
    since = Since(engine)
    engine.generate(REQUEST)
    assert since()["hit_tokens"] == NUM_HIT
    return answers[0]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Two LoRA adapters that differ: (name, folder)."""
    folders = [tmp_path_factory.mktemp("adapter") for _ in range(2)]
    for seed, folder in enumerate(folders):
        _write_adapter(folder, seed)
    return [(f"adapter-{seed}", str(folder)) for seed, folder in enumerate(folders)]


@pytest.fixture(scope="module")
def adapted(node: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine that takes adapters."""
    folder = tmp_path_factory.mktemp("adapted")
    lora = {"enable_lora": True, "max_lora_rank": 8}
    with Engine(folder, "qwen3", **lora, **node.transfer()) as engine:
        yield engine


def hits_of(engine: Engine, request: Request) -> int:
    """Tokens of a request that come from the daemon; its answer must be the computed one."""
    engine.forget()
    (cold,) = engine.generate(request | COLD)
    engine.forget()
    since = Since(engine)
    (answer,) = engine.generate(request)
    assert_same(answer, cold)
    found = since()
    assert found["miss_absent"] == (not found["hit_tokens"])
    return found["hit_tokens"]


def stores(node: Daemon, num_chunks: int, engine: Engine, request: Request) -> int:
    """`hits_of`, of a request that stores so many chunks."""
    found: list[int] = []
    node.new_keys(lambda: found.append(hits_of(engine, request)), num_chunks)
    return found[0]


def _other_weights(folder: Path) -> dict[str, Any]:
    # Everything has the same name, shape and size; one matrix of one layer is other numbers.
    copy = folder / model_path("qwen3").name
    shutil.copytree(model_path("qwen3"), copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.3.self_attn.v_proj.weight"].mul_(1.5)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return {"model": copy}


OTHERS = {
    "weights": (_other_weights, {}),
    "dtype": (lambda _: {"dtype": "bfloat16"}, {}),
    "revision": (lambda _: {}, {"revision": "another"}),
    "salt": (lambda _: {}, {"salt": "tenant"}),
    "chunks": (lambda _: {}, {"chunk_tokens": 128}),
    "hashes": (lambda _: {"prefix_caching_hash_algo": "sha256_cbor"}, {}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_an_engine_that_differs_finds_nothing(
    node: Daemon, stored: Answer, tmp_path: Path, what: str
) -> None:
    change, options = OTHERS[what]
    arguments = change(tmp_path)
    model = arguments.pop("model", "qwen3")
    with Engine(tmp_path, model, **arguments, **node.transfer(**options)) as other:
        pieces = num_pieces(NUM_TOKENS, chunk_tokens=options.get("chunk_tokens", CHUNK_TOKENS))
        assert stores(node, pieces, other, REQUEST) == 0
        # Its own it does find.
        assert hits_of(other, REQUEST) == NUM_HIT


def test_a_cache_salt_is_found_by_itself_alone(
    node: Daemon, engine: Engine, stored: Answer, reference: Reference
) -> None:
    for salt in ("pepper", "sugar"):
        salted = {**REQUEST, "cache_salt": salt}
        assert stores(node, NUM_PIECES, engine, salted) == 0
        assert hits_of(engine, salted) == NUM_HIT
        reference.check(REQUEST, stored)


def test_an_adapter_is_found_by_itself_alone(
    node: Daemon, adapted: Engine, stored: Answer, adapters: list[tuple[str, str]]
) -> None:
    said = []
    for adapter in adapters:
        request = {**REQUEST, "lora": adapter}
        assert stores(node, NUM_PIECES, adapted, request) == 0
        assert hits_of(adapted, request) == NUM_HIT
        said.append(adapted.generate(request)[0].tokens)
    assert len({*map(tuple, said), tuple(stored.tokens)}) == 3, "adapters that change nothing"


def _write_adapter(folder: Path, seed: int) -> None:
    """A LoRA adapter of rank 8 for keys and values, of random numbers."""
    model = json.loads((model_path("qwen3") / "config.json").read_text())
    size, out = model["hidden_size"], model["num_key_value_heads"] * model["head_dim"]
    chance = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(model["num_hidden_layers"]):
        for name in ("k_proj", "v_proj"):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(8, size, generator=chance) * 0.1
            tensors[f"{place}.lora_B.weight"] = torch.randn(out, 8, generator=chance) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["k_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
