"""Cipher key: where the key for encryption at rest comes from. It is never printed or logged.

A file that nobody else may read, or a command that asks whoever keeps keys; 32 bytes as they are,
or as 64 hex digits.
"""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from kvd.errors import ConfigError

if TYPE_CHECKING:
    from kvd.tiers.cipher import Cipher

KEY_SIZE = 32

# A key store over a network may take a while; a daemon that waits for ever helps nobody.
COMMAND_S_MAX = 30.0

# Longer than any key with white space around it: a wrong file is not read whole.
_READ_SIZE = 4096

_FORM = f"{KEY_SIZE} bytes or {2 * KEY_SIZE} hex digits"


def load_cipher(key_file: Path | None, key_command: str | None) -> Cipher:
    """The cipher of the key in `key_file`, or of the one that `key_command` writes to its standard
    output within 30 s. Exactly one of them is given.

    The command is split as a shell would, run without one, and keeps the standard error. Raises
    `ConfigError` where there is no key, others can read its file, or the package is missing.
    """
    if key_file is not None and key_command is None:
        return _cipher(_read(key_file), f"the key file {key_file}")
    if key_command is not None and key_file is None:
        return _cipher(_ask(key_command), "the output of the key command")
    raise ConfigError("a key file or a key command is wanted, one of the two")


def _read(path: Path) -> bytes:
    try:
        # Who opens a pipe by mistake must not wait for it.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            found = os.read(fd, _READ_SIZE) if stat.S_ISREG(status.st_mode) else b""
        finally:
            os.close(fd)
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read: {error.strerror}") from error
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"others may use the key file {path} (mode {mode:04o}): chmod 600 it")
    return found


def _ask(command: str) -> bytes:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"the key command cannot be split into words: {error}") from error
    if not words:
        raise ConfigError("the key command is empty")
    # Words behind the first may be secret themselves.
    name = f"the key command {words[0]}"
    try:
        ended = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=COMMAND_S_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        # Without its cause: that holds what the command wrote so far.
        raise ConfigError(f"{name} did not end within {COMMAND_S_MAX:g} s") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be run: {error.strerror}") from error
    if ended.returncode:
        raise ConfigError(f"{name} ended with {ended.returncode}; run it by hand to see why")
    return ended.stdout


def _cipher(found: bytes, where: str) -> Cipher:
    try:
        from kvd.tiers.cipher import Cipher
    except ImportError as error:
        raise ConfigError(
            "encryption needs the package cryptography: pip install 'kvd-cache[encryption]'"
        ) from error
    if len(found) == KEY_SIZE:
        return Cipher(found)
    digits = found.strip()
    if len(digits) != 2 * KEY_SIZE:
        raise ConfigError(f"{where} has {len(found)} bytes, {_FORM} wanted")
    try:
        return Cipher(bytes.fromhex(digits.decode("ascii")))
    except ValueError:
        # Without its cause: that may quote the key.
        raise ConfigError(f"{where} is no key: {_FORM} wanted") from None
