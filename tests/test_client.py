"""The client against a real daemon in a process of its own."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

import kvd
import kvd.errors
from kvd.client.lease import Lease
from kvd.errors import (
    Corrupt,
    DeadlineExceeded,
    InvalidRequest,
    LayoutMismatch,
    LeaseExpired,
    Unavailable,
    UnknownLease,
)
from kvd.keys import ChunkKey
from kvd.proto import kvd_pb2 as pb
from tests.conftest import DaemonProcess

# What a condition may take on a loaded machine, before a test gives up.
PATIENCE_S = 30


def chunk_keys(layout: kvd.KVLayout, count: int, seed: int = 0) -> list[ChunkKey]:
    tokens = np.arange(count * layout.chunk_tokens) + seed * 1_000_003
    return kvd.chain_keys(layout.fingerprint, tokens, chunk_tokens=layout.chunk_tokens)


def chunks(layout: kvd.KVLayout, count: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    shape = layout.shape(layout.chunk_tokens)
    return [random.standard_normal(shape, dtype=np.float32) for _ in range(count)]


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, "the condition never came true"
        time.sleep(0.005)


def audit(client: kvd.Client) -> pb.StatusReply:
    return client.status(audit=True)


def test_what_is_read_is_what_was_stored(daemon: DaemonProcess, layout: kvd.KVLayout) -> None:
    keys, stored = chunk_keys(layout, 5), chunks(layout, 5)
    with daemon.connect() as writer, daemon.connect() as reader:
        assert writer.store(layout, keys, stored) == ["granted"] * 5
        assert reader.lookup(keys) == 5
        outs = [np.zeros_like(chunk) for chunk in stored]
        assert reader.load(layout, keys, outs) == 5
        for out, chunk in zip(outs, stored, strict=True):
            assert out.tobytes() == chunk.tobytes()
        with reader.pin(layout, keys) as lease:
            assert len(lease) == 5
            assert lease.num_tokens == 5 * layout.chunk_tokens
            assert np.array_equal(lease.array(3), stored[3])
        assert writer.store(layout, keys, stored) == ["exists"] * 5


def test_a_prefix_is_found_by_its_tokens(daemon: DaemonProcess, layout: kvd.KVLayout) -> None:
    with daemon.connect() as client:
        client.store(layout, chunk_keys(layout, 3), chunks(layout, 3))
        tokens = np.arange(5 * layout.chunk_tokens + 3)
        assert client.lookup_tokens(layout, tokens) == 3 * layout.chunk_tokens
        tokens[20] += 1
        assert client.lookup_tokens(layout, tokens) == layout.chunk_tokens


def test_lookups_of_any_length_work(daemon: DaemonProcess, layout: kvd.KVLayout) -> None:
    keys = chunk_keys(layout, 5000)
    with daemon.connect() as client:
        client.store(layout, keys[:3], chunks(layout, 3))
        assert client.lookup(keys) == 3
        assert client.lookup(keys[1:], standalone=True) == 2
        assert client.lookup([]) == 0


def test_torch_tensors_of_any_strides_and_dtype_come_back(daemon: DaemonProcess) -> None:
    torch = pytest.importorskip("torch")
    with daemon.connect() as client:
        for dtype in ("float32", "float16", "bfloat16"):
            layout = kvd.KVLayout(
                model="t", revision="1", dtype=dtype, num_layers=2, num_kv_heads=2, head_dim=8
            )
            keys = chunk_keys(layout, 2)
            # Heads before tokens, as engines keep them: not contiguous in kvd's order.
            source = torch.randn(2, 2, 2, 512, 8).to(getattr(torch, dtype)).transpose(2, 3)
            parts = [source[:, :, :256], source[:, :, 256:]]
            assert client.store(layout, keys, parts) == ["granted"] * 2
            outs = [torch.zeros(2, 2, 2, 256, 8, dtype=source.dtype).transpose(2, 3) for _ in keys]
            assert client.load(layout, keys, outs) == 2
            for out, part in zip(outs, parts, strict=True):
                assert torch.equal(out, part)
            with client.pin(layout, keys) as lease:
                assert torch.equal(lease.tensor(1), parts[1])


def test_bytes_and_partial_chunks_are_chunks_too(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    with daemon.connect() as client:
        (first,) = chunk_keys(layout, 1)
        tail = kvd.chained_key(first, [7, 8, 9])
        data = os.urandom(layout.size(3))
        client.store(layout, [first], chunks(layout, 1))
        client.store(layout, [tail], [data], parent=first, start=16)
        out = np.empty(len(data), dtype=np.uint8)
        with client.pin(layout, [first, tail]) as lease:
            lease.load(1, out)
            assert lease.shape(1) == (2, 2, 3, 2, 8)
        assert out.tobytes() == data


def test_standalone_chunks_are_found_by_their_own_tokens(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    keys = [kvd.standalone_key(layout.fingerprint, [seed] * 16) for seed in range(4)]
    with daemon.connect() as client:
        client.store(layout, keys[:1] + keys[3:], chunks(layout, 2), standalone=True)
        with client.pin(layout, keys, standalone=True) as lease:
            assert lease.keys == [keys[0], keys[3]]


def test_a_wrong_shape_or_dtype_is_refused_and_stores_nothing(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    keys = chunk_keys(layout, 1)
    with daemon.connect() as client:
        for bad in (
            np.zeros(layout.shape(16), dtype=np.float64),
            np.zeros((2, 2, 16, 8, 2), dtype=np.float32),
            np.zeros((1, 2, 16, 2, 8), dtype=np.float32),
            bytes(layout.size(16) - 1),
        ):
            with pytest.raises(InvalidRequest):
                client.store(layout, keys, [bad])
        assert client.lookup(keys) == 0
        until(lambda: audit(client).num_reserved == 0)


def test_kv_of_another_layout_is_never_handed_out(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    other = kvd.KVLayout(
        model="other", revision="1", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8
    )
    keys = chunk_keys(layout, 2)
    with daemon.connect() as client:
        client.store(layout, keys, chunks(layout, 2))
        with pytest.raises(LayoutMismatch, match="expected, chunk"):
            client.pin(other, keys)
        assert audit(client).num_pinned == 0


def test_a_reservation_larger_than_the_tier_names_both_sizes(daemon: DaemonProcess) -> None:
    large = kvd.KVLayout(
        model="l", revision="1", dtype="float32", num_layers=64, num_kv_heads=8, head_dim=128
    )
    with daemon.connect() as client:
        with pytest.raises(kvd.errors.TooLarge, match=f"{large.size(256)} bytes.*{64 << 20}"):
            client.reserve(large, chunk_keys(large, 1))
        assert audit(client).num_reserved == 0


def test_a_reservation_ends_once(daemon: DaemonProcess, layout: kvd.KVLayout) -> None:
    keys = chunk_keys(layout, 1)
    with daemon.connect() as client:
        reservation = client.reserve(layout, keys)
        reservation.write(0, chunks(layout, 1)[0])
        assert reservation.commit() == 1
        for again in (reservation.commit, reservation.release):
            with pytest.raises(UnknownLease, match="already"):
                again()
        lease = client.pin(layout, keys)
        lease.release()
        with pytest.raises(UnknownLease, match="already"):
            lease.release()
        with pytest.raises(LeaseExpired):
            lease.array(0)


def test_an_exception_while_writing_lists_nothing(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    keys = chunk_keys(layout, 2)
    with daemon.connect() as client:
        with pytest.raises(InvalidRequest), client.reserve(layout, keys) as reservation:
            reservation.write(0, bytes(3))
        assert client.lookup(keys) == 0
        until(lambda: audit(client).num_reserved == 0)


def test_two_writers_of_one_chunk_do_not_wait_for_each_other(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    keys = chunk_keys(layout, 1)
    with daemon.connect() as one, daemon.connect() as other:
        first = one.reserve(layout, keys)
        assert other.reserve(layout, keys).states == ["busy"]
        first.release()
        until(lambda: other.reserve(layout, keys).states == ["granted"])


def test_forgotten_leases_come_back_by_themselves(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    with daemon.connect() as client:
        client.store(layout, chunk_keys(layout, 1), chunks(layout, 1))
        client.pin(layout, chunk_keys(layout, 1))
        client.reserve(layout, chunk_keys(layout, 1, seed=1))
        gc.collect()
        until(lambda: (audit(client).num_pinned, audit(client).num_reserved) == (0, 0))


def test_a_late_reader_is_told(daemon: DaemonProcess, layout: kvd.KVLayout) -> None:
    keys, stored = chunk_keys(layout, 1), chunks(layout, 1)
    with daemon.connect() as client:
        client.store(layout, keys, stored)
        lease = client.pin(layout, keys, lease_s=1e-9)
        with pytest.raises(LeaseExpired, match="deadline"):
            lease.load(0, np.empty_like(stored[0]))
        view = client.pin(layout, keys, lease_s=0.2)
        array = view.array(0)
        until(lambda: time.monotonic_ns() > view.deadline_ns)
        with pytest.raises(LeaseExpired):
            view.__exit__(None)
        assert array is not None
        with client.pin(layout, keys, lease_s=0.5) as renewed:
            renewed.renew(60)
            until(lambda: time.monotonic_ns() > renewed.deadline_ns - 59 * 10**9)
            renewed.load(0, np.empty_like(stored[0]))


def test_a_late_writer_lists_nothing(daemon: DaemonProcess, layout: kvd.KVLayout) -> None:
    keys = chunk_keys(layout, 1)
    with daemon.connect() as client:
        reservation = client.reserve(layout, keys, lease_s=1e-9)
        reservation.write(0, chunks(layout, 1)[0])
        with pytest.raises(LeaseExpired):
            reservation.commit()
        assert client.lookup(keys) == 0
        until(lambda: audit(client).num_reserved == 0)
        assert client.store(layout, keys, chunks(layout, 1)) == ["granted"]


def test_verified_chunks_that_changed_are_corrupt(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    keys, stored = chunk_keys(layout, 2), chunks(layout, 2)
    with daemon.connect(verify=True) as client, daemon.connect() as careless:
        client.store(layout, keys, stored)
        outs = [np.empty_like(chunk) for chunk in stored]
        assert client.load(layout, keys, outs) == 2
        lease = careless.pin(layout, keys)
        lease.raw(1)[100] ^= 1
        with pytest.raises(Corrupt, match="treat it as a miss"):
            client.load(layout, keys, outs)


def test_a_stalled_daemon_costs_the_deadline_and_no_more(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    keys = chunk_keys(layout, 1)
    with daemon.connect() as client:
        client.store(layout, keys, chunks(layout, 1))
        os.kill(daemon.pid, signal.SIGSTOP)
        for call in (
            lambda: client.lookup(keys, timeout_s=0.05),
            lambda: client.pin(layout, keys, timeout_s=0.05),
            lambda: client.reserve(layout, chunk_keys(layout, 1, seed=2), timeout_s=0.05),
        ):
            with pytest.raises(DeadlineExceeded, match=r"0.05 s"):
                call()
        os.kill(daemon.pid, signal.SIGCONT)
        # The late answers come now: what they granted is given back, and later calls get their own.
        assert client.lookup(keys) == 1
        until(lambda: (audit(client).num_pinned, audit(client).num_reserved) == (0, 0))
        assert client.store(layout, chunk_keys(layout, 1, seed=2), chunks(layout, 1)) == ["granted"]


def test_connecting_to_a_stalled_daemon_ends_at_the_deadline(daemon: DaemonProcess) -> None:
    os.kill(daemon.pid, signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded):
        daemon.connect(timeout_s=0.05)


def test_a_dead_daemon_is_unavailable_and_a_new_one_is_found(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    keys, stored = chunk_keys(layout, 2), chunks(layout, 2)
    with daemon.connect() as client:
        client.store(layout, keys, stored)
        lease = client.pin(layout, keys)
        reservation = client.reserve(layout, chunk_keys(layout, 1, seed=1))
        instance = client.instance
        daemon.kill()
        with pytest.raises(Unavailable, match="no daemon at"):
            client.lookup(keys)
        with pytest.raises(Unavailable, match="moment ago"):
            client.lookup(keys)
        with pytest.raises(LeaseExpired, match="session ended"):
            lease.load(0, np.empty_like(stored[0]))
        with pytest.raises(Unavailable):
            reservation.commit()
        daemon.restart()
        until(lambda: _is_back(client))
        assert client.instance != instance
        assert client.lookup(keys) == 0
        assert client.store(layout, keys, stored) == ["granted"] * 2


def _is_back(client: kvd.Client) -> bool:
    try:
        client.status()
    except Unavailable:
        return False
    return True


def test_a_restart_between_two_calls_goes_unnoticed(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    with daemon.connect() as client:
        client.store(layout, chunk_keys(layout, 1), chunks(layout, 1))
        daemon.restart()
        assert client.store(layout, chunk_keys(layout, 1), chunks(layout, 1)) == ["granted"]


def test_no_daemon_says_how_to_get_one(tmp_path: object) -> None:
    with pytest.raises(Unavailable, match="start one with `kvd start`"):
        kvd.connect(f"{tmp_path}/none.sock")
    with pytest.raises(Unavailable, match="at most 107 work"):
        kvd.connect("/tmp/" + "x" * 200)


def test_a_closed_client_stays_closed(daemon: DaemonProcess) -> None:
    client = daemon.connect()
    client.close()
    with pytest.raises(Unavailable, match="closed"):
        client.status()


def test_closing_waits_for_those_who_still_write(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    # Were the session to end now, the daemon would give the extent to somebody else.
    watcher, client = daemon.connect(), daemon.connect()
    reservation = client.reserve(layout, chunk_keys(layout, 1))
    client.close()
    reservation.array(0)[:] = 3
    assert watcher.status().num_reserved == 1
    with pytest.raises(Unavailable):
        reservation.commit()
    until(lambda: watcher.status().num_reserved == 0)
    until(lambda: watcher.status().num_sessions == 1)
    watcher.close()


def test_a_forked_child_leaves_its_parents_session_alone(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    keys, stored = chunk_keys(layout, 1), chunks(layout, 1)
    with daemon.connect() as client:
        client.store(layout, keys, stored)
        lease = client.pin(layout, keys)
        child = os.fork()
        if not child:
            # The child gets a session of its own, and ends without touching its parent's.
            code = 0 if client.lookup(keys) == 1 and client.status().num_sessions == 2 else 1
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        until(lambda: client.status().num_sessions == 1)
        assert np.array_equal(lease.array(0), stored[0])
        lease.release()


def test_threads_share_a_client(daemon: DaemonProcess, layout: kvd.KVLayout) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            keys, stored = chunk_keys(layout, 4, seed), chunks(layout, 4, seed)
            for _ in range(20):
                client.store(layout, keys, stored)
                outs = [np.empty_like(chunk) for chunk in stored]
                assert client.load(layout, keys, outs) == 4
                assert all(map(np.array_equal, outs, stored))
                client.clear(keys[:1])
        except BaseException as error:  # noqa: BLE001 - reported below
            failures.append(error)

    with daemon.connect() as client:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert audit(client).num_pinned == 0


def test_the_asynchronous_face_does_the_same(daemon: DaemonProcess, layout: kvd.KVLayout) -> None:
    async def story() -> None:
        async with await kvd.connect_async(daemon.socket) as client:
            keys, stored = chunk_keys(layout, 3), chunks(layout, 3)
            assert await client.store(layout, keys, stored) == ["granted"] * 3
            assert await client.lookup(keys) == 3
            outs = [np.empty_like(chunk) for chunk in stored]
            loads = [client.load(layout, keys, outs) for _ in range(5)]
            assert await asyncio.gather(*loads) == [3] * 5
            assert all(map(np.array_equal, outs, stored))
            with await client.pin(layout, keys) as lease:
                assert isinstance(lease, Lease)
            os.kill(daemon.pid, signal.SIGSTOP)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.pin(layout, keys, timeout_s=0.3), 0.05)
            os.kill(daemon.pid, signal.SIGCONT)
            give_up = time.monotonic() + PATIENCE_S
            while (await client.status(audit=True)).num_pinned:
                assert time.monotonic() < give_up
                await asyncio.sleep(0.01)

    asyncio.run(story())


def test_operators_hold_list_and_clear(daemon: DaemonProcess, layout: kvd.KVLayout) -> None:
    keys = chunk_keys(layout, 3)
    with daemon.connect() as client:
        client.store(layout, keys, chunks(layout, 3), category="chat", prefill_us=1234)
        assert client.hold(keys[2:], True) == 1
        assert client.clear(category="chat") == (0, 0)
        page = client.list_chunks(category="chat")
        assert [chunk.key for chunk in page.chunks if chunk.is_held] == [keys[2]]
        assert client.hold(keys, False) == 3
        assert client.clear(category="other") == (0, 0)
        assert client.clear([]) == (0, 0)
        assert client.clear(layout=layout.fingerprint) == (3, 3 * layout.size(16))
        assert audit(client).tiers[0].used == 0
