"""The second door when kvd fails: engines compute, and wait for nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvd.client.connectors import vllm_offloading
from kvd.keys import ChunkKey
from tests.vllm.daemon import Daemon
from tests.vllm.offloading_tier import HIT, MISS, PATIENCE_S, RETRY, Tier, contents, keys_of

# None of a tier's methods waits. One that did would take as long as the daemon is given, which is
# twice this and more; a machine that is busy otherwise takes less.
CALL_S_MAX = 1.0


def test_a_row_that_is_lost_before_its_load_is_a_miss_from_then_on(tmp_path: Path) -> None:
    keys = keys_of(10)
    with Daemon(tmp_path) as daemon:
        with Tier(daemon) as one:
            one.store(keys)
        with Tier(daemon) as other:
            request = other.request()
            while other.manager.lookup(keys[0], request) is RETRY:
                other.manager.lookup(keys[1], request)
                other.step()
            # Both are wanted now, and their load begins with the end of the step.
            other.manager.lookup(keys[1], request)
            daemon.clear()
            assert other.look(keys, request) == [MISS] * len(keys)
            assert other.look(keys, request) == [MISS] * len(keys)


def test_a_part_of_a_load_that_failed_counts(tmp_path: Path) -> None:
    keys = keys_of(11)
    with Daemon(tmp_path) as daemon:
        with Tier(daemon, verify=True) as one:
            one.store(keys)
        victim = ChunkKey(daemon.chunks()[0].key)
        daemon.overwrite([victim], lambda tensor: tensor.add_(1))
        with Tier(daemon, verify=True) as other:
            found = other.look(keys)
            assert sorted(found, key=str) == [HIT] * 4 + [MISS]
            good = [key for key, result in zip(keys, found, strict=True) if result is HIT]
            assert other.rows(good) == [contents(key).tobytes() for key in good]


@pytest.mark.parametrize("is_paused", [False, True], ids=["killed", "paused"])
def test_a_daemon_that_does_not_answer_costs_misses_and_no_time(
    tmp_path: Path, is_paused: bool
) -> None:
    keys, more = keys_of(12), keys_of(13, 3)
    with Daemon(tmp_path) as daemon, Tier(daemon, lookup_s=2.0, store_s=3.0) as tier:
        tier.store(keys_of(14, 1))
        tier.slowest_s = 0.0
        if is_paused:
            with daemon.paused():
                _serves_alone(tier, keys, more)
        else:
            daemon.kill()
            _serves_alone(tier, keys, more)
            daemon.start()
        tier.until_done()
        # It is found again, though what was stored meanwhile is not in it.
        give_up = time.monotonic() + PATIENCE_S
        for seed in range(100, 1000):
            tier.store(keys_of(seed, 1))
            if daemon.status().num_chunks > 1:
                break
            assert time.monotonic() < give_up, "nothing is stored any more"


def _serves_alone(tier: Tier, keys: list[bytes], more: list[bytes]) -> None:
    begun = time.monotonic()
    assert tier.look(keys) == [MISS] * len(keys)
    tier.store(more)
    assert tier.look(more) == [HIT] * len(more)
    assert tier.slowest_s < CALL_S_MAX
    # A lookup and a store, each with its own deadline.
    assert time.monotonic() - begun < 10


def test_after_an_answer_that_came_too_late_nobody_asks_for_a_while(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, Tier(daemon, lookup_s=0.5) as tier:
        tier.store(keys_of(24, 1))
        with daemon.paused():
            begun = time.monotonic()
            for seed in range(200, 220):
                assert tier.look(keys_of(seed, 1)) == [MISS]
            # Each of them alone would have taken half a second.
            assert time.monotonic() - begun < 5


def test_what_a_request_left_unanswered_can_be_asked_again(tmp_path: Path) -> None:
    keys = keys_of(27)
    with Daemon(tmp_path) as daemon, Tier(daemon, lookup_s=0.5) as tier:
        tier.store(keys_of(28, 1))
        with daemon.paused():
            for _ in range(3):
                request = tier.request()
                assert [tier.manager.lookup(key, request) for key in keys] == [RETRY] * len(keys)
                tier.step()
                tier.manager.on_request_finished(request)
            assert tier.look(keys) == [MISS] * len(keys)
            # One thread asks: when this is known, all of the others have been answered.
            assert tier.look(keys_of(29, 1)) == [MISS]


def test_a_store_that_the_daemon_does_not_follow_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_offloading, "STORES_MAX", 1)
    first, second = keys_of(15, 1), keys_of(16, 1)
    with Daemon(tmp_path) as daemon, Tier(daemon, store_s=30.0) as tier:
        tier.store(keys_of(17, 1))
        with daemon.paused():
            request = tier.request()
            for keys in (first, second):
                tier.manager.prepare_store(keys, request)
                tier.manager.complete_store(keys, request)
        tier.until_done()
        assert daemon.status().num_chunks == 2


def test_an_engine_ends_while_the_daemon_hangs(tmp_path: Path) -> None:
    keys, more = keys_of(18, 2), keys_of(19, 1)
    with Daemon(tmp_path) as daemon:
        tier = Tier(daemon, lookup_s=0.25, store_s=1.0)
        tier.store(more)
        with daemon.paused():
            request = tier.request()
            tier.manager.prepare_store(keys, request)
            tier.manager.complete_store(keys, request)
            tier.manager.lookup(keys_of(25, 1)[0], request)
            tier.step()
            begun = time.monotonic()
            tier.manager.shutdown()
            assert time.monotonic() - begun < 5
