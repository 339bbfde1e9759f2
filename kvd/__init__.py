"""kvd: a node-local store for the KV caches of language-model engines.

client = kvd.connect()
keys = kvd.chain_keys(layout.fingerprint, tokens, chunk_tokens=layout.chunk_tokens)
client.store(layout, keys, arrays)
with client.pin(layout, keys) as lease:
    first = lease.array(0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvd.client import AsyncClient, Client, connect, connect_async
    from kvd.keys import chain_keys, chained_key, standalone_key
    from kvd.layout import KVLayout

_HOMES = {
    "AsyncClient": "kvd.client",
    "Client": "kvd.client",
    "connect": "kvd.client",
    "connect_async": "kvd.client",
    "chain_keys": "kvd.keys",
    "chained_key": "kvd.keys",
    "standalone_key": "kvd.keys",
    "KVLayout": "kvd.layout",
}

__all__ = [
    "AsyncClient",
    "Client",
    "KVLayout",
    "chain_keys",
    "chained_key",
    "connect",
    "connect_async",
    "standalone_key",
]


def __getattr__(name: str) -> Any:
    # Names are imported when first used, so that `import kvd` and `kvd --help` load nothing heavy.
    if name not in _HOMES:
        raise AttributeError(f"module 'kvd' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
