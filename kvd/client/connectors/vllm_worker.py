"""A worker's side of the connector: it moves what a plan says, on threads of its own, while the
engine goes on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvd.client.connectors.late_client import LateClient
from kvd.client.connectors.vllm_identity import Engine
from kvd.client.connectors.vllm_loads import Loads
from kvd.client.connectors.vllm_options import Options
from kvd.client.connectors.vllm_pages import Pages
from kvd.client.connectors.vllm_saves import Saves
from kvd.client.connectors.vllm_stats import Tally


class WorkerSide:
    """One rank's. `caches` are the engine's, by layer."""

    def __init__(
        self,
        engine: Engine,
        client: LateClient,
        options: Options,
        tally: Tally,
        caches: Mapping[str, torch.Tensor],
        *,
        rank: int,
    ) -> None:
        pages = [Pages(group, caches, rank) for group in engine.groups]
        self.loads = Loads(engine, client, options, tally, pages, rank=rank)
        self.saves = Saves(engine, client, options, tally, pages, rank=rank)

    def close(self) -> None:
        """End: what is being saved gets a moment, loads that have not begun are given up."""
        self.saves.close()
        self.loads.close()
