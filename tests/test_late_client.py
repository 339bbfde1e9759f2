"""A client for programs that start before their daemon."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import kvd
from kvd.client.connectors import late_client
from kvd.client.connectors.late_client import LateClient
from kvd.errors import KvdError, Unavailable
from tests.daemon_in_thread import DaemonInThread


class Attach:
    """Counts how often it is asked."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.count = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def __call__(self) -> kvd.Client:
        self.count += 1
        self.may_go_on.wait()
        return kvd.connect(self.socket)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, to be moved."""
    found = [time.monotonic()]
    monkeypatch.setattr(late_client.time, "monotonic", lambda: found[0])
    return found


def store(client: LateClient, layout: kvd.KVLayout) -> list[str]:
    key = kvd.standalone_key(layout.fingerprint, [1])
    with client.reserve(layout, [key], standalone=True, num_tokens=[1]) as reservation:
        for index in reservation:
            reservation.write(index, np.zeros(layout.shape(1), dtype=np.float32))
        reservation.commit()
        return reservation.states


def is_stored(client: LateClient, layout: kvd.KVLayout) -> bool:
    key = kvd.standalone_key(layout.fingerprint, [1])
    with client.pin(layout, [key], standalone=True) as lease:
        return len(lease) == 1


def test_the_daemon_can_be_looked_for_ahead(layout: kvd.KVLayout, tmp_path: Path) -> None:
    away = Attach(tmp_path / "away.sock")
    LateClient(away).attach()
    assert away.count == 1
    daemon = DaemonInThread(tmp_path)
    attach = Attach(daemon.local)
    client = LateClient(attach)
    client.attach()
    assert not is_stored(client, layout)
    assert attach.count == 1
    client.close()
    daemon.stop()


def test_nobody_is_asked_before_the_first_call(tmp_path: Path) -> None:
    attach = Attach(tmp_path / "kvd.sock")
    LateClient(attach).close()
    assert attach.count == 0


def test_it_attaches_once_and_does_as_the_client_does(tmp_path: Path, layout: kvd.KVLayout) -> None:
    daemon = DaemonInThread(tmp_path)
    attach = Attach(daemon.local)
    client = LateClient(attach)
    assert store(client, layout) == ["granted"]
    assert store(client, layout) == ["exists"]
    assert is_stored(client, layout)
    assert attach.count == 1
    daemon.until_sessions(1)
    client.close()
    daemon.until_sessions(0)
    daemon.stop()


def test_a_daemon_that_is_away_is_looked_for_now_and_then(
    tmp_path: Path, layout: kvd.KVLayout, now: list[float]
) -> None:
    attach = Attach(tmp_path / "kvd.sock")
    client = LateClient(attach)
    for _ in range(5):
        with pytest.raises(Unavailable):
            store(client, layout)
    assert attach.count == 1
    now[0] += late_client.RETRY_EVERY_S
    with pytest.raises(Unavailable):
        is_stored(client, layout)
    assert attach.count == 2


def test_a_daemon_that_comes_late_is_found(
    tmp_path: Path, layout: kvd.KVLayout, now: list[float]
) -> None:
    client = LateClient(Attach(tmp_path / "kvd.sock"))
    with pytest.raises(Unavailable):
        store(client, layout)
    daemon = DaemonInThread(tmp_path)
    with pytest.raises(Unavailable):
        store(client, layout)
    now[0] += late_client.RETRY_EVERY_S
    assert store(client, layout) == ["granted"]
    client.close()
    daemon.stop()


def test_a_daemon_that_comes_back_is_the_clients_to_find(
    tmp_path: Path, layout: kvd.KVLayout
) -> None:
    daemon = DaemonInThread(tmp_path)
    attach = Attach(daemon.local)
    client = LateClient(attach)
    store(client, layout)
    daemon.stop()
    with pytest.raises(KvdError):
        is_stored(client, layout)
    daemon.start()
    time.sleep(0.25)
    assert not is_stored(client, layout)
    assert attach.count == 1
    client.close()
    daemon.stop()


def test_a_closed_client_attaches_no_more(tmp_path: Path, layout: kvd.KVLayout) -> None:
    daemon = DaemonInThread(tmp_path)
    attach = Attach(daemon.local)
    client = LateClient(attach)
    client.close()
    client.close()
    for call in (store, is_stored):
        with pytest.raises(Unavailable):
            call(client, layout)
    assert attach.count == 0
    daemon.stop()


def test_threads_share_one_session(tmp_path: Path, layout: kvd.KVLayout) -> None:
    daemon = DaemonInThread(tmp_path)
    attach = Attach(daemon.local)
    attach.may_go_on.clear()
    client = LateClient(attach)
    found: list[bool] = []

    def look() -> None:
        found.append(is_stored(client, layout))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    attach.may_go_on.set()
    for thread in threads:
        thread.join()
    assert found == [False] * 4
    assert attach.count == 1
    client.close()
    daemon.stop()


def test_a_client_that_closes_while_it_attaches_ends_its_session(
    tmp_path: Path, layout: kvd.KVLayout
) -> None:
    daemon = DaemonInThread(tmp_path)
    attach = Attach(daemon.local)
    attach.may_go_on.clear()
    client = LateClient(attach)
    work: list[Callable[[], object]] = [lambda: is_stored(client, layout), client.close]
    threads = [threading.Thread(target=_quietly, args=(each,)) for each in work]
    threads[0].start()
    while not attach.count:
        time.sleep(0.001)
    threads[1].start()
    attach.may_go_on.set()
    for thread in threads:
        thread.join()
    daemon.until_sessions(0)
    daemon.stop()


def _quietly(work: Callable[[], object]) -> None:
    with suppress(KvdError):
        work()
