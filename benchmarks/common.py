"""What the benchmarks share: pairs of samples, figures, tables, facts of the host, a daemon.

A machine's speed drifts by more than what we want to see, from minute to minute. So nothing is
compared with a number of another run: each sample of one thing is taken next to a sample of the
other, and the ratio is taken pair by pair.

    memcpy kvd | kvd memcpy | memcpy kvd | …      one pair, one ratio; the median is quoted
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import kvd
from kvd.errors import Unavailable

BOOTSTRAP_ROUNDS = 2000

# An arena of many GiB on memory that the host has yet to find takes a while to populate.
START_S_MAX = 300.0
STOP_S_MAX = 15.0

Row = Mapping[str, object]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Median:
    """A median with the interval in which it lies at 95 %."""

    value: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number with a target. `value` is None where it could not be measured; `note` says why."""

    name: str
    value: float | None
    unit: str
    target: float
    at_least: bool
    samples: int
    ci95: tuple[float, float] | None
    note: str = ""

    @classmethod
    def of(
        cls, name: str, median: Median, *, target: float, at_least: bool, unit: str = "ratio"
    ) -> Figure:
        """The figure of a measured median."""
        return cls(
            name=name,
            value=median.value,
            unit=unit,
            target=target,
            at_least=at_least,
            samples=median.samples,
            ci95=(median.low, median.high),
        )

    @classmethod
    def missing(
        cls, name: str, note: str, *, target: float, at_least: bool, unit: str = "ratio"
    ) -> Figure:
        """The figure of something that could not be measured here."""
        return cls(
            name=name,
            value=None,
            unit=unit,
            target=target,
            at_least=at_least,
            samples=0,
            ci95=None,
            note=note,
        )

    @property
    def is_met(self) -> bool:
        """Whether the target is reached; what was not measured has not reached it."""
        if self.value is None:
            return False
        return self.value >= self.target if self.at_least else self.value <= self.target

    def as_json(self) -> dict[str, object]:
        """The object that `--json` writes."""
        found: dict[str, object] = {
            "name": self.name,
            "value": None if self.value is None else significant(self.value),
            "unit": self.unit,
            "target": self.target,
            "at_least": self.at_least,
            "samples": self.samples,
            "ci95": None if self.ci95 is None else [significant(end) for end in self.ci95],
        }
        return found | ({"note": self.note} if self.note else {})


def median_of(values: Sequence[float], *, seed: int = 0) -> Median:
    """The median, with a percentile bootstrap. The same values give the same interval."""
    array = np.asarray(values, dtype=np.float64)
    assert array.size
    drawn = np.random.default_rng(seed).integers(array.size, size=(BOOTSTRAP_ROUNDS, array.size))
    low, high = np.percentile(np.median(array[drawn], axis=1), (2.5, 97.5))
    return Median(
        value=float(np.median(array)), low=float(low), high=float(high), samples=array.size
    )


def ratio_of(tops: Sequence[float], bottoms: Sequence[float]) -> Median:
    """The median of `tops[i] / bottoms[i]`, each a pair that was measured side by side."""
    assert len(tops) == len(bottoms)
    return median_of([top / bottom for top, bottom in zip(tops, bottoms, strict=True)])


def interleave(
    measures: Sequence[Callable[[], float]],
    rounds: int,
    tick: Callable[[], None] | None = None,
) -> list[list[float]]:
    """`rounds` samples of each measure, side by side; every other round in reverse order, so that
    nobody always goes first. `found[measure][round]`.
    """
    found: list[list[float]] = [[] for _ in measures]
    for number in range(rounds):
        for index in in_turn(range(len(measures)), number):
            found[index].append(measures[index]())
        if tick:
            tick()
    return found


def in_turn(things: Sequence[T], number: int) -> Sequence[T]:
    """`things` in the order of round `number`: forward, backward, forward."""
    return things[::-1] if number % 2 else things


def significant(value: float, digits: int = 4) -> float:
    """`value` with so many digits that mean something."""
    return float(f"{value:.{digits}g}")


def host_facts() -> dict[str, object]:
    """What a number must be read with: processor, cores, memory, kernel, gpu."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "gpu": _gpu_name(),
    }


def memory_available() -> int:
    """Bytes that can be had without swapping."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def private_size(pid: int) -> int:
    """Bytes of private anonymous memory of a process: what it owns beside shared arenas."""
    return _kilobytes(Path(f"/proc/{pid}/status"), "RssAnon")


def huge_share(size: int) -> float:
    """How much of `size` bytes of this process's private memory lies in 2 MiB pages, 0 to 1."""
    return min(1.0, _kilobytes(Path("/proc/self/smaps_rollup"), "AnonHugePages") / size)


def cpu_ns(pid: int) -> int:
    """CPU time of a process, all its threads and the dead ones among them, from its clock.

    The clock counts what the scheduler counts, in nanoseconds; /proc/<pid>/stat has 10 ms ticks,
    and /proc/<pid>/schedstat one thread. CPUCLOCK_SCHED is 2 (linux/posix-timers.h).
    """
    return time.clock_gettime_ns(~pid << 3 | 2)


@contextmanager
def on_cores(client: int, server: int, pids: Iterable[int]) -> Iterator[None]:
    """This thread on one core and the processes `pids`, all their threads, on another.

    Where the scheduler puts the two ends of a socket decides a round trip more than all code does:
    5 us on one core that switches between them, 50 us where each sleeps on its own and has to be
    woken. Who compares two ways of asking gives both the same place.
    """
    before = os.sched_getaffinity(0)
    places = {0: {client}}
    for pid in pids:
        places |= {int(task.name): {server} for task in Path(f"/proc/{pid}/task").iterdir()}
    for task_id, cores in places.items():
        os.sched_setaffinity(task_id, cores)
    try:
        yield
    finally:
        for task_id in places:
            os.sched_setaffinity(task_id, before)


def arguments(description: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write figures and rows; - is stdout")
    parser.add_argument("--quick", action="store_true", help="fewer samples, within two minutes")
    return parser


def console_for(json_path: str | None) -> Console:
    """Where tables go: standard output, or standard error when JSON goes there."""
    console = Console(stderr=json_path == "-")
    # In a file or a pipe nobody looks at the width: cells must not be cut off.
    return console if console.is_terminal else Console(stderr=json_path == "-", width=120)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error while it is a terminal; yields what makes it go on by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def print_rows(
    console: Console, title: str, rows: Sequence[Row], *, hidden: Sequence[str] = ()
) -> None:
    """A table with a column for each key of the first row, but for those `hidden`."""
    if not rows:
        return
    table = _table(title)
    names = [name for name in rows[0] if name not in hidden]
    for name in names:
        is_number = any(isinstance(row[name], (int, float)) for row in rows)
        justify: Literal["right", "left"] = "right" if is_number else "left"
        table.add_column(name.replace("_", " "), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in names))
    console.print(table)


def print_figures(console: Console, figures: Sequence[Figure]) -> None:
    """The table of figures; one that misses its target is marked."""
    table = _table("figures")
    table.add_column("figure", no_wrap=True)
    for name in ("median", "ci95", "target", "samples"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for figure in figures:
        ends = (_cell(significant(end, 3)) for end in figure.ci95 or ())
        sign = ">=" if figure.at_least else "<="
        mark = "[green]met[/]" if figure.is_met else "[bold red]MISSED[/]"
        table.add_row(
            figure.name,
            _cell(None if figure.value is None else significant(figure.value, 3)),
            " .. ".join(ends),
            f"{sign} {figure.target:g}",
            str(figure.samples),
            mark if figure.value is not None else f"[yellow]not measured[/]: {figure.note}",
        )
    console.print(table)


def write_json(
    path: str | None, benchmark: str, figures: Sequence[Figure], rows: Sequence[Row]
) -> None:
    """The one object of a run, to a file or to standard output; to nowhere without a path."""
    if path is None:
        return
    report = {
        "benchmark": benchmark,
        "host": host_facts(),
        "figures": [figure.as_json() for figure in figures],
        "table": list(rows),
    }
    text = json.dumps(report, indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """A daemon that runs for this benchmark alone."""

    pid: int
    socket: str
    grpc_address: str
    directory: Path


def daemon_command(*, socket: Path, grpc_socket: Path | None, cpu_size: int) -> list[str]:
    """The command line of a daemon with a CPU tier and no HTTP."""
    return [
        *(sys.executable, "-m", "kvd", "start"),
        *("--tiers", "cpu", "--cpu-size", str(cpu_size), "--socket", str(socket)),
        *("--http", "none", "--grpc-socket", str(grpc_socket or "none"), "--log-level", "warning"),
    ]


@contextmanager
def running_daemon(*, cpu_size: int, grpc: bool = False) -> Iterator[Daemon]:
    """A daemon of `cpu_size` bytes that answers; it is told to stop at the end."""
    with tempfile.TemporaryDirectory(prefix="kvd-bench-") as name:
        directory = Path(name)
        socket, grpc_socket = directory / "kvd.sock", directory / "grpc.sock"
        command = daemon_command(
            socket=socket, grpc_socket=grpc_socket if grpc else None, cpu_size=cpu_size
        )
        with running(command, directory / "log", lambda: _answers(socket)) as pid:
            yield Daemon(
                pid=pid,
                socket=str(socket),
                grpc_address=f"grpc+unix://{grpc_socket}",
                directory=directory,
            )


@contextmanager
def running(command: Sequence[str], log: Path, is_ready: Callable[[], bool]) -> Iterator[int]:
    """A server process, from the moment it is ready; yields its pid and ends it by that."""
    # The package need not be installed: the child finds the one that we run.
    path = os.pathsep.join(filter(None, (_package_root(), os.environ.get("PYTHONPATH"))))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": path}
        )
    try:
        give_up = time.monotonic() + START_S_MAX
        while not is_ready():
            if process.poll() is not None or time.monotonic() > give_up:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{' '.join(command)} did not get ready:\n{tail}")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(socket: Path) -> bool:
    try:
        kvd.connect(socket).close()
    except Unavailable:
        return False
    return True


def _package_root() -> str:
    assert kvd.__file__
    return str(Path(kvd.__file__).parents[1])


def _table(title: str) -> Table:
    # Two spaces between columns and no frame: it fits eighty columns, and a log.
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def _kilobytes(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpu_name() -> str | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))
    except pynvml.NVMLError:
        return None
