"""Encryption at rest: what a thief reads, what a forger can make of it, what a wrong key opens."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from kvd.chunk import Extent
from kvd.errors import ConfigError, Corrupt
from kvd.tiers import cipher as cipher_module
from kvd.tiers import cipher_key, segment_reader
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.cipher import Cipher
from kvd.tiers.cipher_key import load_cipher
from kvd.tiers.segment import (
    BLOCK_SIZE,
    NO_KEY,
    PIECE_SIZE_MIN,
    RecordHeader,
    checksum,
    pack_header,
    parse_header,
)
from kvd.tiers.segment_log import SegmentLog
from tests.file_faults import flip, pattern
from tests.test_segment import block_of, hex_dump

SEGMENT_SIZE = 8 << 20
SIZE = 2_100_000
KEY = bytes(range(0x80, 0xA0))
OTHER_KEY = bytes(range(32))

Opener = Callable[..., SegmentLog]


@pytest.fixture
def open_log(tmp_path: Path) -> Iterator[Opener]:
    """Opens the log of the test's folder with a key; the one before is closed."""
    opened: list[SegmentLog] = []

    def open_one(key: bytes | None = KEY, **options: object) -> SegmentLog:
        if opened:
            opened.pop().close()
        opened.append(make_log(tmp_path / "kv", key, **options))
        return opened[0]

    yield open_one
    if opened:
        opened.pop().close()


def make_log(path: Path, key: bytes | None, **options: object) -> SegmentLog:
    made = Cipher(key) if key is not None else None
    options = {"segment_size": SEGMENT_SIZE, "cipher": made, **options}
    return SegmentLog(path, 4 * SEGMENT_SIZE, **options)  # type: ignore[arg-type]


def put(log: SegmentLog, seed: int, size: int = SIZE) -> Extent:
    data = pattern(seed, size)
    extent = log.append(b"record %d" % seed, data, payload_checksum=checksum(data))
    assert extent is not None
    log.sync([extent])
    return extent


def get(log: SegmentLog, extent: Extent) -> tuple[RecordHeader, NDArray[np.uint8]]:
    out = aligned_bytes(extent.size)
    return log.read(extent, out), out


class Disk:
    """The file of the first segment, in a forger's hands: every checksum is made to fit."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "kv" / "segment-00000000"

    def read(self, offset: int, size: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def write(self, offset: int, content: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(content)

    def header(self, extent: Extent) -> RecordHeader:
        return parse_header(self.read(extent.offset, BLOCK_SIZE))

    def write_block(self, offset: int, block: bytes) -> None:
        body = block[: BLOCK_SIZE - 8]
        self.write(offset, body + struct.pack("<Q", checksum(body)))


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.mark.parametrize("size", [1, 4096, 300_000, SIZE, 7_000_000])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("place", ["disk", "memory"])
def test_bytes_come_back_as_they_went_in(tmp_path: Path, size: int, shift: int, place: str) -> None:
    folder = tmp_path if place == "disk" else Path("/dev/shm") / f"kvd-test-{os.getpid()}"
    if not folder.parent.is_dir():
        pytest.skip("no tmpfs here")
    memory = aligned_bytes(size + shift)[shift:]
    memory[:] = pattern(1, size)
    log = make_log(folder / "kv", KEY)
    try:
        extent = log.append(b"label", memory, codec="kvq/1", payload_checksum=checksum(memory))
        assert extent is not None
        assert (memory == pattern(1, size)).all()
        heard: list[int] = []
        out = aligned_bytes(size + shift)[shift:]

        def progress(count: int) -> None:
            heard.append(count)
            assert (out[:count] == memory[:count]).all()

        header = log.read_stream(extent, out, check=lambda _: None, progress=progress)
        assert heard == [*range(1 << 20, size, 1 << 20), size]
        assert (header.label, header.codec) == (b"label", "kvq/1")
        assert header.payload_checksum == checksum(memory)
        assert log.read_header(extent) == header
        start = (header.payload_size - 1) // PIECE_SIZE_MIN * PIECE_SIZE_MIN
        part = aligned_bytes(size - start)
        log.read_range(extent, start, part)
        assert (part == memory[start:]).all()
        assert [found.header for found in log.scan()] == [header]
    finally:
        log.close()
        shutil.rmtree(folder / "kv")
        if place == "memory":
            folder.rmdir()


def test_the_disk_tells_nothing_of_the_payload(open_log: Opener, disk: Disk) -> None:
    data = np.resize(pattern(1, 4096), 600_000)
    log = open_log()
    extent = log.append(b"label", data, payload_checksum=checksum(data))
    again = log.append(b"label", data)
    assert extent is not None
    assert again is not None
    content = disk.path.read_bytes()
    assert data[:16].tobytes() not in content
    assert struct.pack("<Q", checksum(data)) not in content
    assert struct.pack("<Q", checksum(data[:PIECE_SIZE_MIN])) not in content
    # The same payload twice is nothing to see either.
    first, second = disk.header(extent), disk.header(again)
    assert not {*first.pieces, *first.tags, first.tag} & {*second.pieces, *second.tags, second.tag}


def test_records_survive_a_restart(open_log: Opener) -> None:
    held = {put(open_log(), seed): seed for seed in range(3)}
    log = open_log()
    for extent, seed in held.items():
        assert log.adopt(extent)
        header, out = get(log, extent)
        assert header.label == b"record %d" % seed
        assert (out == pattern(seed, SIZE)).all()


@pytest.mark.parametrize("is_header_lost", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (KEY, OTHER_KEY, "is encrypted with key {first}, key {second} was given: give that one"),
        (KEY, None, "is encrypted with key {first}, no key was given: give that one"),
        (None, KEY, "is not encrypted, key {second} was given: give none"),
    ],
    ids=["another key", "no key", "a key for a plain log"],
)
def test_a_wrong_key_is_refused_at_the_start_and_harms_nothing(
    open_log: Opener,
    tmp_path: Path,
    first: bytes | None,
    second: bytes | None,
    words: str,
    is_header_lost: bool,
) -> None:
    log = open_log(first)
    extent = put(log, 1)
    log.close()
    if is_header_lost:
        (tmp_path / "kv" / "log").unlink()
    names = {"first": first, "second": second}
    ids = {name: Cipher(key).key_id.hex() if key else "" for name, key in names.items()}
    with pytest.raises(ConfigError) as caught:
        make_log(tmp_path / "kv", second)
    assert words.format(**ids) in str(caught.value)
    assert "another folder" in str(caught.value)
    for key in (KEY, OTHER_KEY):
        assert key.hex() not in str(caught.value)
    log = open_log(first)
    assert [found.extent for found in log.scan()] == [extent]
    assert (get(log, extent)[1] == pattern(1, SIZE)).all()


def test_a_segment_of_another_key_is_void(open_log: Opener, disk: Disk) -> None:
    log = open_log()
    put(log, 1)
    log.retire()
    kept = put(log, 2)
    # A forger makes the first segment one without a key.
    block = bytearray(disk.read(0, BLOCK_SIZE))
    block[64:80] = NO_KEY
    disk.write_block(0, bytes(block))
    log = open_log()
    assert [found.extent for found in log.scan()] == [kept]
    assert [segment.status for segment in log.segments()] == ["void", "active"]


def test_a_record_of_another_key_says_so() -> None:
    payload = pattern(1, 1000)
    plain = RecordHeader(
        log_id=b"l" * 16,
        life=1,
        sequence=2,
        offset=4096,
        payload_size=1000,
        payload_checksum=0,
        pieces=(0,),
        label=b"",
    )
    sealed = Cipher(KEY).seal(plain, payload, np.empty_like(payload))
    for header in (sealed, plain):
        with pytest.raises(Corrupt, match=f"of key {Cipher(OTHER_KEY).key_id.hex()} expected"):
            Cipher(OTHER_KEY).open_header(header)


def test_a_plain_log_never_returns_what_is_encrypted(open_log: Opener, disk: Disk) -> None:
    log = open_log(None)
    extent = put(log, 1, 1000)
    header = replace(disk.header(extent), key_id=b"k" * 16, tags=(bytes(16),))
    disk.write_block(extent.offset, pack_header(header))
    with pytest.raises(Corrupt):
        get(log, extent)
    assert list(log.scan()) == []


# Everything that a record's header says, and what is reserved in it.
CHANGED = (
    8,
    10,
    16,
    32,
    40,
    48,
    56,
    64,
    72,
    76,
    80,
    84,
    99,
    100,
    111,
    112,
    127,
    128,
    160,
    256,
    320,
)
CHANGED += (512, 527, 512 + 16 * 8, 1024, 1280, 1285, 1300, 3839)


@pytest.mark.parametrize("at", CHANGED)
def test_a_changed_header_never_returns(open_log: Opener, disk: Disk, at: int) -> None:
    log = open_log()
    extent, other = put(log, 1), put(log, 2)
    block = bytearray(disk.read(extent.offset, BLOCK_SIZE))
    block[at] ^= 1
    disk.write_block(extent.offset, bytes(block))
    with pytest.raises(Corrupt):
        get(log, extent)
    with pytest.raises(Corrupt):
        log.read_header(extent)
    # Whoever can write can also hide what he did not change; he cannot make it another's.
    assert {found.extent for found in log.scan()} <= {other}
    assert (get(log, other)[1] == pattern(2, SIZE)).all()


def test_damage_is_told_from_a_forgers_work(
    open_log: Opener, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log()
    extent = put(log, 1)
    flip(disk.path, extent.offset + BLOCK_SIZE + PIECE_SIZE_MIN * 5)
    with pytest.raises(Corrupt, match="piece 5 of the record at 4096 is damaged"):
        get(log, extent)
    # XXH3 is no secret: who wants to finds other bytes with the same checksum.
    header = disk.header(extent)
    monkeypatch.setattr(segment_reader, "checksum", forged(header))
    heard: list[int] = []
    out = aligned_bytes(SIZE)
    with pytest.raises(Corrupt, match="piece 5 of an encrypted record was changed"):
        log.read_stream(extent, out, check=lambda _: None, progress=heard.append)
    assert heard == [1 << 20]
    # Of what was changed nothing stays in the caller's memory.
    assert not out[5 * PIECE_SIZE_MIN : 6 * PIECE_SIZE_MIN].any()


def forged(header: RecordHeader) -> Callable[[object], int]:
    """Says of piece after piece that it has its checksum."""
    checksums = iter(header.pieces)
    return lambda _: next(checksums)


def test_a_forged_checksum_of_a_changed_piece_never_returns(open_log: Opener, disk: Disk) -> None:
    log = open_log()
    extent = put(log, 1, 100_000)
    at = extent.offset + BLOCK_SIZE
    changed = bytes(byte ^ 1 for byte in disk.read(at, 100_000))
    disk.write(at, changed)
    header = replace(disk.header(extent), pieces=(checksum(changed),))
    disk.write_block(extent.offset, pack_header(header))
    with pytest.raises(Corrupt, match="header of an encrypted record was changed"):
        get(log, extent)


@pytest.mark.parametrize("what", ["payload", "payload and tags", "record", "piece"])
def test_swapped_bytes_never_return(open_log: Opener, disk: Disk, what: str) -> None:
    log = open_log()
    extents = [put(log, seed, 600_000) for seed in (1, 2)]
    headers = [disk.header(extent) for extent in extents]
    size = 600_000 if what != "piece" else PIECE_SIZE_MIN
    places = [extent.offset + BLOCK_SIZE for extent in extents]
    if what == "piece":
        places[1] = places[0] + PIECE_SIZE_MIN
        (first, second, *rest), (tag, next_tag, *tags) = headers[0].pieces, headers[0].tags
        headers[0] = replace(
            headers[0],
            pieces=(second, first, *rest),
            tags=(next_tag, tag, *tags),
        )
        disk.write_block(extents[0].offset, pack_header(headers[0]))
    payloads = [disk.read(place, size) for place in places]
    for place, payload in zip(places, reversed(payloads), strict=True):
        disk.write(place, payload)
    for extent, own, other in zip(extents, headers, reversed(headers), strict=True):
        swapped = own
        if what == "payload and tags":
            swapped = replace(own, pieces=other.pieces, tags=other.tags, tag=other.tag)
            swapped = replace(swapped, nonce=other.nonce, payload_checksum=other.payload_checksum)
        elif what == "record":
            swapped = replace(other, offset=own.offset)
        disk.write_block(extent.offset, pack_header(swapped))
        if what != "piece" or extent is extents[0]:
            with pytest.raises(Corrupt):
                get(log, extent)


def test_a_plain_record_in_an_encrypted_segment_is_none(open_log: Opener, disk: Disk) -> None:
    log = open_log()
    extent, other = put(log, 1, 1000), put(log, 2, 1000)
    payload = pattern(3, 1000)
    plain = replace(
        disk.header(extent),
        payload_checksum=checksum(payload),
        pieces=(checksum(payload),),
        key_id=NO_KEY,
        nonce=bytes(12),
        tag=bytes(16),
        tags=(),
    )
    disk.write_block(extent.offset, pack_header(plain))
    disk.write(extent.offset + BLOCK_SIZE, payload.tobytes())
    with pytest.raises(Corrupt):
        get(log, extent)
    assert [found.extent for found in log.scan()] == [other]


class Seals:
    """Stands where GCM is made, and asserts that no key meets a nonce for the second time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: set[tuple[bytes, bytes]] = set()
        self.repeats = 0
        self._real = cipher_module.Gcm
        monkeypatch.setattr(cipher_module, "Gcm", self.make)

    def make(self, key: object, mode: object) -> object:
        # A decryptor is given the tag; it repeats what the encryptor did.
        if mode.tag is None:  # type: ignore[attr-defined]
            pair = (key.key, mode.initialization_vector)  # type: ignore[attr-defined]
            self.repeats += pair in self.seen
            self.seen.add(pair)
        return self._real(key, mode)  # type: ignore[arg-type]


def write_some(log: SegmentLog, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 4)):
        assert log.append(b"", pattern(1, chance.choice([1000, 600_000]))) is not None


def test_no_key_meets_a_nonce_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seals = Seals(monkeypatch)
    chance = random.Random(5)
    # The worst of random sources: within one log, and between logs, it is not needed.
    monkeypatch.setattr(cipher_module.os, "urandom", lambda size: bytes(size))
    for name in ("one", "two"):
        for _ in range(5):
            with contextlib.closing(make_log(tmp_path / name, KEY)) as log:
                write_some(log, chance)
    assert len(seals.seen) > 40
    assert seals.repeats == 0


def test_no_key_meets_a_nonce_twice_when_the_disk_is_rolled_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seals = Seals(monkeypatch)
    with contextlib.closing(make_log(tmp_path / "kv", KEY)) as log:
        write_some(log, random.Random(1))
    before = len(seals.seen)
    shutil.copytree(tmp_path / "kv", tmp_path / "image")
    for _ in range(4):
        # The same image, the same run, the same sequences, other bytes.
        shutil.rmtree(tmp_path / "kv")
        shutil.copytree(tmp_path / "image", tmp_path / "kv")
        with contextlib.closing(make_log(tmp_path / "kv", KEY)) as log:
            write_some(log, random.Random(2))
    assert len(seals.seen) > before + 4
    assert seals.repeats == 0


def test_the_page_is_enough_to_read_a_record(open_log: Opener, disk: Disk) -> None:
    log = open_log()
    extent = put(log, 1, 600_000)
    block = disk.read(extent.offset, BLOCK_SIZE)
    key = blake2b(
        block[16:32] + block[40:48], key=KEY, digest_size=32, person=b"kvd record key"
    ).digest()
    nonce = int.from_bytes(block[100:112], "big")
    gcm = AESGCM(key)
    plain = b""
    for number in range(3):
        at = extent.offset + BLOCK_SIZE + number * PIECE_SIZE_MIN
        piece = disk.read(at, min(PIECE_SIZE_MIN, 600_000 - number * PIECE_SIZE_MIN))
        tag = block[512 + 16 * number : 528 + 16 * number]
        plain += gcm.decrypt((nonce ^ (number + 1)).to_bytes(12, "big"), piece + tag, None)
    assert plain == pattern(1, 600_000).tobytes()
    authenticated = bytearray(block[:4088])
    authenticated[64:72] = bytes(8)
    authenticated[112:128] = bytes(16)
    hidden = gcm.decrypt(nonce.to_bytes(12, "big"), block[64:72] + block[112:128], authenticated)
    assert struct.unpack("<Q", hidden)[0] == checksum(pattern(1, 600_000))
    assert block[84:100] == blake2b(key=KEY, digest_size=16, person=b"kvd key id").digest()


def test_the_pages_example_is_what_the_code_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cipher_module.os, "urandom", lambda size: bytes(range(0x30, 0x30 + size)))
    payload = np.frombuffer(b"kvd" * 100_000, dtype=np.uint8)
    plain = RecordHeader(
        log_id=bytes(range(0x10, 0x20)),
        life=0x0123456789ABCDEF,
        sequence=(1 << 40) + 2,
        offset=4096,
        payload_size=300_000,
        payload_checksum=checksum(payload),
        pieces=(0, 0),
        label=b"hello",
    )
    sealed = Cipher(KEY).seal(plain, payload, np.empty_like(payload))
    block = block_of(hex_dump("An encrypted record"))
    assert pack_header(sealed) == block
    opened = Cipher(KEY).open_header(parse_header(block))
    assert opened.payload_checksum == checksum(payload)


def test_without_a_key_nothing_of_the_package_is_needed() -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "import kvd.tiers.nvme, kvd.tiers.cipher_key as keys\n"
        "from pathlib import Path\n"
        "try: keys.load_cipher(None, 'echo ' + 64 * '1')\n"
        "except keys.ConfigError as error: print(error)\n"
    )
    root = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert "pip install 'kvd-cache[encryption]'" in found.stdout


def key_file(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400])
@pytest.mark.parametrize(
    "content",
    [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n", b" \t" + KEY.hex().encode()],
)
def test_a_key_comes_from_a_file_or_a_command(tmp_path: Path, content: bytes, mode: int) -> None:
    path = key_file(tmp_path / "key", content, mode)
    assert load_cipher(path, None).key_id == Cipher(KEY).key_id
    assert load_cipher(None, f"cat '{path}'").key_id == Cipher(KEY).key_id


@pytest.mark.parametrize(
    "content",
    [b"", KEY[:31], KEY + b"\n", KEY.hex().encode()[:-1], b"g" * 64, b"\xff" * 64, bytes(100_000)],
)
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = key_file(tmp_path / "key", content)
    for arguments in [(path, None), (None, f"cat {path}")]:
        with pytest.raises(ConfigError, match="32 bytes or 64 hex digits wanted"):
            load_cipher(*arguments)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o620])
def test_a_key_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path / "key", KEY, mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}\\): chmod 600"):
        load_cipher(path, None)


def test_a_key_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_cipher(tmp_path / "key", None)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="has 0 bytes"):
        load_cipher(tmp_path / "pipe", None)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "is empty"),
        ("'", "cannot be split"),
        ("/no/such/command secret", "/no/such/command cannot be run: No such file"),
        ("false secret", "false ended with 1"),
    ],
)
def test_a_key_command_that_fails_says_how_and_not_what(command: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_cipher(None, command)
    assert "secret" not in str(caught.value)


def test_a_key_command_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cipher_key, "COMMAND_S_MAX", 0.1)
    with pytest.raises(ConfigError, match=r"did not end within 0\.1 s"):
        load_cipher(None, "sleep 600")


def test_one_source_of_the_key_is_wanted(tmp_path: Path) -> None:
    for arguments in [(None, None), (key_file(tmp_path / "key", KEY), "cat")]:
        with pytest.raises(ConfigError, match="one of the two"):
            load_cipher(*arguments)


def test_no_error_shows_the_key(tmp_path: Path) -> None:
    spoilt = KEY.hex()[:-1] + "x"
    path = key_file(tmp_path / "key", spoilt.encode())
    for arguments in [(path, None), (None, f"cat {path}")]:
        with pytest.raises(ConfigError) as caught:
            load_cipher(*arguments)
        error: BaseException | None = caught.value
        while error is not None:
            assert spoilt[:8] not in str(error)
            error = error.__cause__
    with pytest.raises(ConfigError, match="32 bytes is wanted, found 33"):
        Cipher(KEY + b"1")
    assert KEY.hex()[:8] not in repr(Cipher(KEY))
