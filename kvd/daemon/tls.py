"""TLS files of the TCP listener: read, checked, and read again when somebody renews them.

Certificates live shorter than daemons, and a restart would empty the store.
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from kvd.daemon.config import Config
from kvd.errors import ConfigError

log = logging.getLogger("kvd.tls")


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsPem:
    """Contents of the files; `client_ca` is None where clients need no certificate."""

    key: bytes
    cert: bytes
    client_ca: bytes | None


class TlsFiles:
    """The files that a config names."""

    def __init__(self, config: Config) -> None:
        self._cert = config.tls_cert
        self._key = config.tls_key
        self._client_ca = config.tls_client_ca
        self._seen = self._stamps()

    def read(self) -> TlsPem:
        """What is in them now. Raises `ConfigError` if that makes no TLS."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # An encrypted key would ask for its password on the terminal.
            context.load_cert_chain(self._cert, self._key, password="")
            if self._client_ca:
                context.load_verify_locations(self._client_ca)
            return TlsPem(
                key=Path(self._key).read_bytes(),
                cert=Path(self._cert).read_bytes(),
                client_ca=Path(self._client_ca).read_bytes() if self._client_ca else None,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"tls_cert {self._cert}, tls_key {self._key} and tls_client_ca "
                f"{self._client_ca or 'none'} make no TLS: {error}"
            ) from error

    def read_again(self) -> TlsPem | None:
        """What is in them if they are others than last time, and good. Never raises.

        Files that are bad, or half renewed, leave the last good ones in use until they change.
        """
        stamps = self._stamps()
        if stamps == self._seen:
            return None
        self._seen = stamps
        try:
            pem = self.read()
        except ConfigError as error:
            log.error("event=tls_files_refused reason=%r", str(error))
            return None
        log.info("event=tls_files_renewed cert=%s", self._cert)
        return pem

    def _stamps(self) -> list[tuple[int, int, int]]:
        return [_stamp(path) for path in (self._cert, self._key, self._client_ca) if path]


def _stamp(path: str) -> tuple[int, int, int]:
    try:
        status = Path(path).stat()
    except OSError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns
