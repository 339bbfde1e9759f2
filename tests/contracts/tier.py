"""What every Tier promises. Subclass with a `tier` fixture of at least 8 MiB."""

from __future__ import annotations

import asyncio

import numpy as np

from kvd.tiers.base import Tier


class TierContract:
    def test_bytes_come_back_as_they_went_in(self, tier: Tier) -> None:
        async def story() -> None:
            extent = tier.allocate(10_000)
            assert extent is not None
            data = bytes(range(250)) * 40
            await tier.write(extent, 0, data)
            await tier.write(extent, 5, b"\xff\xfe")
            out = np.empty(9_000, dtype=np.uint8)
            await tier.read(extent, 1_000, out)
            assert out.tobytes() == data[1_000:]
            await tier.read(extent, 0, out[:10])
            assert out[:10].tobytes() == b"\x00\x01\x02\x03\x04\xff\xfe\x07\x08\x09"

        asyncio.run(story())

    def test_extents_do_not_touch_each_others_bytes(self, tier: Tier) -> None:
        async def story() -> None:
            extents = [tier.allocate(5_000) for _ in range(20)]
            for index, extent in enumerate(extents):
                assert extent is not None
                await tier.write(extent, 0, bytes([index]) * 5_000)
            out = np.empty(5_000, dtype=np.uint8)
            for index, extent in enumerate(extents):
                assert extent is not None
                await tier.read(extent, 0, out)
                assert (out == index).all()

        asyncio.run(story())

    def test_sizes_and_free_make_the_tier(self, tier: Tier) -> None:
        extents = [tier.allocate(size) for size in (1, 4096, 4097, 100_000)]
        assert all(extents)
        assert tier.used == sum(tier.allocated_size(extent) for extent in extents if extent)
        assert tier.used + sum(size for _, size in tier.free_runs()) == tier.size
        tier.check()
        for extent in extents:
            assert extent is not None
            tier.free(extent)
        assert (tier.used, tier.num_extents) == (0, 0)
        assert tier.largest_free == tier.size
        tier.check()

    def test_what_does_not_fit_is_none_and_changes_nothing(self, tier: Tier) -> None:
        assert tier.allocate(tier.size + 1) is None
        whole = tier.allocate(tier.size)
        assert whole is not None
        assert tier.allocate(1) is None
        assert tier.num_extents == 1
        tier.free(whole)
