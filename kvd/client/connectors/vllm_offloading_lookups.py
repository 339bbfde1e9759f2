"""Which rows there are: asked on a thread of its own, a step's questions together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from vllm.v1.kv_offload.tiering import async_lookup

# Before 0.30 vLLM forgets a question with the last request that wants to know. Asked once more it
# gets two answers, and asserts that there is one.
_FORGETS = not hasattr(async_lookup, "LookupPhase")

# Stands for requests that are gone.
_NOBODY = ""


class Lookups(async_lookup.AsyncLookupManager):  # type: ignore[misc]  # vLLM has no types here
    """Asks `present`, with keys and the request's id; what it raises is a miss."""

    def __init__(
        self, tier_type: str, present: Callable[[Sequence[bytes], str], list[bool]]
    ) -> None:
        self._present = present
        self._left: set[bytes] = set()
        # The thread runs from here on.
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[bytes], req_context: Any) -> Collection[bool]:
        return self._present(keys, req_context.req_id)

    def cleanup(self, req_id: str) -> None:
        for key in self._req_keys.get(req_id, ()) if _FORGETS else ():
            if self._lookup_state[key].result is None:
                self._lookup_state[key].request_ids.add(_NOBODY)
                self._left.add(key)
        super().cleanup(req_id)

    def drain_results(self) -> None:
        super().drain_results()
        for key in [key for key in self._left if self._lookup_state[key].result is not None]:
            self._left.remove(key)
            self._lookup_state[key].request_ids.remove(_NOBODY)
            if not self._lookup_state[key].request_ids:
                del self._lookup_state[key]
