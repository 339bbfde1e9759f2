"""What a pinned chunk continues stays with it."""

from __future__ import annotations

from tests.test_store import ROOT, S, chain, keys_of, new_store, put


def test_drop_takes_nothing_that_a_pinned_chunk_continues() -> None:
    store = new_store()
    put(store, (1, 2, 3))
    lease, _ = store.pin(keys_of((1, 2, 3))[2:], ROOT, standalone=True, lease_ns=S, now_ns=0)
    assert lease is not None
    first = store.directory.get(chain((1,))[0].key)
    assert first is not None
    assert store.drop([first]) == (0, 0)
    assert store.lookup(keys_of((1, 2, 3))) == 3
    store.release(lease.id)
    assert store.drop([first])[0] == 3
    store.check()
