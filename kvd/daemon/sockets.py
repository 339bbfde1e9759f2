"""Socket files: which of them may be replaced, and who may open them."""

from __future__ import annotations

import fcntl
import grp
import os
import socket
import stat
from pathlib import Path

from kvd.errors import ConfigError


def claim(path: Path, flag: str) -> int:
    """Make `path` free for a new socket; a lock, to be held while the daemon listens there.

    The lock, in a file beside the socket, tells a living daemon's socket from one that a dead
    daemon has left; what is no socket is never taken away. Raises `ConfigError`, which names `flag`
    as the way to another path.
    """
    _make_directory(path.parent, flag)
    lock = _lock(path, flag)
    try:
        if path.exists():
            if not path.is_socket():
                raise ConfigError(f"{path} exists and is no socket; choose another {flag}")
            if _is_alive(path):
                raise ConfigError(f"socket {path} is in use; choose another {flag}")
            path.unlink()
    except OSError as error:
        os.close(lock)
        raise ConfigError(f"cannot make a socket at {path}: {error.strerror}") from error
    except BaseException:
        os.close(lock)
        raise
    return lock


def give_to_group(path: Path, group: str) -> None:
    """Let the members of `group` open the socket. Raises `ConfigError`: it is gone then."""
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
        path.chmod(0o660)
    except KeyError:
        path.unlink()
        raise ConfigError(f"there is no group {group!r} on this machine") from None
    except OSError as error:
        path.unlink()
        raise ConfigError(f"cannot give {path} to group {group}: {error.strerror}") from error


def _make_directory(directory: Path, flag: str) -> None:
    try:
        directory.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise ConfigError(f"directory {directory} for the socket: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(
            f"directory {directory} for the socket belongs to user {status.st_uid} "
            "and is not writable"
        )
    is_sticky = status.st_mode & stat.S_ISVTX
    if status.st_uid not in (0, os.geteuid()) and not is_sticky:
        raise ConfigError(
            f"directory {directory} for the socket belongs to user {status.st_uid}, "
            f"who could put another socket in its place; choose another {flag}"
        )


def _lock(path: Path, flag: str) -> int:
    name = path.with_name(path.name + ".lock")
    try:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"lock {name} of the socket: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise ConfigError(
            f"socket {path} is in use by a live daemon, pid {owner}; "
            f"stop it or choose another {flag}"
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def _is_alive(path: Path) -> bool:
    """Whether some program, kvd or not, listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError as error:
            # A full queue, or a listener of another type: somebody is there.
            return not isinstance(error, FileNotFoundError)
    return True
