"""What operators watch: /metrics for Prometheus, /healthz and /readyz for those who restart us.

The server runs on threads of its own, so that it answers while the arena is being populated and
while the event loop is busy. It reads numbers that the loop changes at the same moment, and keeps
no counts itself: each scrape is a look at the store.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, TypeVar, cast

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from kvd.daemon.admin import Facts
from kvd.daemon.store import ChunkStore
from kvd.errors import ConfigError
from kvd.proto.address import parse_address

T = TypeVar("T")

# Scrapers and probes at once; more than that is not monitoring.
CONNECTIONS_MAX = 32

# A client that sends nothing for so long is hung up on.
REQUEST_TIMEOUT_S = 10.0

# How often a number that changed under the reading is read again.
_TRIES_MAX = 4

# Store counter -> (metric, help). Those of `_TIER_COUNTERS` are bytes and chunks of one tier.
_COUNTERS = {
    "lookups": ("lookups", "Lookups answered."),
    "lookup_chunks": ("lookup_chunks", "Chunks that lookups asked for."),
    "lookup_hits": ("lookup_hit_chunks", "Chunks that lookups asked for and that were here."),
    "reserve_full": ("reserve_full_chunks", "Chunks not stored for want of room."),
    "commit_chunks": ("commit_chunks", "Chunks stored."),
    "commit_bytes": ("commit_bytes", "Bytes of chunks stored."),
    "pin_chunks": ("pin_chunks", "Chunks that pins asked for."),
    "pin_hits": ("pin_hit_chunks", "Chunks pinned."),
    "pin_bytes": ("pin_bytes", "Bytes of chunks pinned, to be loaded."),
    "evict_chunks": ("evict_chunks", "Chunks evicted to make room."),
    "evict_bytes": ("evict_bytes", "Bytes of chunks evicted."),
    "demote_chunks": ("demote_chunks", "Chunks written from memory to disk."),
    "demote_bytes": ("demote_bytes", "Bytes of chunks written from memory to disk."),
    "demote_missed_chunks": (
        "demote_missed_chunks",
        "Chunks that left memory before the disk could take them.",
    ),
    "promote_chunks": ("promote_chunks", "Chunks read from disk into memory."),
    "promote_bytes": ("promote_bytes", "Bytes of chunks read from disk into memory."),
    "promote_full": ("promote_full_chunks", "Chunks not read from disk for want of memory."),
    "prefetch_chunks": ("prefetch_chunks", "Chunks that a lookup let come from disk."),
    "encode_chunks": ("encode_chunks", "Chunks encoded for the disk."),
    "encode_source_bytes": ("encode_source_bytes", "Bytes of chunks that were encoded, raw."),
    "encode_bytes": ("encode_bytes", "Bytes of the bitstreams that they became."),
    "decode_errors": ("decode_errors", "Bitstreams whose codec or profile was not here."),
    "pack_chunks": ("pack_chunks", "Chunks encoded in memory."),
    "pack_full": ("pack_full_chunks", "Chunks not encoded in memory for want of room."),
    "pack_evict_chunks": ("pack_evict_chunks", "Bitstreams dropped to make room in memory."),
    "unpack_chunks": ("unpack_chunks", "Chunks decoded out of memory."),
    "lend_chunks": ("lend_chunks", "Bitstreams lent to clients that decode themselves."),
    "lend_bytes": ("lend_bytes", "Bytes of bitstreams lent."),
    "nvme_evict_chunks": ("nvme_evict_chunks", "Chunks dropped to make room on disk."),
    "nvme_quota_chunks": ("nvme_quota_chunks", "Chunks dropped for their tenant's quota."),
    "nvme_copy_chunks": ("nvme_copy_chunks", "Chunks that got a second chance on disk."),
    "nvme_copy_bytes": ("nvme_copy_bytes", "Bytes written for second chances."),
    "nvme_read_errors": ("nvme_read_errors", "Reads that the device refused."),
    "nvme_write_errors": ("nvme_write_errors", "Writes that the device refused."),
    "nvme_index_errors": ("nvme_index_errors", "Failures of the index on disk."),
    "quarantine_chunks": ("quarantine_chunks", "Records on disk found damaged, never served."),
    "damaged_chunks": ("damaged_chunks", "Chunks in memory that were not what was committed."),
    "revive_chunks": ("revive_chunks", "Chunks of an earlier daemon found good in memory."),
    "scrub_chunks": ("scrub_chunks", "Records that scrubbing has verified."),
    "scrub_bytes": ("scrub_bytes", "Bytes that scrubbing has verified."),
    "leases_expired": ("leases_expired", "Leases that ended by their deadline."),
    "expired_chunks": ("expired_chunks", "Chunks whose time to live was over."),
    "clear_chunks": ("clear_chunks", "Chunks dropped by an operator."),
    "request_errors": ("request_errors", "Requests refused with an error."),
    "internal_errors": ("internal_errors", "Requests that failed inside the daemon."),
}
_TIER_COUNTERS = frozenset(
    ("reserve_full", "commit_chunks", "commit_bytes", "pin_bytes", "evict_chunks", "evict_bytes")
)

_TIER_GAUGES = {
    "size": ("kvd_tier_size_bytes", "Bytes of the tier."),
    "used": ("kvd_tier_used_bytes", "Bytes allocated, rounding included."),
    "largest_free": ("kvd_tier_largest_free_bytes", "Longest run of free bytes."),
    "num_extents": ("kvd_tier_extents", "Extents allocated."),
    "disk_size": ("kvd_tier_disk_bytes", "Bytes of files."),
    "written": ("kvd_tier_written_bytes", "Bytes given to the device since the start."),
    "written_a_day": ("kvd_tier_written_a_day_bytes", "Bytes a day at the rate of this run."),
    "write_amplification": (
        "kvd_tier_write_amplification",
        "Bytes given to the device for each byte of chunks that came from memory.",
    ),
}


class StoreCollector(Collector):
    """Reads facts and, once there is one, the store. What cannot be read just now is left out."""

    def __init__(self, store: Callable[[], ChunkStore | None], facts: Facts) -> None:
        self._store = store
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        yield from _facts_metrics(self._facts)
        store = self._store()
        if store is not None:
            yield from _store_metrics(store)
            yield from _tier_metrics(store)
            yield from _counter_metrics(store)


class HttpServer:
    """The server of one daemon. `port` is the one it got where the address said 0."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self._server = server
        self.port: int = server.server_address[1]
        self._thread = threading.Thread(
            target=server.serve_forever, name="kvd-http", kwargs={"poll_interval": 0.1}, daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Answer nobody any more. Twice is once."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_http(address: str, store: Callable[[], ChunkStore | None], facts: Facts) -> HttpServer:
    """Serve at `host:port` until closed. Raises `ConfigError` where that cannot be had."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StoreCollector(store, facts))
    ProcessCollector(registry=registry)
    try:
        host, port = parse_address(address)
        server = _Server(host, port, registry, facts)
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(
            f"http: cannot listen on {address}: {reason}; choose another address or none"
        ) from error
    return HttpServer(server)


class _Server(ThreadingHTTPServer):
    """Threads a connection, up to a bound; beyond it connections are closed at once."""

    daemon_threads = True
    request_queue_size = CONNECTIONS_MAX

    def __init__(self, host: str, port: int, registry: CollectorRegistry, facts: Facts) -> None:
        self.registry = registry
        self.facts = facts
        self._slots = threading.BoundedSemaphore(CONNECTIONS_MAX)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # localhost is both; those who probe it try 127.0.0.1 first.
        self.address_family, _, _, _, where = min(found, key=lambda one: one[0])
        super().__init__((str(where[0]), port), _Request)

    def server_bind(self) -> None:
        # Not HTTPServer's own: it asks the resolver for this host's name, which can take seconds.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "kvd", self.server_address[1]

    def process_request(self, request: object, client_address: object) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)  # type: ignore[arg-type]
            return
        try:
            super().process_request(request, client_address)  # type: ignore[arg-type]
        except BaseException:
            self._slots.release()
            raise

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._slots.release()

    def handle_error(self, request: object, client_address: object) -> None:
        # A prober that hangs up in the middle is no event.
        return


class _Request(BaseHTTPRequestHandler):
    """One request: three paths, GET and HEAD."""

    timeout = REQUEST_TIMEOUT_S
    server_version = "kvd"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._metrics()
        elif path == "/healthz":
            self._answer(HTTPStatus.OK, "ok\n")
        elif path == "/readyz":
            state = self._daemon.facts.state
            is_ready = state == "serving"
            status = HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, f"{state}\n")
        else:
            self._answer(HTTPStatus.NOT_FOUND, "there is: /metrics /healthz /readyz\n")

    do_HEAD = do_GET  # noqa: N815

    @property
    def _daemon(self) -> _Server:
        return cast(_Server, self.server)

    def _metrics(self) -> None:
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        try:
            body = encode(self._daemon.registry)
        except Exception as error:  # noqa: BLE001
            # The scraper sees that this scrape failed; the next one may not.
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}\n")
            return
        self._answer(HTTPStatus.OK, body, content_type)

    def _answer(
        self, status: HTTPStatus, body: str | bytes, content_type: str = "text/plain; charset=utf-8"
    ) -> None:
        raw = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, format: str, *args: object) -> None:
        # Scrapes are no events.
        return


def _facts_metrics(facts: Facts) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "kvd_info", "What runs here; always 1.", labels=("version", "instance", "pages")
    )
    info.add_metric((facts.version, facts.instance, facts.pages), 1)
    yield info
    state = facts.state
    states = GaugeMetricFamily("kvd_state_info", "1 for the daemon's state.", labels=("state",))
    for name in sorted({"starting", "serving", "draining", state}):
        states.add_metric((name,), int(name == state))
    yield states
    uptime_s = (time.monotonic_ns() - facts.started_ns) / 1e9
    yield GaugeMetricFamily("kvd_uptime_seconds", "Since the daemon's start.", uptime_s)
    yield GaugeMetricFamily("kvd_sessions", "Clients attached.", facts.num_sessions)


def _store_metrics(store: ChunkStore) -> Iterator[Metric]:
    readers: tuple[tuple[str, str, Callable[[], int]], ...] = (
        ("kvd_chunks", "Chunks here.", lambda: len(store.directory)),
        ("kvd_layouts", "Layouts known.", lambda: len(store.layouts)),
        ("kvd_pin_leases", "Open leases of readers.", lambda: store.num_pinned),
        ("kvd_reserved_chunks", "Chunks that are being written.", lambda: store.num_reserved),
    )
    for name, text, read in readers:
        value = _read(read)
        if value is not None:
            yield GaugeMetricFamily(name, text, value)


def _tier_metrics(store: ChunkStore) -> Iterator[Metric]:
    tier = store.tier
    upper: dict[str, Any] = {
        "name": tier.name,
        "size": tier.size,
        "used": tier.used,
        "largest_free": _read(lambda: tier.largest_free),
        "num_extents": tier.num_extents,
    }
    found = (_read(below.facts) for below in store.below)
    tiers = [upper, *(facts for facts in found if facts is not None)]
    for name, (metric, text) in _TIER_GAUGES.items():
        family = GaugeMetricFamily(metric, text, labels=("tier",))
        for facts in tiers:
            if (value := facts.get(name)) is not None:
                family.add_metric((facts["name"],), value)
        if family.samples:
            yield family
    disks = [facts for facts in tiers if "failure" in facts]
    if disks:
        family = GaugeMetricFamily(
            "kvd_tier_failing", "1 while the tier refuses writes.", labels=("tier",)
        )
        for facts in disks:
            family.add_metric((facts["name"],), bool(facts["failure"]))
        yield family


def _counter_metrics(store: ChunkStore) -> Iterator[Metric]:
    counters = _read(lambda: dict(store.counters)) or {}
    # A counter is there from the first scrape on, at 0: a rate needs a point to start from.
    for name in {**_COUNTERS, **dict.fromkeys(sorted(counters))}:
        metric, text = _COUNTERS.get(name, (name, "Counted by the store."))
        labels = ("tier",) if name in _TIER_COUNTERS else ()
        family = CounterMetricFamily(f"kvd_{metric}", text, labels=labels)
        family.add_metric((store.tier.name,) if labels else (), counters.get(name, 0))
        yield family


def _read(read: Callable[[], T]) -> T | None:
    """What `read` returns, or None if the event loop changes it under each of a few tries."""
    for _ in range(_TRIES_MAX):
        try:
            return read()
        except (RuntimeError, LookupError, ValueError):
            continue
    return None
