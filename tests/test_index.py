"""The index: what is committed comes back, whoever asks, and the page that describes it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import lmdb
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from kvd.chunk import CATEGORY_SIZE_MAX, REUSE_SIZE_MAX
from kvd.daemon import index as index_module
from kvd.daemon import index_channel, index_format
from kvd.daemon.index import ChunkIndex, FoundIndex, IndexRecord
from kvd.daemon.index_database import MAP_SIZE_MAX, Database, OldDatabase
from kvd.daemon.index_format import (
    HEADER_NAME,
    LAYOUT_SIZE_MAX,
    Header,
    is_sealed,
    pack_header,
    pack_layout,
    pack_record,
    parse_header,
    parse_layout,
    parse_record,
)
from kvd.daemon.index_frames import BODY_SIZE, pack_put
from kvd.daemon.index_queue import ChangeQueue
from kvd.daemon.labels import LABEL_SIZE_MAX
from kvd.errors import Corrupt, InvalidRequest, TierFailed, Unsupported
from kvd.tiers import segment
from tests.index_writer import LOG_ID, NUM_KEYS, key_of, record_of
from tests.test_labels import META, PAGE, hex_dump

LAYOUTS = {bytes([n]) * 32: b"layout %d" % n for n in range(3)}


async def filled(folder: Path, numbers: range) -> ChunkIndex:
    """A complete index of these records and all layouts."""
    index, _ = await ChunkIndex.open(folder, LOG_ID)
    await index.reset([record_of(number) for number in numbers], LAYOUTS)
    return index


async def reopened(index: ChunkIndex, folder: Path) -> tuple[ChunkIndex, FoundIndex]:
    await index.close()
    return await ChunkIndex.open(folder, LOG_ID)


async def found_in(folder: Path, log_id: bytes = LOG_ID) -> FoundIndex:
    index, found = await ChunkIndex.open(folder, log_id)
    assert index.failure == ""
    await index.close()
    return found


def records_of(numbers: range) -> list[IndexRecord]:
    return sorted(record_of(number) for number in numbers)


def run(story: Coroutine[Any, Any, None]) -> None:
    """A minute or two is far beyond every bound of the index: what takes longer hangs."""
    asyncio.run(asyncio.wait_for(story, 120))


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_what_is_committed_comes_back(tmp_path: Path, new_loop: Any) -> None:
    async def story() -> None:
        index = await filled(tmp_path, range(0))
        for number in range(200):
            index.put(record_of(number, label_size=number * 12))
        for fingerprint, encoded in LAYOUTS.items():
            index.put_layout(fingerprint, encoded)
        await index.commit()
        index, found = await reopened(index, tmp_path)
        assert found.reason == index.failure == ""
        wanted = sorted(record_of(number, label_size=number * 12) for number in range(200))
        assert sorted(found.records) == wanted
        assert found.layouts == LAYOUTS
        await index.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(story())


def test_a_new_copy_replaces_the_old_and_a_delete_takes_only_what_it_names(tmp_path: Path) -> None:
    async def story() -> None:
        index = await filled(tmp_path, range(10))
        newer = [record_of(number + NUM_KEYS) for number in range(4)]
        for record in newer:
            index.put(record)
        await index.commit()
        # The old copies of 0 and 1 are gone already; 2 is deleted where it is; 5 as well.
        index.delete(key_of(0), record_of(0).offset)
        index.delete(key_of(1), record_of(1).offset)
        index.delete(key_of(2), newer[2].offset)
        index.delete(key_of(5), record_of(5).offset)
        index.delete(key_of(77), 4096)
        await index.commit()
        index, found = await reopened(index, tmp_path)
        kept = [record_of(number) for number in (4, 6, 7, 8, 9)]
        assert sorted(found.records) == sorted([newer[0], newer[1], newer[3], *kept])
        await index.close()

    run(story())


def test_closing_commits_what_is_queued(tmp_path: Path) -> None:
    async def story() -> None:
        index = await filled(tmp_path, range(0))
        index.put(record_of(1))
        index, found = await reopened(index, tmp_path)
        assert found.records == [record_of(1)]
        await index.close()

    run(story())


def test_those_who_wait_share_transactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        index = await filled(tmp_path, range(0))
        assert index._channel is not None
        sent = []
        send = index._channel.send

        def watch(kind: bytes, body: bytes = b"") -> None:
            sent.append(kind)
            send(kind, body)

        monkeypatch.setattr(index._channel, "send", watch)

        async def one(number: int) -> None:
            index.put(record_of(number))
            await index.commit()

        await asyncio.gather(*map(one, range(100)))
        # The first goes by itself, the others gather meanwhile.
        assert len(sent) == 2
        index, found = await reopened(index, tmp_path)
        assert sorted(found.records) == records_of(range(100))
        await index.close()

    run(story())


def test_what_comes_in_while_others_fly_is_not_durable_with_them() -> None:
    async def story() -> None:
        queue = ChangeQueue()
        queue.add(b"first")
        first = asyncio.ensure_future(queue.wait())
        await asyncio.sleep(0)
        assert queue.take() == b"first"
        queue.add(b"second")
        second = asyncio.ensure_future(queue.wait())
        await asyncio.sleep(0)
        assert queue.take() == b""
        queue.landed()
        await first
        assert not second.done()
        assert queue.take() == b"second"
        queue.landed()
        await second

    run(story())


def test_a_commit_that_is_cancelled_keeps_the_changes_and_the_others(tmp_path: Path) -> None:
    async def story() -> None:
        index = await filled(tmp_path, range(0))
        index.put(record_of(1))
        hasty, patient = (asyncio.ensure_future(index.commit()) for _ in range(2))
        await asyncio.sleep(0)
        hasty.cancel()
        await patient
        assert hasty.cancelled()
        index, found = await reopened(index, tmp_path)
        assert found.records == [record_of(1)]
        await index.close()

    run(story())


def test_many_changes_go_out_though_nobody_asks(tmp_path: Path) -> None:
    async def story() -> None:
        index = await filled(tmp_path, range(0))
        for number in range(index_module.SEND_COUNT):
            index.put(record_of(number))
        assert len(index._queue) == index_module.SEND_COUNT
        async with asyncio.timeout(60):
            while len(index._queue) or index._queue.num_flying:
                await asyncio.sleep(0.001)
        assert index.failure == ""
        await index.close()

    run(story())


def test_a_commit_larger_than_a_frame_is_whole(tmp_path: Path) -> None:
    async def story() -> None:
        index = await filled(tmp_path, range(0))
        numbers = range(NUM_KEYS)
        for number in numbers:
            index.put(record_of(number, label_size=2560))
            index.put_layout(bytes([number % 256]) * 32, bytes(LAYOUT_SIZE_MAX))
        assert index._queue.size > 8 * BODY_SIZE
        await index.commit()
        index, found = await reopened(index, tmp_path)
        assert sorted(found.records) == sorted(record_of(n, label_size=2560) for n in numbers)
        assert set(found.layouts.values()) == {bytes(LAYOUT_SIZE_MAX)}
        assert len(found.layouts) == 256
        await index.close()

    run(story())


def test_a_reset_leaves_exactly_what_it_is_given_and_what_comes_meanwhile(tmp_path: Path) -> None:
    async def story() -> None:
        index = await filled(tmp_path, range(100))
        index.put(record_of(400))
        beginning = asyncio.ensure_future(index.reset(records_of(range(50, 60)), {}))
        await asyncio.sleep(0)
        index.put(record_of(61))
        index.delete(key_of(50), record_of(50).offset)
        await index.commit()
        assert beginning.done()
        index, found = await reopened(index, tmp_path)
        assert sorted(found.records) == sorted([*records_of(range(51, 60)), record_of(61)])
        assert (found.layouts, found.reason) == ({}, "")
        await index.close()

    run(story())


def test_progress_is_told_while_records_come_in(tmp_path: Path) -> None:
    async def story() -> None:
        await (await filled(tmp_path, range(0))).close()
        index = await filled(tmp_path, range(0))
        # Five hundred keys of 2.6 KB are more than one frame.
        for number in range(NUM_KEYS):
            index.put(record_of(number, label_size=2560))
        await index.close()
        told: list[int] = []
        index, _ = await ChunkIndex.open(tmp_path, LOG_ID, on_progress=told.append)
        assert told == sorted(told)
        assert len(told) > 1
        assert told[-1] == NUM_KEYS
        await index.close()

    run(story())


def test_a_first_opening_wants_a_rebuild_and_the_reset_ends_that(tmp_path: Path) -> None:
    async def story() -> None:
        index, found = await ChunkIndex.open(tmp_path, LOG_ID)
        assert found.reason.startswith("missing")
        # It works all the same; but what came in is not all there is.
        index.put(record_of(1))
        await index.commit()
        index, found = await reopened(index, tmp_path)
        assert found.reason.startswith("incomplete")
        assert found.records == [record_of(1)]
        await index.reset([record_of(2)], {})
        index, found = await reopened(index, tmp_path)
        assert (found.reason, found.records) == ("", [record_of(2)])
        await index.close()

    run(story())


def test_an_index_of_another_log_is_not_used(tmp_path: Path) -> None:
    async def story() -> None:
        await (await filled(tmp_path, range(5))).close()
        found = await found_in(tmp_path, b"another log here")
        assert found.reason.startswith("other log")
        assert (found.records, found.layouts) == ([], {})

    run(story())


def test_an_index_of_another_version_is_not_used(tmp_path: Path) -> None:
    async def story() -> None:
        await (await filled(tmp_path, range(5))).close()
        entry = bytearray(HEADER_NAME + pack_header(Header(LOG_ID, is_complete=True)))
        entry[9] = 2
        sealed = index_format._seal(bytes(entry[:-8]))
        put_raw(tmp_path, HEADER_NAME, sealed[1:])
        found = await found_in(tmp_path)
        assert found.reason.startswith("version")
        assert (found.records, found.layouts) == ([], {})
        assert (await found_in(tmp_path)).reason.startswith("incomplete")

    run(story())


def put_raw(folder: Path, name: bytes, value: bytes | None) -> None:
    """Change the database as no index would."""
    path = str(folder / "index" / "data.mdb")
    with lmdb.open(path, subdir=False, lock=False) as env, env.begin(write=True) as txn:
        assert txn.delete(name) if value is None else txn.put(name, value)


@pytest.mark.parametrize(
    "value", [b"", b"short", bytes(100), bytes(200_000), pack_record(record_of(2))[33:], None]
)
def test_a_bad_value_is_dropped_and_the_index_is_to_be_rebuilt(
    tmp_path: Path, value: bytes | None
) -> None:
    async def story() -> None:
        await (await filled(tmp_path, range(5))).close()
        put_raw(tmp_path, b"\2" + key_of(1), value)
        found = await found_in(tmp_path)
        assert sorted(found.records) == sorted(record_of(number) for number in (0, 2, 3, 4))
        assert found.reason.startswith("damaged")
        assert found.layouts == LAYOUTS
        assert (await found_in(tmp_path)).reason.startswith("incomplete")

    run(story())


def test_an_old_record_in_a_new_ones_place_is_seen(tmp_path: Path) -> None:
    async def story() -> None:
        await (await filled(tmp_path, range(5))).close()
        old = record_of(1 + NUM_KEYS)
        put_raw(tmp_path, b"\2" + old.key, pack_record(old)[33:])
        found = await found_in(tmp_path)
        assert found.reason.startswith("damaged: 8 good entries")
        assert old in found.records

    run(story())


@pytest.mark.parametrize("value", [None, b"", bytes(40), bytes(100_000)])
def test_an_index_without_its_header_is_not_used(tmp_path: Path, value: bytes | None) -> None:
    async def story() -> None:
        await (await filled(tmp_path, range(5))).close()
        put_raw(tmp_path, HEADER_NAME, value)
        found = await found_in(tmp_path)
        assert found.reason.startswith("damaged")
        assert found.records == []

    run(story())


def test_of_two_indexes_in_a_folder_the_second_fails_and_says_who_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        first = await filled(tmp_path, range(5))
        assert first._channel is not None
        monkeypatch.setattr(index_channel, "LOCK_S_MAX", 0.1)
        second, found = await ChunkIndex.open(tmp_path, LOG_ID)
        assert f"in use by process {first._channel.pid}" in found.reason
        assert found.reason.startswith("unusable")
        assert "in use by process" in second.failure
        second.put(record_of(7))
        with pytest.raises(TierFailed, match="in use by process"):
            await second.commit()
        first.put(record_of(6))
        await first.commit()
        await second.close()
        monkeypatch.undo()
        first, found = await reopened(first, tmp_path)
        assert sorted(found.records) == sorted([*records_of(range(5)), record_of(6)])
        await first.close()

    run(story())


def test_a_closed_index_takes_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        index = await filled(tmp_path, range(5))
        await index.close()
        await index.close()
        index.put(record_of(6))
        with pytest.raises(TierFailed, match="closed"):
            await index.commit()
        with pytest.raises(TierFailed, match="closed"):
            await index.reset([], {})
        assert sorted((await found_in(tmp_path)).records) == records_of(range(5))

    run(story())


def test_what_a_log_cannot_hold_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        index = await filled(tmp_path, range(0))
        good = record_of(1)
        for bad in (
            good._replace(label=bytes(2561)),
            good._replace(codec=""),
            good._replace(codec="c" * 33),
            good._replace(codec="ü"),
        ):
            with pytest.raises(InvalidRequest):
                index.put(bad)
        with pytest.raises(InvalidRequest):
            index.put_layout(bytes(32), bytes(LAYOUT_SIZE_MAX + 1))
        with pytest.raises(InvalidRequest):
            index.put_layout(b"short", b"")
        await index.close()

    run(story())


def test_a_full_map_grows_and_its_bound_holds(tmp_path: Path) -> None:
    old = OldDatabase(tmp_path, LOG_ID)
    database = Database(tmp_path, LOG_ID, map_size=1 << 16, map_size_max=1 << 22)
    database.append([pack_record(record) for record in records_of(range(300))])
    database.place(is_complete=True)
    database.write(b"".join(pack_put(pack_record(record_of(number))) for number in range(300, 500)))
    with pytest.raises(lmdb.MapFullError):
        database.write(
            b"".join(pack_put(pack_layout(bytes([n]) * 32, bytes(65536))) for n in range(100))
        )
    database.close()
    entries = [entry for batch in old.batches() for entry in batch]
    assert [parse_record(entry) for entry in entries] == records_of(range(500))
    assert old.reason == ""


def test_the_process_outlives_the_signals_that_stop_a_daemon(tmp_path: Path) -> None:
    async def story() -> None:
        index = await filled(tmp_path, range(5))
        assert index._channel is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(index._channel.pid, number)
        index.put(record_of(6))
        await index.commit()
        await index.close()

    run(story())


def test_the_process_is_small() -> None:
    from tests.test_package import modules_after

    loaded = modules_after("import kvd.daemon.index_process")
    assert not loaded & {"numpy", "grpc", "google", "asyncio", "uvloop", "logging"}


u64 = st.integers(0, 2**64 - 1)
records = st.builds(
    IndexRecord,
    key=st.binary(min_size=32, max_size=32),
    offset=u64,
    size=u64,
    life=u64,
    checksum=u64,
    label=st.binary(max_size=2560),
    codec=st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=32),
)


@given(records)
def test_records_come_back_as_they_went_in(record: IndexRecord) -> None:
    entry = pack_record(record)
    assert is_sealed(entry)
    assert parse_record(entry) == record


def test_every_flipped_or_cut_entry_is_seen() -> None:
    for entry in (
        HEADER_NAME + pack_header(Header(LOG_ID, is_complete=True)),
        pack_layout(bytes(32), b"layout"),
        pack_record(record_of(1)),
    ):
        for at in range(len(entry)):
            assert not is_sealed(entry[:at])
            for mask in (1, 0x80, 0xFF):
                flipped = entry[:at] + bytes([entry[at] ^ mask]) + entry[at + 1 :]
                assert not is_sealed(flipped)


@given(st.binary(max_size=200))
def test_sealed_nonsense_is_corrupt_or_what_it_says(body: bytes) -> None:
    with suppress(Corrupt):
        entry = index_format._seal(b"\2" + body)
        assert pack_record(parse_record(entry)) == entry
    with suppress(Corrupt):
        entry = index_format._seal(b"\1" + body)
        assert pack_layout(*parse_layout(entry)) == entry
    with suppress(Corrupt, Unsupported):
        value = index_format._seal(b"\0" + body)[1:]
        assert pack_header(parse_header(value)) == value


def test_the_pages_example_is_what_the_code_writes() -> None:
    header = Header(bytes(range(0x10, 0x20)), is_complete=True, total=0x0123456789ABCDEF)
    record = IndexRecord(
        key=META.key,
        offset=7 * (256 << 20) + 4096,
        size=300_000,
        life=0x0123456789ABCDEF,
        checksum=0x5405A705D7C9EC7F,
        label=b"hello",
    )
    dump = hex_dump("The header's entry")
    assert dump == HEADER_NAME + pack_header(header)
    assert parse_header(dump[1:]) == header
    dump = hex_dump("A layout's entry")
    assert dump == pack_layout(META.layout, b"layout")
    assert parse_layout(dump) == (META.layout, b"layout")
    dump = hex_dump("A record's entry")
    assert dump == pack_record(record)
    assert parse_record(dump) == record


def test_the_page_names_the_real_limits() -> None:
    text = PAGE.read_text()
    assert index_format.LABEL_SIZE_MAX == segment.LABEL_SIZE_MAX
    assert index_format.CODEC_SIZE_MAX == segment.CODEC_SIZE_MAX
    numbers = (REUSE_SIZE_MAX, LABEL_SIZE_MAX, segment.LABEL_SIZE_MAX, LAYOUT_SIZE_MAX)
    for number in (*numbers, MAP_SIZE_MAX):
        assert f"{number:,}" in text
    assert f"{CATEGORY_SIZE_MAX} bytes" in text
    assert f"version {index_format.FORMAT_VERSION}" in text
