"""Where a daemon is reached: the default socket, and `host:port`. The same on both sides."""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

# The limit of sockaddr_un on Linux, without the final zero.
SOCKET_PATH_SIZE_MAX = 107


def default_socket(env: Mapping[str, str] = os.environ, uid: int | None = None) -> Path:
    """The attach socket that daemon and client meet at when nobody names one.

    KVD_SOCKET if set, else in /run/kvd for root, in $XDG_RUNTIME_DIR/kvd, or in /tmp/kvd-<uid>.
    """
    uid = os.geteuid() if uid is None else uid
    if named := env.get("KVD_SOCKET"):
        return Path(named)
    if uid == 0:
        return Path("/run/kvd/kvd.sock")
    if runtime := env.get("XDG_RUNTIME_DIR"):
        return Path(runtime, "kvd", "kvd.sock")
    return Path("/tmp") / f"kvd-{uid}" / "kvd.sock"


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6 address]:port`; `ValueError` if it is neither."""
    host, colon, port = text.rpartition(":")
    is_v6 = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if is_v6 else host
    is_bare = not is_v6 and ":" in host
    if not colon or not host or is_bare or not host.isprintable() or set(host) & set(" []/@"):
        raise ValueError(f"an address like 127.0.0.1:9471 or [::1]:9471 wanted, found {text!r}")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ValueError(f"a port in 0..65535 wanted, found {port!r} in {text!r}")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name that is not localhost could be any."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
