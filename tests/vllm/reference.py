"""The right answer: what an engine says that computes everything, alone."""

from __future__ import annotations

import json

from tests.vllm.harness import Answer, Engine, Request

# float32, whole prompt against loaded prefix, prompts of 40 to 3,000 tokens: 4e-6 was seen at most.
LOGPROB_ERROR_MAX = 1e-4

# What of a request changes its answer, where an engine runs one model.
_TELLING = ("prompt", "new_tokens", "lora")


class Reference:
    """The answers of `engine`, which has no connector and caches nothing."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._answers: dict[str, Answer] = {}

    def __call__(self, request: Request) -> Answer:
        """The right answer. The engine is asked once."""
        told = {name: request[name] for name in _TELLING if name in request}
        name = json.dumps(told)
        if name not in self._answers:
            (self._answers[name],) = self._engine.generate(told)
        return self._answers[name]

    def check(self, request: Request, answer: Answer) -> None:
        """Assert that an answer has the right tokens and log-probabilities."""
        assert_same(answer, self(request))


def assert_same(one: Answer, other: Answer) -> None:
    """Tokens are the same, and log-probabilities as near as another order of sums lets them be."""
    assert one.finish == other.finish == "length"
    assert one.logprob_error(other) <= LOGPROB_ERROR_MAX
