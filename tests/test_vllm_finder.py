"""What the finder makes of a daemon that is slow."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kvd.client.connectors import late_answers
from kvd.client.connectors.late_client import LateClient
from kvd.client.connectors.vllm_finder import Finder
from kvd.client.connectors.vllm_identity import engine_of
from kvd.client.connectors.vllm_options import Options
from kvd.client.lease import Lease
from kvd.errors import DeadlineExceeded, KvdError, Unavailable
from tests.vllm_bench import FULL
from tests.vllm_fakes import kv_cache_config, vllm_config

PATIENCE_S = 30.0


class Client:
    """Counts the questions, and answers each with an error."""

    def __init__(self, error: KvdError) -> None:
        self.error = error
        self.count = 0

    def pin(self, *_: Any, **__: Any) -> Lease:
        self.count += 1
        raise self.error


def reasons(client: Client, *, times: int) -> list[str]:
    """Why nothing is found, time after time."""
    options = Options(chunk_tokens=8, revision="v1", lookup_s=PATIENCE_S)
    engine = engine_of(vllm_config(FULL), kv_cache_config(FULL), options)
    finder = Finder(cast(LateClient, client), engine, options)
    questions = [finder.ask([bytes(32)], lambda _: ()) for _ in range(times)]
    found = [question.answer(PATIENCE_S) for question in questions]
    finder.close()
    return [each.reason for each in found if each]


def test_after_an_answer_that_came_too_late_nobody_asks_for_a_while() -> None:
    client = Client(DeadlineExceeded("late"))
    assert reasons(client, times=5) == ["slow"] * 5
    assert client.count == 1


def test_who_was_slow_is_asked_again_after_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_answers, "REST_S", 0.0)
    client = Client(DeadlineExceeded("late"))
    assert reasons(client, times=5) == ["slow"] * 5
    assert client.count == 5


def test_a_daemon_that_is_away_is_not_slow() -> None:
    client = Client(Unavailable("away"))
    assert reasons(client, times=5) == ["unavailable"] * 5
    assert client.count == 5
