"""What kvd cannot serve with an older vLLM runs as if there were no kvd, and the log says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.counts import counts
from tests.vllm.daemon import Daemon
from tests.vllm.harness import Engine, Request, prompt
from tests.vllm.reference import assert_same


@pytest.mark.vllm(before="0.30", why="from then on several groups are served")
def test_several_groups_are_not_served_and_the_log_says_why(tmp_path: Path) -> None:
    request: Request = {"prompt": prompt(960, 600), "new_tokens": 16}
    with Engine(tmp_path, "gemma3", name="plain", enable_prefix_caching=False) as plain:
        (right,) = plain.generate(request)
    with Daemon(tmp_path) as daemon:
        with Engine(tmp_path, "gemma3", **daemon.transfer()) as engine:
            for _ in range(2):
                engine.forget()
                (answer,) = engine.generate(request)
                assert_same(answer, right)
                assert answer.cached_tokens == 0
            assert not counts(engine)
            # What was to be stored would be by then.
            engine.stop()
        assert not daemon.chunks()
    told = [each for each in engine.log.read_text().splitlines() if "event=not_served" in each]
    # By the scheduler's side and by the worker's.
    assert len(told) == 2
    reason = "before vLLM 0.30 a failed load of several groups cannot be told"
    assert all(reason in each for each in told)
