"""Metrics and probes over real HTTP, with the store absent, in use, and changing under a scrape."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvd.arena import Arena
from kvd.chunk import ChunkMeta, Fingerprint
from kvd.daemon import metrics
from kvd.daemon.admin import Facts
from kvd.daemon.eviction.lru import Lru
from kvd.daemon.metrics import HttpServer, serve_http
from kvd.daemon.store import ChunkStore
from kvd.errors import ConfigError
from kvd.keys import chain_keys
from kvd.layout import KVLayout
from kvd.tiers.cpu import CpuTier

SIZE = 2 << 20

# Gauges that count things; all others end in a unit.
COUNTED = {
    "kvd_sessions",
    "kvd_chunks",
    "kvd_layouts",
    "kvd_pin_leases",
    "kvd_reserved_chunks",
    "kvd_tier_extents",
}


@pytest.fixture
def store() -> Iterator[ChunkStore]:
    arena = Arena.create(SIZE, huge_pages="never")
    yield ChunkStore(CpuTier(arena), Lru())
    arena.close()


@pytest.fixture
def facts() -> Facts:
    return Facts(pid=7, version="1.2.3", instance="abc", state="serving")


@contextmanager
def served(
    store: Callable[[], ChunkStore | None], facts: Facts, address: str = "127.0.0.1:0"
) -> Iterator[HttpServer]:
    server = serve_http(address, store, facts)
    try:
        yield server
    finally:
        server.close()


def ask(
    server: HttpServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, str, http.client.HTTPMessage]:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as client:
        client.request(method, path, headers=headers)
        answer = client.getresponse()
        return answer.status, answer.read().decode(), answer.headers


def scrape(server: HttpServer) -> dict[str, float]:
    """Samples by name and labels, as Prometheus would read them."""
    status, text, _ = ask(server, "/metrics")
    assert status == 200
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def fill(store: ChunkStore, layout: KVLayout, count: int) -> None:
    store.declare(layout)
    fingerprint = Fingerprint(layout.fingerprint)
    keys = chain_keys(fingerprint, range(16 * count), chunk_tokens=16)
    parents: list[bytes] = [fingerprint, *keys]
    metas = [
        ChunkMeta(key, parents[index], fingerprint, 16 * index, 16)
        for index, key in enumerate(keys)
    ]
    lease, _ = store.reserve(metas, lease_ns=10**9, now_ns=0)
    assert lease is not None
    store.commit(lease.id, (), now_ns=0)
    store.lookup(keys)
    store.pin(keys[:1], fingerprint, standalone=False, lease_ns=10**9, now_ns=0)


def test_scrape_is_the_store_in_numbers(store: ChunkStore, facts: Facts, layout: KVLayout) -> None:
    fill(store, layout, 3)
    facts.num_sessions = 2
    with served(lambda: store, facts) as server:
        samples = scrape(server)
    size = layout.size(16)
    expected = {
        "kvd_info{instance=abc,pages=small,version=1.2.3}": 1,
        "kvd_state_info{state=serving}": 1,
        "kvd_state_info{state=starting}": 0,
        "kvd_state_info{state=draining}": 0,
        "kvd_sessions": 2,
        "kvd_chunks": 3,
        "kvd_layouts": 1,
        "kvd_pin_leases": 1,
        "kvd_reserved_chunks": 0,
        "kvd_tier_size_bytes{tier=cpu}": SIZE,
        "kvd_tier_used_bytes{tier=cpu}": 3 * size,
        "kvd_tier_largest_free_bytes{tier=cpu}": SIZE - 3 * size,
        "kvd_tier_extents{tier=cpu}": 3,
        "kvd_lookups_total": 1,
        "kvd_lookup_chunks_total": 3,
        "kvd_lookup_hit_chunks_total": 3,
        "kvd_commit_chunks_total{tier=cpu}": 3,
        "kvd_commit_bytes_total{tier=cpu}": 3 * size,
        "kvd_pin_chunks_total": 1,
        "kvd_pin_hit_chunks_total": 1,
        "kvd_pin_bytes_total{tier=cpu}": size,
        "kvd_evict_chunks_total{tier=cpu}": 0,
        "kvd_internal_errors_total": 0,
    }
    assert {name: samples[name] for name in expected} == expected
    assert samples["kvd_uptime_seconds"] >= 0
    assert samples["process_resident_memory_bytes"] > 0


def test_names_end_in_their_unit_and_have_a_help(store: ChunkStore, facts: Facts) -> None:
    store.counters["a_new_counter"] = 7
    with served(lambda: store, facts) as server:
        families = list(text_string_to_metric_families(ask(server, "/metrics")[1]))
    ours = [family for family in families if family.name.startswith("kvd_")]
    assert ours
    for family in ours:
        assert family.documentation.endswith(".")
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        else:
            is_unit = family.name.endswith(("_bytes", "_seconds", "_info"))
            assert is_unit or family.name in COUNTED, family.name
    assert "kvd_a_new_counter" in {family.name for family in ours}


def test_before_the_store_is_there_the_daemon_is_alive_and_not_ready(facts: Facts) -> None:
    facts.state = "starting"
    with served(lambda: None, facts) as server:
        assert ask(server, "/healthz")[:2] == (200, "ok\n")
        assert ask(server, "/readyz")[:2] == (503, "starting\n")
        samples = scrape(server)
    assert samples["kvd_state_info{state=starting}"] == 1
    assert "kvd_chunks" not in samples


def test_ready_is_told_from_draining(store: ChunkStore, facts: Facts) -> None:
    with served(lambda: store, facts) as server:
        assert ask(server, "/readyz")[:2] == (200, "serving\n")
        facts.state = "draining"
        assert ask(server, "/readyz")[:2] == (503, "draining\n")
        assert ask(server, "/healthz")[0] == 200


def test_other_paths_and_methods_are_refused(store: ChunkStore, facts: Facts) -> None:
    with served(lambda: store, facts) as server:
        status, text, _ = ask(server, "/")
        assert (status, text) == (404, "there is: /metrics /healthz /readyz\n")
        assert ask(server, "/metricsandmore")[0] == 404
        assert ask(server, "/healthz", "POST")[0] == 501
        assert ask(server, "/metrics?name=x")[0] == 200


def test_head_is_the_answer_without_its_body(store: ChunkStore, facts: Facts) -> None:
    with served(lambda: store, facts) as server:
        status, text, headers = ask(server, "/healthz", "HEAD")
    assert (status, text, headers["Content-Length"]) == (200, "", "3")


def test_scraper_gets_the_format_it_asks_for(store: ChunkStore, facts: Facts) -> None:
    accept = "application/openmetrics-text;version=1.0.0"
    with served(lambda: store, facts) as server:
        _, text, headers = ask(server, "/metrics", Accept=accept)
        assert headers["Content-Type"].startswith("application/openmetrics-text")
        assert text.endswith("# EOF\n")
        assert ask(server, "/metrics")[2]["Content-Type"].startswith("text/plain")


def test_answer_tells_no_version_of_anything(store: ChunkStore, facts: Facts) -> None:
    with served(lambda: store, facts) as server:
        assert "ython" not in ask(server, "/healthz")[2]["Server"]


class ChangingStore:
    """A store whose `num_pinned` changes under the reader for its first `num_failures` readings."""

    def __init__(self, store: ChunkStore, num_failures: int) -> None:
        self.num_failures = num_failures
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    @property
    def num_pinned(self) -> int:
        if self.num_failures:
            self.num_failures -= 1
            raise RuntimeError("dictionary changed size during iteration")
        return 5


def test_number_that_changes_under_a_scrape_is_read_again(store: ChunkStore, facts: Facts) -> None:
    changing: Any = ChangingStore(store, num_failures=1)
    with served(lambda: changing, facts) as server:
        assert scrape(server)["kvd_pin_leases"] == 5


def test_number_that_never_holds_still_is_left_out(store: ChunkStore, facts: Facts) -> None:
    changing: Any = ChangingStore(store, num_failures=1_000_000)
    with served(lambda: changing, facts) as server:
        samples = scrape(server)
    assert "kvd_pin_leases" not in samples
    assert "kvd_reserved_chunks" in samples


def test_scrapes_beside_a_working_store_never_fail(
    store: ChunkStore, facts: Facts, layout: KVLayout
) -> None:
    stop = threading.Event()

    def work() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            store.declare(KVLayout(**{**vars_of(layout), "salt": str(count % 1000)}))
            store.counters[f"counter_{count % 50}"] += 1
            extent = store.tier.allocate(4096 * (count % 7 + 1))
            assert extent is not None
            store.tier.free(extent)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        with served(lambda: store, facts) as server:
            for _ in range(30):
                scrape(server)
    finally:
        stop.set()
        worker.join()


def vars_of(layout: KVLayout) -> dict[str, Any]:
    return {name: getattr(layout, name) for name in KVLayout.__dataclass_fields__}


def test_scrape_that_breaks_is_an_error_and_the_next_one_is_not(
    store: ChunkStore, facts: Facts
) -> None:
    stores: dict[str, ChunkStore] = {}
    with served(lambda: stores["it"], facts) as server:
        assert ask(server, "/metrics")[:2] == (500, "KeyError\n")
        stores["it"] = store
        assert ask(server, "/metrics")[0] == 200


def test_port_in_use_says_so(store: ChunkStore, facts: Facts) -> None:
    with (
        served(lambda: store, facts) as server,
        pytest.raises(ConfigError, match=r"cannot listen on 127.0.0.1:\d+: Address already in use"),
    ):
        serve_http(f"127.0.0.1:{server.port}", lambda: store, facts)


def test_address_that_is_none_says_so(store: ChunkStore, facts: Facts) -> None:
    with pytest.raises(ConfigError, match="http: cannot listen on 9470: an address like"):
        serve_http("9470", lambda: store, facts)


def test_close_frees_the_port_and_twice_is_once(store: ChunkStore, facts: Facts) -> None:
    server = serve_http("127.0.0.1:0", lambda: store, facts)
    port = server.port
    server.close()
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=30)
    with served(lambda: store, facts, f"127.0.0.1:{port}") as again:
        assert again.port == port


def test_localhost_is_reached_by_its_number(store: ChunkStore, facts: Facts) -> None:
    with served(lambda: store, facts, "localhost:0") as server:
        assert ask(server, "/healthz")[0] == 200


def test_connections_are_bounded(
    store: ChunkStore, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "CONNECTIONS_MAX", 2)
    with served(lambda: store, facts) as server:
        where = ("127.0.0.1", server.port)
        idle = [socket.create_connection(where, timeout=30) for _ in range(2)]
        with socket.create_connection(where, timeout=30) as refused:
            # Taken in the order of their coming: both slots are held by the idle ones.
            assert refused.recv(1) == b""
        # An idle one that asks after all is answered, and that frees its slot.
        idle[0].sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: idle[0].recv(4096), b""))
        assert answer.endswith(b"ok\n")
        for one in idle:
            one.close()
