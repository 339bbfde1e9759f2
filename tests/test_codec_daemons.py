"""Whole daemons whose tiers keep bitstreams: through the client, the disk and a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

import kvd
from kvd.codecs.base import Span
from kvd.codecs.kvq import Kvq
from kvd.codecs.profile_file import StoredProfile, named
from tests.codec_chunks import encoded, layout_of, numbers_of, real_chunk
from tests.codec_data import LEVELS, profile_of
from tests.conftest import DaemonProcess
from tests.tier_prompts import until

# 4 layers x 2 planes x 256 tokens x 2 heads x 64: half a MiB a chunk.
LAYOUT = layout_of(4, 2, 2, 64)
TOKENS = LAYOUT.chunk_tokens
PATIENCE_S = 30.0


def keys_of(prompt: int, count: int, layout: kvd.KVLayout = LAYOUT) -> list[kvd.ChunkKey]:
    tokens = np.full(count * TOKENS, prompt)
    return kvd.chain_keys(layout.fingerprint, tokens, chunk_tokens=TOKENS)


def chunks_of(prompt: int, count: int, layout: kvd.KVLayout = LAYOUT) -> list[NDArray[Any]]:
    chunks = (real_chunk(layout, TOKENS, seed=100 * prompt + index) for index in range(count))
    return [chunk.view(np.uint16).reshape(layout.shape(TOKENS)) for chunk in chunks]


def store(client: kvd.Client, prompt: int, count: int = 4, **options: Any) -> None:
    chunks = chunks_of(prompt, count)
    keys = keys_of(prompt, count)
    states = client.store(LAYOUT, keys, chunks, wait_s=10, timeout_s=PATIENCE_S, **options)
    assert set(states) == {"granted"}


def load(client: kvd.Client, prompt: int, count: int = 4) -> list[NDArray[Any]]:
    outs = [np.zeros(LAYOUT.shape(TOKENS), np.uint16) for _ in range(count)]
    keys = keys_of(prompt, count)
    found = client.load(LAYOUT, keys, outs, wait_s=10, timeout_s=PATIENCE_S)
    return outs[:found]


def assert_same(found: list[NDArray[Any]], prompt: int, count: int = 4) -> None:
    assert len(found) == count
    for chunk, stored in zip(found, chunks_of(prompt, count), strict=True):
        assert np.array_equal(chunk, stored)


def codecs_of(daemon: DaemonProcess) -> list[str]:
    command = [sys.executable, "-m", "kvd", "ls", "--json", "--socket", str(daemon.socket)]
    answer = subprocess.run(command, capture_output=True, check=True, timeout=60)
    return [chunk["codec"] for chunk in json.loads(answer.stdout)["chunks"]]


def write_profile(folder: Path, style: Literal["half", "pairs"] = "half") -> None:
    profile = profile_of(LAYOUT, bytes(32), LEVELS[0], style)
    # Those that need no basis.
    profile = replace(profile, levels=LEVELS[:2])
    content, _ = named(StoredProfile(profile=profile))
    folder.mkdir(exist_ok=True)
    (folder / "tiny.safetensors").write_bytes(content)


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    write_profile(tmp_path / "profiles")
    return tmp_path / "profiles"


def test_what_is_lossless_on_disk_is_the_same_bytes_after_a_kill(tmp_path: Path) -> None:
    with DaemonProcess.on_disk(tmp_path, "--codec", "nvme=bf16") as daemon:
        with daemon.connect() as client:
            store(client, 1)
            assert client.persist(timeout_s=PATIENCE_S) == 4
            counters = client.status().counters
            assert counters["encode_source_bytes"] > 1.4 * counters["encode_bytes"]
        daemon.kill()
        daemon.restart()
        assert codecs_of(daemon) == ["bf16/1"] * 4
        with daemon.connect() as client:
            assert_same(load(client, 1), 1)
            client.status(audit=True)


def test_a_category_has_a_codec_of_its_own(tmp_path: Path) -> None:
    rules = "nvme=bf16,nvme/system=raw"
    with DaemonProcess.on_disk(tmp_path, "--codec", rules) as daemon:
        with daemon.connect() as client:
            store(client, 1, category="system")
            store(client, 2, category="chat")
            client.persist(timeout_s=PATIENCE_S)
        daemon.kill()
        daemon.restart()
        assert sorted(codecs_of(daemon)) == ["bf16/1"] * 4 + ["raw"] * 4
        with daemon.connect() as client:
            assert_same(load(client, 1), 1)
            assert_same(load(client, 2), 2)


def test_a_lossy_level_gives_what_its_codec_gives(tmp_path: Path, profiles: Path) -> None:
    flags = ("--codec", "nvme=kvq:none", "--profiles", str(profiles))
    with DaemonProcess.on_disk(tmp_path, *flags) as daemon:
        with daemon.connect() as client:
            store(client, 1, count=1)
            client.persist(timeout_s=PATIENCE_S)
        daemon.kill()
        daemon.restart()
        assert codecs_of(daemon) == ["kvq/1"]
        with daemon.connect() as client:
            (found,) = load(client, 1, count=1)
    book = kvd_book(profiles)
    codec = Kvq("none", book)
    (chunk,) = chunks_of(1, 1)
    bitstream = encoded(codec, chunk.reshape(-1).view(np.uint8), LAYOUT)
    expected = np.empty_like(chunk)
    span = Span(start=0, num_tokens=TOKENS)
    codec.decode(bitstream, LAYOUT, span, expected.reshape(-1).view(np.uint8))
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, chunk)
    near = numbers_of(found.reshape(-1).view(np.uint8), LAYOUT)
    assert np.abs(near - numbers_of(chunk.reshape(-1).view(np.uint8), LAYOUT)).max() < 2


def test_a_profile_that_is_gone_is_a_miss_and_never_a_guess(tmp_path: Path, profiles: Path) -> None:
    flags = ("--codec", "nvme=kvq:none", "--profiles", str(profiles))
    with DaemonProcess.on_disk(tmp_path, *flags) as daemon:
        with daemon.connect() as client:
            store(client, 1)
            client.persist(timeout_s=PATIENCE_S)
        daemon.kill()
        # Another calibration of the same model.
        write_profile(profiles, "pairs")
        daemon.restart()
        with daemon.connect() as client:
            assert load(client, 1) == []
            assert client.status(audit=True).counters["decode_errors"] == 4
            store(client, 1)
            assert_same(load(client, 1), 1)


def test_memory_has_room_for_more_when_it_is_packed(tmp_path: Path) -> None:
    """18 MiB of chunks in 16 MiB of memory, of which 4 are mapped."""
    flags = ("--codec", "cpu=bf16", "--cpu-packed-size", "14MiB")
    with DaemonProcess(tmp_path, *flags, cpu_size="18MiB") as daemon, daemon.connect() as client:
        prompts = range(10)
        for prompt in prompts:
            store(client, prompt)
        until(lambda: client.status().counters["pack_chunks"] == 40, "chunks are never packed")
        for prompt in prompts:
            assert_same(load(client, prompt), prompt)
        status = client.status(audit=True)
        assert status.num_chunks == 40
        assert status.counters["unpack_chunks"] > 20
        assert [tier.name for tier in status.tiers] == ["cpu", "packed"]
        assert sum(tier.size for tier in status.tiers) == 18 << 20


def test_codecs_are_compiled_before_the_daemon_is_ready(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, "--codec", "cpu=bf16,cpu/rag=kvq:2") as daemon:
        lines = daemon.log.read_text().splitlines()
    ready = next(index for index, line in enumerate(lines) if "event=ready" in line)
    told = [
        line.partition("codec=")[2].split()[0] for line in lines[:ready] if "codec_ready" in line
    ]
    assert sorted(told) == ["bf16", "kvq"]


def test_a_file_that_is_no_profile_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / "broken.safetensors").write_bytes(b"no profile")
    flags = ("--codec", "cpu=kvq:2", "--profiles", str(folder))
    with DaemonProcess(tmp_path, *flags) as daemon, daemon.connect() as client:
        store(client, 1)
        until(lambda: "event=not_encoded" in daemon.log.read_text(), "nobody hears of it")
        assert "event=profile_unreadable" in daemon.log.read_text()
        assert_same(load(client, 1), 1)


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ("nvme=nope", "codec 'nope' does not exist here"),
        ("nvme=bf16:3", "bf16 has no levels"),
        ("cpu=cachegen:1", "cachegen has no levels"),
    ],
)
def test_a_codec_that_cannot_be_is_refused_at_the_start(
    tmp_path: Path, rules: str, reason: str
) -> None:
    command = [sys.executable, "-m", "kvd", "start", "--socket", str(tmp_path / "kvd.sock")]
    disk = ["--tiers", "cpu,nvme", "--nvme-path", str(tmp_path / "nvme"), "--cpu-size", "64MiB"]
    found = subprocess.run(
        [*command, *disk, "--codec", rules], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 1
    assert reason in found.stderr
    assert not (tmp_path / "nvme").exists()


def kvd_book(folder: Path) -> Any:
    from kvd.codecs.profile_folder import ProfileFolder

    return ProfileFolder(folder)
