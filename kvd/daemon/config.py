"""Config: all that can be set on a daemon. What is unknown or cannot be stops the start.

Flags, KVD_* variables and TOML keys are made from its fields, and its defaults are the only ones.

    flag          --cpu-size 8GiB      strongest
    variable      KVD_CPU_SIZE=8GiB
    TOML          cpu_size = "8GiB"
    default       4 GiB                weakest
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from kvd.daemon.codec_rules import CodecRules, read_codec_rules
from kvd.daemon.settings import (
    Setting,
    read_address,
    read_choice,
    read_count,
    read_names,
    read_seconds,
    read_size,
    read_socket,
    read_switch,
    read_text,
    setting,
)
from kvd.errors import ConfigError
from kvd.proto.address import default_socket, is_loopback, parse_address

HugePages = Literal["auto", "never", "require"]
LogLevel = Literal["debug", "info", "warning", "error"]

# One huge page: below it an arena holds no chunk of any real model.
CPU_SIZE_MIN = 2 << 20

# Four segments of the least size that is used: one to fill, one to give back, room to copy.
NVME_SIZE_MIN = 4 << 20

# More than a node's cores.
CODEC_THREADS_MAX = 256

# Far more than anybody asks for one chunk before it is worth a write.
ADMIT_HITS_MAX = 1000

WriteWhen = Literal["back", "through"]

_WRITE_WHEN = ("back", "through")
_HUGE_PAGES = ("auto", "never", "require")
_LOG_LEVELS = ("debug", "info", "warning", "error")

# KVD_ variables that are no field of the config.
_OTHER_VARIABLES = ("KVD_CONFIG",)

# Kubernetes describes a Service named kvd or kvd-… to every container of its namespace, in
# variables like KVD_SERVICE_HOST and KVD_PORT_9471_TCP_ADDR. They are nobody's settings.
_SERVICE_VARIABLE = re.compile(
    r"KVD_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)",
    re.ASCII,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A config that is valid as far as one can tell without a look at the machine.

    That look is `preflight.check_machine`.
    """

    tiers: tuple[str, ...] = field(
        default=("cpu",),
        metadata=setting(read_names, "NAMES", "Tiers to keep chunks in, fastest first."),
    )
    cpu_size: int = field(
        default=4 << 30,
        metadata=setting(read_size(CPU_SIZE_MIN), "SIZE", "Host memory for the arena."),
    )
    cpu_packed_size: int = field(
        default=0,
        metadata=setting(
            read_size(0),
            "SIZE",
            "Of cpu_size, for encoded chunks; 0 for three quarters where codec says cpu=….",
        ),
    )
    huge_pages: HugePages = field(
        default="auto",
        metadata=setting(
            read_choice(*_HUGE_PAGES),
            "WHEN",
            "2 MiB pages for the arena: if enough are free, never, or else do not start.",
            choices=_HUGE_PAGES,
        ),
    )
    cpu_persist: bool = field(
        default=False,
        metadata=setting(
            read_switch, "", "Let a small process keep the arena while no daemon runs."
        ),
    )
    cpu_persist_s: float = field(
        default=600.0,
        metadata=setting(
            read_seconds, "SECONDS", "How long it is kept, with --cpu-persist, until one starts."
        ),
    )
    nvme_path: str = field(
        default="",
        metadata=setting(read_text, "DIR", "Folder of the nvme tier; one daemon a folder."),
    )
    nvme_size: int = field(
        default=64 << 30,
        metadata=setting(read_size(NVME_SIZE_MIN), "SIZE", "The most that the nvme tier uses."),
    )
    nvme_reserve: int = field(
        default=5 << 30,
        metadata=setting(
            read_size(0), "SIZE", "What the nvme tier leaves free on its file system, for others."
        ),
    )
    nvme_write: WriteWhen = field(
        default="back",
        metadata=setting(
            read_choice(*_WRITE_WHEN),
            "WHEN",
            "Write chunks to disk before they leave memory, or as soon as they are stored.",
            choices=_WRITE_WHEN,
        ),
    )
    nvme_admit_hits: int = field(
        default=1,
        metadata=setting(
            read_count(1, ADMIT_HITS_MAX),
            "COUNT",
            "Write only chunks that were asked for so often, their store counted; 1 is all.",
        ),
    )
    nvme_quota: int = field(
        default=0,
        metadata=setting(
            read_size(0), "SIZE", "The most that one tenant (a salt) uses on disk; 0 is no bound."
        ),
    )
    nvme_prefetch: bool = field(
        default=True,
        metadata=setting(
            read_switch, "", "Let chunks on disk begin to come when a lookup finds them."
        ),
    )
    nvme_scrub_rate: int = field(
        default=16 << 20,
        metadata=setting(
            read_size(0), "SIZE", "Bytes a second of the daily pass over all records; 0 for none."
        ),
    )
    nvme_flush_s: float = field(
        default=20.0,
        metadata=setting(
            read_seconds, "SECONDS", "How long a stop may take to write what is only in memory."
        ),
    )
    nvme_key_file: str = field(
        default="",
        metadata=setting(
            read_text, "FILE", "Key that encrypts the nvme tier: 32 bytes or 64 hex digits."
        ),
    )
    nvme_key_command: str = field(
        default="",
        metadata=setting(read_text, "COMMAND", "Command that prints that key."),
    )
    codec: str = field(
        default="",
        metadata=setting(
            read_codec_rules,
            "RULES",
            "How tiers keep chunks, like nvme=kvq:2,nvme/system=bf16; raw if not named.",
        ),
    )
    codec_threads: int = field(
        default=0,
        metadata=setting(
            read_count(0, CODEC_THREADS_MAX),
            "COUNT",
            "Threads that encode and decode; 0 for half of the cores.",
        ),
    )
    profiles: str = field(
        default="",
        metadata=setting(
            read_text, "DIR", "Folder of model profiles, beside those that come with kvd."
        ),
    )
    socket: Path = field(
        default_factory=default_socket,
        metadata=setting(read_socket, "PATH", "Socket where clients attach."),
    )
    socket_group: str = field(
        default="",
        metadata=setting(read_text, "GROUP", "Group whose members may attach too."),
    )
    grpc_socket: str = field(
        default="",
        metadata=setting(
            read_text,
            "PATH",
            'Socket for gRPC; beside the other one if not named, "none" for no such socket.',
        ),
    )
    listen: str = field(
        default="",
        metadata=setting(
            read_address(""),
            "HOST:PORT",
            "TCP address for gRPC; beyond loopback it needs TLS or --insecure.",
        ),
    )
    tls_cert: str = field(
        default="",
        metadata=setting(read_text, "FILE", "Certificate chain of the TCP listener, PEM."),
    )
    tls_key: str = field(
        default="",
        metadata=setting(read_text, "FILE", "Its private key, PEM."),
    )
    tls_client_ca: str = field(
        default="",
        metadata=setting(
            read_text, "FILE", "Authorities, PEM: only clients that they certify are let in."
        ),
    )
    insecure: bool = field(
        default=False,
        metadata=setting(
            read_switch, "", "Let anybody who reaches the TCP listener read and write all chunks."
        ),
    )
    http: str = field(
        default="127.0.0.1:9470",
        metadata=setting(
            read_address("none"),
            "HOST:PORT",
            'Address of /metrics, /healthz and /readyz, "none" for no such server.',
        ),
    )
    drain_s: float = field(
        default=10.0,
        metadata=setting(
            read_seconds, "SECONDS", "How long open leases may go on after the order to stop."
        ),
    )
    eviction: str = field(
        default="lru",
        metadata=setting(read_text, "NAME", "Policy that says which chunk goes first."),
    )
    log_level: LogLevel = field(
        default="info",
        metadata=setting(
            read_choice(*_LOG_LEVELS), "LEVEL", "The least that is logged.", choices=_LOG_LEVELS
        ),
    )
    log_file: str = field(
        default="",
        metadata=setting(read_text, "FILE", "Where to log; standard error if not named."),
    )

    def __post_init__(self) -> None:
        for name, found in settings().items():
            value = getattr(self, name)
            if _read(name, found.read, value) != value:
                raise ConfigError(f"{name}: {value!r} is not read yet")
        if self.grpc_socket_path is not None:
            _read("grpc_socket", read_socket, self.grpc_socket_path)
        if self.grpc_socket_path == self.socket:
            raise ConfigError(f"grpc_socket and socket are the same path, {self.socket}")
        self._check_nvme()
        self._check_codec()
        self._check_tls()

    @property
    def grpc_socket_path(self) -> Path | None:
        """Where gRPC listens on this machine, None for nowhere."""
        if self.grpc_socket == "none":
            return None
        if self.grpc_socket:
            return Path(self.grpc_socket)
        return self.socket.with_name(f"{self.socket.stem}.grpc.sock")

    @property
    def codec_rules(self) -> CodecRules:
        """Which codec keeps a chunk in which tier."""
        return CodecRules.parse(self.codec)

    @property
    def packed_size(self) -> int:
        """Bytes for encoded chunks in memory, 0 for none."""
        if not self.codec_rules.specs_of("cpu"):
            return 0
        return self.cpu_packed_size or self.cpu_size * 3 // 4

    @property
    def arena_size(self) -> int:
        """Bytes that clients map."""
        return self.cpu_size - self.packed_size

    @property
    def has_tls(self) -> bool:
        """Whether the TCP listener speaks TLS."""
        return bool(self.tls_cert)

    def _check_nvme(self) -> None:
        if "nvme" in self.tiers and not self.nvme_path:
            raise ConfigError("tier nvme needs a folder: give nvme_path, like /var/lib/kvd")
        if self.nvme_path and "nvme" not in self.tiers:
            raise ConfigError(
                "nvme_path is given, but nvme is not among the tiers: give tiers cpu,nvme"
            )
        if self.nvme_key_file and self.nvme_key_command:
            raise ConfigError("nvme_key_file and nvme_key_command are both given: choose one")

    def _check_codec(self) -> None:
        if self.codec_rules.specs_of("nvme") and "nvme" not in self.tiers:
            raise ConfigError(
                "codec has a rule for nvme, which is not among the tiers: give tiers cpu,nvme"
            )
        if not self.codec_rules.specs_of("cpu"):
            if self.cpu_packed_size:
                raise ConfigError("cpu_packed_size is given, but codec has no rule for cpu")
            return
        if self.arena_size < CPU_SIZE_MIN or self.packed_size < CPU_SIZE_MIN:
            raise ConfigError(
                f"cpu_size {self.cpu_size} leaves {self.arena_size} bytes raw and "
                f"{self.packed_size} encoded; each needs {CPU_SIZE_MIN} or more"
            )
        if self.cpu_persist:
            raise ConfigError("cpu_persist keeps raw chunks only: give codec no rule for cpu")

    def _check_tls(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            given, missing = ("tls_cert", "tls_key") if self.tls_cert else ("tls_key", "tls_cert")
            raise ConfigError(f"{given} is given without {missing}: TLS needs both")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError("tls_client_ca is given without tls_cert and tls_key: TLS needs both")
        if not self.listen or self.insecure or is_loopback(parse_address(self.listen)[0]):
            return
        if not self.has_tls:
            raise ConfigError(
                f"listen {self.listen} is beyond this machine, without tls_cert and tls_key: "
                "anybody on the way could read and change all chunks; give both "
                "(and tls_client_ca, to know who connects), listen on loopback, or set insecure"
            )


def settings() -> dict[str, Setting]:
    """The setting of each field of `Config`, by its name."""
    return {found.name: found.metadata["setting"] for found in fields(Config)}


def flag_of(name: str) -> str:
    """How a field is spelled on the command line."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """How a field is spelled in the environment."""
    return "KVD_" + name.upper()


def load_config(
    flags: Mapping[str, object], env: Mapping[str, str], toml_path: Path | None
) -> Config:
    """The config of flags (by field name), variables and a TOML file, in this order of strength.

    A flag that is None and a variable that is empty count as not given. Raises `ConfigError` for
    anything unknown or bad, overridden or not, and names where it was found.
    """
    values: dict[str, object] = {"socket": default_socket({**env, "KVD_SOCKET": ""})}
    if toml_path is not None:
        values |= _read_source(f"{toml_path}: key", str, _parse_toml(toml_path))
    variables = {
        name: value
        for name, value in env.items()
        if name.startswith("KVD_")
        and name not in _OTHER_VARIABLES
        and not _SERVICE_VARIABLE.fullmatch(name)
    }
    values |= _read_source("variable", variable_of, variables)
    given = {flag_of(name): value for name, value in flags.items() if value is not None}
    values |= _read_source("flag", flag_of, given)
    return Config(**values)  # type: ignore[arg-type]


def _read_source(
    label: str, spell: Callable[[str], str], found: Mapping[str, object]
) -> dict[str, object]:
    """The fields that one source sets, read and checked."""
    known = settings()
    names = {spell(name): name for name in known}
    values = {}
    for spelling, value in found.items():
        if spelling not in names:
            raise ConfigError(
                f"{label} {spelling} is unknown; {_suggestion(spelling, list(names))}"
            )
        if value != "" or label != "variable":
            name = names[spelling]
            values[name] = _read(f"{label} {spelling}", known[name].read, value)
    return values


def _read(where: str, read: Callable[[object], object], value: object) -> object:
    try:
        return read(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _suggestion(spelling: str, valid: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(spelling, valid, n=1)
    return (f"did you mean {close[0]}? " if close else "") + f"There is: {', '.join(valid)}"


def _parse_toml(path: Path) -> dict[str, object]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"config file {path} is no TOML: {error}") from None
