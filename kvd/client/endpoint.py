"""Endpoint: where a daemon's gRPC is, what to show it, and what it means when it cannot be reached.

Knows no gRPC: only how gRPC writes addresses, and what it says when it fails.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from kvd.errors import AccessDenied, InvalidRequest, KvdError, Unavailable
from kvd.proto.address import SOCKET_PATH_SIZE_MAX, parse_address

_FORMS = "grpc://host:port, grpcs://host:port or grpc+unix:///path"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """`target` is the address as gRPC wants it; `ca`, `key` and `cert` are PEM."""

    address: str
    target: str
    has_tls: bool = False
    ca: bytes | None = None
    key: bytes | None = None
    cert: bytes | None = None

    def failure(self, details: str) -> KvdError:
        """What a failed attach means and what to do; gRPC has one status for nearly all of it."""
        if "CERTIFICATE_VERIFY_FAILED" in details or "Hostname Verification" in details:
            return AccessDenied(
                f"{self.address} shows no certificate that tls_ca has signed for this name: "
                f"{details}"
            )
        if "Permission denied" in details:
            return AccessDenied(
                f"user {os.geteuid()} may not open {self.address}; ask for --socket-group: "
                f"{details}"
            )
        return Unavailable(f"{self._diagnosis(details)}: {details}")

    def _diagnosis(self, details: str) -> str:
        if "WRONG_VERSION_NUMBER" in details:
            return f"{self.address} speaks no TLS, so this daemon wants grpc://"
        if "UNIMPLEMENTED" in details:
            return f"{self.address} is no kvd daemon"
        if "RESOURCE_EXHAUSTED" in details:
            return f"{self.address} takes no more clients"
        if "Socket closed" in details and self.has_tls:
            what = "does not know who signed tls_cert" if self.cert else "wants a tls_cert of ours"
            return f"{self.address} hung up; perhaps it {what}"
        if "Socket closed" in details and self.target.startswith("dns:"):
            return f"{self.address} hung up; perhaps it wants TLS, grpcs://"
        return f"no daemon at {self.address}; start one with `kvd start`"


def parse_endpoint(
    address: str,
    *,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
) -> Endpoint:
    """The endpoint of an address. Raises `InvalidRequest` for what can never be connected."""
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in ("grpc", "grpcs", "grpc+unix"):
        raise InvalidRequest(f"{_FORMS} wanted, found {address!r}")
    if scheme != "grpcs" and (tls_ca or tls_cert or tls_key):
        raise InvalidRequest(f"certificates are given, but {address} has no TLS; use grpcs://")
    if scheme == "grpc+unix":
        return Endpoint(address=address, target=_unix_target(address, rest))
    try:
        host, port = parse_address(rest.removesuffix("/"))
    except ValueError as error:
        raise InvalidRequest(f"{address}: {error}") from None
    target = f"dns:///[{host}]:{port}" if ":" in host else f"dns:///{host}:{port}"
    if scheme == "grpc":
        return Endpoint(address=address, target=target)
    ca, key, cert = _read_pem(tls_ca, tls_cert, tls_key)
    return Endpoint(address=address, target=target, has_tls=True, ca=ca, key=key, cert=cert)


def _unix_target(address: str, path: str) -> str:
    size = len(os.fsencode(path))
    if not path.startswith("/") or size > SOCKET_PATH_SIZE_MAX:
        raise InvalidRequest(
            f"an absolute path of at most {SOCKET_PATH_SIZE_MAX} bytes wanted, found {address!r}"
        )
    return f"unix:{quote(path)}"


def _read_pem(
    ca: str | Path | None, cert: str | Path | None, key: str | Path | None
) -> list[bytes | None]:
    """The contents of the files, in gRPC's order; it would say of bad ones only that they fail."""
    if bool(cert) != bool(key):
        raise InvalidRequest("tls_cert and tls_key are given together or not at all")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca:
            context.load_verify_locations(ca)
        if cert:
            # An encrypted key would ask for its password on the terminal.
            context.load_cert_chain(cert, key, password="")
        return [Path(path).read_bytes() if path else None for path in (ca, key, cert)]
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"tls_ca {ca}, tls_cert {cert} and tls_key {key} make no TLS: {error}"
        ) from error
