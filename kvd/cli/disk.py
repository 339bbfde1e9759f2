"""The commands that take care of what is on disk: persist, scrub, fsck."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvd.cli.console import FAILURE, USAGE, Failure, json_option, print_json, print_rows
from kvd.cli.flags import Remote, remote_options
from kvd.cli.listing import resolve_keys, to_dict
from kvd.errors import ConfigError, DeadlineExceeded
from kvd.sizes import format_size, parse_size

if TYPE_CHECKING:
    from kvd.client import Client
    from kvd.keys import ChunkKey
    from kvd.proto import kvd_pb2 as pb
    from kvd.tiers.segment_check import LogReport

SCRUB_LOOK_EVERY_S = 0.2


@click.command()
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@remote_options
def persist(remote: Remote, keys: tuple[str, ...], is_json: bool) -> int:
    """Write chunks (default: all) to disk, and wait until they would survive a crash.

    KEY is a key or its first digits, eight at least. Before an upgrade, or to warm a node for good.
    """
    with remote.connect() as client:
        resolved = resolve_keys(client, keys) if keys else None
        count = _persist(client, resolved, remote.timeout_s)
    if is_json:
        print_json({"count": count})
    else:
        click.echo(f"{count} chunks are on disk")
    return 0


@click.command()
@click.option("--rate", default="0", metavar="SIZE", help="Bytes a second; 0: the daemon's rate.")
@click.option("--no-wait", "is_left", is_flag=True, help="Begin the pass and do not wait for it.")
@remote_options
def scrub(remote: Remote, rate: str, is_left: bool, is_json: bool) -> int:
    """Verify every record on disk now. Fails if one is bad: it is dropped, and was never served.

    Ctrl-C leaves the pass going; the same command shows it again.
    """
    try:
        rate_size = parse_size(rate)
    except ValueError as error:
        raise click.UsageError(f"--rate: {error}") from None
    with remote.connect() as client:
        reply = client.scrub(rate=rate_size)
        if not is_left:
            reply = _follow(client, reply)
    if is_json:
        print_json(to_dict(reply))
    elif is_left and reply.is_running:
        click.echo("the pass has begun; `kvd scrub` shows it")
    else:
        done = f"{reply.num_done} records, {format_size(reply.size_done)} verified"
        click.echo(f"{done}, {reply.num_bad} bad")
    return FAILURE if reply.num_bad else 0


@click.command()
@click.option(
    "--nvme-path",
    "path",
    type=click.Path(exists=True, file_okay=False),
    required=True,
    metavar="DIR",
    help="Folder of the tier; its daemon must have stopped.",
)
@click.option("--repair", "is_repairing", is_flag=True, help="Take away what is damaged.")
@click.option("--nvme-key-file", default="", metavar="FILE", help="Key of an encrypted tier.")
@click.option("--nvme-key-command", default="", metavar="COMMAND", help="Command that prints it.")
@json_option
def fsck(
    path: str, is_repairing: bool, nvme_key_file: str, nvme_key_command: str, is_json: bool
) -> int:
    """Verify every byte of a folder that no daemon has open. Fails if something is damaged.

    Nothing damaged is ever served, repaired or not. --repair gives its room back, and has the index
    rebuilt at the next start. Without the key, an encrypted tier is checked for damage all the
    same, not for forgery.
    """
    try:
        report = _check(Path(path), is_repairing, nvme_key_file, nvme_key_command)
    except ConfigError as error:
        raise Failure(str(error), code=error.code, exit_code=USAGE) from None
    if report.is_repaired and not report.is_clean:
        # It names records that are gone.
        shutil.rmtree(Path(path) / "index", ignore_errors=True)
    if is_json:
        print_json(_report_dict(report))
    else:
        print_rows(("what", "where", "why"), _report_rows(report))
        click.echo(_verdict(report), err=True)
    return 0 if report.is_clean or report.is_repaired else FAILURE


def _check(path: Path, is_repairing: bool, key_file: str, key_command: str) -> LogReport:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from kvd.tiers.segment_check import check_log

    cipher = None
    if key_file or key_command:
        from kvd.tiers.cipher_key import load_cipher

        cipher = load_cipher(Path(key_file) if key_file else None, key_command or None)
    columns = (TextColumn("checking"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("check", total=None)

        def show(done: int, size: int) -> None:
            bar.update(task, completed=done, total=size)

        return check_log(path, is_repairing=is_repairing, progress=show, cipher=cipher)


def _report_rows(report: LogReport) -> list[tuple[str, str, str]]:
    rows = [
        ("damaged record", f"segment {one.slot} at {one.offset}", one.reason)
        for one in report.damaged
    ]
    rows += [("unreadable", f"segment {one.slot}", one.reason) for one in report.unreadable]
    found = f"{report.num_records} in {report.num_segments} segments"
    return [*rows, ("records", found, f"{format_size(report.size)} verified")]


def _report_dict(report: LogReport) -> dict[str, Any]:
    values = asdict(report)
    values["damaged"] = [one | {"label": one["label"].hex()} for one in values["damaged"]]
    return values | {"is_clean": report.is_clean}


def _verdict(report: LogReport) -> str:
    if report.is_clean:
        return "kvd: nothing is damaged"
    if report.is_repaired:
        return "kvd: what was damaged is gone; the next start rebuilds the index"
    return "kvd: something is damaged; it is never served, and --repair takes it away"


def _persist(client: Client, keys: list[ChunkKey] | None, timeout_s: float) -> int:
    """As `Client.persist`, for as long as there is progress."""
    last = -1
    while True:
        try:
            return client.persist(keys, timeout_s=timeout_s)
        except DeadlineExceeded:
            written = client.status().counters["demote_chunks"]
            if written == last:
                raise
            last = written


def _follow(client: Client, reply: pb.ScrubReply) -> pb.ScrubReply:
    """Show a pass until it ends; what it came to."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("scrubbing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("scrub", total=None)
        while reply.is_running:
            time.sleep(SCRUB_LOOK_EVERY_S)
            reply = client.scrub(start=False)
            progress.update(task, completed=reply.size_done, total=reply.size_all or None)
    return reply
