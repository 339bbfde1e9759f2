"""What differs between the versions of vLLM that have tiers, and the oldest that will do.

0.29   the oldest: its tiers hear in which order KV lies in the engine's caches
0.30   rows are called chunks instead of blocks; groups have numbers
0.31   tiers may be given something that notices when stores back up; the result of a job may
       tell how many bytes were moved
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.tiering.base import JobResult
from vllm.version import __version__ as vllm_version

if TYPE_CHECKING:
    from vllm.v1.kv_offload.tiering.base import TransferJob

_RESULT_FIELDS = {field.name for field in fields(JobResult)}

# Else engines that differ in nothing but that order would load each other's rows.
if not hasattr(OffloadingConfig, "kv_cache_layout"):
    raise ImportError(
        f"kvd below native offloading needs vLLM 0.29 or later, found {vllm_version}: "
        "use KvdConnector of kvd.client.connectors.vllm"
    )


def known_arguments(backpressure_detector: Any) -> dict[str, Any]:
    """What a tier hands on to vLLM's own class, where there is any."""
    if backpressure_detector is None:
        return {}
    return {"backpressure_detector": backpressure_detector}


def rows_of(job: TransferJob) -> list[int]:
    """Where the rows of a job's keys are in the primary tier."""
    indices = job.chunk_ids if hasattr(job, "chunk_ids") else job.block_ids
    return [int(index) for index in indices]


def result_of(
    job: TransferJob,
    *,
    success: bool,
    successful_keys: Collection[bytes] | None = None,
    transfer_time: float | None = None,
    transfer_bytes: int | None = None,
) -> JobResult:
    """As much of a job's result as this version has a place for."""
    told = {
        "job_id": job.job_id,
        "success": success,
        "successful_keys": successful_keys,
        "transfer_time": transfer_time,
        "transfer_bytes": transfer_bytes,
    }
    return JobResult(**{name: value for name, value in told.items() if name in _RESULT_FIELDS})


def group_numbers(config: Any) -> list[int]:
    """The numbers of an `OffloadingConfig`'s groups."""
    return [getattr(group, "group_id", index) for index, group in enumerate(config.groups)]
