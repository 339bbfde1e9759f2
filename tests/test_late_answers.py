"""Nobody asks for a while after an answer that came too late."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest

from kvd.client.connectors import late_answers
from kvd.client.connectors.late_answers import Rest
from kvd.errors import DeadlineExceeded, KvdError, Unavailable


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, to be moved."""
    found = [time.monotonic()]
    monkeypatch.setattr(late_answers.time, "monotonic", lambda: found[0])
    return found


def is_asked(rest: Rest, outcome: KvdError | None = None) -> bool:
    """Whether a question got through, which then ends so."""
    is_through = False
    with suppress(KvdError), rest.asking():
        is_through = True
        if outcome is not None:
            raise outcome
    return is_through


def test_a_rest_follows_a_late_answer_and_ends(now: list[float]) -> None:
    rest = Rest()
    assert is_asked(rest)
    assert is_asked(rest, DeadlineExceeded("late"))
    assert not is_asked(rest)
    now[0] += late_answers.REST_S
    assert is_asked(rest)


def test_whoever_is_turned_away_hears_why() -> None:
    rest = Rest()
    is_asked(rest, DeadlineExceeded("late"))
    with pytest.raises(DeadlineExceeded, match="slow a moment ago"), rest.asking():
        pass


def test_who_asks_in_a_rest_does_not_make_it_longer(now: list[float]) -> None:
    rest = Rest()
    is_asked(rest, DeadlineExceeded("late"))
    now[0] += late_answers.REST_S * 0.75
    assert not is_asked(rest)
    now[0] += late_answers.REST_S * 0.25
    assert is_asked(rest)


def test_no_rest_follows_other_errors() -> None:
    rest = Rest()
    assert is_asked(rest, Unavailable("away"))
    assert is_asked(rest)
