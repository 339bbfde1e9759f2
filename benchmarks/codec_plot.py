"""The plot of quality against rate: a panel a model, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.codec_contenders import NO_TRANSFORM, PLAIN, PUBLISHED, TRANSFORM
from benchmarks.common import Row

_TITLES = {"smollm2": "SmolLM2-135M-Instruct", "qwen": "Qwen2.5-Coder-0.5B-Instruct"}
_LINES = {NO_TRANSFORM: "#0b6e99", TRANSFORM: "#d1495b"}
_POINTS = {PLAIN: ("s", "#777777"), PUBLISHED: ("^", "#222222")}
# Below, bfloat16 itself is what is seen.
_KL_MIN = 3e-5


def draw(rows: Sequence[Row], path: Path, *, kl_max: float) -> None:
    """A PNG of the rows that have a KL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(5.6 * len(models), 4.6), sharey=True, squeeze=False
    )
    for panel, model in zip(panels[0], models, strict=True):
        _draw_model(panel, [row for row in rows if row["model"] == model and row["KL"]])
        panel.axhline(kl_max, color="#999999", linestyle=":", linewidth=1)
        panel.set_title(_TITLES.get(model, model))
        panel.set_xlabel("times smaller than bfloat16")
    panels[0][0].set_ylabel("KL, nats a token")
    panels[0][0].legend(loc="upper left", fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_model(panel: Any, rows: Sequence[Row]) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    for group, colour in _LINES.items():
        line = sorted((row for row in rows if row["group"] == group), key=_ratio)
        if not line:
            continue
        errors = [[_kl(row) - _low(row) for row in line], [_high(row) - _kl(row) for row in line]]
        panel.errorbar(
            *([_ratio(row) for row in line], [_kl(row) for row in line]),
            yerr=errors,
            color=colour,
            marker="o",
            markersize=4,
            linewidth=1.4,
            elinewidth=0.8,
            label=group,
        )
    for group, (marker, colour) in _POINTS.items():
        points = [row for row in rows if row["group"] == group]
        panel.plot(
            *([_ratio(row) for row in points], [_kl(row) for row in points]),
            color=colour,
            marker=marker,
            linestyle="",
            markersize=5,
            label=group,
        )
        for row in points:
            panel.annotate(
                str(row["codec"]),
                (_ratio(row), _kl(row)),
                xytext=(5, 3),
                textcoords="offset points",
                fontsize=7,
            )
    ticks = [2, 3, 4, 5, 6, 8, 10, 14]
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_xlim(1.6, 17)
    panel.grid(alpha=0.25)


def _ratio(row: Row) -> float:
    return _number(row["x bf16"])


def _kl(row: Row) -> float:
    return max(_KL_MIN, _number(row["KL"]))


def _low(row: Row) -> float:
    return min(_kl(row), max(_KL_MIN, _number(row["KL low"])))


def _high(row: Row) -> float:
    return max(_kl(row), _number(row["KL high"]))


def _number(value: object) -> float:
    assert isinstance(value, (int, float))
    return float(value)
