"""What requests and operators say of KV: what is stored, what is loaded, under which category."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvd.client import Client
from tests.vllm.counts import Since, num_pieces
from tests.vllm.daemon import Daemon
from tests.vllm.harness import Engine, EngineDied, Request, prompt
from tests.vllm.reference import Reference

NEW_TOKENS = 8
NUM_TOKENS = 600
NUM_PIECES = num_pieces(NUM_TOKENS)
NUM_HIT = 576

MALFORMED: list[Any] = [
    {"stroe": False},
    {"store": "no"},
    {"ttl_s": -1},
    {"category": 7},
    ["store"],
    "store",
]


def request_of(seed: int, **options: Any) -> Request:
    request: Request = {"prompt": prompt(200 + seed, NUM_TOKENS), "new_tokens": NEW_TOKENS}
    return request | ({"kv_transfer_params": {"kvd": options}} if options else {})


def ask(engine: Engine, reference: Reference, request: Request) -> None:
    """Ask an engine that has nothing itself for an answer, which must be right."""
    engine.forget()
    (answer,) = engine.generate(request)
    reference.check(request, answer)


def test_store_false_stores_nothing(node: Daemon, engine: Engine, reference: Reference) -> None:
    def store() -> None:
        ask(engine, reference, request_of(1, store=False))
        # Saves are made in order: with this one there, that one would be.
        ask(engine, reference, request_of(2))

    node.new_keys(store, NUM_PIECES)
    since = Since(engine)
    ask(engine, reference, request_of(1))
    assert (since()["miss_absent"], since()["hits"]) == (1, 0)


def test_load_false_loads_nothing(node: Daemon, engine: Engine, reference: Reference) -> None:
    node.new_keys(lambda: ask(engine, reference, request_of(3)), NUM_PIECES)
    since = Since(engine)
    ask(engine, reference, request_of(3, load=False))
    assert (since()["miss_not_wanted"], since()["hits"]) == (1, 0)
    ask(engine, reference, request_of(3))
    assert since()["hit_tokens"] == NUM_HIT


def test_params_of_others_are_no_matter(node: Daemon, engine: Engine, reference: Reference) -> None:
    request = request_of(4) | {"kv_transfer_params": {"do_remote_decode": False}}
    node.new_keys(lambda: ask(engine, reference, request), NUM_PIECES)


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_malformed_params_neither_load_nor_store(
    node: Daemon, engine: Engine, reference: Reference, number: int
) -> None:
    there, new, marker = 20 + number, 40 + number, 60 + number
    node.new_keys(lambda: ask(engine, reference, request_of(there)), NUM_PIECES)
    since = Since(engine)
    params = {"kv_transfer_params": {"kvd": MALFORMED[number]}}

    def store() -> None:
        ask(engine, reference, request_of(there) | params)
        ask(engine, reference, request_of(new) | params)
        assert (since()["hits"], since()["miss_not_wanted"]) == (0, 2)
        ask(engine, reference, request_of(marker))

    node.new_keys(store, NUM_PIECES)


def test_a_category_is_listed(node: Daemon, engine: Engine, reference: Reference) -> None:
    request = request_of(5, category="system")
    keys = node.new_keys(lambda: ask(engine, reference, request), NUM_PIECES)
    line = [sys.executable, "-m", "kvd", "ls", "--json", "--category", "system"]
    listed = subprocess.check_output([*line, "--socket", str(node.socket)])
    chunks = json.loads(listed)["chunks"]
    assert {chunk["key"] for chunk in chunks} == {key.hex() for key in keys}


def test_a_time_to_live_is_kept(node: Daemon, engine: Engine, reference: Reference) -> None:
    if "ttl_s" not in inspect.signature(Client.reserve).parameters:
        pytest.skip("the daemon keeps no time to live yet")
    request = request_of(6, ttl_s=3600)
    keys = node.new_keys(lambda: ask(engine, reference, request), NUM_PIECES)
    ends = {chunk.key: chunk.expires_in_ns / 1e9 for chunk in node.chunks()}
    assert all(3000 < ends[key] <= 3600 for key in keys)
    assert any(not end for end in ends.values()), "others have no such end"


def test_a_producer_stores_and_never_loads(
    node: Daemon, reference: Reference, tmp_path: Path
) -> None:
    transfer = node.transfer(role="kv_producer", store_tails=False, category="made")
    with Engine(tmp_path, "qwen3", **transfer) as producer:
        # Without tails, the two whole chunks.
        keys = node.new_keys(lambda: ask(producer, reference, request_of(7)), 2)
        since = Since(producer)
        ask(producer, reference, request_of(7))
        assert (since()["miss_not_wanted"], since()["hits"]) == (1, 0)
    categories = {chunk.key: chunk.category for chunk in node.chunks()}
    assert {categories[key] for key in keys} == {"made"}


def test_a_consumer_loads_what_is_worth_it_and_never_stores(
    node: Daemon, engine: Engine, reference: Reference, tmp_path: Path
) -> None:
    short: Request = {"prompt": prompt(208, 300), "new_tokens": NEW_TOKENS}
    node.new_keys(lambda: ask(engine, reference, request_of(9)), NUM_PIECES)
    node.new_keys(lambda: ask(engine, reference, short), num_pieces(300))
    transfer = node.transfer(role="kv_consumer", min_hit_tokens=300)

    def store() -> None:
        with Engine(tmp_path, "qwen3", **transfer) as consumer:
            since = Since(consumer)
            ask(consumer, reference, request_of(9))
            assert (since()["hits"], since()["miss_short"]) == (1, 0)
            ask(consumer, reference, short)
            assert (since()["hits"], since()["miss_short"]) == (1, 1)
            ask(consumer, reference, request_of(10))
            consumer.stop()

    node.new_keys(store, 0)


def test_an_option_that_is_none_stops_the_start(node: Daemon, tmp_path: Path) -> None:
    with (
        pytest.raises(EngineDied, match="kv_connector_extra_config has no 'sokcet'"),
        Engine(tmp_path, "qwen3", **node.transfer(sokcet="x")),
    ):
        pass
