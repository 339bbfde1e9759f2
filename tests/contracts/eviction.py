"""What every EvictionPolicy promises. Subclass with a `policy` fixture."""

from __future__ import annotations

from collections import Counter

from kvd.chunk import ChunkMeta, Fingerprint
from kvd.daemon.eviction.base import EvictionPolicy
from kvd.keys import ChunkKey

FINGERPRINT = Fingerprint(bytes(32))


def meta(index: int) -> ChunkMeta:
    """The `index`-th of distinct chunks."""
    key = ChunkKey(index.to_bytes(32, "big"))
    return ChunkMeta(key=key, parent=FINGERPRINT, layout=FINGERPRINT, start=0, num_tokens=1)


class EvictionPolicyContract:
    def test_every_chunk_is_named_once(self, policy: EvictionPolicy) -> None:
        metas = [meta(index) for index in range(300)]
        for value in metas:
            policy.insert(value, 1)
        assert Counter(policy.victims()) == Counter(value.key for value in metas)

    def test_a_removed_chunk_is_not_named(self, policy: EvictionPolicy) -> None:
        for index in range(3):
            policy.insert(meta(index), 1)
        policy.remove(meta(1).key)
        assert set(policy.victims()) == {meta(0).key, meta(2).key}

    def test_the_caller_may_remove_all_while_it_iterates(self, policy: EvictionPolicy) -> None:
        for index in range(300):
            policy.insert(meta(index), 1)
        seen = []
        for key in policy.victims():
            policy.remove(key)
            seen.append(key)
        assert len(seen) == 300
        assert list(policy.victims()) == []

    def test_chunks_that_are_kept_do_not_hide_those_behind(self, policy: EvictionPolicy) -> None:
        for index in range(300):
            policy.insert(meta(index), 1)
        order = list(policy.victims())
        kept = set(order[:200])
        removed = []
        for key in policy.victims():
            if key not in kept:
                policy.remove(key)
                removed.append(key)
        assert set(removed) == set(order[200:])

    def test_no_chunks_no_victims(self, policy: EvictionPolicy) -> None:
        assert list(policy.victims()) == []
