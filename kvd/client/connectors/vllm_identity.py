"""What a vLLM engine's KV is to kvd: its KV-cache groups, the layout of each, and the name space of
its block hashes. Whatever changes KV changes one of them.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from kvd.client.connectors.vllm_options import Options
from kvd.client.connectors.weights import digest_of, weights_in
from kvd.errors import Unsupported
from kvd.layout import DTYPE_SIZES, KVLayout

# How many tokens of a group's KV a request needs to go on: all of them, or a window.
Kind = Literal["full", "window"]

# By the names of vLLM's classes; their subclasses may keep something else.
_KINDS: dict[str, Kind] = {
    "FullAttentionSpec": "full",
    "MLAAttentionSpec": "full",
    "SlidingWindowSpec": "window",
}
_MLA = "MLAAttentionSpec"

# Kinds of RoPE whose frequencies vLLM chooses by the longest prompt it was started for.
_ROPE_BY_LENGTH = ("longrope", "dynamic")

# What a config says about itself or about output, not about KV.
_CONFIG_IGNORED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

# What a multimodal config says that changes no image's KV: limits, caches, the ways between
# processes, and what vLLM derives from the connector's role.
_MULTIMODAL_IGNORED = frozenset(
    {
        "allow_missing_mm_embeddings",
        "enable_mm_embeds",
        "interleave_mm_strings",
        "language_model_only",
        "limit_per_prompt",
        "mm_encoder_only",
        "mm_encoder_tp_mode",
        "mm_hasher_algorithm",
        "mm_ipc_gpu_memory_gb",
        "mm_processor_cache_gb",
        "mm_processor_cache_type",
        "mm_shm_cache_max_object_size_mb",
        "mm_tensor_ipc",
        "skip_mm_profiling",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A KV-cache group: layers that share block ids. `layouts` has one for each rank that stores;
    of a group with a window, the last `window` tokens before a place are of use there.
    """

    index: int
    kind: Kind
    window: int
    block_size: int
    layer_names: tuple[str, ...]
    num_planes: int
    layouts: tuple[KVLayout, ...]

    def layout(self, rank: int) -> KVLayout:
        """The layout of what a rank has; the same for all where all have the same."""
        return self.layouts[rank % len(self.layouts)]

    def stores(self, rank: int) -> bool:
        """Whether it is this rank that stores."""
        return rank < len(self.layouts)

    def first_useful(self, end: int) -> int:
        """Where the piece begins that is stored for the tokens before `end`, a block's end."""
        chunk_tokens = self.layouts[0].chunk_tokens
        start = (end - 1) // chunk_tokens * chunk_tokens
        if self.kind == "full" or self.window - 1 >= chunk_tokens:
            return start
        # The token at `end` sees itself and `window - 1` before it.
        return max((end - self.window + 1) // self.block_size * self.block_size, 0)

    def ends_needed(self, end: int) -> list[int]:
        """Ends of the pieces that are needed to go on at `end`, the last first."""
        first = 0 if self.kind == "full" else max(end - self.window + 1, 0)
        found = []
        while end > first:
            found.append(end)
            end = self.first_useful(end)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What both sides of a connector know of their engine. A chunk has `chunk_tokens` tokens, a
    whole number of blocks of every group; hits end on a multiple of `block_size`, block hashes
    stand for `hash_block_size` tokens each. One that `plans_ahead` plans a step while the one
    before it is computed.
    """

    groups: tuple[Group, ...]
    chunk_tokens: int
    block_size: int
    hash_block_size: int
    num_ranks: int
    plans_ahead: bool

    @property
    def num_left_out(self) -> int:
        """How many of a prompt's last tokens no hit may cover. vLLM computes the last one in any
        case: it sees a token more than what goes on behind it, where that begins a block.
        """
        windows = [group for group in self.groups if group.kind == "window"]
        return int(any((group.window - 1) % group.block_size == 0 for group in windows))

    @property
    def fails_as_a_whole(self) -> bool:
        """Whether a load that has failed in part is of no use: a block's number does not tell its
        group, or what stands before the first bad block was not loaded, being out of the window.
        """
        return len(self.groups) > 1 or any(group.kind == "window" for group in self.groups)


def engine_of(config: Any, kv_cache_config: Any, options: Options) -> Engine:
    """What `VllmConfig` and `KVCacheConfig` say. Raises `Unsupported` with the reason for an engine
    whose KV cannot be served exactly.
    """
    parallel = config.parallel_config
    _check_parallel(parallel)
    groups = list(kv_cache_config.kv_cache_groups)
    sizes = [group.kv_cache_spec.block_size for group in groups]
    if not sizes:
        raise Unsupported("the model has no KV cache")
    block_size = math.lcm(*sizes)
    if block_size > max(options.chunk_tokens, 1024):
        raise Unsupported(f"blocks of {sizes} tokens have {block_size} in common: too long a chunk")
    chunk_tokens = block_size * max(options.chunk_tokens // block_size, 1)
    hash_block_size = getattr(kv_cache_config, "hash_block_size", None)
    if hash_block_size is None:
        chosen = getattr(config.cache_config, "prefix_match_unit", None) or math.gcd(*sizes)
        hash_block_size = sizes[0] if len(groups) == 1 else chosen
    weights = _weights(config, options)
    found = []
    for index, group in enumerate(groups):
        base = _base_layout(config, options, weights, chunk_tokens)
        found.append(_group(index, group, base, config, num_ranks=parallel.tensor_parallel_size))
    return Engine(
        groups=tuple(found),
        chunk_tokens=chunk_tokens,
        block_size=block_size,
        hash_block_size=hash_block_size,
        num_ranks=parallel.tensor_parallel_size,
        plans_ahead=getattr(config.scheduler_config, "async_scheduling", True),
    )


def hash_space(hash_block_size: int) -> bytes:
    """What the engine's block hashes mean: their algorithm and seed, and how many tokens each
    stands for. Known in the scheduler's process, when the first request is there.
    """
    from vllm.v1.core import kv_cache_utils

    return blake2b(
        b"kvd.vllm.1" + hash_block_size.to_bytes(4, "little") + bytes(kv_cache_utils.NONE_HASH),
        digest_size=32,
    ).digest()


def adapter_of(request: Any) -> bytes:
    """What the weights of a request's LoRA adapter are; its block hashes know its name and path
    only, and another may have taken its place there.
    """
    lora = request.lora_request
    if lora is None:
        return b""
    path = Path(lora.lora_path)
    files = tuple((str(file), file.stat().st_mtime_ns) for file in sorted(weights_in(path)))
    return _digest_at(path, files) if files else b""


@lru_cache(maxsize=1024)
def _digest_at(path: Path, files: tuple[tuple[str, int], ...]) -> bytes:
    return digest_of(path).encode()


def _check_parallel(parallel: Any) -> None:
    if parallel.pipeline_parallel_size > 1:
        raise Unsupported("pipeline parallelism: its ranks have layers of their own")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise Unsupported(f"{name} above 1: a rank has some tokens of a block only")


def _group(index: int, group: Any, base: KVLayout, config: Any, *, num_ranks: int) -> Group:
    spec = group.kv_cache_spec
    name = type(spec).__name__
    kind = _KINDS.get(name)
    if kind is None:
        raise Unsupported(f"KV-cache group {index} is a {name}")
    if getattr(group, "is_eagle_group", False):
        raise Unsupported(f"KV-cache group {index} has layers of a draft model")
    if not getattr(group, "enable_kv_transfer", True):
        raise Unsupported(f"KV-cache group {index} is not to be transferred")
    if int(getattr(spec, "kv_quant_mode", 0)) > 1:
        raise Unsupported(f"KV-cache group {index} has scales of its own for tokens or heads")
    if getattr(spec, "head_size_v", None) not in (None, 0, spec.head_size):
        raise Unsupported(f"K has {spec.head_size} channels a head, V {spec.head_size_v}")
    dtype = str(spec.dtype).removeprefix("torch.")
    if dtype not in DTYPE_SIZES:
        raise Unsupported(f"KV of dtype {dtype}")
    is_mla = name == _MLA
    window = int(spec.sliding_window) if kind == "window" else 0
    # Another version may sort layers into other groups.
    layers = tuple(sorted(group.layer_names, key=_by_number))
    told = blake2b("\0".join(layers).encode(), digest_size=8).hexdigest()
    layout = replace(
        base,
        dtype=dtype,
        num_layers=len(layers),
        num_planes=1 if is_mla else 2,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        group=f"vllm {kind} {window} {config.cache_config.cache_dtype} {told}",
    )
    # With MLA each rank has all of it: one stores, all load.
    world_size = 1 if is_mla else num_ranks
    return Group(
        index=index,
        kind=kind,
        window=window,
        block_size=spec.block_size,
        layer_names=layers,
        num_planes=layout.num_planes,
        layouts=tuple(
            replace(layout, rank=rank, world_size=world_size) for rank in range(world_size)
        ),
    )


def _base_layout(config: Any, options: Options, weights: str, chunk_tokens: int) -> KVLayout:
    """What all groups have in common; shapes are filled in."""
    model = config.model_config
    return KVLayout(
        model=Path(model.model).name,
        revision=weights,
        dtype="uint8",
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        chunk_tokens=chunk_tokens,
        rope=_rope(model),
        salt=options.salt,
    )


def _weights(config: Any, options: Options) -> str:
    """A name for the weights and for what the model does with them."""
    model, load = config.model_config, config.load_config
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise Unsupported("calculate_kv_scales: each process finds scales of its own")
    told: dict[str, Any] = {
        "config": _told(model.hf_text_config),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "weights": options.revision or _checkpoint(model, str(load.load_format)),
    }
    if (multimodal := getattr(model, "multimodal_config", None)) is not None:
        _check_images_are_known(multimodal, config.cache_config)
        told["images"] = _images(model, multimodal, options)
    return blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()


def _check_images_are_known(multimodal: Any, cache: Any) -> None:
    # Block hashes cover what vLLM calls an image. Where nothing of its own looks images up it
    # numbers them instead of hashing them, and the first of another process is number one again.
    if not (multimodal.mm_processor_cache_gb or cache.enable_prefix_caching):
        raise Unsupported(
            "images have numbers in place of hashes: give mm_processor_cache_gb or prefix caching"
        )
    is_fp8 = getattr(multimodal, "mm_encoder_attn_dtype", None) == "fp8"
    if is_fp8 and getattr(multimodal, "mm_encoder_fp8_scale_path", None) is None:
        raise Unsupported("mm_encoder_attn_dtype fp8: each process finds scales of its own")


def _images(model: Any, multimodal: Any, options: Options) -> dict[str, Any]:
    """What the engine makes of an image, a sound or a video before it is KV. Their hashes know
    what they are, and what a request says of its own, no more than that.
    """
    chosen = {
        name: value for name, value in vars(multimodal).items() if name not in _MULTIMODAL_IGNORED
    }
    place = None if options.revision else _place(model)
    files = [] if place is None else sorted(place.glob("*processor*.json"))
    if scales := getattr(multimodal, "mm_encoder_fp8_scale_path", None):
        files.append(Path(scales))
    return {
        "config": _told(model.hf_config),
        "options": json.loads(json.dumps(chosen, default=str)),
        "processors": {file.name: file.read_text() for file in files},
    }


def _checkpoint(model: Any, load_format: str) -> str:
    if "dummy" in load_format:
        return f"dummy {model.seed}"
    place = _place(model)
    if place is None:
        raise Unsupported(
            f"the weights of {model.model} are not on this machine: name them by "
            'kv_connector_extra_config {"revision": ...}'
        )
    return digest_of(place)


def _place(model: Any) -> Path | None:
    """The model's folder, or its one file; None if it is not on this machine."""
    path = Path(model.model)
    if path.exists():
        return path
    from huggingface_hub import try_to_load_from_cache

    config = None
    # Other loaders have names of their own, which are no repository's.
    with suppress(ValueError):
        config = try_to_load_from_cache(model.model, "config.json", revision=model.revision)
    return Path(config).parent if isinstance(config, str) else None


def _told(config: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(
        json.dumps(_without_ignored(config.to_dict()), sort_keys=True, default=str)
    )
    return told


def _without_ignored(told: Any) -> Any:
    """A config has those of its parts in it, a vision tower's for one."""
    if not isinstance(told, dict):
        return told
    return {
        key: _without_ignored(value) for key, value in told.items() if key not in _CONFIG_IGNORED
    }


def _rope(model: Any) -> str:
    config = model.hf_text_config
    names = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
    found = {name: getattr(config, name, None) for name in names}
    text = json.dumps(found, sort_keys=True, default=str)
    if any(kind in text for kind in _ROPE_BY_LENGTH):
        text += f" up to {model.max_model_len}"
    return text


def _by_number(name: str) -> list[tuple[int, str]]:
    """ "layers.10" comes behind "layers.9"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
