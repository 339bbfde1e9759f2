"""Which calls of `generate` kvd serves: one prompt of plain tokens, decoded greedily or by
sampling. Everything else is computed as if kvd were not there, and counted by its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

SERVED_MODES = frozenset({"greedy_search", "sample"})

# Arguments that kvd does not look behind, with the reason under which their calls are counted.
_ARGUMENTS = {
    "assistant_model": "assisted_generation",
    "custom_generate": "custom_generate",
    "decoder_input_ids": "encoder_inputs",
    "encoder_outputs": "encoder_inputs",
    "inputs_embeds": "inputs_embeds",
    "negative_prompt_attention_mask": "guidance",
    "negative_prompt_ids": "guidance",
    "past_key_values": "past_key_values",
    "position_ids": "position_ids",
    "synced_gpus": "distributed",
}

_MULTIMODAL = ("audio", "image", "input_features", "pixel", "video")

# Arguments of `generate` itself that change nothing about a prompt's KV.
_HARMLESS = frozenset(
    {
        "generation_config",
        "logits_processor",
        "prefix_allowed_tokens_fn",
        "stopping_criteria",
        "streamer",
        "tokenizer",
        "trust_remote_code",
    }
)
_INTEGERS = frozenset({torch.int32, torch.int64})
_PROMPT = frozenset({"attention_mask", "input_ids", "inputs"})


def prompt_of(arguments: Mapping[str, Any]) -> Any:
    """The prompt among the arguments of `generate`, by either of its names."""
    inputs = arguments.get("inputs")
    return arguments.get("input_ids") if inputs is None else inputs


def bypass_reason(model: Any, arguments: Mapping[str, Any], *, chunk_tokens: int) -> str | None:
    """Why this call of `model.generate` is computed without kvd, or None if it is served."""
    given = {name: value for name, value in arguments.items() if value is not None}
    for name, value in given.items():
        if name in _ARGUMENTS and value is not False:
            return _ARGUMENTS[name]
        if any(word in name for word in _MULTIMODAL):
            return "multimodal"
    if model.training:
        return "training"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast"
    others = {
        name: value
        for name, value in given.items()
        if name not in _HARMLESS and name not in _PROMPT and name not in _ARGUMENTS
    }
    try:
        # What `generate` does first, so that both see the same settings.
        config, unknown = model._prepare_generation_config(given.get("generation_config"), **others)
    except (TypeError, ValueError):
        # `generate` will say what is wrong with them.
        return "invalid_arguments"
    return _config_reason(config, unknown) or _prompt_reason(config, given, chunk_tokens)


def _config_reason(config: Any, unknown: Mapping[str, Any]) -> str | None:
    mode = config.get_generation_mode(None).value
    checks = {
        str(mode): mode not in SERVED_MODES,
        "use_cache": config.use_cache is False,
        "batch": (config.num_return_sequences or 1) > 1,
        "cache_implementation": config.cache_implementation is not None,
        "guidance": config.guidance_scale not in (None, 1),
        # Attentions and hidden states of the prompt are returned as well, and have to be computed.
        "outputs": bool(config.output_attentions or config.output_hidden_states),
        "token_healing": bool(config.token_healing),
        "prefill_chunk_size": config.prefill_chunk_size is not None,
        # It counts from inside `generate`, where most of the prefill would lie behind it already.
        "max_time": config.max_time is not None,
        # Arguments for the model's forward: what they do to KV is not known.
        "model_arguments": bool(unknown),
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def _prompt_reason(config: Any, given: Mapping[str, Any], chunk_tokens: int) -> str | None:
    prompt = prompt_of(given)
    if "inputs" in given and "input_ids" in given:
        return "invalid_arguments"
    if not isinstance(prompt, torch.Tensor) or prompt.ndim != 2 or prompt.dtype not in _INTEGERS:
        return "no_tokens"
    if prompt.shape[0] != 1:
        return "batch"
    if bool((prompt < 0).any()):
        return "no_tokens"
    if prompt.shape[1] < chunk_tokens:
        return "short_prompt"
    if _is_padded(config, prompt, given.get("attention_mask")):
        return "padding"
    return None


def _is_padded(config: Any, prompt: torch.Tensor, mask: Any) -> bool:
    """Whether a token of the prompt is masked, by the caller or by what `generate` infers."""
    if mask is not None:
        return tuple(mask.shape) != tuple(prompt.shape) or not bool((mask == 1).all())
    if config.pad_token_id is None:
        return False
    eos = config.eos_token_id
    stops = eos if isinstance(eos, (list, tuple)) else [eos]
    return config.pad_token_id not in stops and bool((prompt == config.pad_token_id).any())
