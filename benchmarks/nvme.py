"""What does the nvme tier cost beside the bare device: writes, reads, restarts, promotions, wear?

The answer on the back of an envelope. A 2 MiB record takes 1.2 ms of a device of 1.7 GB/s. On top
come 4 KiB of header in the same call (0.2 %), the checksums of its pieces (0.1 ms, on another core
while the device works), two hops between threads (0.1 ms) and an fdatasync that a group shares.
With four in flight none of it waits for the device: 0.95 of the plain stream each way, 5 % on top
of a read for a promotion, which is one message more. A client that wants the first of 32 layers
waits for the first stripe of a MiB, an eighth of a chunk of 8 MiB, and shares the device with the
stripes behind it: a quarter to a half of the chunk's time. A hundred thousand records are 30 MB of
index: a second of Python. A scan reads a block of each record: of 2 MiB, five hundred times less
than the device could read; of 4 KiB, the half of it. Copying on is bounded by 15 % of what is given
back, so it adds 0.18 bytes to each one that is stored in the worst case.

    durable_write_vs_plain   >= 0.9   records of 2 MiB and more, acknowledged when durable
    cold_read_vs_plain       >= 0.9   the same, verified, past the page cache
    restart_100k_s           <= 2 s   from the command to the first session, index whole
    rebuild_vs_device        >= 0.5   segments by second without an index, by the device's reads
    write_amplification      <= 1.2   coding agents' prompts, the log full in steady state
    promotion_overhead       <= 0.1   pin of chunks on disk, by plain reads of as many bytes
    first_layer_fraction     <= 0.5   a layer of 32, by all of the chunk of 8 MiB

What each part does stands in its module: nvme_streams, nvme_restart, nvme_amplification,
nvme_promotion. Ratios are taken pair by pair. The folder should be on the disk to measure; it is
left as it was. Without O_DIRECT there (tmpfs) both sides go through the page cache, and the figures
say little: `direct` among the facts is no then.

    python benchmarks/nvme.py [--quick] [--path DIR] [--trace FILE] [--json FILE]
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from benchmarks.common import (
    Figure,
    Row,
    arguments,
    console_for,
    host_facts,
    print_figures,
    print_rows,
    write_json,
)
from benchmarks.nvme_amplification import ReplayScale, measure_amplification
from benchmarks.nvme_disk import can_bypass_cache
from benchmarks.nvme_promotion import PromotionScale, measure_promotion
from benchmarks.nvme_restart import Rebuilt, RestartScale, measure_restart
from benchmarks.nvme_streams import StreamScale, measure_streams
from benchmarks.nvme_trace import DEFAULT_PATH

# In the JSON only: the tables have a line's room.
HIDDEN = ("samples", "of_all", "first", "seconds_replayed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much each part measures. The defaults take some minutes and 10 GB of disk."""

    streams: StreamScale = field(default_factory=StreamScale)
    restart: RestartScale = field(default_factory=RestartScale)
    replay: ReplayScale = field(default_factory=ReplayScale)
    promotion: PromotionScale = field(default_factory=PromotionScale)


# As much on the disk, fewer samples; of the trace a few sessions.
QUICK = Scale(
    streams=StreamScale(rounds=7, rival_every=6),
    restart=RestartScale(
        rounds=2, rebuild_rounds=1, rebuilds=(Rebuilt(4000, 4 << 10), Rebuilt(250, 2 << 20))
    ),
    replay=ReplayScale(num_sessions=5, memory_part=0.15, disk_parts=(0.4,), plain_parts=(0.4,)),
    promotion=PromotionScale(rounds=8),
)


def measure(
    folder: Path, trace: Path | None, scale: Scale, console: Console
) -> tuple[list[Figure], list[Row]]:
    """All figures, and all rows; a table is printed as soon as its part has ended."""
    rows: list[Row] = [disk_facts(folder)]
    console.print(" | ".join(f"{name} {value}" for name, value in rows[0].items()))
    parts: dict[str, Callable[[], tuple[list[Figure], list[Row]]]] = {
        "streams": lambda: measure_streams(folder, scale.streams),
        "restarts": lambda: measure_restart(folder, scale.restart),
        "coding agents' prompts": lambda: measure_amplification(folder, trace, scale.replay),
        "promotions": lambda: measure_promotion(folder, scale.promotion),
    }
    figures: list[Figure] = []
    for part, run in parts.items():
        found, table = run()
        print_rows(console, part, table, hidden=HIDDEN)
        figures += found
        rows += [{"part": part, "load": os.getloadavg()[0], **row} for row in table]
    return figures, rows


def disk_facts(folder: Path) -> Row:
    """What the disk's numbers must be read with."""
    device = folder.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    kind, name = _mounted(folder)
    return {
        "part": "disk",
        "file_system": kind,
        "mounted_from": name,
        "is_rotational": _fact(place / "queue" / "rotational"),
        "scheduler": _fact(place / "queue" / "scheduler"),
        "direct": "yes" if can_bypass_cache(folder) else "no",
        "load": os.getloadavg()[0],
    }


def main(arguments_given: Sequence[str] | None = None, *, scale: Scale | None = None) -> int:
    """Measure, print the tables, write the JSON. Missed targets are reported, not failed."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--path", type=Path, help="folder on the disk to measure (default: /tmp)")
    parser.add_argument("--trace", type=Path, help=f"sessions to replay ({DEFAULT_PATH.name})")
    options = parser.parse_args(arguments_given)
    if scale is None:
        scale = QUICK if options.quick else Scale()
    trace = options.trace or (DEFAULT_PATH if DEFAULT_PATH.exists() else None)
    console = console_for(options.json)
    console.print(" | ".join(f"{name} {value}" for name, value in host_facts().items()))
    # Of what the store says in this process, only what is wrong.
    logger = logging.getLogger("kvd")
    level = logger.level
    logger.setLevel(logging.ERROR)
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="kvd-bench-", dir=options.path) as folder:
            figures, rows = measure(Path(folder), trace, scale, console)
    finally:
        logger.setLevel(level)
    print_figures(console, figures)
    console.print(f"{time.monotonic() - started:.0f} s")
    write_json(options.json, "nvme", figures, rows)
    return 0


def _mounted(folder: Path) -> tuple[str, str]:
    """Type and source of the file system that holds `folder`."""
    best = ("", "unknown", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        source, place, kind = line.split()[:3]
        is_above = folder.resolve().is_relative_to(place)
        if is_above and len(place) >= len(best[0]):
            best = (place, kind, source)
    return best[1], best[2]


def _fact(path: Path) -> str:
    return path.read_text().strip() if path.exists() else "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
