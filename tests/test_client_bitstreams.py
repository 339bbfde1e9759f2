"""Bitstreams in the arena: a client that decodes by itself gets them, for its lease alone."""

from __future__ import annotations

import asyncio
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import kvd
from kvd.client.lease import Lease
from kvd.codecs.base import Part
from kvd.codecs.bitstream import read_header
from kvd.codecs.profile_folder import ProfileFolder
from kvd.daemon import loans as loans_module
from kvd.daemon.leases import GRACE_NS
from kvd.errors import (
    Corrupt,
    DeadlineExceeded,
    InvalidRequest,
    KvdError,
    LeaseExpired,
    TooLarge,
    Unsupported,
)
from kvd.keys import ChunkKey
from kvd.proto import kvd_pb2 as pb
from kvd.proto.limits import CODEC_SIZE_MAX, CODECS_MAX
from tests.conftest import DaemonProcess
from tests.file_faults import flip
from tests.node_daemon import NodeDaemon, stored
from tests.test_codec_daemons import LAYOUT as LARGE
from tests.test_codec_daemons import PATIENCE_S, keys_of, load, store, write_profile
from tests.tier_harness import LAYOUT, MEMORY_SIZE, quick
from tests.tier_harness import keys_of as keys_in
from tests.toy_codec import MASK, toy_codecs

PATH = [1, 2, 3]
# What this client decodes.
TOY = ("toy/1", "toy-lossy/1")


@pytest.fixture(autouse=True)
def _quick_rests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    quick(monkeypatch.setattr)
    with toy_codecs():
        yield


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[NodeDaemon]:
    """A daemon that is lossless on disk and lossy in packed memory."""
    with NodeDaemon(tmp_path, codec="nvme=toy,cpu=toy:lossy") as daemon:
        yield daemon
        daemon.settle()
        daemon.audit()
        daemon.until_lent(0)


@pytest.fixture
def client(daemon: NodeDaemon) -> Iterator[kvd.Client]:
    with daemon.connect() as client:
        yield client


@pytest.fixture
def on_disk(daemon: NodeDaemon) -> list[ChunkKey]:
    """The keys of a prompt that is on disk alone."""
    keys = daemon.put_on_disk(PATH)
    for entry in daemon.entries(PATH):
        if entry.packed is not None:
            daemon.loop.call(daemon.store.transit.unpack, entry)
    daemon.settle()
    return keys


@contextmanager
def stalled_copies() -> Iterator[threading.Event]:
    """No copy out of packed memory begins before the event."""
    go_on, copy = threading.Event(), loans_module._copy

    def stalled(target: Any, source: Any) -> None:
        assert go_on.wait(PATIENCE_S)
        copy(target, source)

    with mock.patch.object(loans_module, "_copy", stalled):
        try:
            yield go_on
        finally:
            go_on.set()


def chunk_like(lease: Lease, index: int) -> Any:
    return np.zeros(lease.shape(index), np.uint8)


def assert_decodes(lease: Lease, keys: list[ChunkKey], mask: int = 0xFF) -> None:
    assert lease.keys == keys
    for index, key in enumerate(keys):
        out = chunk_like(lease, index)
        lease.decode(index, out)
        expected = stored(key, lease.chunk_tokens(index)) & mask
        assert np.array_equal(out.reshape(-1), expected)


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize("wait", [False, True])
def test_a_chunk_on_disk_comes_as_its_bitstream(
    daemon: NodeDaemon, on_disk: list[ChunkKey], is_remote: bool, wait: bool
) -> None:
    before = daemon.store.tier.used
    with daemon.connect_remote() if is_remote else daemon.connect() as client:
        with client.pin(LAYOUT, on_disk, codecs=TOY, wait=wait) as lease:
            assert [lease.codec(index) for index in range(3)] == ["toy/1"] * 3
            assert lease.all_exact
            for index in range(3):
                bitstream = lease.bitstream(index)
                assert read_header(bitstream).codec == "toy/1"
                assert 0 < bitstream.size < lease.layout.size(7)
            assert lease.size == sum(lease.bitstream(index).size for index in range(3))
            assert_decodes(lease, on_disk)
            # The daemon has decoded nothing, and nobody else finds anything in memory.
            assert not any(entry.in_memory for entry in daemon.entries(PATH))
            assert daemon.store.counters["lend_chunks"] == 3
            daemon.audit()
        daemon.loop.until(lambda: daemon.store.tier.used == before)
        # Who does not name the codec gets chunks.
        with client.pin(LAYOUT, on_disk, codecs=("kvq/1",)) as lease:
            assert [lease.codec(index) for index in range(3)] == ["raw"] * 3
            assert np.array_equal(lease.raw(1), stored(on_disk[1], lease.chunk_tokens(1)))


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_packed_chunk_comes_as_its_bitstream(daemon: NodeDaemon, is_remote: bool) -> None:
    keys = daemon.put_packed(PATH)
    with daemon.connect_remote() if is_remote else daemon.connect() as client:
        with client.pin(LAYOUT, keys, codecs=TOY) as lease:
            assert [lease.codec(index) for index in range(3)] == ["toy-lossy/1"] * 3
            assert not any(lease.is_exact(index) for index in range(3))
            # Packed memory may need the room meanwhile.
            for entry in daemon.entries(PATH)[::-1]:
                daemon.loop.call(daemon.store.transit.unpack, entry)
            daemon.audit()
            assert_decodes(lease, keys, MASK)
        daemon.until_lent(0)


def test_what_is_raw_in_memory_stays_raw(
    daemon: NodeDaemon, client: kvd.Client, on_disk: list[ChunkKey]
) -> None:
    daemon.loop.call(daemon.node.put, [*PATH, 4])
    keys = keys_in([*PATH, 4])
    with client.pin(LAYOUT, keys, codecs=TOY) as lease:
        assert [lease.codec(index) for index in range(4)] == ["toy/1"] * 3 + ["raw"]
        assert np.array_equal(lease.raw(3), stored(keys[3], lease.chunk_tokens(3)))
        with pytest.raises(InvalidRequest, match="there raw"):
            lease.bitstream(3)
        assert_decodes(lease, keys)
        assert len(daemon.store.loans.open) == 3
    with client.pin(LAYOUT, keys[3:], codecs=TOY, standalone=True) as lease:
        assert lease.codec(0) == "raw"


def test_exact_and_bitstreams_go_together(daemon: NodeDaemon, client: kvd.Client) -> None:
    """The packed copy is approximate, the one on disk is not."""
    keys = daemon.put_on_disk(PATH)
    assert all(entry.packed for entry in daemon.entries(PATH))
    with client.pin(LAYOUT, keys, codecs=TOY) as lease:
        assert [lease.codec(index) for index in range(3)] == ["toy-lossy/1"] * 3
    with client.pin(LAYOUT, keys, codecs=TOY, exact=True) as lease:
        assert [lease.codec(index) for index in range(3)] == ["toy/1"] * 3
        assert lease.all_exact
        assert_decodes(lease, keys)


def test_views_of_a_bitstream_are_refused_and_load_decodes(
    client: kvd.Client, on_disk: list[ChunkKey]
) -> None:
    with client.pin(LAYOUT, on_disk, codecs=TOY) as lease:
        for view in (lease.raw, lease.array, lease.tensor):
            with pytest.raises(InvalidRequest, match=r"bitstream of toy/1: load\(\) or decode\(\)"):
                view(0)
        out = chunk_like(lease, 0)
        lease.load(0, out)
        assert np.array_equal(out.reshape(-1), stored(on_disk[0], lease.chunk_tokens(0)))
    tokens = [lease.chunk_tokens(index) for index in range(3)]
    outs = [np.zeros(LAYOUT.size(count), np.uint8) for count in tokens]
    assert client.load(LAYOUT, on_disk, outs, codecs=TOY) == 3
    assert np.array_equal(outs[2], stored(on_disk[2], tokens[2]))


def test_decode_fills_what_it_is_given(client: kvd.Client, on_disk: list[ChunkKey]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with client.pin(LAYOUT, on_disk, codecs=TOY) as lease:
        shape = lease.shape(0)
        expected = stored(on_disk[0], lease.chunk_tokens(0)).reshape(shape)
        room = np.zeros((*shape[:2], 2 * shape[2], *shape[3:]), np.uint8)
        lease.decode(0, room[:, :, ::2])
        assert np.array_equal(room[:, :, ::2], expected)
        assert not room[:, :, 1::2].any()
        tensor = torch.zeros(shape, dtype=torch.uint8)
        lease.decode(0, tensor)
        assert np.array_equal(tensor.numpy(), expected)
        swapped = torch.zeros((*shape[:2], shape[3], shape[2], shape[4]), dtype=torch.uint8)
        lease.load(0, swapped.transpose(2, 3))
        assert np.array_equal(swapped.transpose(2, 3).numpy(), expected)
        for out in (np.zeros(shape, np.int8), np.zeros(shape[1:], np.uint8), torch.zeros(shape)):
            with pytest.raises(InvalidRequest, match="expected, found"):
                lease.decode(0, out)


def test_decode_leaves_what_the_part_leaves_out(
    client: kvd.Client, on_disk: list[ChunkKey]
) -> None:
    part = Part(layer_start=1, layer_end=3)
    for codecs in (TOY, ()):
        with client.pin(LAYOUT, on_disk, codecs=codecs) as lease:
            expected = stored(on_disk[1], lease.chunk_tokens(1)).reshape(lease.shape(1))
            strided = np.full((*lease.shape(1), 2), 77, np.uint8)[..., 0]
            for out in (np.full(lease.shape(1), 77, np.uint8), strided):
                lease.decode(1, out, part=part)
                assert np.array_equal(out[1:3], expected[1:3])
                assert (out[0] == 77).all()
                assert (out[3] == 77).all()


def test_a_codec_that_the_client_lacks_is_unsupported(
    client: kvd.Client, on_disk: list[ChunkKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    with client.pin(LAYOUT, on_disk, codecs=TOY) as lease:
        monkeypatch.setattr("kvd.codecs.registry._OWN", {})
        with pytest.raises(Unsupported, match="toy"):
            lease.load(0, chunk_like(lease, 0))


def test_a_lookup_that_names_codecs_lets_nothing_be_decoded(
    daemon: NodeDaemon, client: kvd.Client, on_disk: list[ChunkKey]
) -> None:
    daemon.store.is_prefetching = True
    assert client.lookup(on_disk, codecs=TOY) == 3
    assert daemon.store.counters["prefetch_chunks"] == 0
    with client.pin(LAYOUT, on_disk, codecs=TOY) as lease:
        assert lease.codec(0) == "toy/1"
    assert client.lookup(on_disk) == 3
    assert daemon.store.counters["prefetch_chunks"] == 3


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("standalone", [False, True])
def test_a_damaged_record_is_lost_and_destroyed(
    daemon: NodeDaemon,
    client: kvd.Client,
    on_disk: list[ChunkKey],
    standalone: bool,
    wait: bool,
) -> None:
    path, offset, _ = daemon.node.record_of(daemon.entries(PATH)[1])
    flip(path, offset + 4096 + 300)
    options: dict[str, Any] = {"codecs": TOY, "standalone": standalone, "wait": wait}
    with client.pin(LAYOUT, on_disk, **options) as lease:
        if wait:
            expected = [on_disk[0], on_disk[2]] if standalone else on_disk[:1]
            assert_decodes(lease, expected)
        else:
            assert not lease.wait(1)
            with pytest.raises(Corrupt, match="lost on disk"):
                lease.decode(1, chunk_like(lease, 1))
        daemon.audit()
    daemon.settle()
    assert daemon.store.counters["quarantine_chunks"] == 1
    assert client.lookup(on_disk, standalone=True) == 2
    assert not daemon.store.loans.open


def test_a_damaged_record_is_lost_to_all_who_read_it(
    daemon: NodeDaemon, client: kvd.Client, on_disk: list[ChunkKey]
) -> None:
    path, offset, _ = daemon.node.record_of(daemon.entries(PATH)[0])
    with daemon.connect() as other:
        with daemon.stalled_disk():
            lent = client.pin(LAYOUT, on_disk[:1], codecs=TOY, wait=False)
            raw = other.pin(LAYOUT, on_disk[:1], wait=False)
            assert (lent.codec(0), raw.codec(0)) == ("toy/1", "raw")
            flip(path, offset + 4096 + 300)
        assert not lent.wait(0)
        assert not raw.wait(0)
        daemon.audit()
    assert client.lookup(on_disk) == 0


def test_a_damaged_record_costs_a_chunk_that_is_elsewhere_that_copy_alone(
    daemon: NodeDaemon, client: kvd.Client
) -> None:
    keys = daemon.put_on_disk([1])
    (entry,) = daemon.entries([1])
    assert entry.packed is not None
    path, offset, _ = daemon.node.record_of(entry)
    with daemon.stalled_disk(), daemon.connect() as other:
        lent = client.pin(LAYOUT, keys, codecs=TOY, exact=True, wait=False)
        with other.pin(LAYOUT, keys) as raw:
            assert not raw.all_exact
        flip(path, offset + 4096 + 300)
    assert not lent.wait(0)
    daemon.settle()
    daemon.audit()
    assert entry.on_disk is None
    assert (client.lookup(keys), client.lookup(keys, exact=True)) == (1, 0)


def test_a_device_that_refuses_costs_a_miss(
    daemon: NodeDaemon, client: kvd.Client, on_disk: list[ChunkKey]
) -> None:
    def refuse(name: str) -> None:
        if name == "preadv":
            raise OSError(5, "an error")

    daemon.node.ops.fault = refuse
    assert len(client.pin(LAYOUT, on_disk, codecs=TOY)) == 0
    daemon.node.ops.fault = lambda _: None
    daemon.settle()
    daemon.audit()
    assert not daemon.store.loans.open


def test_where_there_is_no_room_a_chunk_counts_as_not_there(
    daemon: NodeDaemon, client: kvd.Client, on_disk: list[ChunkKey]
) -> None:
    whole = LAYOUT.size(16)
    with client.reserve(
        LAYOUT,
        [ChunkKey(bytes([index]) * 32) for index in range(MEMORY_SIZE // whole)],
        standalone=True,
        wait_s=0,
    ) as reservation:
        assert len(reservation) == MEMORY_SIZE // whole
        assert len(client.pin(LAYOUT, on_disk, codecs=TOY, wait_s=0)) == 0
        assert len(client.pin(LAYOUT, on_disk, codecs=TOY, standalone=True, wait_s=0)) == 0
        daemon.audit()
    with client.pin(LAYOUT, on_disk, codecs=TOY) as lease:
        assert_decodes(lease, on_disk)


class TestEnds:
    """Whatever ends a lease, nobody reads another chunk's bytes, and nothing is leaked."""

    def test_a_late_reader_is_told_and_the_bytes_stay_until_the_grace_is_over(
        self, daemon: NodeDaemon, client: kvd.Client, on_disk: list[ChunkKey]
    ) -> None:
        lease = client.pin(LAYOUT, on_disk, codecs=TOY)
        bitstream = lease.bitstream(0)
        before = bitstream.copy()
        assert len(daemon.store.loans.open) == 3
        out = chunk_like(lease, 0)
        with mock.patch("time.monotonic_ns", return_value=lease.deadline_ns + 1):
            for read in (lease.check, partial(lease.bitstream, 0), partial(lease.decode, 0, out)):
                with pytest.raises(LeaseExpired):
                    read()
        daemon.loop.call(daemon.store.expire, lease.deadline_ns + GRACE_NS)
        assert len(daemon.store.loans.open) == 3
        assert np.array_equal(bitstream, before)
        daemon.loop.call(daemon.store.expire, lease.deadline_ns + GRACE_NS + 1)
        assert not daemon.store.loans.open
        daemon.audit()
        lease.release()

    def test_bytes_that_are_reused_under_a_decoder_are_no_damage(
        self, daemon: NodeDaemon, client: kvd.Client, on_disk: list[ChunkKey]
    ) -> None:
        lease = client.pin(LAYOUT, on_disk, codecs=TOY)
        lease.bitstream(0)[:] = 0
        out = chunk_like(lease, 0)
        with pytest.raises(Corrupt):
            lease.decode(0, out)
        lease.deadline_ns = 0
        damaged = mock.patch.object(lease, "_content", return_value=np.zeros(9, np.uint8))
        with damaged, pytest.raises(LeaseExpired):
            lease.decode(0, out)
        lease.release()

    @pytest.mark.parametrize("is_remote", [False, True])
    def test_the_end_of_the_session_frees(
        self, daemon: NodeDaemon, on_disk: list[ChunkKey], is_remote: bool
    ) -> None:
        client = daemon.connect_remote() if is_remote else daemon.connect()
        lease = client.pin(LAYOUT, on_disk, codecs=TOY)
        assert len(daemon.store.loans.open) == 3
        client.close()
        daemon.until_lent(0)
        daemon.audit()
        with pytest.raises(LeaseExpired):
            lease.check()

    def test_a_release_while_it_comes_from_disk_frees_when_it_has_come(
        self, daemon: NodeDaemon, client: kvd.Client, on_disk: list[ChunkKey]
    ) -> None:
        with daemon.stalled_disk():
            lease = client.pin(LAYOUT, on_disk, codecs=TOY, wait=False)
            with pytest.raises(DeadlineExceeded):
                lease.wait(0, timeout_s=0.05)
            lease.release()
            client.lookup([])
            daemon.audit()
            # Still being written to: nobody else may have them.
            assert len(daemon.store.loans.open) == 3
        daemon.until_lent(0)
        daemon.audit()

    def test_a_release_while_it_is_copied_frees_when_that_has_ended(
        self, daemon: NodeDaemon, client: kvd.Client
    ) -> None:
        keys = daemon.put_packed(PATH)
        with stalled_copies() as go_on:
            lease = client.pin(LAYOUT, keys, codecs=TOY, wait=False)
            assert not lease.is_released
            lease.release()
            client.lookup([])
            daemon.audit()
            assert len(daemon.store.loans.open) == 3
            go_on.set()
            daemon.until_lent(0)
        daemon.audit()

    def test_what_leaves_packed_memory_under_the_copy_is_a_miss(
        self, daemon: NodeDaemon, client: kvd.Client
    ) -> None:
        keys = daemon.put_packed(PATH)
        with stalled_copies() as go_on:
            lease = client.pin(LAYOUT, keys, codecs=TOY, wait=False)
            entry = daemon.entries(PATH)[2]
            daemon.loop.call(daemon.store.transit.unpack, entry)
            go_on.set()
            assert lease.wait(0)
            assert not lease.wait(2)
            lease.release()
        assert client.lookup(keys) == 2 + (entry.on_disk is not None)

    def test_a_clear_under_a_lease_takes_nothing_from_it(
        self, daemon: NodeDaemon, client: kvd.Client, on_disk: list[ChunkKey]
    ) -> None:
        with client.pin(LAYOUT, on_disk, codecs=TOY) as lease:
            assert client.clear() == (0, 0)
            # Whatever becomes of the record.
            for entry in daemon.entries(PATH)[::-1]:
                daemon.loop.call(daemon.store.unshelve, entry)
            daemon.audit()
            assert_decodes(lease, on_disk)
        assert client.lookup(on_disk) == 0

    def test_a_pin_that_is_given_up_gives_back_what_it_was_granted(
        self, daemon: NodeDaemon, on_disk: list[ChunkKey]
    ) -> None:
        async def story() -> None:
            address = daemon.node.config.socket
            async with await kvd.connect_async(address, timeout_s=PATIENCE_S) as client:
                with daemon.stalled_disk(), pytest.raises(DeadlineExceeded):
                    await client.pin(LAYOUT, on_disk, codecs=TOY, timeout_s=0.1)
                # An answer that came too late is looked at with the next one.
                await client.lookup([])
                daemon.until_lent(0)

        asyncio.run(story())


class TestHostile:
    """Neither side believes what cannot be."""

    @pytest.mark.parametrize(
        ("codecs", "error"),
        [
            ([""], InvalidRequest),
            (["x" * (CODEC_SIZE_MAX + 1)], InvalidRequest),
            ([f"toy/{number}" for number in range(CODECS_MAX + 1)], TooLarge),
        ],
    )
    def test_names_that_no_codec_has_are_refused(
        self,
        client: kvd.Client,
        on_disk: list[ChunkKey],
        codecs: list[str],
        error: type[KvdError],
    ) -> None:
        with pytest.raises(error, match="codec"):
            client.pin(LAYOUT, on_disk, codecs=codecs)
        with pytest.raises(error, match="codec"):
            client.lookup(on_disk, codecs=codecs)
        most = [f"toy/{number}" for number in range(CODECS_MAX)]
        with client.pin(LAYOUT, on_disk, codecs=most) as lease:
            assert lease.codec(0) == "toy/1"

    def test_raw_is_no_bitstream(self, tmp_path: Path) -> None:
        with NodeDaemon(tmp_path) as daemon, daemon.connect() as client:
            keys = daemon.put_on_disk(PATH)
            with client.pin(LAYOUT, keys, codecs=["raw"]) as lease:
                assert [lease.codec(index) for index in range(3)] == ["raw"] * 3
                assert not daemon.store.loans.open
                daemon.settle()
                assert all(entry.in_memory for entry in daemon.entries(PATH))

    @pytest.mark.parametrize(
        "lie", [{"is_approximate": b"\1"}, {"codecs": ["a", "b", "c"]}, {"starts": [1]}]
    )
    def test_an_answer_that_contradicts_itself_is_refused(
        self, client: kvd.Client, lie: dict[str, Any]
    ) -> None:
        reply = pb.PinReply(offsets=[0, 4096], sizes=[1, 1], num_tokens=[1, 1], **lie)
        with pytest.raises(Corrupt, match="2 chunks pinned"):
            Lease(
                client._connection,
                LAYOUT,
                keys_in([1, 2]),
                reply,
                is_verified=False,
                timeout_s=1,
            )


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    write_profile(tmp_path / "profiles")
    return tmp_path / "profiles"


@pytest.mark.parametrize(("rule", "codec"), [("bf16", "bf16/1"), ("kvq:none", "kvq/1")])
def test_a_whole_daemon_gives_what_it_would_decode_itself(
    tmp_path: Path, profiles: Path, rule: str, codec: str
) -> None:
    flags = ("--codec", f"nvme={rule}", "--profiles", str(profiles))
    keys = keys_of(1, 4)
    with DaemonProcess.on_disk(tmp_path, *flags) as daemon:
        with daemon.connect() as client:
            store(client, 1)
            client.persist(timeout_s=PATIENCE_S)
        daemon.kill()
        daemon.restart()
        with daemon.connect(verify=True) as client:
            with client.pin(LARGE, keys, codecs=(codec,), timeout_s=PATIENCE_S) as lease:
                assert [lease.codec(index) for index in range(4)] == [codec] * 4
                outs = [np.zeros(lease.shape(index), np.uint16) for index in range(4)]
                for index, out in enumerate(outs):
                    lease.verify(index)
                    # Each at its own position.
                    lease.decode(index, out, profiles=ProfileFolder(profiles))
                if codec == "kvq/1":
                    with pytest.raises(Unsupported, match="profile"):
                        lease.load(0, outs[0].copy())
            for found, decoded in zip(load(client, 1), outs, strict=True):
                assert np.array_equal(found, decoded)
            again = [np.zeros_like(out) for out in outs]
            options: dict[str, Any] = {"codecs": (codec,), "timeout_s": PATIENCE_S}
            book = ProfileFolder(profiles)
            assert client.load(LARGE, keys, again, profiles=book, **options) == 4
            client.status(audit=True)


@pytest.mark.parametrize("has_kernels", [False, True])
def test_a_tensor_on_a_gpu_is_filled_there_or_by_the_host(
    client: kvd.Client,
    on_disk: list[ChunkKey],
    monkeypatch: pytest.MonkeyPatch,
    has_kernels: bool,
) -> None:
    """A stand-in for the kernels: they have tests of their own, on a GPU."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    asked: list[Any] = []

    def decode_to_device(*arguments: Any) -> None:
        asked.append(arguments)
        if not has_kernels:
            raise Unsupported("no Triton")
        arguments[4][0].fill_(7)

    kernels = types.SimpleNamespace(decode_to_device=decode_to_device)
    monkeypatch.setitem(sys.modules, "kvd.codecs.gpu", kernels)
    monkeypatch.setattr("kvd.client.decoding.is_on_gpu", lambda _: True)
    monkeypatch.setattr("kvd.client.decoding.GPU_CODEC", "toy/1")
    with client.pin(LAYOUT, on_disk, codecs=TOY) as lease:
        bitstream = lease.bitstream(2).tobytes()
        out = torch.zeros(lease.shape(2), dtype=torch.uint8)
        lease.decode(2, out)
        (arguments,) = asked
        assert arguments[0][0].tobytes() == bitstream
        assert arguments[2][0].start == 32
        expected = stored(on_disk[2], lease.chunk_tokens(2))
        found = out.numpy().reshape(-1)
        assert (found == 7).all() if has_kernels else np.array_equal(found, expected)
