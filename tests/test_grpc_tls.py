"""TLS on gRPC: each side lets in only whom its authority has certified, and says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

import kvd
from kvd.errors import AccessDenied, ConfigError, InvalidRequest, KvdError, Unavailable
from tests.daemon_in_thread import DaemonInThread


class Pki:
    """Files of one authority, and of what it has certified."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str) -> tuple[Path, Path]:
        """(certificate, key) for a name or an address."""
        issued = self._authority.issue_cert(name)
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        issued.private_key_pem.write_to_path(str(key))
        cert.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
        return cert, key


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


@pytest.fixture
def stranger(tmp_path: Path) -> Pki:
    """An authority that nobody here knows."""
    return Pki(tmp_path / "stranger")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., DaemonInThread]]:
    """Starts a daemon with a certificate; `ca` makes it ask its clients for theirs."""
    running: list[DaemonInThread] = []

    def start(pair: tuple[Path, Path], ca: Path | None = None, **options: Any) -> DaemonInThread:
        daemon = DaemonInThread(
            tmp_path,
            **{"listen": "127.0.0.1:0", **options},
            tls_cert=str(pair[0]),
            tls_key=str(pair[1]),
            tls_client_ca=str(ca or ""),
        )
        running.append(daemon)
        return daemon

    yield start
    for daemon in running:
        daemon.stop()


def attach(daemon: DaemonInThread, ca: Path, pair: tuple[Path, Path] | None = None) -> kvd.Client:
    cert, key = pair or (None, None)
    return daemon.connect(daemon.tcp, tls_ca=ca, tls_cert=cert, tls_key=key)


def assert_serves(client: kvd.Client, layout: kvd.KVLayout) -> None:
    keys = kvd.chain_keys(layout.fingerprint, range(16), chunk_tokens=16)
    chunk = bytes(range(256)) * 16
    with client:
        client.store(layout, keys, [chunk])
        out = bytearray(len(chunk))
        assert client.load(layout, keys, [out]) == 1
        assert out == chunk


def test_chunks_travel_over_tls(
    start: Callable[..., DaemonInThread], pki: Pki, layout: kvd.KVLayout
) -> None:
    daemon = start(pki.issue("127.0.0.1"))
    assert_serves(attach(daemon, pki.ca), layout)


def test_chunks_travel_over_mutual_tls(
    start: Callable[..., DaemonInThread], pki: Pki, layout: kvd.KVLayout
) -> None:
    daemon = start(pki.issue("127.0.0.1"), pki.ca)
    assert_serves(attach(daemon, pki.ca, pki.issue("client.test")), layout)


def test_beyond_loopback_a_daemon_serves_with_mutual_tls(
    start: Callable[..., DaemonInThread], pki: Pki, layout: kvd.KVLayout
) -> None:
    daemon = start(pki.issue("127.0.0.1"), pki.ca, listen="0.0.0.0:0")
    assert_serves(attach(daemon, pki.ca, pki.issue("client.test")), layout)


def test_renewed_certificates_serve_without_a_restart(
    start: Callable[..., DaemonInThread], pki: Pki, stranger: Pki, layout: kvd.KVLayout
) -> None:
    cert, key = pki.issue("127.0.0.1")
    daemon = start((cert, key))
    attach(daemon, pki.ca).close()
    # Half a renewal is none: the old certificate goes on.
    new_cert, new_key = stranger.issue("127.0.0.1")
    new_cert.replace(cert)
    attach(daemon, pki.ca).close()
    new_key.replace(key)
    with pytest.raises(AccessDenied):
        attach(daemon, pki.ca)
    assert_serves(attach(daemon, stranger.ca), layout)
    key.unlink()
    attach(daemon, stranger.ca).close()


def test_a_client_without_a_certificate_is_refused(
    start: Callable[..., DaemonInThread], pki: Pki
) -> None:
    daemon = start(pki.issue("127.0.0.1"), pki.ca)
    with pytest.raises(Unavailable, match="wants a tls_cert"):
        attach(daemon, pki.ca)
    assert daemon.facts.num_sessions == 0


def test_a_client_that_another_authority_certified_is_refused(
    start: Callable[..., DaemonInThread], pki: Pki, stranger: Pki
) -> None:
    daemon = start(pki.issue("127.0.0.1"), pki.ca)
    with pytest.raises(Unavailable, match="who signed tls_cert"):
        attach(daemon, pki.ca, stranger.issue("client.test"))
    assert daemon.facts.num_sessions == 0


def test_a_daemon_that_another_authority_certified_is_refused(
    start: Callable[..., DaemonInThread], pki: Pki, stranger: Pki
) -> None:
    daemon = start(stranger.issue("127.0.0.1"))
    with pytest.raises(AccessDenied, match="tls_ca"):
        attach(daemon, pki.ca)


def test_a_daemon_whose_certificate_has_another_name_is_refused(
    start: Callable[..., DaemonInThread], pki: Pki
) -> None:
    daemon = start(pki.issue("other.test"))
    with pytest.raises(AccessDenied, match="for this name"):
        attach(daemon, pki.ca)


def test_plaintext_to_a_daemon_with_tls_is_told_to_use_tls(
    start: Callable[..., DaemonInThread], pki: Pki
) -> None:
    daemon = start(pki.issue("127.0.0.1"))
    with pytest.raises(Unavailable, match="grpcs://"):
        daemon.connect(f"grpc://127.0.0.1:{daemon.port}")


def test_tls_to_a_daemon_without_is_told_to_use_none(tmp_path: Path, pki: Pki) -> None:
    daemon = DaemonInThread(tmp_path, listen="127.0.0.1:0")
    with pytest.raises(Unavailable, match="no TLS"):
        daemon.connect(f"grpcs://127.0.0.1:{daemon.port}", tls_ca=pki.ca)
    daemon.stop()


def test_certificates_without_tls_are_a_mistake(pki: Pki) -> None:
    for address in ("grpc://127.0.0.1:1", "grpc+unix:///kvd.sock"):
        with pytest.raises(InvalidRequest, match="grpcs://"):
            kvd.connect(address, tls_ca=pki.ca)


def test_a_daemon_does_not_start_with_files_that_make_no_tls(
    start: Callable[..., DaemonInThread], pki: Pki, stranger: Pki, tmp_path: Path
) -> None:
    cert, key = pki.issue("127.0.0.1")
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    wrong = stranger.issue("127.0.0.1")[1]
    for pair, ca in (
        ((junk, key), None),
        ((cert, junk), None),
        ((cert, wrong), None),
        ((cert, tmp_path / "absent"), None),
        ((cert, key), junk),
    ):
        with pytest.raises(ConfigError, match="make no TLS"):
            start(pair, ca)
    assert not [path for path in tmp_path.iterdir() if path.is_socket()]


def test_a_client_does_not_start_with_files_that_make_no_tls(
    pki: Pki, stranger: Pki, tmp_path: Path
) -> None:
    cert, key = pki.issue("client.test")
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    wrong = stranger.issue("client.test")[1]
    options: list[dict[str, Path]] = [
        {"tls_ca": junk},
        {"tls_ca": tmp_path / "absent"},
        {"tls_cert": cert},
        {"tls_key": key},
        {"tls_cert": cert, "tls_key": wrong},
        {"tls_cert": cert, "tls_key": junk},
    ]
    for option in options:
        with pytest.raises(KvdError) as raised:
            kvd.connect("grpcs://127.0.0.1:1", **option)  # type: ignore[arg-type]
        assert raised.value.code == "invalid_request", option
