"""What makes two engines' KV the same, or not, and what of a group's KV is of use later."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvd.client.connectors.vllm_identity import Engine, Group, adapter_of, engine_of
from kvd.client.connectors.vllm_options import Options, parse_options, request_options
from kvd.client.connectors.weights import SAMPLE_SIZE, digest_of
from kvd.errors import ConfigError, Unsupported
from tests.vllm_fakes import FullAttentionSpec, HfConfig, Model, kv_cache_config, vllm_config

HYBRID = Model(windows=(6, 0), num_kv_heads=1)

Change = Callable[[Any, Any], None]


def engine(
    change: Change | None = None, *, model: Model = HYBRID, options: Options | None = None
) -> Engine:
    config, caches = vllm_config(model), kv_cache_config(model)
    if change is not None:
        change(config, caches)
    return engine_of(config, caches, options or Options())


def fingerprints(found: Engine) -> list[bytes]:
    return [layout.fingerprint for group in found.groups for layout in group.layouts]


def put(path: str, value: Any) -> Change:
    """Sets one field of `VllmConfig`."""

    def change(config: Any, _: Any) -> None:
        *parents, name = path.split(".")
        for each in parents:
            config = getattr(config, each)
        setattr(config, name, value)

    return change


def put_spec(name: str, value: Any, *, group: int = 1) -> Change:
    """Sets one field of a group's spec."""

    def change(_: Any, caches: Any) -> None:
        setattr(caches.kv_cache_groups[group].kv_cache_spec, name, value)

    return change


def rename_layers(_: Any, caches: Any) -> None:
    for group in caches.kv_cache_groups:
        group.layer_names = [f"draft.{name}" for name in group.layer_names]


def drop_layer(_: Any, caches: Any) -> None:
    for group in caches.kv_cache_groups:
        group.layer_names.pop()


@pytest.mark.parametrize(
    "change",
    [
        put("model_config.model", "/models/other"),
        put("model_config.seed", 1),
        put("model_config.dtype", "torch.bfloat16"),
        put("model_config.quantization", "fp8"),
        put("model_config.hf_text_config.hidden_size", 32),
        put("model_config.hf_text_config.rope_theta", 5e5),
        put("model_config.hf_text_config.rope_scaling", {"type": "yarn", "factor": 4.0}),
        put("model_config.hf_text_config.partial_rotary_factor", 0.5),
        put("cache_config.cache_dtype", "fp8"),
        put("parallel_config.tensor_parallel_size", 2),
        rename_layers,
        drop_layer,
    ],
    ids=str,
)
def test_what_changes_all_kv_changes_every_fingerprint(change: Change) -> None:
    assert not set(fingerprints(engine(change))) & set(fingerprints(engine()))


def put_images(path: str | None = None, value: Any = None) -> Change:
    """Makes the model multimodal, and sets one field of it."""

    def change(config: Any, caches: Any) -> None:
        vision = {"hidden_act": "gelu", "transformers_version": "5.0"}
        text = config.model_config.hf_text_config
        config.model_config.hf_config = HfConfig(text_config=text.to_dict(), vision_config=vision)
        config.model_config.multimodal_config = SimpleNamespace(
            mm_processor_kwargs=None, mm_processor_cache_gb=4.0, enable_mm_embeds=False
        )
        config.cache_config.enable_prefix_caching = True
        if path is not None:
            put(path, value)(config, caches)

    return change


@pytest.mark.parametrize(
    "change",
    [
        put_images("model_config.multimodal_config.mm_processor_kwargs", {"do_normalize": False}),
        put_images("model_config.multimodal_config.an_option_of_tomorrow", 1),
        put_images("model_config.hf_config.vision_config", {"hidden_act": "relu"}),
    ],
    ids=["kwargs", "unknown", "vision_config"],
)
def test_what_becomes_of_an_image_changes_every_fingerprint(change: Change) -> None:
    assert not set(fingerprints(engine(change))) & set(fingerprints(engine(put_images())))


@pytest.mark.parametrize(
    "change",
    [
        put_images("model_config.multimodal_config.mm_processor_cache_gb", 0.0),
        put_images("cache_config.enable_prefix_caching", False),
        put_images("model_config.multimodal_config.enable_mm_embeds", True),
        put_images(
            "model_config.hf_config.vision_config",
            {"hidden_act": "gelu", "transformers_version": "9.9"},
        ),
    ],
    ids=["cache_gb", "prefix_caching", "embeds", "transformers_version"],
)
def test_what_changes_no_image_changes_nothing(change: Change) -> None:
    assert fingerprints(engine(change)) == fingerprints(engine(put_images()))


def test_a_processors_files_are_part_of_what_an_image_is(tmp_path: Path) -> None:
    def found(options: Options | None = None) -> list[bytes]:
        change = put_images("model_config.model", str(tmp_path))
        return fingerprints(engine(change, options=options))

    file = tmp_path / "preprocessor_config.json"
    file.write_text("{}")
    before, named = found(), found(Options(revision="a"))
    file.write_text('{"do_normalize": false}')
    assert not set(found()) & set(before)
    assert found(Options(revision="a")) == named


def test_scales_of_an_image_are_those_of_a_file_or_of_nobody_else(tmp_path: Path) -> None:
    def change(config: Any, caches: Any) -> None:
        put_images("model_config.multimodal_config.mm_encoder_attn_dtype", "fp8")(config, caches)
        images = config.model_config.multimodal_config
        images.mm_encoder_fp8_scale_path = str(file) if file.exists() else None

    file = tmp_path / "scales.json"
    with pytest.raises(Unsupported, match="fp8"):
        engine(change)
    file.write_text('{"layer 0": 1.0}')
    before = fingerprints(engine(change))
    assert fingerprints(engine(change)) == before
    file.write_text('{"layer 0": 2.0}')
    assert not set(fingerprints(engine(change))) & set(before)


def test_an_engine_that_numbers_its_images_is_refused() -> None:
    def change(config: Any, caches: Any) -> None:
        put_images("model_config.multimodal_config.mm_processor_cache_gb", 0.0)(config, caches)
        config.cache_config.enable_prefix_caching = False

    with pytest.raises(Unsupported, match="images"):
        engine(change)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "torch.float16"), ("num_kv_heads", 2), ("head_size", 16), ("sliding_window", 7)],
)
def test_what_changes_a_groups_kv_changes_its_fingerprint(name: str, value: Any) -> None:
    before, after = engine(), engine(put_spec(name, value, group=0))
    assert before.groups[0].layout(0).fingerprint != after.groups[0].layout(0).fingerprint
    assert before.groups[1].layout(0).fingerprint == after.groups[1].layout(0).fingerprint


@pytest.mark.parametrize(
    "options",
    [Options(salt="tenant"), Options(revision="a"), Options(chunk_tokens=128)],
    ids=["salt", "revision", "chunk_tokens"],
)
def test_an_operator_can_keep_kv_apart(options: Options) -> None:
    assert not set(fingerprints(engine(options=options))) & set(fingerprints(engine()))


@pytest.mark.parametrize(
    "change",
    [
        put("model_config.model", "/elsewhere/small"),
        put("model_config.max_model_len", 4096),
        put("model_config.hf_text_config.transformers_version", "9.9"),
        put("model_config.hf_text_config.use_cache", False),
        put("model_config.hf_text_config.eos_token_id", 7),
        put("model_config.revision", "main"),
    ],
    ids=[
        "folder",
        "max_model_len",
        "transformers_version",
        "use_cache",
        "eos_token_id",
        "revision",
    ],
)
def test_what_does_not_change_kv_changes_nothing(change: Change) -> None:
    assert fingerprints(engine(change)) == fingerprints(engine())


@pytest.mark.parametrize(
    "options",
    [Options(category="chat"), Options(mode="load"), Options(verify=True), Options(lookup_s=9.0)],
    ids=["category", "mode", "verify", "lookup_s"],
)
def test_what_an_operator_says_otherwise_changes_nothing(options: Options) -> None:
    assert fingerprints(engine(options=options)) == fingerprints(engine())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_longest_prompt_depends_on_it(kind: str) -> None:
    def change(length: int) -> Change:
        def both(config: Any, caches: Any) -> None:
            put("model_config.hf_text_config.rope_scaling", {"rope_type": kind})(config, caches)
            put("model_config.max_model_len", length)(config, caches)

        return both

    assert fingerprints(engine(change(512))) != fingerprints(engine(change(1024)))


def test_layers_in_another_order_are_the_same_layers() -> None:
    def turn(_: Any, caches: Any) -> None:
        caches.kv_cache_groups[0].layer_names.reverse()

    model = Model(layers_per_group=12)
    assert engine(turn, model=model) == engine(model=model)
    names = engine(turn, model=model).groups[0].layer_names
    assert [int(name.split(".")[2]) for name in names] == list(range(12))


def test_each_rank_has_a_layout_of_its_own() -> None:
    group = engine(model=Model(num_ranks=2)).groups[0]
    assert group.layout(0).fingerprint != group.layout(1).fingerprint
    assert group.stores(0)
    assert group.stores(1)
    own = {layout.fingerprint for layout in group.layouts}
    assert not own & set(fingerprints(engine(model=Model())))


def test_with_mla_all_ranks_have_the_same_and_one_stores() -> None:
    group = engine(model=Model(is_mla=True, num_ranks=2, num_kv_heads=1)).groups[0]
    assert group.layout(0) == group.layout(1)
    assert [group.stores(rank) for rank in (0, 1)] == [True, False]
    assert group.num_planes == 1
    alone = engine(model=Model(is_mla=True, num_kv_heads=1)).groups[0]
    assert alone.layout(0).fingerprint == group.layout(0).fingerprint


class MambaSpec(FullAttentionSpec):
    pass


class ChunkedLocalAttentionSpec(FullAttentionSpec):
    pass


def put_kind(kind: type) -> Change:
    def change(_: Any, caches: Any) -> None:
        caches.kv_cache_groups[1].kv_cache_spec = kind(block_size=4, num_kv_heads=1, head_size=8)

    return change


def put_group(name: str, value: Any) -> Change:
    def change(_: Any, caches: Any) -> None:
        setattr(caches.kv_cache_groups[1], name, value)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put("parallel_config.pipeline_parallel_size", 2), "pipeline"),
        (put("parallel_config.decode_context_parallel_size", 2), "context_parallel"),
        (put("parallel_config.prefill_context_parallel_size", 2), "context_parallel"),
        (put("cache_config.calculate_kv_scales", True), "scales"),
        (put("load_config.load_format", "auto"), "not on this machine"),
        (put_kind(MambaSpec), "MambaSpec"),
        (put_kind(ChunkedLocalAttentionSpec), "ChunkedLocalAttentionSpec"),
        (put_group("is_eagle_group", True), "draft"),
        (put_group("enable_kv_transfer", False), "transferred"),
        (put_spec("kv_quant_mode", 2), "scales"),
        (put_spec("head_size_v", 4), "channels"),
        (put_spec("dtype", "torch.int64"), "dtype"),
        (put_spec("block_size", 1030), "too long"),
        (lambda _, caches: caches.kv_cache_groups.clear(), "no KV"),
    ],
)
def test_an_engine_that_cannot_be_served_exactly_is_refused(change: Change, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        engine(change)


def test_chunks_are_whole_blocks_of_every_group() -> None:
    found = engine(put_spec("block_size", 12))
    assert (found.block_size, found.hash_block_size) == (12, 4)
    assert found.chunk_tokens == 252
    found = engine(put_spec("block_size", 512))
    assert found.chunk_tokens == 512


def test_hashes_stand_for_what_vllm_says() -> None:
    assert engine().hash_block_size == 4
    assert engine(put("cache_config.prefix_match_unit", 2)).hash_block_size == 2
    one = engine(put("cache_config.prefix_match_unit", 4), model=Model())
    assert one.hash_block_size == 4


# What is of use of a group.


@st.composite
def groups(draw: st.DrawFn) -> Group:
    block_size = draw(st.sampled_from([1, 4, 16]))
    chunk_tokens = block_size * draw(st.integers(1, 8))
    window = draw(st.integers(1, 4 * chunk_tokens))
    model = Model(windows=(draw(st.sampled_from([0, window])),), block_size=block_size)
    return engine(model=model, options=Options(chunk_tokens=chunk_tokens)).groups[0]


@given(group=groups(), index=st.integers(1, 60))
def test_the_pieces_at_an_end_are_what_the_next_token_sees(group: Group, index: int) -> None:
    end = index * group.block_size
    seen = set(range(max(end - group.window + 1, 0) if group.window else 0, end))
    ends = group.ends_needed(end)
    covered = [set(range(group.first_useful(each), each)) for each in ends]
    assert seen <= set().union(*covered)
    assert sum(map(len, covered)) == len(set().union(*covered)), "a token is in two pieces"
    for each, tokens in zip(ends, covered, strict=True):
        assert each % group.block_size == group.first_useful(each) % group.block_size == 0
        assert 0 < len(tokens) <= group.layouts[0].chunk_tokens
        assert tokens & seen, "a piece is of no use"


@given(group=groups(), index=st.integers(1, 60), begin=st.integers(0, 2000))
def test_a_piece_is_there_in_the_step_that_completes_it(
    group: Group, index: int, begin: int
) -> None:
    """A step that begins at a token still has what that token sees, and computes the rest."""
    end = index * group.block_size
    assume(begin < end)
    kept = max(begin - group.window + 1, 0) // group.block_size if group.window else 0
    assert group.first_useful(end) // group.block_size >= kept


@given(group=groups(), index=st.integers(1, 60))
def test_pieces_at_whole_chunks_are_those_that_are_stored(group: Group, index: int) -> None:
    """Whatever is needed at an end, but for the piece right before it, ends with a chunk."""
    others = group.ends_needed(index * group.block_size)[1:]
    assert not [end for end in others if end % group.layouts[0].chunk_tokens]


# Weights.


def write_weights(path: Path, tensors: dict[str, bytes]) -> None:
    header, offset = {}, 0
    for name, content in tensors.items():
        end = offset + len(content)
        header[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "model"
    found.mkdir()
    for number in range(2):
        tensors = {f"{name}.{number}": name.encode() * 9000 for name in ("a", "b", "c")}
        write_weights(found / f"model-{number}.safetensors", tensors)
    (found / "config.json").write_text("{}")
    return found


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("place", [0, 4500, 8999])
def test_a_tensor_that_was_trained_further_changes_the_digest(
    folder: Path, name: str, place: int
) -> None:
    before = digest_of(folder)
    tensors = {f"{each}.1": each.encode() * 9000 for each in ("a", "b", "c")}
    changed = bytearray(tensors[f"{name}.1"])
    changed[place] ^= 1
    write_weights(folder / "model-1.safetensors", tensors | {f"{name}.1": bytes(changed)})
    assert digest_of(folder) != before


def test_a_file_by_another_name_changes_the_digest(folder: Path) -> None:
    before = digest_of(folder)
    (folder / "model-1.safetensors").rename(folder / "model-2.safetensors")
    assert digest_of(folder) != before


def test_a_tensor_by_another_name_changes_the_digest(folder: Path) -> None:
    before = digest_of(folder)
    path = folder / "model-1.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"a.1"', b'"d.1"'))
    assert digest_of(folder) != before


def test_files_that_change_places_change_the_digest(folder: Path) -> None:
    before = digest_of(folder)
    one, other = (folder / f"model-{number}.safetensors" for number in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert digest_of(folder) != before


def test_a_file_that_is_cut_short_changes_the_digest(folder: Path) -> None:
    before = digest_of(folder)
    path = folder / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert digest_of(folder) != before


def test_the_same_files_elsewhere_have_the_same_digest(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in sorted(folder.iterdir(), reverse=True):
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "README.md").write_text("another folder")
    assert digest_of(copy) == digest_of(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"\xff" * 64,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 200) + b"{}",
        *(
            struct.pack("<Q", len(header)) + header
            for header in (
                b'{"a": {}}',
                b'{"a": 1}',
                b'{"a": {"data_offsets": 1}}',
                b'{"a": {"data_offsets": [1]}}',
                b'{"a": {"data_offsets": ["x", null]}}',
                b'{"a": {"data_offsets": [9, 1]}}',
                b'{"a": {"data_offsets": [-9, -1]}}',
            )
        ),
    ],
)
def test_what_is_no_safetensors_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model-1.safetensors").write_bytes(content)
    with pytest.raises(Unsupported):
        digest_of(folder)


def test_a_folder_without_weights_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(Unsupported, match="no weights"):
            digest_of(path)


def test_files_of_other_kinds_are_sampled_all_over(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    content = bytearray(10 * SAMPLE_SIZE)
    found = set()
    for place in range(0, len(content), SAMPLE_SIZE // 2):
        content[place] = 1
        path.write_bytes(content)
        found.add(digest_of(path))
        assert digest_of(tmp_path) == digest_of(path)
    assert len(found) == 20


def test_an_engines_weights_are_those_in_its_folder(folder: Path) -> None:
    def change(config: Any, _: Any) -> None:
        config.model_config.model, config.load_config.load_format = str(folder), "auto"

    before = fingerprints(engine(change))
    assert fingerprints(engine(change)) == before
    write_weights(folder / "model-1.safetensors", {"a.1": b"other weights"})
    assert not set(fingerprints(engine(change))) & set(before)


def test_an_adapter_is_its_weights(folder: Path, tmp_path: Path) -> None:
    def adapter(path: Path) -> bytes:
        return adapter_of(SimpleNamespace(lora_request=SimpleNamespace(lora_path=str(path))))

    assert adapter_of(SimpleNamespace(lora_request=None)) == b""
    before = adapter(folder)
    assert before == adapter(folder) != b""
    file = folder / "model-1.safetensors"
    write_weights(file, {"a.1": b"other weights"})
    assert adapter(folder) != before


# Options.


def test_options_are_what_an_operator_wrote() -> None:
    written = {"socket": "/run/kvd.sock", "chunk_tokens": 512, "lookup_s": 1, "verify": True}
    options = parse_options(written)
    assert options == Options(socket="/run/kvd.sock", chunk_tokens=512, lookup_s=1.0, verify=True)
    assert isinstance(options.lookup_s, float)
    assert parse_options({}) == Options()


@pytest.mark.parametrize(
    "found",
    [
        {"sockets": "/run/kvd.sock"},
        {"socket": 1},
        {"chunk_tokens": 256.0},
        {"chunk_tokens": True},
        {"chunk_tokens": 0},
        {"verify": 1},
        {"verify": "yes"},
        {"mode": "none"},
        {"lookup_s": 0},
        {"load_s": -1.0},
        {"store_s": "1"},
        {"lookup_s": True},
        {"lookup_s": float("nan")},
        {"min_hit_tokens": -1},
    ],
    ids=str,
)
def test_what_is_no_option_is_refused(found: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_options(found)


@pytest.mark.parametrize(
    ("mode", "role", "loads", "stores"),
    [
        ("both", "kv_both", True, True),
        ("both", "kv_producer", False, True),
        ("both", "kv_consumer", True, False),
        ("load", "kv_consumer", True, False),
        ("load", "kv_both", True, False),
        ("store", "kv_producer", False, True),
    ],
)
def test_a_role_narrows_the_mode(mode: str, role: str, loads: bool, stores: bool) -> None:
    options = parse_options({"mode": mode}, role=role)
    assert (options.loads, options.stores) == (loads, stores)


@pytest.mark.parametrize(("mode", "role"), [("load", "kv_producer"), ("store", "kv_consumer")])
def test_a_mode_that_a_role_rules_out_is_refused(mode: str, role: str) -> None:
    with pytest.raises(ConfigError, match="nothing is left"):
        parse_options({"mode": mode}, role=role)


@pytest.mark.parametrize("params", [None, {}, {"other": 1}, {"kvd": None}, {"kvd": {}}])
def test_a_request_that_says_nothing_is_as_any_other(params: Any) -> None:
    options = request_options(params)
    assert (options.load, options.store, options.category, options.ttl_s) == (True, True, "", 0.0)


def test_a_request_says_what_becomes_of_its_kv() -> None:
    params = {"kvd": {"category": "chat", "ttl_s": 60, "load": False}}
    options = request_options(params)
    assert (options.category, options.ttl_s, options.load, options.store) == (
        "chat",
        60.0,
        False,
        True,
    )


@pytest.mark.parametrize(
    "found",
    [
        "no-store",
        ["store"],
        {"stores": False},
        {"store": 0},
        {"store": "false"},
        {"ttl_s": -1},
        {"ttl_s": float("nan")},
        {"ttl_s": "60"},
        {"category": 5},
    ],
    ids=str,
)
def test_a_request_that_is_not_understood_is_left_alone(found: Any) -> None:
    options = request_options({"kvd": found})
    assert (options.load, options.store) == (False, False)
