"""The tier over the segment log: many calls at a time from an event loop, and cancelled ones."""

from __future__ import annotations

import asyncio
import errno

import pytest

from kvd.chunk import Extent
from kvd.errors import Corrupt, InvalidRequest, TierFailed
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.nvme import NvmeTier
from kvd.tiers.segment import PIECE_SIZE_MIN, checksum
from tests.file_faults import FaultyOps, pattern
from tests.nvme_log import PATIENCE_S, SEGMENT_SIZE, Opener, aligned, put


def test_many_in_flight_both_ways_from_an_event_loop(open_log: Opener) -> None:
    tier = NvmeTier(open_log(size=16 * SEGMENT_SIZE))

    async def one(seed: int) -> None:
        size = 1000 + 5000 * seed
        data = aligned(pattern(seed, size))
        extent = await tier.append(b"record %d" % seed, data, payload_checksum=checksum(data))
        assert extent is not None
        out = aligned_bytes(size)
        header = await tier.read(extent, out)
        assert header.label == b"record %d" % seed
        assert (out == data).all()
        assert await tier.read_header(extent) == header
        out[:] = 0
        starts = range(0, size, PIECE_SIZE_MIN)
        await asyncio.gather(
            *(
                tier.read_range(extent, at, out[at : at + PIECE_SIZE_MIN], header=header)
                for at in starts
            )
        )
        assert (out == data).all()

    async def story() -> None:
        await asyncio.gather(*(one(seed) for seed in range(60)))

    asyncio.run(story())
    assert tier.log.num_extents == 60
    tier.log.check()
    tier.close()


def test_a_cancelled_append_leaves_nothing_alive(open_log: Opener, ops: FaultyOps) -> None:
    tier = NvmeTier(open_log())
    put(tier.log, 0)
    gate = ops.hold_syncs()

    async def story() -> None:
        task = asyncio.ensure_future(tier.append(b"", pattern(1, 10_000)))
        assert await asyncio.to_thread(ops.at_gate.acquire, timeout=PATIENCE_S)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        # Its thread still uses the caller's memory.
        assert not task.done()
        gate.release()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(story())
    assert tier.log.num_extents == 1
    tier.log.check()
    tier.close()


def test_a_cancelled_write_that_could_not_be_made_durable_frees_nothing(
    open_log: Opener, ops: FaultyOps
) -> None:
    tier = NvmeTier(open_log())
    put(tier.log, 0)
    gate = ops.hold_syncs()

    async def story() -> None:
        task = asyncio.ensure_future(tier.append(b"", pattern(1, 10_000)))
        assert await asyncio.to_thread(ops.at_gate.acquire, timeout=PATIENCE_S)
        task.cancel()
        ops.fail("fdatasync", errno.EIO)
        gate.release()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(story())
    assert tier.log.num_extents == 1
    tier.log.check()
    tier.close()


def test_appends_at_a_time_share_their_syncs_and_each_hears_of_its_own(
    open_log: Opener, ops: FaultyOps
) -> None:
    tier = NvmeTier(open_log(size=16 * SEGMENT_SIZE))
    put(tier.log, 0)
    gate = ops.hold_syncs()
    before = ops.calls["fdatasync"]

    async def story() -> list[Extent | BaseException | None]:
        first = asyncio.ensure_future(tier.append(b"first", pattern(1, 1000)))
        assert await asyncio.to_thread(ops.at_gate.acquire, timeout=PATIENCE_S)
        others = [asyncio.ensure_future(tier.append(b"", pattern(seed, 1000))) for seed in range(6)]
        while tier.log.num_extents < 8:
            await asyncio.sleep(0)
        assert not first.done()
        ops.fail("fdatasync", errno.EIO, after=1)
        gate.release(2)
        return await asyncio.gather(first, *others, return_exceptions=True)

    first, *others = asyncio.run(story())
    assert isinstance(first, Extent)
    assert all(isinstance(found, TierFailed) for found in others)
    assert ops.calls["fdatasync"] == before + 2
    assert tier.log.num_extents == 2
    tier.close()


def test_what_fails_in_an_append_is_the_callers_to_hear(
    open_log: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = NvmeTier(open_log())
    data = pattern(1, 10_000)

    async def story() -> None:
        with pytest.raises(Corrupt, match="expected"):
            await tier.append(b"", data, payload_checksum=checksum(data) ^ 1)
        with pytest.raises(InvalidRequest):
            await tier.append(b"", data, codec="")
        monkeypatch.setattr(tier.log, "sync", lambda _: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            await tier.append(b"", data)

    asyncio.run(story())
    tier.close()


def test_the_tier_kills_too(open_log: Opener) -> None:
    tier = NvmeTier(open_log())
    extent = put(tier.log, 1)
    assert asyncio.run(tier.kill(extent))
    assert tier.log.num_extents == 0
    tier.close()
