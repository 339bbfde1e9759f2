"""What vLLM hands to a connector, kept to the fields that are read: configs, and the output of its
scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

HEAD_DIM = 8


# Named as vLLM's: the connector goes by the names.


@dataclass(kw_only=True)
class FullAttentionSpec:
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: Any = torch.uint8
    head_size_v: int | None = None
    kv_quant_mode: int = 0


@dataclass(kw_only=True)
class MLAAttentionSpec(FullAttentionSpec):
    head_size_v: int | None = 0


@dataclass(kw_only=True)
class SlidingWindowSpec(FullAttentionSpec):
    sliding_window: int = 0


class HfConfig(SimpleNamespace):
    """A model's config, as transformers has it."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model by its groups: the window of each, 0 for none. `num_kv_heads` are a rank's."""

    windows: tuple[int, ...] = (0,)
    is_mla: bool = False
    num_ranks: int = 1
    num_kv_heads: int = 2
    layers_per_group: int = 2
    block_size: int = 4

    @property
    def num_planes(self) -> int:
        return 1 if self.is_mla else 2

    def layers(self, group: int) -> list[int]:
        """Numbers of a group's layers: they are dealt out."""
        return [place * len(self.windows) + group for place in range(self.layers_per_group)]

    def heads(self, rank: int) -> list[int]:
        """Numbers of a rank's heads among those of all ranks."""
        first = 0 if self.is_mla else rank * self.num_kv_heads
        return list(range(first, first + self.num_kv_heads))


def layer_name(number: int) -> str:
    return f"model.layers.{number}.self_attn.attn"


def vllm_config(model: Model, *, plans_ahead: bool = False) -> SimpleNamespace:
    """As `VllmConfig`."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=plans_ahead),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, tensor_parallel_size=model.num_ranks
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", calculate_kv_scales=False),
        load_config=SimpleNamespace(load_format="dummy"),
        model_config=SimpleNamespace(
            model="/models/small",
            revision=None,
            hf_text_config=HfConfig(model_type="small", hidden_size=16, rope_theta=10000.0),
            dtype="torch.float16",
            quantization=None,
            seed=0,
            max_model_len=512,
        ),
    )


def kv_cache_config(model: Model) -> SimpleNamespace:
    """As `KVCacheConfig`."""
    groups = []
    for index, window in enumerate(model.windows):
        names = [layer_name(number) for number in model.layers(index)]
        groups.append(SimpleNamespace(layer_names=names, kv_cache_spec=_spec(model, window)))
    return SimpleNamespace(kv_cache_groups=groups)


def _spec(model: Model, window: int) -> FullAttentionSpec:
    size, heads = model.block_size, model.num_kv_heads
    if window:
        return SlidingWindowSpec(
            block_size=size, num_kv_heads=heads, head_size=HEAD_DIM, sliding_window=window
        )
    kind = MLAAttentionSpec if model.is_mla else FullAttentionSpec
    return kind(block_size=size, num_kv_heads=heads, head_size=HEAD_DIM)


@dataclass(kw_only=True)
class NewRequest:
    """As `NewRequestData`."""

    req_id: str
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int


@dataclass(kw_only=True)
class CachedRequests:
    """As `CachedRequestData`."""

    req_ids: list[str] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)
    new_block_ids: list[tuple[list[int], ...] | None] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class SchedulerOutput:
    """As vLLM's."""

    scheduled_new_reqs: list[NewRequest] = field(default_factory=list)
    scheduled_cached_reqs: CachedRequests = field(default_factory=CachedRequests)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())
