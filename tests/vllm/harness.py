"""Real vLLM engines for tests: each a process of its own that a test talks to in lines of JSON.

    with Engine(tmp_path, "qwen3", kv_transfer_config={...}) as engine:
        first, second = engine.generate({"prompt": [1, 2, 3]}, {"prompt": [4, 5, 6]})

What a request and an answer hold: `engine_main.py`. `ask` and `answer` are the two halves of every
call, so that a test can do something, such as kill a daemon, while the engine works.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.vllm.models import VOCABULARY, model_path
from tests.vllm.nursery import Nursery, Process

ROOT = Path(__file__).parent.parent.parent
# Imports alone take ten seconds of one core; two workers and a busy machine take a minute.
START_S_MAX = 240.0
# No generation in a test takes a tenth of it.
ANSWER_S_MAX = 240.0
STOP_S_MAX = 30.0
LOG_TAIL_CHARACTERS = 6000

# One process for engine and worker, few threads that do not spin, nothing from the network, and
# hashes of prompts that are the same in every process.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    # Or numpy begins threads when it is imported, which are lost in a fork.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
    # Else the first forward compiles small functions with a C++ compiler, 4 s or, uncached, 20 s.
    "TORCH_COMPILE_DISABLE": "1",
}

# float32: between a prompt computed whole and one whose beginning is cached, bfloat16 rounds
# otherwise, and greedy decoding then takes another token now and then.
ARGUMENTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 4096,
    "block_size": 32,
    "disable_log_stats": False,
}

Request = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a request. `logprobs` are those of `tokens`, `top` the likeliest by place."""

    tokens: list[int]
    finish: str
    ttft_s: float | None
    logprobs: tuple[float, ...] = ()
    top: tuple[dict[str, float], ...] = ()
    cached_tokens: int | None = None
    kv_transfer_params: dict[str, Any] | None = None

    def logprob_error(self, other: Answer) -> float:
        """How far the log-probabilities of the same tokens are apart, at most."""
        assert self.tokens == other.tokens
        return max(abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True))


class EngineDied(AssertionError):
    """The engine's process ended, or said nothing in time; the message has the end of its log."""


class Engine:
    """vLLM with a model of `models.py`, or of a folder. `arguments` are those of `vllm.LLM`, over
    `ARGUMENTS`.

    A context manager; the process and its workers are killed at its end. `stop` before that ends
    them as an operator would.
    """

    def __init__(
        self,
        folder: Path,
        model: str | Path,
        *,
        name: str = "engine",
        settings: dict[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        self.log = folder / f"{name}.log"
        path = model if isinstance(model, Path) else model_path(model)
        self._environment = {
            **os.environ,
            **SETTINGS,
            # What this vLLM found out about a model's class: finding out costs 11 s of CPU.
            "VLLM_CACHE_ROOT": str(path.parent / f"of-vllm-{version('vllm-cpu')}"),
            **(settings or {}),
        }
        # Some settings count when vLLM is imported.
        self._imported = tuple((name, self._environment[name]) for name in SETTINGS)
        self._arguments = {"model": str(path), **ARGUMENTS, **arguments}
        self._process: Process | None = None

    def __enter__(self) -> Engine:
        with self.log.open("ab") as log:
            self._process = nursery(self._imported).engine(self._environment, log)
        try:
            self.ask(self._arguments)
            self.start_s = self.answer(timeout_s=START_S_MAX)["start_s"]
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def process(self) -> Process:
        assert self._process is not None, "the engine was not started"
        return self._process

    def generate(self, *requests: Request, timeout_s: float = ANSWER_S_MAX) -> list[Answer]:
        """All requests at once. Raises `EngineDied`."""
        self.ask({"generate": list(requests)})
        return self.answers(timeout_s=timeout_s)

    def answers(self, *, timeout_s: float = ANSWER_S_MAX) -> list[Answer]:
        """The answers to the requests that `ask` was told to generate from."""
        return [Answer(**told) for told in self.answer(timeout_s=timeout_s)["outputs"]]

    def settle(self, seconds: float = 30.0) -> bool:
        """Whether nothing is in flight any more, within so many seconds: saves are done."""
        self.ask({"settle": seconds})
        return bool(self.answer()["settled"])

    def metrics(self, prefix: str) -> dict[str, float]:
        """`name{label=value}` -> number."""
        self.ask({"metrics": prefix})
        return self.answer()

    def forget(self) -> None:
        """Empty the engine's own prefix cache, which must not be in use."""
        self.ask({"forget": True})
        assert self.answer()["forgot"]

    def ask(self, line: dict[str, Any]) -> None:
        """The first half of a call; `answer` is the second."""
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise EngineDied(self._end()) from None

    def answer(self, *, timeout_s: float = ANSWER_S_MAX) -> dict[str, Any]:
        stdout = self.process.stdout
        if not select.select([stdout], [], [], timeout_s)[0]:
            raise EngineDied(f"no answer within {timeout_s:.0f} s\n{self._end()}")
        line = stdout.readline()
        if not line:
            raise EngineDied(self._end())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineDied(f"{answer['error']}\n{self._end()}")
        return answer

    def stop(self) -> None:
        """As an operator would: standard input ends, the engine shuts down."""
        self.process.stdin.close()
        self.process.wait(timeout=STOP_S_MAX)

    def kill(self) -> None:
        """SIGKILL to what is left of it, workers too."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()

    def _end(self) -> str:
        text = self.log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]
        return f"the engine's log ends with\n{text}"


@cache
def nursery(settings: tuple[tuple[str, str], ...]) -> Nursery:
    """Where engines with these settings come from. Its start is most of the first one's."""
    return Nursery({**os.environ, **dict(settings)})


def prompt(seed: int, num_tokens: int) -> list[int]:
    """Tokens at random, the same for the same seed; a longer prompt begins with the shorter one."""
    chance = random.Random(seed)
    return [chance.randrange(1, VOCABULARY) for _ in range(num_tokens)]
