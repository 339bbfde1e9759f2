"""Flags that several commands share: the config's fields, and which daemon to ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from kvd.cli.console import F, json_option
from kvd.daemon.config import Config, flag_of
from kvd.daemon.settings import Setting
from kvd.proto.address import is_loopback, parse_address
from kvd.sizes import format_size

if TYPE_CHECKING:
    from kvd.client import Client

EXISTING_FILE = click.Path(exists=True, dir_okay=False)

TIMEOUT_S_DEFAULT = 5.0


def config_options(command: F) -> F:
    """Adds a flag for each field of the config; None where it is not given."""
    for field in reversed(fields(Config)):
        command = _config_option(field)(command)
    return command


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """Which daemon to ask, and how. Raises a usage error where the flags contradict each other."""

    socket: str | None
    address: str | None
    tls_ca: str | None
    tls_cert: str | None
    tls_key: str | None
    insecure: bool
    timeout_s: float

    def __post_init__(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise click.UsageError("--tls-cert and --tls-key go together")
        if self.address is None:
            if self.has_tls or self.insecure:
                raise click.UsageError("the --tls files and --insecure need --address")
            return
        if self.socket:
            raise click.UsageError("--socket and --address name two daemons; give one of them")
        if self.insecure and self.has_tls:
            raise click.UsageError("--insecure means no TLS; leave out the --tls files, or it")
        try:
            host, _ = parse_address(self.address)
        except ValueError as error:
            raise click.UsageError(f"--address: {error}") from None
        if not (self.has_tls or self.insecure or is_loopback(host)):
            raise click.UsageError(
                f"--address {self.address} is beyond this machine: give --tls-ca, and --tls-cert "
                "with --tls-key, or --insecure to speak without TLS"
            )

    @property
    def has_tls(self) -> bool:
        """Whether gRPC goes over TLS."""
        return bool(self.tls_ca or self.tls_cert)

    @property
    def target(self) -> str | None:
        """The address as `kvd.connect` wants it; None for the default socket."""
        if self.address is None:
            return self.socket
        return f"{'grpcs' if self.has_tls else 'grpc'}://{self.address}"

    @contextmanager
    def connect(self) -> Iterator[Client]:
        """A session that ends with the block."""
        from kvd.client import connect

        client = connect(
            self.target,
            timeout_s=self.timeout_s,
            name="kvd",
            tls_ca=self.tls_ca,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
        )
        with client:
            yield client


_REMOTE_OPTIONS = (
    click.option("--socket", metavar="PATH", help="The daemon's socket, if not the default one."),
    click.option("--address", metavar="HOST:PORT", help="Ask over gRPC instead."),
    click.option("--tls-ca", type=EXISTING_FILE, help="Authorities that vouch for it, PEM."),
    click.option("--tls-cert", type=EXISTING_FILE, help="Certificate to show to it, PEM."),
    click.option("--tls-key", type=EXISTING_FILE, help="Private key of the certificate, PEM."),
    click.option("--insecure", is_flag=True, help="Speak to --address without TLS."),
    click.option(
        "--timeout-s",
        type=click.FloatRange(0.001, 3600),
        default=TIMEOUT_S_DEFAULT,
        show_default=True,
        help="How long to wait for an answer.",
    ),
)


def remote_options(command: F) -> F:
    """Adds the flags that say which daemon to ask, as the argument `remote`; and --json."""

    @wraps(command)
    def with_remote(**arguments: Any) -> Any:
        remote = Remote(**{field.name: arguments.pop(field.name) for field in fields(Remote)})
        return command(remote=remote, **arguments)

    decorated: Any = json_option(with_remote)
    for option in reversed(_REMOTE_OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def _config_option(field: Field[Any]) -> Any:
    found: Setting = field.metadata["setting"]
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    shown = str(default) if found.metavar == "COUNT" else _show(default)
    text = found.help + (f"  [default: {shown}]" if shown else "")
    flag = flag_of(field.name)
    if found.is_switch:
        # With its opposite, for what a variable or the file has switched on.
        flag += "/--no-" + flag.removeprefix("--")
        return click.option(flag, field.name, is_flag=True, default=None, help=text)
    kind = click.Choice(found.choices) if found.choices else None
    metavar = None if found.choices else found.metavar
    return click.option(flag, field.name, type=kind, metavar=metavar, default=None, help=text)


def _show(default: object) -> str:
    if isinstance(default, bool):
        return ""
    if isinstance(default, int):
        return format_size(default).replace(" ", "")
    if isinstance(default, float):
        return f"{default:g}"
    return ",".join(default) if isinstance(default, tuple) else str(default)
