"""What the benchmarks share: pairs, medians and the shape of the JSON. Nothing here is timed."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks import nvme
from benchmarks.common import (
    Figure,
    Median,
    console_for,
    cpu_ns,
    host_facts,
    in_turn,
    interleave,
    median_of,
    on_cores,
    print_figures,
    print_rows,
    ratio_of,
    write_json,
)
from benchmarks.nvme_amplification import ReplayScale, Written, measure_amplification
from benchmarks.nvme_promotion import Case, PromotionScale
from benchmarks.nvme_restart import Rebuilt, RestartScale
from benchmarks.nvme_streams import StreamScale
from benchmarks.nvme_trace import read_prompts

RATIO = Median(value=0.91234567, low=0.88, high=0.93, samples=30)


def test_the_interval_of_a_median_holds_it() -> None:
    found = median_of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found.value == 3.0
    assert 1.0 <= found.low <= 3.0 <= found.high <= 100.0
    assert found.samples == 5


@given(st.lists(st.floats(min_value=1e-6, max_value=1e6), min_size=1, max_size=40))
def test_the_interval_lies_within_the_samples_and_is_the_same_each_time(
    values: list[float],
) -> None:
    found = median_of(values)
    assert min(values) <= found.low <= found.high <= max(values)
    assert found == median_of(values)


def test_more_samples_narrow_the_interval() -> None:
    few, many = (median_of([1.0, 1.1, 0.9, 1.2, 0.8] * times) for times in (2, 200))
    assert many.high - many.low < few.high - few.low


def test_one_sample_has_no_width() -> None:
    assert median_of([7.0]) == Median(value=7.0, low=7.0, high=7.0, samples=1)


def test_a_ratio_is_taken_pair_by_pair() -> None:
    # The machine became ten times slower in between: both medians are far apart, no pair is.
    tops, bottoms = [2.0, 2.0, 20.0], [1.0, 10.0, 10.0]
    assert ratio_of(tops, bottoms).value == 2.0
    assert ratio_of([1.0, 10.0], [2.0, 20.0]) == Median(value=0.5, low=0.5, high=0.5, samples=2)


def test_samples_are_taken_side_by_side_and_nobody_always_goes_first() -> None:
    order: list[str] = []

    def measure(name: str) -> Callable[[], float]:
        def call() -> float:
            order.append(name)
            return float(len(order))

        return call

    ticks: list[None] = []
    found = interleave([measure("a"), measure("b")], 3, lambda: ticks.append(None))
    assert "".join(order) == "abbaab"
    assert found == [[1.0, 4.0, 5.0], [2.0, 3.0, 6.0]]
    assert len(ticks) == 3
    assert in_turn("abc", 0) == "abc"
    assert in_turn("abc", 1) == "cba"


@pytest.mark.parametrize(
    ("value", "at_least", "is_met"),
    [(0.85, True, True), (0.84, True, False), (0.85, False, True), (0.86, False, False)],
)
def test_a_target_is_met_on_its_own_side(value: float, at_least: bool, is_met: bool) -> None:
    median = Median(value=value, low=value, high=value, samples=1)
    assert Figure.of("f", median, target=0.85, at_least=at_least).is_met is is_met


def test_a_figure_that_was_not_measured_is_not_met_and_says_why() -> None:
    figure = Figure.missing("f", "too little memory", target=1.2, at_least=False)
    assert not figure.is_met
    assert figure.as_json() == {
        "name": "f",
        "value": None,
        "unit": "ratio",
        "target": 1.2,
        "at_least": False,
        "samples": 0,
        "ci95": None,
        "note": "too little memory",
    }


def test_the_report_has_the_agreed_shape(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    figure = Figure.of("load_32MiB_vs_memcpy", RATIO, target=0.85, at_least=True)
    write_json(str(path), "local", [figure], [{"chunk": "32 MiB", "GB/s": 9.1}])
    report = json.loads(path.read_text())
    assert list(report) == ["benchmark", "host", "figures", "table"]
    assert report["benchmark"] == "local"
    assert list(report["host"]) == ["cpu", "cores", "memory_bytes", "kernel", "gpu"]
    assert report["host"] == host_facts()
    assert report["figures"] == [
        {
            "name": "load_32MiB_vs_memcpy",
            "value": 0.9123,
            "unit": "ratio",
            "target": 0.85,
            "at_least": True,
            "samples": 30,
            "ci95": [0.88, 0.93],
        }
    ]
    assert report["table"] == [{"chunk": "32 MiB", "GB/s": 9.1}]


def test_json_on_standard_output_has_it_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    console = console_for("-")
    console.print("a table")
    write_json("-", "local", [], [])
    out, err = capsys.readouterr()
    assert json.loads(out)["benchmark"] == "local"
    assert "a table" in err
    assert console_for(None).file is not console.file


def test_without_a_path_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    write_json(None, "local", [], [])
    assert capsys.readouterr() == ("", "")


def test_a_missed_target_is_marked_in_the_table() -> None:
    console = Console(file=io.StringIO(), width=120)
    met = Figure.of("good", RATIO, target=0.85, at_least=True)
    missed = Figure.of("bad", RATIO, target=0.95, at_least=True)
    missing = Figure.missing("absent", "no GPU", target=1, at_least=True)
    print_figures(console, [met, missed, missing])
    lines = {line.split()[0]: line for line in _text(console).splitlines() if "0.9" in line}
    assert "met" in lines["good"]
    assert "MISSED" in lines["bad"]
    assert "not measured: no GPU" in _text(console)


def test_rows_become_a_table_with_their_keys_as_columns() -> None:
    console = Console(file=io.StringIO(), width=120)
    print_rows(console, "a title", [{"route": "memcpy", "p50_us": 3333.3, "note": None}])
    assert "a title" in _text(console)
    assert "p50 us" in _text(console)
    assert "3,333" in _text(console)
    print_rows(console, "nothing", [])
    assert "nothing" not in _text(console)


def test_cores_are_given_back() -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    with on_cores(core, core, [os.getpid()]):
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before


def test_the_cpu_clock_of_a_process_is_its_own() -> None:
    assert 0 < cpu_ns(os.getpid()) <= cpu_ns(os.getpid())


def session_line(number: int) -> str:
    """A session of twelve requests: each goes on from the one before, with 40 blocks more."""
    requests = [
        [10.0 * index, 64 * 40 * (index + 1), 10, 40 * index, [[40 * index, 40]], 0]
        for index in range(12)
    ]
    session = {"id": f"s{number}", "bs": 64, "tool": 512, "sys": 256, "model": ["m"], "r": requests}
    return json.dumps(session) + "\n"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "sessions.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(map(session_line, range(4)))
    return path


def test_prompts_of_a_session_share_what_they_go_on_from(trace: Path) -> None:
    prompts = list(read_prompts(trace, bytes(32), num_sessions=1))
    assert [len(prompt.keys) for prompt in prompts] == list(range(10, 121, 10))
    assert prompts == sorted(prompts, key=lambda prompt: prompt.at_s)
    for before, after in pairwise(prompts):
        assert after.keys[: len(before.keys)] == before.keys


def test_sessions_share_tools_and_system_prompt_and_nothing_behind_them(trace: Path) -> None:
    prompts = list(read_prompts(trace, bytes(32), num_sessions=4))
    last = sorted((prompt.keys for prompt in prompts), key=len)[-4:]
    # 768 tokens are three chunks.
    assert len({keys[:3] for keys in last}) == 1
    assert len({keys[3] for keys in last}) == 4
    assert read_prompts(trace, bytes(32), num_sessions=4).__next__() == prompts[0]


def test_the_nvme_benchmark_gives_every_figure(
    tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chunk_size = 64 << 10
    scale = nvme.Scale(
        streams=StreamScale(
            record_sizes=(chunk_size,), segment_size=1 << 20, rounds=2, rival_every=2
        ),
        restart=RestartScale(
            count=300,
            rounds=1,
            rebuilds=(Rebuilt(100, 4096), Rebuilt(20, chunk_size)),
            rebuild_rounds=1,
        ),
        replay=ReplayScale(
            num_sessions=4,
            chunk_size=chunk_size,
            memory_part=0.3,
            disk_parts=(0.4,),
            plain_parts=(0.4,),
        ),
        promotion=PromotionScale(
            cases=(Case(size=chunk_size, count=1), Case(size=chunk_size, count=8)),
            cpu_size=2 << 20,
            disk_size=8 << 20,
            rounds=2,
        ),
    )
    folder = tmp_path / "disk"
    folder.mkdir()
    flags = ["--path", str(folder), "--trace", str(trace), "--json", "-"]
    assert nvme.main(flags, scale=scale) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["benchmark"] == "nvme"
    assert report["host"] == host_facts()
    targets = {
        "durable_write_vs_plain": 0.9,
        "cold_read_vs_plain": 0.9,
        "restart_100k_s": 2.0,
        "rebuild_vs_device": 0.5,
        "write_amplification": 1.2,
        "promotion_overhead": 0.1,
        "first_layer_fraction": 0.5,
    }
    assert {figure["name"]: figure["target"] for figure in report["figures"]} == targets
    for figure in report["figures"]:
        assert math.isfinite(figure["value"]), figure
    values = {figure["name"]: figure["value"] for figure in report["figures"]}
    # What no machine's speed can change.
    assert values["write_amplification"] >= 1.0
    assert 0 < values["first_layer_fraction"] <= 1.0
    assert values["promotion_overhead"] > -1.0
    assert report["table"][0]["direct"] in ("yes", "no")
    assert not list(folder.iterdir()), "the benchmark has left something"


def test_without_a_trace_its_figure_says_how_to_name_one(tmp_path: Path) -> None:
    figures, rows = measure_amplification(tmp_path, None, ReplayScale())
    assert [figure.value for figure in figures] == [None]
    assert "--trace" in figures[0].note
    assert rows == []


def test_bytes_that_are_written_again_are_amplification() -> None:
    steady = Written(first=100, again=5, copied=10, log=119, index=1) - Written(0, 0, 0, 0, 0)
    assert steady.amplification == 1.2
    assert Written(0, 0, 0, 0, 0).amplification == 1.0


def test_headers_and_index_do_not_grow_with_the_payload() -> None:
    # 200 bytes came once, 20 were copied; 20 of header and 20 of index come with them.
    steady = Written(first=200, again=0, copied=20, log=240, index=20)
    assert steady.amplification == 1.3
    assert steady.with_payloads(1000, measured=100) == (220 + 4) / 200
    assert steady.with_payloads(100, measured=100) == steady.amplification
    assert Written(0, 0, 0, 0, 0).with_payloads(1, measured=1) == 1.0


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
