"""A vLLM engine that does what it is told line by line, in a process of its own.

    python -m tests.vllm.engine_main    (see `harness.py`, which has it started by `nursery.py`)

Standard input has one JSON object a line, standard output one for each; what vLLM prints goes to
standard error. The first line holds the arguments of `vllm.LLM`, and is answered with
`{"start_s"}`. Then, until standard input ends:

    {"generate": [request, ...]}   all at once -> {"outputs": [output, ...], "wall_s", "steps"}
    {"settle": seconds}            step until nothing is in flight -> {"settled": bool}
    {"metrics": prefix}            -> {name{label=value,...}: number}, from Prometheus' registry
    {"forget": true}               empty the engine's own prefix cache -> {"forgot": bool}

A request is `{"prompt": [token, ...]}`, and may have `new_tokens`, `logprobs`, `cache_salt`,
`kv_transfer_params`, `lora` (a name and a path), `abort_after` (tokens), `abort_at` (steps),
`images` (a seed for each that the prompt has a place for) and `embeds` (the seed of embeddings that
stand for its tokens).
An output is `{"tokens", "logprobs", "top", "cached_tokens", "ttft_s", "finish",
"kv_transfer_params"}`: `logprobs` those of the tokens chosen, `top` the likeliest at each place,
`{token: log-probability}`.
What raises is answered with `{"error"}`, and ends the process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from tests.vllm import holds

# No generation in a test takes longer; a request that hangs must not hang the engine's process.
GENERATE_S_MAX = 300.0
# Between two looks at an engine that waits for its connector.
IDLE_S = 0.001

Json = dict[str, Any]


class Engine:
    """vLLM in this process, driven step by step. `arguments` are those of `vllm.LLM`."""

    def __init__(self, arguments: Json) -> None:
        if "kv_events_config" in arguments:
            from vllm.config.kv_events import KVEventsConfig

            # The one option of these that `LLM` does not take as an object of JSON.
            events = KVEventsConfig(**arguments["kv_events_config"])
            arguments = arguments | {"kv_events_config": events}
        self._llm = vllm().LLM(**arguments)
        # An engine as any version has it: requests go in, steps are made, outputs come out.
        self._engine: Any = self._llm.llm_engine
        if vllm().__version_tuple__ < (0, 28):
            _count_every_step(self._engine)
        self._names = map(str, count())
        self._adapters: dict[str, int] = {}

    def answer(self, line: Json) -> Json:
        match line:
            case {"generate": requests}:
                return self._generate(requests)
            case {"settle": seconds}:
                return {"settled": self._settle(seconds)}
            case {"metrics": prefix}:
                return metrics(prefix)
            case {"forget": True}:
                return {"forgot": bool(self._llm.reset_prefix_cache())}
        raise ValueError(f"what to do? {sorted(line)}")

    def _generate(self, requests: list[Json]) -> Json:
        begun = time.perf_counter()
        running = {next(self._names): Watched(request, begun) for request in requests}
        for name, watched in running.items():
            self._add(name, watched.request)
        steps = 0
        while self._engine.has_unfinished_requests():
            if time.perf_counter() - begun > GENERATE_S_MAX:
                raise TimeoutError(f"requests unfinished after {GENERATE_S_MAX:.0f} s")
            outputs = self._engine.step()
            steps += 1
            if not outputs:
                time.sleep(IDLE_S)
            for name, watched in running.items():
                if watched.request.get("abort_at") == steps:
                    self._engine.abort_request([name])
            for output in outputs:
                watched = running[output.request_id]
                watched.see(output)
                if watched.is_to_abort:
                    self._engine.abort_request([output.request_id])
        outputs = [watched.told for watched in running.values()]
        return {"outputs": outputs, "wall_s": time.perf_counter() - begun, "steps": steps}

    def _add(self, name: str, request: Json) -> None:
        transfer = request.get("kv_transfer_params")
        parameters = vllm().SamplingParams(
            temperature=0.0,
            max_tokens=request.get("new_tokens", 8),
            ignore_eos=True,
            logprobs=request.get("logprobs", 5),
            detokenize=False,
            extra_args={"kv_transfer_params": transfer} if transfer else None,
        )
        prompt: Json = {"prompt_token_ids": request["prompt"]}
        if "images" in request:
            prompt["multi_modal_data"] = {"image": [image(seed) for seed in request["images"]]}
        if "embeds" in request:
            size = self._llm.model_config.get_hidden_size()
            prompt = {"prompt_embeds": embeds(request["embeds"], request["prompt"], size)}
        if "cache_salt" in request:
            prompt["cache_salt"] = request["cache_salt"]
        lora = self._lora(*request["lora"]) if "lora" in request else None
        self._engine.add_request(name, prompt, parameters, lora_request=lora)

    def _lora(self, name: str, path: str) -> Any:
        # vLLM takes adapters of one number for one.
        number = self._adapters.setdefault(name, len(self._adapters) + 1)
        return importlib.import_module("vllm.lora.request").LoRARequest(name, number, path)

    def _settle(self, seconds: float) -> bool:
        """Whether all that the connector still had to do is done, within so many seconds."""
        scheduler = self._engine.engine_core.engine_core.scheduler
        give_up = time.perf_counter() + seconds
        while scheduler.has_requests():
            if time.perf_counter() > give_up:
                return False
            self._engine.step()
            time.sleep(IDLE_S)
        return True


class Watched:
    """A request that runs, and what is told of it."""

    def __init__(self, request: Json, begun: float) -> None:
        self.request = request
        self.told: Json = {"tokens": [], "finish": "abort", "ttft_s": None}
        self._begun = begun

    @property
    def is_to_abort(self) -> bool:
        abort_after: int = self.request.get("abort_after", sys.maxsize)
        return len(self.told["tokens"]) >= abort_after

    def see(self, output: Any) -> None:
        """Takes in a `vllm.RequestOutput`."""
        completion = output.outputs[0]
        if self.told["ttft_s"] is None:
            self.told["ttft_s"] = time.perf_counter() - self._begun
        tokens = list(completion.token_ids)
        tops = completion.logprobs or []
        self.told |= {
            "tokens": tokens,
            "logprobs": [top[token].logprob for token, top in zip(tokens, tops, strict=False)],
            "top": [{token: entry.logprob for token, entry in top.items()} for top in tops],
            "cached_tokens": output.num_cached_tokens,
            "kv_transfer_params": output.kv_transfer_params,
        }
        if output.finished:
            self.told["finish"] = completion.finish_reason


def _count_every_step(engine: Any) -> None:
    """Before 0.28 `LLM`, unlike vLLM's server, drops what a step without outputs has counted."""
    get_output = engine.engine_core.get_output

    def counted() -> Any:
        found = get_output()
        if not found.outputs and found.scheduler_stats is not None:
            engine.logger_manager.record(
                scheduler_stats=found.scheduler_stats, iteration_stats=None
            )
        return found

    engine.engine_core.get_output = counted


def vllm() -> Any:
    """The package. Type checkers would take it for this folder."""
    return importlib.import_module("vllm")


def image(seed: int) -> Any:
    """Squares of colours at random, the same for the same seed; all images have one size."""
    import numpy as np
    from PIL import Image

    squares = np.random.default_rng(seed).integers(256, size=(8, 8, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((128, 128), Image.Resampling.NEAREST)


def embeds(seed: int, tokens: list[int], size: int) -> Any:
    """For each token a row that stands for it with this seed: float32 [tokens, size]."""
    import torch

    table = torch.randn(max(tokens) + 1, size, generator=torch.Generator().manual_seed(seed))
    return table[tokens]


def metrics(prefix: str) -> dict[str, float]:
    import prometheus_client

    return {
        f"{sample.name}{{{','.join(f'{k}={v}' for k, v in sorted(sample.labels.items()))}}}": (
            sample.value
        )
        for family in prometheus_client.REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith(prefix)
    }


def main() -> None:
    # vLLM logs to standard output, and so may what it imports.
    reply = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        _serve(reply)
    except Exception as error:
        # Whoever waits for an answer must get one.
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=reply)
        raise SystemExit(1) from error


def _serve(reply: TextIO) -> None:
    if folder := os.environ.get(holds.SETTING):
        holds.install(Path(folder))
    begun = time.perf_counter()
    engine = Engine(json.loads(sys.stdin.readline()))
    print(json.dumps({"start_s": time.perf_counter() - begun}), file=reply)
    for line in sys.stdin:
        print(json.dumps(engine.answer(json.loads(line))), file=reply)


if __name__ == "__main__":
    main()
