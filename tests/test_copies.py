"""Shared copies: every byte once, whoever takes its piece."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from kvd.client import copies
from kvd.client.copies import PIECE_SIZE, SHARED_SIZE_MIN, copy


@pytest.fixture(params=[0, copies.HELPERS_MAX], autouse=True)
def num_helpers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without help, whatever the machine is doing."""
    monkeypatch.setattr(copies, "_num_idle_cores", lambda: request.param)


@pytest.mark.parametrize(
    "size", [0, 1, SHARED_SIZE_MIN - 1, SHARED_SIZE_MIN, 5 * PIECE_SIZE + 7, 16 * PIECE_SIZE]
)
def test_every_byte_arrives(size: int) -> None:
    source = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    target = np.zeros(size + 2, dtype=np.uint8)
    copy(target[1:-1], source)
    assert np.array_equal(target[1:-1], source)
    assert target[0] == target[-1] == 0


def test_shapes_and_strides_do_not_matter() -> None:
    source = np.arange(3 << 20, dtype=np.float32).reshape(3, 1024, 1024)
    target = np.zeros((1024, 3, 1024), dtype=np.float32)
    copy(target.transpose(1, 0, 2), source)
    assert np.array_equal(target.transpose(1, 0, 2), source)
    whole = np.zeros_like(source)
    copy(whole, source)
    assert np.array_equal(whole, source)


def test_many_threads_copy_at_once() -> None:
    sources = [np.full(SHARED_SIZE_MIN + seed, seed, dtype=np.uint8) for seed in range(8)]
    targets = [np.zeros_like(source) for source in sources]
    threads = [
        threading.Thread(target=copy, args=pair) for pair in zip(targets, sources, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(np.array_equal, targets, sources))


def test_a_helper_that_gets_no_core_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # All helpers are busy until the copy has returned, so it can only have been the caller's.
    monkeypatch.setattr(copies, "_num_idle_cores", lambda: copies.HELPERS_MAX)
    release = threading.Event()
    busy = [copies._helpers().submit(release.wait) for _ in range(copies.HELPERS_MAX)]
    source = np.full(4 * SHARED_SIZE_MIN, 7, dtype=np.uint8)
    target = np.zeros_like(source)
    copy(target, source)
    assert np.array_equal(target, source)
    release.set()
    assert all(future.result() for future in busy)


def test_a_forked_child_copies_with_helpers_of_its_own() -> None:
    source = np.full(4 * SHARED_SIZE_MIN, 9, dtype=np.uint8)
    copy(np.zeros_like(source), source)
    child = os.fork()
    if not child:
        target = np.zeros_like(source)
        copy(target, source)
        os._exit(0 if np.array_equal(target, source) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
