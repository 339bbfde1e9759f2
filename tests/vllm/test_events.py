"""What vLLM publishes of blocks that kvd has taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import zmq
from vllm.distributed.kv_events import BlockStored, KVEventBatch

from tests.vllm.counts import num_pieces
from tests.vllm.daemon import PATIENCE_S, Daemon
from tests.vllm.harness import Engine, prompt

NUM_TOKENS = 600
NUM_STORED = 576
UNSTORED = {"new_tokens": 1, "kv_transfer_params": {"kvd": {"store": False}}}


def test_blocks_that_are_stored_are_told(node: Daemon, tmp_path: Path) -> None:
    tokens = prompt(900, NUM_TOKENS)
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.subscribe(b"")
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        events = {"enable_kv_cache_events": True, "endpoint": f"tcp://127.0.0.1:{port}"}
        with Engine(tmp_path, "qwen3", kv_events_config=events, **node.transfer()) as engine:
            found: list[BlockStored] = []

            def step_until(condition: Callable[[], bool]) -> None:
                seeds, give_up = count(901), time.monotonic() + PATIENCE_S
                while not condition():
                    assert time.monotonic() < give_up, "the blocks were never told"
                    # What was stored after a step is told with the next one.
                    engine.generate({"prompt": prompt(next(seeds), 40), **UNSTORED})
                    while socket.poll(100):
                        found.extend(stored(socket.recv_multipart()[-1]))

            # What is told before the two have found each other is lost.
            step_until(lambda: bool(found))
            found.clear()
            node.new_keys(lambda: engine.generate({"prompt": tokens}), num_pieces(NUM_TOKENS))
            step_until(lambda: sum(len(told.token_ids) for told in by_kvd(found)) >= NUM_STORED)
    pieces = by_kvd(found)
    assert [token for told in pieces for token in told.token_ids] == tokens[:NUM_STORED]
    assert {told.block_size for told in found} == {32}
    # The same names as vLLM's own, each behind the one before it.
    own = {each for told in found if told not in pieces for each in told.block_hashes}
    names = [each for told in pieces for each in told.block_hashes]
    assert len(names) == NUM_STORED // 32
    assert set(names) <= own
    parents = [told.parent_block_hash for told in pieces]
    assert parents == [None, *(told.block_hashes[-1] for told in pieces[:-1])]


def by_kvd(found: list[BlockStored]) -> list[BlockStored]:
    return [told for told in found if told.medium == "KVD"]


def stored(packet: Any) -> list[BlockStored]:
    batch = msgspec.msgpack.decode(packet, type=KVEventBatch)
    return [event for event in batch.events if isinstance(event, BlockStored)]
