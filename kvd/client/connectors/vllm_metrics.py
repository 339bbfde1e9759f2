"""The connector's counters as vLLM wants them: added up from step to step and rank to rank, shown
in its log and on its `/metrics`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvd.client.connectors.vllm_stats import COUNTERS, MISSES, merged


@dataclass
class KvdStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is not there for the type checker
    """`data` is counters by name, of an interval."""

    data: dict[str, float] = field(default_factory=dict)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.data = merged(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(value, 3) for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class KvdPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # as above
    """`kvd_vllm_*_total` by engine; misses have their reason as a label."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make = metric_types[Counter]
        self._counters = {
            name: make(name=f"kvd_vllm_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }
        self._misses = make(
            name="kvd_vllm_misses",
            documentation="Prompts, or ends of prompts, that were computed, by reason.",
            labelnames=[*labelnames, "reason"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, counter in self._counters.items():
            if value := transfer_stats_data.get(name):
                counter.labels(*labels).inc(value)
        for reason in MISSES:
            if value := transfer_stats_data.get(f"miss_{reason}"):
                self._misses.labels(*labels, reason).inc(value)
