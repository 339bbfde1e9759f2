"""What an operator says of the connector, and what a request may say of its own KV."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from kvd.client.client import connect
from kvd.client.connectors.late_client import LateClient
from kvd.errors import ConfigError
from kvd.layout import CHUNK_TOKENS

log = logging.getLogger("kvd.vllm")

MODES = ("both", "load", "store")

# Under this name a request's own options stand in its `kv_transfer_params`.
PARAMS_NAME = "kvd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`kv_connector_extra_config`, by the names of these fields. Times are seconds.

    `socket` is the daemon's (default: `KVD_SOCKET` or the daemon's own default). `mode` "load"
    never stores, "store" never loads. A hit of fewer than `min_hit_tokens` tokens beyond what the
    engine has itself is not loaded. With `exact_only` nothing is loaded that a lossy codec has
    touched. `revision` names the weights (default: a digest of their files), `salt` a tenant. A
    prompt waits `lookup_s` at most for the daemon's answer, and `load_s` for its KV; then it is
    computed. With `layer_by_layer` an engine that has nothing else to do computes while its KV is
    still being loaded.
    """

    socket: str = ""
    category: str = ""
    mode: Literal["both", "load", "store"] = "both"
    min_hit_tokens: int = 0
    chunk_tokens: int = CHUNK_TOKENS
    exact_only: bool = False
    verify: bool = False
    revision: str = ""
    salt: str = ""
    store_generated: bool = True
    store_tails: bool = True
    layer_by_layer: bool = True
    lookup_s: float = 0.25
    load_s: float = 10.0
    store_s: float = 10.0

    @property
    def loads(self) -> bool:
        """Whether KV may come from the daemon."""
        return self.mode != "store"

    @property
    def stores(self) -> bool:
        """Whether KV may go to the daemon."""
        return self.mode != "load"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """`kv_transfer_params["kvd"]` of one request."""

    category: str = ""
    ttl_s: float = 0.0
    load: bool = True
    store: bool = True


def parse_options(found: Mapping[str, Any], *, role: str = "kv_both") -> Options:
    """The options in an engine's `kv_connector_extra_config`; a `kv_role` of producer or consumer
    narrows the mode. Raises `ConfigError` for what is no option, or no value of one.
    """
    options = Options(**_checked(Options, found, "kv_connector_extra_config"))
    if options.mode not in MODES:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}, found {options.mode!r}")
    for name in ("lookup_s", "load_s", "store_s"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"{name} must be above 0, found {getattr(options, name)}")
    if options.chunk_tokens < 1 or options.min_hit_tokens < 0:
        raise ConfigError("chunk_tokens must be at least 1, min_hit_tokens at least 0")
    allowed = {"kv_producer": "store", "kv_consumer": "load"}.get(role)
    if allowed is None or options.mode == allowed:
        return options
    if options.mode != "both":
        raise ConfigError(f"kv_role is {role}, and mode is {options.mode!r}: nothing is left to do")
    return replace(options, mode="store" if allowed == "store" else "load")


def client_of(options: Options, name: str) -> LateClient:
    """A client of the daemon that the options name, as soon as that is there."""
    return LateClient(
        lambda: connect(
            options.socket or None,
            name=name,
            verify=options.verify,
            timeout_s=options.lookup_s,
        )
    )


def request_options(params: Mapping[str, Any] | None) -> RequestOptions:
    """What a request says of itself. What cannot be understood may have meant "do not keep this":
    such a request neither loads nor stores, and the log says why.
    """
    found = (params or {}).get(PARAMS_NAME)
    if found is None:
        return RequestOptions()
    try:
        if not isinstance(found, Mapping):
            raise ConfigError(f"an object was expected, found {type(found).__name__}")
        options = RequestOptions(**_checked(RequestOptions, found, f"params.{PARAMS_NAME}"))
        if not options.ttl_s >= 0:
            raise ConfigError(f"ttl_s must be at least 0, found {options.ttl_s}")
    except ConfigError as error:
        log.warning("event=request_params_refused reason=%r", str(error))
        return RequestOptions(load=False, store=False)
    return options


def _checked(kind: type, found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values, each of its field's type."""
    types = {field.name: type(field.default) for field in fields(kind)}
    checked = {}
    for name, value in found.items():
        wanted = types.get(name)
        if wanted is None:
            raise ConfigError(f"{where} has no {name!r}; it may have {', '.join(sorted(types))}")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if wanted is float and is_number:
            value = float(value)
        if type(value) is not wanted:
            raise ConfigError(f"{where}.{name} must be a {wanted.__name__}, found {value!r}")
        checked[name] = value
    return checked
