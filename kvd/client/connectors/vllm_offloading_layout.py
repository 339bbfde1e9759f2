"""What a row of vLLM's primary tier means: only who writes the same rows may read them.

A row's bytes lie in whatever order the engine's backend has, so all that decides on this order goes
into the layout as a digest. vLLM hands its tiers a part of it; a connector that knows more says so
by `engine_known`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform
from vllm.version import __version__ as vllm_version

from kvd.client.connectors.vllm_identity import engine_of
from kvd.client.connectors.vllm_offloading_versions import group_numbers
from kvd.client.connectors.vllm_options import Options
from kvd.errors import Unsupported
from kvd.layout import KVLayout

# A row's bytes have no heads; these make numbers of any size out of numbers that a layout may have.
_HEAD_DIM_MAX = 4096

# What a connector knows of the engine while it makes its tiers: `VllmConfig` and `KVCacheConfig`.
_engine_configs: ContextVar[tuple[Any, Any] | None] = ContextVar("engine_configs", default=None)


@contextmanager
def engine_known(vllm_config: Any, kv_cache_config: Any) -> Iterator[None]:
    """What is made in here may look at the engine's whole configuration."""
    token = _engine_configs.set((vllm_config, kv_cache_config))
    try:
        yield
    finally:
        _engine_configs.reset(token)


def row_layout(config: Any, row_size: int, options: Options) -> KVLayout:
    """What rows of `row_size` bytes mean, by `OffloadingConfig` and, inside of a
    `KvdOffloadingConnector`, by everything that is known of the engine. Raises `Unsupported` for
    one whose KV cannot be told from that of others.
    """
    known = _engine_configs.get()
    if known is None and not options.revision:
        raise Unsupported(
            "OffloadingConnector does not tell what the engine's weights are: use "
            "KvdOffloadingConnector, or name them by revision"
        )
    told = _row_facts(config)
    rope, revision = "", options.revision
    if known is not None:
        engine = engine_of(*known, options)
        layouts = [layout for group in engine.groups for layout in group.layouts]
        rope, revision = layouts[0].rope, layouts[0].revision
        told["layouts"] = [layout.fingerprint.hex() for layout in layouts]
        told["backend"] = str(getattr(known[0], "attention_config", None))
        told["runner"] = str(getattr(known[0], "use_v2_model_runner", None))
    digest = blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()
    tokens = _tokens_of_row(config, row_size)
    head_dim = math.gcd(row_size // tokens, _HEAD_DIM_MAX)
    return KVLayout(
        model=Path(config.model.name).name,
        revision=revision,
        dtype="uint8",
        num_layers=1,
        num_planes=1,
        num_kv_heads=row_size // tokens // head_dim,
        head_dim=head_dim,
        chunk_tokens=tokens,
        axes="opaque",
        rope=rope,
        group=f"vllm offloading row {digest}",
        salt=options.salt,
    )


def _row_facts(config: Any) -> dict[str, Any]:
    """What decides what stands where in a row. Its size, its tokens and the model's name stand in
    its layout by themselves, what hashes mean in its name.
    """
    parallel = config.parallel
    return {
        "vllm": vllm_version,
        "device": current_platform.get_device_name(),
        "dtype": config.model.dtype,
        "block_size": config.worker_kv_bytes_per_block,
        "blocks": config.cache.blocks_per_chunk,
        "groups": [
            [number, group.tokens_per_block, *group.layer_names]
            for number, group in zip(group_numbers(config), config.groups, strict=True)
        ],
        "ranks": [
            parallel.world_size,
            parallel.tp_size,
            parallel.pp_size,
            parallel.pcp_size,
            parallel.dcp_size,
        ],
        "order": [config.kv_cache_layout, config.canonical_layout, config.replicated_layout],
    }


def _tokens_of_row(config: Any, row_size: int) -> int:
    """How many tokens a row stands for, where that is the same for all groups; else 1."""
    sizes = {group.tokens_per_block * config.cache.blocks_per_chunk for group in config.groups}
    tokens = int(sizes.pop())
    return 1 if sizes or row_size % tokens else tokens
