"""Rows of vLLM's primary tier on their way to kvd and back, without vLLM."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvd
from kvd.client.connectors.late_client import LateClient
from kvd.client.connectors.vllm_offloading_rows import Rows
from kvd.client.connectors.vllm_options import Options, RequestOptions
from kvd.errors import DeadlineExceeded
from tests.daemon_in_thread import PATIENCE_S, DaemonInThread

LAYOUT = kvd.KVLayout(
    model="some",
    revision="v1",
    dtype="uint8",
    num_layers=1,
    num_planes=1,
    num_kv_heads=1,
    head_dim=64,
    chunk_tokens=16,
    axes="opaque",
    rope="",
)
ROW_SIZE = LAYOUT.size(LAYOUT.chunk_tokens)
NAMES = [bytes([number]) * 32 for number in range(4)]


class Tier:
    """Four rows of noise; `rows` moves them."""

    def __init__(self, daemon: DaemonInThread) -> None:
        self.memory = np.random.default_rng(0).integers(0, 256, (4, ROW_SIZE), np.uint8)
        self.client = LateClient(lambda: kvd.connect(daemon.local, timeout_s=PATIENCE_S))
        self.rows = Rows(self.client, LAYOUT, Options(), memoryview(self.memory))

    def store(self, give_up: float) -> int:
        places = {name: row for row, name in enumerate(NAMES)}
        return self.rows.store(places, RequestOptions(), give_up)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonInThread]:
    daemon = DaemonInThread(tmp_path)
    yield daemon
    daemon.stop()


@pytest.fixture
def tier(daemon: DaemonInThread) -> Iterator[Tier]:
    tier = Tier(daemon)
    yield tier
    tier.client.close()


def later() -> float:
    return time.monotonic() + PATIENCE_S


def test_rows_come_back_where_they_are_wanted(tier: Tier) -> None:
    assert tier.store(later()) == 4 * ROW_SIZE
    assert tier.rows.present([*NAMES, b"x" * 32], later()) == {*NAMES}
    before = tier.memory.copy()
    tier.memory[:] = 0
    loaded = list(tier.rows.load({NAMES[1]: 3, NAMES[2]: 0}, later()))
    assert loaded == [NAMES[1], NAMES[2]]
    assert np.array_equal(tier.memory[[3, 0]], before[[1, 2]])
    assert not tier.memory[1:3].any()


def test_rows_that_are_there_are_not_stored_again(tier: Tier) -> None:
    tier.store(later())
    assert tier.store(later()) == 0


def test_who_has_no_time_left_asks_nobody_and_others_may_ask(tier: Tier) -> None:
    for call in (
        lambda: tier.rows.present(NAMES, time.monotonic()),
        lambda: list(tier.rows.load({NAMES[0]: 0}, time.monotonic())),
        lambda: tier.store(time.monotonic()),
    ):
        with pytest.raises(DeadlineExceeded, match="other rows took all of the time"):
            call()
    # A rest would be for a daemon that is slow.
    assert tier.store(later()) == 4 * ROW_SIZE
