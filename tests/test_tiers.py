"""Two tiers through a whole daemon: what leaves memory comes back, also after the daemon."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvd
from kvd.errors import InvalidRequest, TierFailed
from tests.conftest import DaemonProcess
from tests.crash_client import pattern
from tests.tier_prompts import (
    LAYOUT,
    PATIENCE_S,
    SIZE,
    damage_payloads,
    keys_of,
    load,
    store,
    until,
)


def test_what_leaves_memory_comes_back(tmp_path: Path) -> None:
    with DaemonProcess.on_disk(tmp_path, cpu_size="16MiB") as daemon:
        with daemon.connect() as client:
            # Ten times what memory holds.
            for prompt in range(20):
                store(client, prompt)
            assert client.persist(timeout_s=PATIENCE_S) == 160
            assert [load(client, prompt) for prompt in range(20)] == [8] * 20
            status = client.status(audit=True)
            assert status.counters["promote_chunks"] >= 144
            assert status.tiers[1].num_extents == 160
            assert status.counters["demote_missed_chunks"] == 0
        assert daemon.stop() == 0


def test_what_was_acknowledged_is_there_after_a_kill(tmp_path: Path) -> None:
    with DaemonProcess.on_disk(tmp_path) as daemon:
        with daemon.connect() as client:
            store(client, 1)
            assert client.persist(keys_of(1), timeout_s=PATIENCE_S) == 8
        daemon.restart()
        with daemon.connect() as client:
            assert client.lookup(keys_of(1)) == 8
            assert load(client, 1) == 8
            # Layouts are remembered too.
            assert client.list_chunks().layouts[0].model == "tiers"


def test_a_stop_writes_what_is_only_in_memory(tmp_path: Path) -> None:
    with DaemonProcess.on_disk(tmp_path) as daemon:
        with daemon.connect() as client:
            store(client, 1)
        assert daemon.stop() == 0
        daemon.restart()
        with daemon.connect() as client:
            assert load(client, 1) == 8


def test_write_through_needs_no_eviction(tmp_path: Path) -> None:
    with (
        DaemonProcess.on_disk(tmp_path, "--nvme-write", "through") as daemon,
        daemon.connect() as client,
    ):
        store(client, 1)
        until(lambda: client.status().tiers[1].num_extents == 8, "nothing was written")


def test_only_what_is_asked_for_again_is_written(tmp_path: Path) -> None:
    with (
        DaemonProcess.on_disk(tmp_path, "--nvme-admit-hits", "2", cpu_size="16MiB") as daemon,
        daemon.connect() as client,
    ):
        store(client, 1)
        assert load(client, 1) == 8
        for prompt in range(2, 12):
            store(client, prompt)
        until(lambda: client.status().counters["demote_chunks"] == 8, "not the one prompt")
        assert load(client, 1) == 8
        assert client.lookup(keys_of(2)) == 0


def test_a_lookup_lets_chunks_come(tmp_path: Path) -> None:
    with (
        DaemonProcess.on_disk(tmp_path, cpu_size="16MiB") as daemon,
        daemon.connect() as client,
    ):
        for prompt in range(6):
            store(client, prompt)
        client.persist(timeout_s=PATIENCE_S)
        assert client.lookup(keys_of(0)) == 8
        until(lambda: client.status().counters["promote_chunks"] > 0, "nothing comes")
        assert client.status(audit=True).counters["prefetch_chunks"] > 0


def test_a_lookup_moves_nothing_when_told_so(tmp_path: Path) -> None:
    with (
        DaemonProcess.on_disk(tmp_path, "--no-nvme-prefetch", cpu_size="16MiB") as daemon,
        daemon.connect() as client,
    ):
        for prompt in range(6):
            store(client, prompt)
        client.persist(timeout_s=PATIENCE_S)
        assert client.lookup(keys_of(0)) == 8
        assert load(client, 1) == 8
        counters = client.status().counters
        assert (counters["prefetch_chunks"], counters["promote_chunks"]) == (0, 8)


def test_a_pin_that_does_not_wait_gives_the_first_layer_early(tmp_path: Path) -> None:
    with DaemonProcess.on_disk(tmp_path, "--no-nvme-prefetch") as daemon:
        with daemon.connect() as client:
            store(client, 1)
            client.persist(timeout_s=PATIENCE_S)
        daemon.restart()
        keys = keys_of(1)
        with daemon.connect() as client, client.pin(LAYOUT, keys, wait=False) as lease:
            assert len(lease) == 8
            for index in range(8):
                layer = SIZE // LAYOUT.num_layers
                assert lease.wait(index, layer, timeout_s=PATIENCE_S)
                assert lease.wait(index, timeout_s=PATIENCE_S)
                assert np.array_equal(lease.raw(index), pattern(keys[index], SIZE))


def test_the_tier_stays_within_its_size_and_keeps_what_is_asked_for(tmp_path: Path) -> None:
    with DaemonProcess.on_disk(tmp_path, "--no-nvme-prefetch", cpu_size="8MiB") as daemon:
        with daemon.connect() as client:
            store(client, 0, 6)
            for prompt in range(1, 60):
                store(client, prompt)
                # One prompt is asked for again and again, and only comes from disk.
                assert load(client, 0, 6) == 6
                disk = client.status().tiers[1]
                assert disk.disk_size <= disk.size == 256 << 20
            status = client.status(audit=True)
            assert status.counters["nvme_evict_chunks"] > 0
            assert status.counters["nvme_copy_chunks"] > 0
        files = sum(path.stat().st_size for path in (tmp_path / "nvme").glob("segment-*"))
        assert files <= 256 << 20


def test_a_tenant_stays_within_its_quota(tmp_path: Path) -> None:
    other = kvd.KVLayout(**{**vars_of(LAYOUT), "salt": "other"})
    with (
        DaemonProcess.on_disk(tmp_path, "--nvme-quota", "16MiB", cpu_size="8MiB") as daemon,
        daemon.connect() as client,
    ):
        store(client, 1, layout=other)
        client.persist(keys_of(1, layout=other), timeout_s=PATIENCE_S)
        for prompt in range(10):
            store(client, prompt)
        until(lambda: client.status().counters["nvme_quota_chunks"] > 0, "no quota")
        client.status(audit=True)
        # What one tenant does costs the other nothing.
        assert load(client, 1, layout=other) == 8


def test_clear_forgets_on_disk_too(tmp_path: Path) -> None:
    with DaemonProcess.on_disk(tmp_path) as daemon:
        with daemon.connect() as client:
            store(client, 1)
            store(client, 2)
            client.persist(timeout_s=PATIENCE_S)
            assert client.clear(keys_of(1))[0] == 8
            assert client.status(audit=True).tiers[1].num_extents == 8
            client.persist(timeout_s=PATIENCE_S)
        daemon.restart()
        with daemon.connect() as client:
            assert (client.lookup(keys_of(1)), client.lookup(keys_of(2))) == (0, 8)


def test_persist_without_a_disk_says_so(daemon: DaemonProcess) -> None:
    with daemon.connect() as client, pytest.raises(InvalidRequest, match="no tier on disk"):
        client.persist()


def test_a_chunk_larger_than_a_segment_stays_in_memory(tmp_path: Path) -> None:
    with (
        DaemonProcess.on_disk(tmp_path, nvme_size="4MiB") as daemon,
        daemon.connect() as client,
    ):
        store(client, 1)
        with pytest.raises(TierFailed, match="0 chunks are durable"):
            client.persist(timeout_s=PATIENCE_S)
        assert load(client, 1) == 8


def vars_of(layout: kvd.KVLayout) -> dict[str, object]:
    names = layout.__dataclass_fields__
    return {name: getattr(layout, name) for name in names}


def test_the_commands_persist_and_scrub(tmp_path: Path) -> None:
    with DaemonProcess.on_disk(tmp_path) as daemon, daemon.connect() as client:
        store(client, 1)
        assert kvd_json(daemon, "persist") == {"count": 8}
        found = kvd_json(daemon, "scrub")
        assert (found["num_done"], found["num_bad"], found["is_running"]) == (8, 0, False)
        assert found["size_done"] == found["size_all"] == 8 * SIZE
        damage_payloads(tmp_path / "nvme", count=2)
        found = kvd_json(daemon, "scrub", exit_code=1)
        assert (found["num_done"], found["num_bad"]) == (8, 2)
        # They are in memory as well: nothing is lost, and both are written again.
        assert load(client, 1) == 8
        assert kvd_json(daemon, "persist") == {"count": 8}
        assert kvd_json(daemon, "scrub")["num_bad"] == 0
        assert client.status(audit=True).counters["quarantine_chunks"] == 2
        tiers = kvd_json(daemon, "status")["tiers"]
        assert tiers[1]["path"] == str(tmp_path / "nvme")
        assert 1 < tiers[1]["write_amplification"] < 1.1


def test_a_damaged_record_is_a_miss(tmp_path: Path) -> None:
    with DaemonProcess.on_disk(tmp_path, "--no-nvme-prefetch") as daemon:
        with daemon.connect() as client:
            for prompt in range(3):
                store(client, prompt)
            client.persist(timeout_s=PATIENCE_S)
        daemon.kill()
        damage_payloads(tmp_path / "nvme", count=5)
        daemon.restart()
        with daemon.connect() as client:
            found = [load(client, prompt) for prompt in range(3)]
            assert sum(found) < 24
            # What is read without waiting for all of it is no different.
            with client.pin(LAYOUT, keys_of(0), wait=False, standalone=True) as lease:
                for index, key in enumerate(lease.keys):
                    if lease.wait(index, timeout_s=PATIENCE_S):
                        assert np.array_equal(lease.raw(index), pattern(key, SIZE))
            client.status(audit=True)
            assert client.status().counters["quarantine_chunks"] >= 1
            # A miss can be stored again.
            for prompt in range(3):
                store(client, prompt)
                assert load(client, prompt) == 8


def kvd_json(daemon: DaemonProcess, command: str, *, exit_code: int = 0) -> dict[str, Any]:
    """What a command of the shell says with --json."""
    words = [sys.executable, "-m", "kvd", command, "--json", "--socket", str(daemon.socket)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == exit_code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_is_held_on_disk_stays_however_much_comes(tmp_path: Path) -> None:
    # Segments of three chunks: whenever one is given back, its held chunk needs a place at once.
    with DaemonProcess.on_disk(
        tmp_path, "--no-nvme-prefetch", nvme_size="64MiB", cpu_size="8MiB"
    ) as daemon:
        with daemon.connect() as client:
            store(client, 0, 1)
            client.persist(timeout_s=PATIENCE_S)
        daemon.restart()
        with daemon.connect() as client:
            assert client.hold(keys_of(0, 1), True) == 1
            for prompt in range(1, 41):
                store(client, prompt)
                assert client.lookup(keys_of(0, 1)) == 1
            assert client.status(audit=True).counters["nvme_evict_chunks"] > 100
            assert load(client, 0, 1) == 1


def test_bytes_from_disk_travel_over_grpc_too(tmp_path: Path) -> None:
    socket = tmp_path / "grpc.sock"
    with DaemonProcess.on_disk(tmp_path, "--grpc-socket", str(socket)) as daemon:
        with kvd.connect(f"grpc+unix://{socket}") as client:
            for prompt in range(2):
                store(client, prompt)
            assert client.persist(timeout_s=PATIENCE_S) == 16
        daemon.restart()
        with kvd.connect(f"grpc+unix://{socket}") as client:
            assert load(client, 0) == 8
            # Without a wait at the pin, each chunk is waited for as it is read.
            keys = keys_of(1)
            with client.pin(LAYOUT, keys, wait=False) as lease:
                for index, key in enumerate(keys):
                    assert np.array_equal(lease.raw(index), pattern(key, SIZE))
            assert client.status(audit=True).counters["promote_chunks"] == 16


def test_asyncio_persists_too(tmp_path: Path) -> None:
    async def story(socket: Path) -> int:
        async with await kvd.connect_async(socket) as client:
            chunks = [pattern(key, SIZE) for key in keys_of(1)]
            await client.store(LAYOUT, keys_of(1), chunks)
            return await client.persist(keys_of(1), timeout_s=PATIENCE_S)

    with DaemonProcess.on_disk(tmp_path) as daemon:
        assert asyncio.run(story(daemon.socket)) == 8
