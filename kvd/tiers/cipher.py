"""Cipher: AES-256-GCM for records at rest, of one key. docs/formats/segment.md, Encryption.

The one idea: no key is ever used with the same nonce for other bytes. Each record has a key of its
own, derived from the operator's and the record's name (log id and sequence), and a random nonce. A
name never comes twice in a log; where a restored copy of a disk makes it come twice, the nonce is
another.

    counter 0      header: what stands in it is authenticated, the storer's checksum hidden
    counter n + 1  piece n of the payload
"""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from hashlib import blake2b

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher as Gcm
from cryptography.hazmat.primitives.ciphers import CipherContext, algorithms, modes
from numpy.typing import NDArray

from kvd.errors import ConfigError, Corrupt
from kvd.tiers.segment import (
    CHECKSUM_AT,
    KEY_ID_SIZE,
    NONCE_SIZE,
    TAG_SIZE,
    RecordHeader,
    checksum,
    pack_header,
    pieces_of,
)

KEY_SIZE = 32

# A call of the library keeps the interpreter to itself: 256 KiB take twenty microseconds.
STEP_SIZE = 256 << 10

_U64 = struct.Struct("<Q")


class Cipher:
    """Seals and opens records with `key`, 32 bytes. Thread-safe; it never shows the key.

    `key_id` names the key and tells nothing about it.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_SIZE:
            raise ConfigError(f"a key of {KEY_SIZE} bytes is wanted, found {len(key)}")
        self._key = key
        self.key_id = blake2b(key=key, digest_size=KEY_ID_SIZE, person=b"kvd key id").digest()

    def seal(
        self, header: RecordHeader, payload: NDArray[np.uint8], out: NDArray[np.uint8]
    ) -> RecordHeader:
        """Encrypt `payload` into `out`, both `uint8 [header.payload_size]`; the header to write.

        `header` has the storer's checksum in the clear; its pieces are not looked at.
        """
        nonce = os.urandom(NONCE_SIZE)
        key = self._record_key(header)
        checksums, tags = [], []
        parts = zip(pieces_of(payload), pieces_of(out), strict=True)
        for number, (source, target) in enumerate(parts):
            gcm = Gcm(key, modes.GCM(_nonce(nonce, number + 1))).encryptor()
            _run(gcm, source, target)
            gcm.finalize()
            checksums.append(checksum(target))
            tags.append(gcm.tag)
        plain = _U64.pack(header.payload_checksum)
        sealed = replace(
            header,
            key_id=self.key_id,
            nonce=nonce,
            pieces=tuple(checksums),
            tags=tuple(tags),
        )
        gcm = Gcm(key, modes.GCM(_nonce(nonce, 0))).encryptor()
        gcm.authenticate_additional_data(_authenticated(sealed))
        (hidden,) = _U64.unpack(gcm.update(plain) + gcm.finalize())
        return replace(sealed, payload_checksum=hidden, tag=gcm.tag)

    def open_header(self, header: RecordHeader) -> RecordHeader:
        """The header with the storer's checksum in the clear. Raises `Corrupt` for one that was not
        sealed with this key, or changed since.
        """
        if header.key_id != self.key_id:
            raise Corrupt(
                f"a record of key {self.key_id.hex()} expected, found {header.key_id.hex()}"
            )
        key = self._record_key(header)
        gcm = Gcm(key, modes.GCM(_nonce(header.nonce, 0), header.tag)).decryptor()
        gcm.authenticate_additional_data(_authenticated(header))
        hidden = gcm.update(_U64.pack(header.payload_checksum))
        try:
            gcm.finalize()
        except InvalidTag as error:
            raise Corrupt("the header of an encrypted record was changed") from error
        return replace(header, payload_checksum=_U64.unpack(hidden)[0])

    def open_piece(self, header: RecordHeader, number: int, piece: NDArray[np.uint8]) -> None:
        """Decrypt piece `number` in its own memory.

        Raises `Corrupt` where it was not sealed with this header; the piece is then zeros.
        """
        nonce = _nonce(header.nonce, number + 1)
        gcm = Gcm(self._record_key(header), modes.GCM(nonce, header.tags[number])).decryptor()
        _run(gcm, piece, piece)
        try:
            gcm.finalize()
        except InvalidTag as error:
            # What came out is whatever the forger wanted.
            piece[:] = 0
            raise Corrupt(f"piece {number} of an encrypted record was changed") from error

    def _record_key(self, header: RecordHeader) -> algorithms.AES256:
        name = header.log_id + _U64.pack(header.sequence)
        key = blake2b(name, key=self._key, digest_size=KEY_SIZE, person=b"kvd record key")
        return algorithms.AES256(key.digest())


def _run(gcm: CipherContext, source: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
    # `source` and `target` may be the same memory.
    given, taken = memoryview(source), memoryview(target)
    for at in range(0, len(given), STEP_SIZE):
        gcm.update_into(given[at : at + STEP_SIZE], taken[at : at + STEP_SIZE])


def _authenticated(header: RecordHeader) -> bytes:
    # All of the block but the tag, the hidden checksum and the block's own checksum.
    block = pack_header(replace(header, payload_checksum=0, tag=bytes(TAG_SIZE)))
    return block[:CHECKSUM_AT]


def _nonce(base: bytes, counter: int) -> bytes:
    # The counter in the last four bytes: other pieces have other nonces, and no two random bases
    # meet but by a chance of 2^-90.
    number = int.from_bytes(base, "big") ^ counter
    return number.to_bytes(NONCE_SIZE, "big")
