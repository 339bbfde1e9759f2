"""What a Hugging Face model is to kvd: whether its KV can be served exactly, and the layout that
names it.

The model is asked, not only its config: a probe of a few tokens shows the cache's classes, shapes
and dtype, that the KV of a prefix does not depend on what follows it, and that `generate` goes on
from a cache that it is handed. The config is asked for what so short a probe cannot show.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvd.client.connectors.transformers_cache import RoomyLayer
from kvd.errors import Unsupported
from kvd.layout import DTYPE_SIZES, KVLayout

PROBE_TOKENS = 8

# Kinds of RoPE whose frequencies are fixed when the model is made. "dynamic" and "longrope" choose
# them by the prompt's length: the same tokens have other keys in a longer prompt.
STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional"})

DEVICES = ("cpu", "cuda")

# What a config says about itself or about output, not about KV.
_CONFIG_IGNORED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "transformers_version",
        "use_cache",
    }
)

# `PreTrainedModel` carries no types that check, so a model is `Any` here.
Model = Any

_GENERATE: Callable[..., Any] = vars(GenerationMixin)["generate"]


def layout_of(model: Model, *, chunk_tokens: int, salt: str, revision: str | None) -> KVLayout:
    """The layout of the KV that `model` computes. Raises `Unsupported` with the reason if kvd
    cannot serve it exactly.
    """
    _check_class(model)
    _check_layers(model)
    _check_rope(model.config)
    _check_weights(model, revision)
    first = _probe(model)
    return KVLayout(
        model=_label(model),
        revision=" ".join(
            [
                f"revision={revision}" if revision else f"weights={weights_digest(model)}",
                f"config={config_digest(model.config)}",
                *_numerics(model),
            ]
        ),
        dtype=str(first.keys.dtype).removeprefix("torch."),
        num_layers=int(model.config.num_hidden_layers),
        num_kv_heads=first.keys.shape[1],
        head_dim=first.keys.shape[3],
        chunk_tokens=chunk_tokens,
        rope=_canonical(rope) if (rope := _rope_parameters(model.config)) else "",
        salt=salt,
    )


@torch.no_grad()
def extend(model: Model, cache: Any, input_ids: torch.Tensor) -> None:
    """Compute the KV of `input_ids`, int64 [1, tokens], behind what `cache` holds, and append it.

    The forward is the one with which `generate` prefills, so that both leave the same bits.
    """
    start = cache.get_seq_length()
    options: dict[str, Any] = {}
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" in accepted:
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        options["position_ids"] = positions.unsqueeze(0)
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    model(input_ids=input_ids, past_key_values=cache, use_cache=True, return_dict=True, **options)


def empty_cache(model: Model) -> Any:
    """A `DynamicCache` for a model with a layout, as `generate` would make it but for its layers,
    which are `RoomyLayer`.
    """
    cache = _plain_cache(model)
    cache.layers = [RoomyLayer() for _ in cache.layers]
    return cache


def state_of(model: Model) -> tuple[object, ...]:
    """What changes when the model is no longer the one whose layout was taken: its weights, their
    place and form, adapters, the attention's implementation. Costs some microseconds a tensor.

    Writing through `.data` of a tensor is the one change of weights that it cannot see.
    """
    weights = [*model.parameters(), *model.buffers()]
    versions = tuple(
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in weights
    )
    return model.dtype, str(model.device), _numerics(model), _adapters(model), versions


def weights_digest(model: Model) -> str:
    """32 hexadecimal digits over every byte of every parameter and buffer, with name, dtype and
    shape: BLAKE2b over the XXH3-128 of each tensor.

    XXH3 reads as fast as memory gives; it tells weights apart, it does not withstand somebody who
    builds two models with one digest.
    """
    digest = blake2b(digest_size=16)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(xxhash.xxh3_128_digest(raw))
    return digest.hexdigest()


def config_digest(config: Any) -> str:
    """16 hexadecimal digits over the config as canonical JSON, without names and output options."""
    found = json.loads(config.to_json_string(use_diff=False))
    relevant = {name: value for name, value in found.items() if name not in _CONFIG_IGNORED}
    return blake2b(_canonical(relevant).encode(), digest_size=8).hexdigest()


def _check_class(model: Model) -> None:
    found: Any = type(model)
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise Unsupported(
            f"{found.__name__} is no causal LM of transformers; "
            "attach to the model itself, not to what wraps it"
        )
    if model.config.is_encoder_decoder:
        raise Unsupported(f"{found.__name__} is an encoder-decoder model")
    if model.config.get_text_config(decoder=True) is not model.config:
        raise Unsupported(f"{found.__name__} is multimodal: its KV does not depend on tokens alone")
    if found.generate is not _GENERATE:
        raise Unsupported(f"{found.__name__} brings a generate of its own")
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        raise Unsupported(f"{found.__name__} has attention that is not causal")
    if found.__module__.startswith("transformers_modules"):
        raise Unsupported(f"{found.__name__} is code from outside transformers")
    if model.training:
        raise Unsupported("the model is in training mode; call model.eval() first")


def _check_layers(model: Model) -> None:
    """Every layer must keep the KV of every token, in a cache of its own."""
    implementation = model.generation_config.cache_implementation
    if implementation is not None:
        raise Unsupported(
            f"the model's generation_config asks for a {implementation!r} cache; "
            "kvd fills a DynamicCache"
        )
    for index, kind in enumerate(getattr(model.config, "layer_types", None) or []):
        if kind != "full_attention":
            raise Unsupported(f"layer {index} is {kind}: its cache does not keep every token's KV")
    for index, layer in enumerate(_plain_cache(model).layers):
        if type(layer) is not DynamicLayer:
            raise Unsupported(
                f"layer {index} is cached in a {type(layer).__name__} "
                f"(sliding_window={getattr(model.config, 'sliding_window', None)}): "
                "only layers that keep every token's KV can be served"
            )


def _check_rope(config: Any) -> None:
    parameters = _rope_parameters(config)
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for part in nested or [parameters]:
        kind = part.get("rope_type", part.get("type", "default"))
        if kind not in STATIC_ROPE:
            raise Unsupported(
                f"RoPE of type {kind!r}: the frequencies may depend on the prompt's length"
            )


def _check_weights(model: Model, revision: str | None) -> None:
    """All weights on one device, and, unless the caller names the revision, in tensors that show
    every bit of them.
    """
    tensors = dict(_weights(model))
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) != 1:
        raise Unsupported(f"the model is on several devices: {sorted(map(str, devices))}")
    if (device := devices.pop()).type not in DEVICES:
        raise Unsupported(f"the model is on {device}; kvd serves models on {' and '.join(DEVICES)}")
    if revision == "":
        raise Unsupported("the revision is empty; leave it out and the weights are read instead")
    if revision is not None:
        return
    if _adapters(model):
        raise Unsupported("adapters are loaded; name a revision= that stands for them as well")
    for name, tensor in tensors.items():
        is_plain = type(tensor.data) is torch.Tensor and tensor.layout is torch.strided
        has_state = hasattr(tensor, "quant_state") or hasattr(tensor, "SCB")
        if not is_plain or has_state:
            raise Unsupported(
                f"weight {name} is a {type(tensor).__name__} whose bits cannot be read; "
                "name a revision= for this model"
            )


def _probe(model: Model) -> Any:
    """The first layer of a cache that `model` has filled. Raises `Unsupported` if any layer is not
    K and V of one shape, or if a prefix's KV is not the same whatever follows it.
    """
    ids = torch.arange(PROBE_TOKENS, device=model.device).unsqueeze(0) % model.config.vocab_size
    whole, parts = _plain_cache(model), _plain_cache(model)
    try:
        extend(model, whole, ids)
        _check_length(whole, PROBE_TOKENS)
        extend(model, parts, ids[:, : PROBE_TOKENS // 2])
        _generate_one(model, ids, parts)
        _check_length(parts, PROBE_TOKENS)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise Unsupported(f"the model does not compute with a DynamicCache: {error}") from error
    num_layers = int(model.config.num_hidden_layers)
    found = [type(layer) for layer in (*whole.layers, *parts.layers)]
    if found != [DynamicLayer] * num_layers * 2:
        raise Unsupported(f"{num_layers} layers of a DynamicCache expected, found {found}")
    first = whole.layers[0]
    for index, layer in enumerate(whole.layers):
        _check_planes(index, layer, first)
    deviations = [
        _deviation(getattr(one, plane), getattr(other, plane))
        for one, other in zip(whole.layers, parts.layers, strict=True)
        for plane in ("keys", "values")
    ]
    # The median: in a mixture of experts a rounding may send one token elsewhere in one layer.
    deviation = sorted(deviations)[len(deviations) // 2]
    if deviation > _deviation_max(first.keys.dtype):
        raise Unsupported(
            f"the KV of a prefix depends on what follows it (it moves by {deviation:.2g})"
        )
    return first


def _check_planes(index: int, layer: Any, first: Any) -> None:
    shape = tuple(first.keys.shape)
    for plane in (layer.keys, layer.values):
        if plane is None or tuple(plane.shape) != shape or plane.dtype != first.keys.dtype:
            raise Unsupported(
                f"layer {index} caches {_shape(layer.keys)} and {_shape(layer.values)}: "
                f"K and V of every layer must be alike, layer 0 has {_shape(first.keys)}"
            )
    if len(shape) != 4 or shape[0] != 1 or shape[2] != PROBE_TOKENS:
        raise Unsupported(f"a cache [1, heads, {PROBE_TOKENS}, dim] expected, found {list(shape)}")
    if str(first.keys.dtype).removeprefix("torch.") not in DTYPE_SIZES:
        raise Unsupported(f"KV of dtype {first.keys.dtype}")


def _plain_cache(model: Model) -> Any:
    return DynamicCache(config=model.config)


def _check_length(cache: Any, num_tokens: int) -> None:
    if cache.get_seq_length() != num_tokens:
        raise Unsupported(
            f"the model keeps {cache.get_seq_length()} tokens in the layers of its cache, "
            f"{num_tokens} expected"
        )


def _generate_one(model: Model, ids: torch.Tensor, cache: Any) -> None:
    """One token from `ids`, int64 [1, tokens], the first of which `cache` holds."""
    config = GenerationConfig(max_new_tokens=1, do_sample=False, num_beams=1, pad_token_id=0)
    mask = torch.ones_like(ids)
    _GENERATE(model, ids, generation_config=config, attention_mask=mask, past_key_values=cache)


def _deviation(one: torch.Tensor, other: torch.Tensor) -> float:
    a, b = one.double(), other.double()
    return float((a - b).norm() / a.norm().clamp_min(1e-30))


def _deviation_max(dtype: torch.dtype) -> float:
    """How far rounding may move KV that is computed with other rows beside it, relative to the KV's
    norm: the square root of the dtype's precision, 3e-4 in float32 and 0.09 in bfloat16.
    """
    is_rough = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return float(torch.finfo(torch.bfloat16 if is_rough else dtype).eps ** 0.5)


def _numerics(model: Model) -> tuple[str, ...]:
    """What decides about the last bits of KV, beside weights and config. The number of threads does
    as well, in bfloat16; it is left out, or no two processes would share anything.
    """
    return (
        f"attention={model.config._attn_implementation}",
        f"device={model.device.type}",
        f"matmul={torch.get_float32_matmul_precision()}",
        f"torch={_minor(torch.__version__)}",
        f"transformers={_minor(transformers.__version__)}",
    )


def _adapters(model: Model) -> tuple[object, ...]:
    """The state of each peft layer in the model: which adapters are on, off or merged."""
    return tuple(
        (getattr(module, "active_adapters", None), getattr(module, "disable_adapters", None))
        for module in model.modules()
        if type(module).__module__.startswith("peft.")
    )


def _rope_parameters(config: Any) -> dict[str, Any]:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    assert isinstance(found, dict)
    return found


def _weights(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _label(model: Model) -> str:
    """A name for people; which weights they are, the revision says."""
    name = str(model.config._name_or_path)
    if name and Path(name).is_absolute():
        return Path(name).name
    return name or str(model.config.model_type)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _shape(tensor: Any) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}" if tensor is not None else "nothing"
