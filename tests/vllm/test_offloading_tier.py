"""The second door without an engine: rows go down to kvd and come back."""

from __future__ import annotations

from typing import Any

import pytest

from kvd.errors import ConfigError
from tests.vllm.daemon import Daemon
from tests.vllm.offloading_tier import HIT, MISS, NUM_ROWS, RETRY, Tier, contents, keys_of


def test_rows_come_back_bit_for_bit(node: Daemon) -> None:
    keys = keys_of(1)
    with Tier(node) as one:
        one.store(keys)
    with Tier(node) as other:
        assert other.look(keys) == [HIT] * len(keys)
        assert other.rows(keys) == [contents(key).tobytes() for key in keys]
    node.until_idle()


def test_rows_that_the_primary_tier_drops_come_back(node: Daemon) -> None:
    first, second = keys_of(2, NUM_ROWS), keys_of(3, NUM_ROWS)
    with Tier(node) as tier:
        tier.store(first)
        tier.store(second)
        assert tier.look(first) == [HIT] * NUM_ROWS
        assert tier.rows(first) == [contents(key).tobytes() for key in first]


def test_what_is_there_already_is_not_stored_again(node: Daemon) -> None:
    keys = keys_of(4)
    with Tier(node) as one, Tier(node) as other:
        one.store(keys[:2])
        before = node.status().num_chunks
        other.store(keys)
        assert node.status().num_chunks == before + 3
        assert other.look(keys) == [HIT] * len(keys)


def test_a_row_that_nobody_stored_is_a_miss_and_others_are_hits(node: Daemon) -> None:
    keys = keys_of(5)
    with Tier(node) as one:
        one.store(keys[1:3])
    with Tier(node) as other:
        assert other.look(keys) == [MISS, HIT, HIT, MISS, MISS]
        # The same hash in another group is other KV.
        assert other.look(keys_of(5, group=1)) == [MISS] * 5


def test_an_answer_that_nobody_waited_for_is_not_kept(node: Daemon) -> None:
    keys = keys_of(30)
    with Tier(node) as tier, Tier(node) as other:
        request = tier.request()
        assert [tier.manager.lookup(key, request) for key in keys] == [RETRY] * len(keys)
        tier.step()
        tier.manager.on_request_finished(request)
        # One thread asks: when this is known, those before have been answered.
        assert tier.look(keys_of(31, 1)) == [MISS]
        other.store(keys)
        assert tier.look(keys) == [HIT] * len(keys)


def test_a_request_says_whether_it_is_loaded_and_stored(node: Daemon) -> None:
    keys = keys_of(20)
    with Tier(node) as one, Tier(node) as other:
        one.store(keys[:1], one.request(store=False))
        assert other.look(keys[:1]) == [MISS]
        one.store(keys[1:], one.request(category="chat"))
        assert other.look(keys[1:], other.request(load=False)) == [MISS] * 4
        assert other.look(keys[1:], other.request(nonsense=1)) == [MISS] * 4
        assert other.look(keys[1:]) == [HIT] * 4
        assert {chunk.category for chunk in node.chunks()} >= {"chat"}


def test_a_request_says_how_long_its_rows_are_kept(node: Daemon) -> None:
    def stored() -> set[bytes]:
        return {chunk.key for chunk in node.chunks()} - before

    before = {chunk.key for chunk in node.chunks()}
    with Tier(node) as tier:
        tier.store(keys_of(26), tier.request(ttl_s=2.0))
    assert len(stored()) == 5
    node.until(lambda: not stored(), "its rows are kept for ever")


@pytest.mark.parametrize("mode", ["load", "store"])
def test_a_mode_is_kept(node: Daemon, mode: str) -> None:
    stored, new = keys_of(21), keys_of(22)
    with Tier(node, salt=mode) as one:
        one.store(stored)
    with Tier(node, salt=mode, mode=mode) as tier, Tier(node, salt=mode) as other:
        assert tier.look(stored) == [HIT if mode == "load" else MISS] * 5
    with Tier(node, salt=mode, mode=mode) as tier, Tier(node, salt=mode) as other:
        tier.store(new)
        assert other.look(new) == [HIT if mode == "store" else MISS] * 5


@pytest.mark.parametrize("option", [{"chunk_tokens": 32}, {"sokcet": "/x"}, {"mode": "none"}])
def test_options_that_cannot_be_are_refused(node: Daemon, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Tier(node, **option)


def test_the_primary_tier_can_be_unmapped_at_the_end(node: Daemon) -> None:
    with Tier(node) as tier:
        tier.store(keys_of(23))
        mapping = tier.spec._scheduler_mmap.mmap_obj
    assert mapping.closed
