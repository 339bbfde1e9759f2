"""The command that makes a profile of a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvd.cli.console import Failure, json_option, print_json, print_rows
from kvd.cli.flags import EXISTING_FILE

if TYPE_CHECKING:
    from kvd.client.calibration.calibrate import Report
    from kvd.codecs.profile_file import Judged, StoredProfile

_HEADERS = ("level", "bits", "x bf16", "KL", "+-", "top-1", "facts", "safe")
_TRANSFORMS = ("none", "head", "layer")


@click.command()
@click.option("--model", required=True, metavar="DIR|NAME", help="What transformers loads.")
@click.option(
    "--text",
    "texts",
    type=EXISTING_FILE,
    multiple=True,
    required=True,
    metavar="FILE",
    help="Text like what the model will read; several times for several kinds.",
)
@click.option(
    "--held-out",
    type=EXISTING_FILE,
    multiple=True,
    metavar="FILE",
    help="Text that levels are judged on (default: the last fifth of each --text).",
)
@click.option(
    "--out", type=click.Path(dir_okay=False), required=True, metavar="FILE", help="The profile."
)
@click.option("--kl", default=0.005, show_default=True, help="What a safe level may cost, in nats.")
@click.option("--tokens", default=8192, show_default=True, help="Context that is calibrated on.")
@click.option("--window", default=1024, show_default=True, help="Tokens of one context.")
@click.option(
    "--transform",
    "joint",
    type=click.Choice(_TRANSFORMS),
    default="head",
    show_default=True,
    help="The widest; layer is coarser at equal KL, and costs more to decode and to keep.",
)
@click.option("--revision", help="The model's name where its weights cannot be read.")
@json_option
def calibrate(out: str, kl: float, texts: tuple[str, ...], is_json: bool, **options: Any) -> int:
    """Measure a model's KV and write a profile, with what each level costs on unseen text.

    Put the file into the daemon's folder of profiles. Fails if no level is safe; the profile is
    written all the same.
    """
    if not kl > 0:
        raise click.UsageError("--kl must be above 0")
    if not Path(out).absolute().parent.is_dir():
        raise click.UsageError(f"--out: there is no folder {Path(out).absolute().parent}")
    from kvd.client.calibration.calibrate import coarsest_safe

    content, stored = _calibrated(texts, options)
    _write(Path(out), content)
    chosen = coarsest_safe(stored.judged, kl)
    if is_json:
        print_json(_told(stored, chosen, kl, out, len(content)))
    else:
        print_rows(_HEADERS, (_row(found, kl) for found in stored.judged))
        level = f"level {chosen.level} is the coarsest safe one" if chosen else "no level is safe"
        click.echo(f"{out}: {len(content)} bytes, {stored.profile.hash.hex()[:8]}; {level}")
    if chosen is None and not is_json:
        raise Failure(f"no level stays below KL {kl:g}", code="unsupported")
    return 0 if chosen else 1


def _calibrated(texts: tuple[str, ...], options: dict[str, Any]) -> tuple[bytes, StoredProfile]:
    # Threads that wait without spinning: ten times faster on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from kvd.client.calibration.model import load_subject
    except ImportError as error:
        raise Failure(
            f"{error}: pip install kvd-cache[transformers]", code="unsupported"
        ) from error
    from kvd.client.calibration.calibrate import Settings
    from kvd.client.calibration.calibrate import calibrate as run

    window = options["window"]
    if not 16 <= window <= options["tokens"]:
        raise click.UsageError("--window must be at least 16 and at most --tokens")
    settings = Settings(
        tokens=options["tokens"],
        context_tokens=window,
        next_tokens=max(1, window // 4),
        joint=_joint(options["joint"]),
    )
    subject = load_subject(options["model"], revision=options["revision"])
    with _progress() as report:
        return run(
            subject,
            [_read(path) for path in texts],
            settings,
            held_out=[_read(path) for path in options["held_out"]],
            report=report,
        )


def _joint(widest: str) -> Any:
    return _TRANSFORMS[1 : _TRANSFORMS.index(widest) + 1]


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: a daemon may look into the folder at any time."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise Failure(f"{path} cannot be written: {error}", code="tier_failed") from error


@contextmanager
def _progress() -> Iterator[Report]:
    """Bars on a terminal, silence elsewhere."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield report


def _row(found: Judged, kl: float) -> tuple[str, ...]:
    facts = f"{found.codes_exact - found.codes_lost + found.codes_gained}/{found.codes_exact}"
    return (
        found.level,
        f"{found.bits:.2f}",
        f"{16 / found.bits:.1f}",
        f"{found.kl:.5f}",
        f"{found.kl_se:.5f}",
        f"{found.top1:.3f}",
        f"{facts} of {found.num_codes}",
        "yes" if found.is_safe(kl) else "no",
    )


def _told(
    stored: StoredProfile, chosen: Judged | None, kl: float, out: str, size: int
) -> dict[str, Any]:
    return {
        "file": out,
        "size": size,
        "hash": stored.profile.hash.hex(),
        "model": stored.profile.layout.model,
        "kl_max": kl,
        "level": chosen.level if chosen else None,
        "levels": [asdict(found) | {"is_safe": found.is_safe(kl)} for found in stored.judged],
    }
