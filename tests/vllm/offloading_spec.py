"""vLLM's native offloading for an engine on a CPU.

It copies between a GPU and host memory on CUDA streams, and refuses to start on a CPU. `CpuSpec`
stands in for that copy alone; connector, scheduler, tiers and the primary tier's memory are vLLM's.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from typing import Any

import numpy as np

_spec: Any = importlib.import_module("vllm.v1.kv_offload.tiering.spec")
_region: Any = importlib.import_module("vllm.v1.kv_offload.cpu.shared_offload_region")
_base: Any = importlib.import_module("vllm.v1.kv_offload.base")
_gpu_worker: Any = importlib.import_module("vllm.v1.kv_offload.cpu.gpu_worker")


class CpuSpec(_spec.TieringOffloadingSpec):  # type: ignore[misc]
    """Native offloading for an engine whose KV cache is in host memory itself."""

    def get_worker(self, kv_caches: Any) -> Any:
        # Chunks were blocks before 0.30.
        unit = "chunk" if hasattr(self, "num_chunks") else "block"
        sizes = {f"num_{unit}s": getattr(self, f"num_{unit}s")}
        region = _region.SharedOffloadRegion(
            engine_id=self._engine_id,
            rank=self.config.parallel.rank,
            cpu_page_size=self.cpu_page_size_per_worker,
            **sizes,
            **{f"kv_bytes_per_{unit}": self.kv_bytes_per_chunk},
        )
        return CpuWorker(kv_caches, region, self.blocks_per_chunk)


class CpuWorker(_base.OffloadingWorker):  # type: ignore[misc]
    """Copies at once what it is told to; pages lie in a row as `CPUOffloadingWorker` lays them."""

    def __init__(self, kv_caches: Any, region: Any, blocks_per_chunk: int) -> None:
        self._region = region
        self._blocks_per_chunk = blocks_per_chunk
        self._refs = kv_caches.group_data_refs
        self._caches = [t.tensor.view(-1, t.page_size_bytes) for t in kv_caches.tensors]
        self._rows = [
            region.create_next_worker_view(t.page_size_bytes * blocks_per_chunk)
            for t in kv_caches.tensors
        ]
        self._finished: list[Any] = []

    def submit_store(self, job_id: int, source: Any, target: Any) -> bool:
        self._copy(job_id, source, target.block_ids, is_store=True)
        return True

    def submit_load(self, job_id: int, source: Any, target: Any) -> bool:
        self._copy(job_id, target, source.block_ids, is_store=False)
        return True

    def get_finished(self) -> list[Any]:
        found, self._finished = self._finished, []
        return found

    def wait(self, job_ids: set[int]) -> None:
        """Copies have ended when they are submitted."""

    def shutdown(self) -> None:
        self._caches.clear()
        self._rows.clear()
        self._region.cleanup()

    def _copy(self, job_id: int, spec: Any, rows: Any, *, is_store: bool) -> None:
        size = block_start = row_start = 0
        for refs, count, first in zip(
            self._refs, spec.group_sizes, spec.block_indices, strict=True
        ):
            skip = first % self._blocks_per_chunk
            num_rows = math.ceil((count + skip) / self._blocks_per_chunk) if count else 0
            blocks = spec.block_ids[block_start : block_start + count]
            for ref in refs if count else ():
                caches = self._pointers(blocks, 1, count, self._caches[ref.tensor_idx], 0)
                places = self._pointers(
                    rows[row_start : row_start + num_rows],
                    self._blocks_per_chunk,
                    count,
                    self._rows[ref.tensor_idx],
                    skip,
                )
                for cache, place in zip(caches, places, strict=True):
                    target, source = (place, cache) if is_store else (cache, place)
                    ctypes.memmove(int(target), int(source), ref.page_size_bytes)
                size += count * ref.page_size_bytes
            block_start, row_start = block_start + count, row_start + num_rows
        assert (block_start, row_start) == (len(spec.block_ids), len(rows))
        self._finished.append(_base.TransferResult(job_id, True, size, 0.0))

    def _pointers(self, ids: Any, per_id: int, count: int, tensor: Any, skip: int) -> Any:
        found = np.empty(count, np.uint64)
        _gpu_worker.compute_sub_block_ptrs(ids, per_id, found, tensor, skip_count=skip)
        return found
