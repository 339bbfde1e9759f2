"""SIGKILLs of a daemon with a disk: what was acknowledged is there, and nothing is ever wrong.

docs/crash-contract.md says the same as a table, and names these tests.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import kvd
from tests.tier_judge import PATIENCE_S, TierDaemon, Writers, judge, until
from tests.tier_writer import keys_of, load, store

# Of the daemon, all runs together.
KILLS = 200

# Restarts from one judgement to the next.
JUDGE_EVERY = 5

HELD_KILLS = 12

# That go before each of these kills: a segment's worth.
CHUNKS_RECLAIMED = 50


@dataclass
class Tally:
    """What a run did."""

    kills: Counter[str] = field(default_factory=Counter)
    num_acknowledged: int = 0
    num_verified: int = 0
    num_reclaimed: int = 0


def kill_again_and_again(folder: Path, seed: int, *flags: str, keeps_all: bool) -> Tally:
    """Half of all kills. With `keeps_all` the log is so large that nothing is ever given back."""
    folder.mkdir()
    chance, tally = random.Random(seed), Tally()
    daemon = TierDaemon(folder, folder / "nvme", *flags)
    writers = Writers(folder, daemon.socket)
    try:
        for count in range(1, KILLS // 2 + 1):
            _strike(daemon, writers, chance, tally)
            daemon.start()
            if count % JUDGE_EVERY == 0:
                with daemon.connect() as client:
                    must = writers.said().done if keeps_all else []
                    tally.num_verified += judge(client, writers, must, chance)[1]
                    tally.num_reclaimed += client.status().counters["nvme_evict_chunks"]
        writers.kill()
        with daemon.connect() as client:
            must = writers.said().done if keeps_all else []
            tally.num_verified += judge(client, writers, must, chance, is_thorough=True)[1]
        tally.num_acknowledged = len(writers.said().done)
    finally:
        writers.kill()
        daemon.kill()
    return tally


def _strike(daemon: TierDaemon, writers: Writers, chance: random.Random, tally: Tally) -> None:
    """Kill the daemon at some moment of its start or its work, sometimes after its index."""
    moment = chance.choices(["start", "work", "index", "client"], [30, 55, 10, 5])[0]
    if moment == "start":
        time.sleep(chance.random() * 0.6)
    else:
        writers.advance(chance.randint(1, 800))
        time.sleep(chance.random() * 0.01)
    if moment == "client":
        writers.kill()
        writers.start()
    if moment == "index":
        assert daemon.kill_index()
        time.sleep(chance.random() * 0.05)
    tally.kills[moment] += 1
    daemon.kill()


def test_two_hundred_kills_lose_nothing_acknowledged_and_make_nothing_up(tmp_path: Path) -> None:
    sizes = {
        "roomy": ("--nvme-size", "1GiB", "--cpu-size", "4MiB"),
        "tight": ("--nvme-size", "4MiB", "--cpu-size", "2MiB"),
    }
    with ThreadPoolExecutor(2) as pool:
        runs = {
            name: pool.submit(
                kill_again_and_again, tmp_path / name, seed, *flags, keeps_all=name == "roomy"
            )
            for seed, (name, flags) in enumerate(sizes.items())
        }
    tallies = {name: run.result() for name, run in runs.items()}
    print(tallies)
    assert sum(sum(tally.kills.values()) for tally in tallies.values()) == KILLS
    assert all(tally.num_acknowledged > KILLS for tally in tallies.values())
    assert (tallies["roomy"].num_reclaimed, tallies["tight"].num_reclaimed > 0) == (0, True)


def test_what_is_held_outlives_kills_while_segments_are_given_back(tmp_path: Path) -> None:
    chance = random.Random(5)
    # Segments of 1 MiB: twice what is held, so that there always is room for its copies.
    flags = ("--nvme-size", "16MiB", "--cpu-size", "2MiB")
    daemon = TierDaemon(tmp_path, tmp_path / "nvme", *flags)
    writers = Writers(tmp_path, daemon.socket)
    held = range(10, 20)
    num_copied = 0
    try:
        writers.freeze()
        with daemon.connect() as client:
            for prompt in held:
                store(client, prompt)
            client.persist(timeout_s=PATIENCE_S)
        for _ in range(HELD_KILLS):
            with daemon.connect() as client:
                for prompt in held:
                    # A hold ends with its daemon.
                    keys = keys_of(prompt)
                    assert client.hold(keys, True) == load(client, prompt) == len(keys)
                writers.thaw()
                until(partial(has_evicted, client, CHUNKS_RECLAIMED), "no reclaim")
                time.sleep(chance.random() * 0.1)
                num_copied += client.status(audit=True).counters["nvme_copy_chunks"]
                assert all(
                    client.lookup(keys_of(prompt)) == len(keys_of(prompt)) for prompt in held
                )
            writers.freeze()
            daemon.kill()
            daemon.start()
        with daemon.connect() as client:
            assert all(load(client, prompt) == len(keys_of(prompt)) for prompt in held)
        assert num_copied > 0
    finally:
        writers.kill()
        daemon.kill()


def test_a_held_chunk_is_never_between_two_copies(tmp_path: Path) -> None:
    flags = ("--nvme-size", "8MiB", "--cpu-size", "2MiB", "--nvme-write", "through")
    daemon = TierDaemon(tmp_path, tmp_path / "nvme", *flags)
    held = range(10, 20)
    try:
        with daemon.connect() as client:
            for prompt in held:
                store(client, prompt)
                client.hold(keys_of(prompt), True)
            client.persist(timeout_s=PATIENCE_S)
            # From here on the index hears of no new copy: none may take the old one's place.
            index = daemon.index_pid()
            assert index is not None
            os.kill(index, signal.SIGSTOP)
            for prompt in range(100, 500):
                store(client, prompt, wait_s=0.02)
            until(lambda: has_copied(client), "nothing was copied on")
        daemon.kill()
        daemon.start()
        with daemon.connect() as client:
            assert all(load(client, prompt) == len(keys_of(prompt)) for prompt in held)
    finally:
        daemon.kill()


def has_copied(client: kvd.Client) -> bool:
    return client.status().counters["nvme_copy_chunks"] > 0


def has_evicted(client: kvd.Client, count: int) -> bool:
    return client.status().counters["nvme_evict_chunks"] > count
