r"""Time to the first token of a real vLLM engine with kvd, beside the same engine without.

    python benchmarks/vllm_ttft.py [--quick] [--json FILE] [--lmcache PYTHON]
                                                               (after `make test-vllm`)

SmolLM2-135M in bfloat16 on the CPU, engines in processes of their own, one prompt at a time, the
engines by turns in one run:

    plain      no connector: a new prompt is computed; the same again is a hit of vLLM's own cache
    kvd        a new prompt is computed and stored; vLLM's own cache is emptied; then it is loaded,
               layer by layer while what is behind it is computed
    kvd whole  the same with `layer_by_layer` off: it is loaded, then the rest is computed
    example    vLLM's ExampleConnector, files in a folder: the same
    lmcache    LMCache's server and vLLM's connector to it, in shared memory: the same. Takes part
               where LMCache can be imported

LMCache's wheel asks for other versions than vLLM here has. In an environment that
`tests/vllm/environment.py FOLDER` made, this is enough for a CPU:

    pip install --constraint tests/vllm/constraints.txt \
        aiofile cryptography opentelemetry-exporter-prometheus sortedcontainers
    pip install --no-deps lmcache==0.5.6

and then `--lmcache FOLDER/bin/python`: everything runs in that environment. Its connector inside
the engine (LMCacheConnectorV1) has no way to copy from a CPU engine, and stores nothing.

On the back of an envelope: a token has 23 KB of KV (30 layers, 2 planes, 3 heads of 64), so 2,048
tokens 47 MB, 8 ms to copy; they take 2 x 135e6 x 2,048 = 0.55 TFLOP to compute, some seconds on two
cores. What is left of a hit is one step of the engine.

A hit that was none by the connector's own counters ends the run: it would be measured as one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.vllm_python import run_with_vllm

if __name__ == "__main__":
    run_with_vllm()

import numpy as np

import kvd
from benchmarks.common import (
    Figure,
    Median,
    Row,
    arguments,
    console_for,
    in_turn,
    median_of,
    print_figures,
    print_rows,
    progress_bar,
    ratio_of,
    running,
    running_daemon,
    significant,
    write_json,
)

LENGTHS, LENGTHS_QUICK = (512, 1024, 2048, 4096), (512, 2048)
ROUNDS, ROUNDS_QUICK = 9, 3
# Of one layer, plane and head each 64 numbers of two bytes.
TOKEN_SIZE = 30 * 2 * 3 * 64 * 2
CPU_SIZE = 3 << 30
CHUNK_TOKENS = 256
STORE_S_MAX = 30.0
# A load is counted before the first token is there, or just after.
COUNT_S_MAX = 1.0
BLOCK_SIZE = 128
# Behind what is known stands a question, as behind a document: fewer tokens than a block, which
# every engine computes every time. Without one vLLM's own hit leaves out a whole block.
QUESTION_TOKENS = 40

# For what a connector costs where nothing is found: so many prompts at once, of so many tokens.
MISS_PROMPTS, MISS_TOKENS, MISS_NEW_TOKENS = 4, 1024, 16
# In each round twice: what it costs is little against how much one run differs from the next.
MISS_ROUNDS = 2
# By engine, and what their requests say. Two processes of one and the same engine differ by more
# than what is to be measured, so the figure compares requests of one process.
ALL_NEW: dict[str, tuple[str, dict[str, object]]] = {
    "kvd": ("kvd", {}),
    "unkept": ("kvd", {"kv_transfer_params": {"kvd": {"load": False, "store": False}}}),
    "plain": ("plain", {}),
}

SETTINGS = {
    "OMP_NUM_THREADS": str(os.cpu_count() or 1),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "LMCACHE_TRACK_USAGE": "false",
}
KVD: dict[str, object] = {
    "kv_connector": "KvdConnector",
    "kv_connector_module_path": "kvd.client.connectors.vllm",
}
CONNECTORS: dict[str, dict[str, object]] = {
    "plain": {},
    "kvd": KVD,
    "kvd whole": KVD,
    "example": {"kv_connector": "ExampleConnector"},
    "lmcache": {"kv_connector": "LMCacheMPConnector"},
}
# With hybrid groups vLLM imports LMCache, and with it llvmlite, before the worker is there, which
# then fails when it goes through all modules. This model has one group either way.
ARGUMENTS: dict[str, dict[str, object]] = {"lmcache": {"disable_hybrid_kv_cache_manager": True}}
# Those that say themselves how many tokens they stored and loaded.
COUNTING = ("kvd", "kvd whole", "lmcache")

Times = dict[tuple[str, int], list[float]]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--lmcache", metavar="PYTHON", help="of an environment with LMCache")
    args = parser.parse_args()
    console = console_for(args.json)
    lengths = LENGTHS_QUICK if args.quick else LENGTHS
    rounds = ROUNDS_QUICK if args.quick else ROUNDS
    started = time.monotonic()
    times: Times = defaultdict(list)
    with ExitStack() as stack:
        bench = Bench(stack)
        with progress_bar("prompts", rounds * len(lengths) + rounds) as tick:
            # Everything is used once before anything is measured.
            bench.measure(lengths[0], 0, defaultdict(list))
            for number in range(rounds):
                for length in lengths:
                    bench.measure(length, number, times)
                    tick()
                for again in range(MISS_ROUNDS):
                    bench.measure_misses(MISS_ROUNDS * number + again, times)
                tick()
    rows = [row_of(name, length, found) for (name, length), found in sorted(times.items())]
    figures = figures_of(times)
    print_rows(console, "time to the first token, one prompt", rows)
    print_figures(console, figures)
    console.print(f"{time.monotonic() - started:.0f} s, load {os.getloadavg()[0]:.1f}")
    write_json(args.json, "vllm_ttft", figures, rows)


class Bench:
    """A daemon, LMCache's server, and engines that are there while `stack` is open."""

    def __init__(self, stack: ExitStack) -> None:
        from tests.vllm.harness import Engine

        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvd-bench-")))
        daemon = stack.enter_context(running_daemon(cpu_size=CPU_SIZE))
        self._client = stack.enter_context(kvd.connect(daemon.socket))
        extra: dict[str, dict[str, object]] = {
            "plain": {},
            "kvd": {"socket": daemon.socket},
            # Of a name space of its own: else it would find what the other has just stored.
            "kvd whole": {"socket": daemon.socket, "layer_by_layer": False, "salt": "whole"},
            "example": {"shared_storage_path": str(folder / "example")},
        }
        if importlib.util.find_spec("lmcache"):
            self._lmcache = stack.enter_context(running_lmcache(folder / "lmcache-server.log"))
            extra["lmcache"] = {"lmcache.mp.port": self._lmcache.port}
        self._seeds = count(1)
        self._engines: dict[str, Engine] = {}
        for name, options in extra.items():
            engine = Engine(
                folder,
                "smollm2",
                name=name,
                settings=SETTINGS,
                dtype="bfloat16",
                max_model_len=8192,
                block_size=BLOCK_SIZE,
                **_arguments_of(name, options),
            )
            self._engines[name] = stack.enter_context(engine)

    def measure(self, length: int, number: int, times: Times) -> None:
        """One prompt of `length` tokens and a question: computed, and found again but for the
        question, by each engine.
        """
        seed = next(self._seeds)
        for name in in_turn(list(self._engines), number):
            stored = self._stored_tokens(name)
            times[f"{name} computed", length].append(self._ttft(name, seed, length))
            if not self._reaches(self._stored_tokens, name, stored + length, STORE_S_MAX):
                raise SystemExit(f"{name}: after {STORE_S_MAX} s a prompt is not stored")
            if name != "plain":
                # A connector may hold blocks until the engine makes another step.
                self._engines[name].settle()
                self._engines[name].forget()
            loaded = self._loaded_tokens(name)
            times[f"{name} hit", length].append(self._ttft(name, seed, length))
            if not self._reaches(self._loaded_tokens, name, loaded + length, COUNT_S_MAX):
                raise SystemExit(f"{name}: a prompt that was stored was not loaded")
        times["copy", length].append(seconds_to_copy(length * TOKEN_SIZE))

    def measure_misses(self, number: int, times: Times) -> None:
        """Prompts that nobody has seen, several at once, to their last token, and until all of them
        are stored: with kvd, with requests that want nothing of it, and without a connector.
        """
        for name in in_turn(list(ALL_NEW), number):
            engine, more = ALL_NEW[name]
            prompts = [_prompt(next(self._seeds), MISS_TOKENS) for _ in range(MISS_PROMPTS)]
            wanted = {"new_tokens": MISS_NEW_TOKENS, "logprobs": 0, **more}
            # With a full cache of its own an engine evicts: all begin with an empty one.
            self._engines[engine].settle()
            self._engines[engine].forget()
            stored = self._stored_tokens(name) + MISS_PROMPTS * MISS_TOKENS
            started = time.perf_counter()
            self._engines[engine].generate(*({"prompt": each, **wanted} for each in prompts))
            # What is stored after the last token is part of the price: others would pay it.
            if not self._reaches(self._stored_tokens, name, stored, STORE_S_MAX):
                raise SystemExit(f"{name}: after {STORE_S_MAX} s the prompts are not stored")
            taken = time.perf_counter() - started
            times[f"{name} all new", MISS_PROMPTS * MISS_TOKENS].append(taken)

    def _ttft(self, name: str, seed: int, length: int) -> float:
        prompt = _prompt(seed, length + QUESTION_TOKENS)
        request = {"prompt": prompt, "new_tokens": 1, "logprobs": 0}
        (answer,) = self._engines[name].generate(request)
        assert answer.ttft_s is not None
        return answer.ttft_s

    def _stored_tokens(self, name: str) -> int:
        if name.startswith("kvd"):
            return self._client.status().counters["commit_chunks"] * CHUNK_TOKENS
        return self._lmcache.tokens("Stored") if name == "lmcache" else 0

    def _loaded_tokens(self, name: str) -> int:
        if name.startswith("kvd"):
            found = self._engines[name].metrics("kvd_vllm_hit_tokens_total")
            return int(sum(found.values()))
        return self._lmcache.tokens("Retrieved") if name == "lmcache" else 0

    def _reaches(
        self, count_of: Callable[[str], int], name: str, wanted: int, seconds: float
    ) -> bool:
        """Whether what is counted is `wanted` within so many seconds; saves go on after the first
        token is there. Those who do not count are believed.
        """
        give_up = time.monotonic() + seconds
        while name in COUNTING and count_of(name) < wanted:
            if time.monotonic() > give_up:
                return False
            time.sleep(0.005)
        return True


def _arguments_of(name: str, options: dict[str, object]) -> dict[str, object]:
    if name == "plain":
        return {}
    transfer = {**CONNECTORS[name], "kv_role": "kv_both", "kv_connector_extra_config": options}
    return {"kv_transfer_config": transfer, **ARGUMENTS.get(name, {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class LmcacheServer:
    """LMCache's server, that engines reach at `port`."""

    port: int
    log: Path

    def tokens(self, done: str) -> int:
        """How many tokens it has `Stored`, or `Retrieved`: it says so in its log."""
        found = re.findall(rf"{done} (\d+) tokens", self.log.read_text(errors="replace"))
        return sum(map(int, found))


@contextmanager
def running_lmcache(log: Path) -> Iterator[LmcacheServer]:
    """As LMCache's own tests run it on a CPU: the engine copies, into shared memory."""
    port, http_port = _free_port(), _free_port()
    command = [
        *("env", "PYTHONHASHSEED=0", "LMCACHE_TRACK_USAGE=false"),
        *(sys.executable, "-m", "lmcache.cli.main", "server"),
        *("--port", str(port), "--http-port", str(http_port)),
        *("--l1-size-gb", str(CPU_SIZE >> 30), "--eviction-policy", "LRU"),
        *("--chunk-size", str(CHUNK_TOKENS)),
        *("--supported-transfer-mode", "engine_driven", "--shm-name", f"kvd_{os.getpid()}"),
    ]
    with running(command, log, lambda: _is_healthy(http_port)):
        yield LmcacheServer(port=port, log=log)


def _free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _is_healthy(http_port: int) -> bool:
    try:
        with urlopen(f"http://localhost:{http_port}/healthcheck", timeout=1) as answer:
            status: int = answer.status
            return status == 200
    except (URLError, OSError):
        return False


def _prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(100, 40_000, length).tolist()


def seconds_to_copy(size: int) -> float:
    """A plain copy of as many bytes, in memory that is there."""
    # Zeros would be no memory before they are written.
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    started = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - started


def row_of(name: str, length: int, found: list[float]) -> Row:
    median = median_of(found)
    return {
        "engine": name,
        "tokens": length,
        "ms": significant(1e3 * median.value, 3),
        "low": significant(1e3 * median.low, 3),
        "high": significant(1e3 * median.high, 3),
        "samples": median.samples,
    }


def figures_of(times: Times) -> list[Figure]:
    def at(name: str, length: int = 2048) -> list[float]:
        return times[name, length]

    native = [hit + copy for hit, copy in zip(at("plain hit"), at("copy"), strict=True)]
    many = MISS_PROMPTS * MISS_TOKENS
    overhead = ratio_of(at("kvd all new", many), at("unkept all new", many))
    less_one = Median(
        value=overhead.value - 1,
        low=overhead.low - 1,
        high=overhead.high - 1,
        samples=overhead.samples,
    )
    return [
        Figure.of(
            "ttft_hit_vs_native_hit", ratio_of(at("kvd hit"), native), target=1.5, at_least=False
        ),
        Figure.of(
            "ttft_speedup_2048",
            ratio_of(at("plain computed"), at("kvd hit")),
            target=5,
            at_least=True,
        ),
        Figure.of("miss_overhead", less_one, target=0.03, at_least=False),
        Figure.of(
            "ttft_layers_vs_whole",
            ratio_of(at("kvd hit"), at("kvd whole hit")),
            target=1,
            at_least=False,
        ),
        Figure.of(
            "ttft_hit_vs_example_connector",
            ratio_of(at("example hit"), at("kvd hit")),
            target=1,
            at_least=True,
        ),
        _against_lmcache(times),
    ]


def _against_lmcache(times: Times) -> Figure:
    name, target = "ttft_hit_vs_lmcache", 1
    if ("lmcache hit", 2048) not in times:
        return Figure.missing(name, "LMCache is not installed", target=target, at_least=True)
    ratio = ratio_of(times["lmcache hit", 2048], times["kvd hit", 2048])
    return Figure.of(name, ratio, target=target, at_least=True)


if __name__ == "__main__":
    main()
