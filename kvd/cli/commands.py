"""The commands: start a daemon, look at it, take care of what it keeps.

Everything heavy is imported inside the command that needs it, so that `kvd --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvd import __version__
from kvd.cli.calibrate import calibrate
from kvd.cli.console import (
    FAILURE,
    USAGE,
    Cli,
    Failure,
    is_terminal,
    json_option,
    make_table,
    print_json,
    print_rows,
)
from kvd.cli.disk import fsck, persist, scrub
from kvd.cli.flags import EXISTING_FILE, Remote, config_options, remote_options
from kvd.cli.listing import (
    CHUNK_HEADERS,
    chunk_dict,
    chunk_row,
    layouts_of,
    pages,
    resolve_keys,
    resolve_layout,
    status_rows,
    to_dict,
)
from kvd.daemon.config import load_config
from kvd.errors import ConfigError, InvalidRequest
from kvd.sizes import format_size

if TYPE_CHECKING:
    from kvd.client import Client
    from kvd.proto import kvd_pb2 as pb

LIST_DEFAULT = 100
WATCH_EVERY_S = 2.0


@click.group(cls=Cli, invoke_without_command=True)
@click.version_option(__version__, prog_name="kvd", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Keep the KV caches of language-model engines on this node."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(USAGE)


for command in (persist, scrub, fsck, calibrate):
    main.add_command(command)


@main.command()
@config_options
@click.option(
    "--config",
    "toml",
    type=EXISTING_FILE,
    envvar="KVD_CONFIG",
    metavar="FILE",
    help='TOML file with these settings, like cpu_size = "4GiB"; flags and KVD_* variables win.',
)
@json_option
def start(toml: str | None, is_json: bool, **flags: Any) -> int:
    """Run a daemon until it is told to stop (SIGTERM or Ctrl-C)."""
    from kvd.daemon.preflight import check_machine

    try:
        config = load_config(flags, os.environ, Path(toml) if toml else None)
        check_machine(config)
    except ConfigError as error:
        # What is wrong with the command stays wrong: a supervisor need not try again.
        raise Failure(str(error), code=error.code, exit_code=USAGE) from None
    from kvd.daemon.server import run

    if is_json:
        print_json({"pid": os.getpid(), "config": asdict(config) | {"socket": str(config.socket)}})
    return run(config)


@main.command()
@click.option("--audit", is_flag=True, help="Check all invariants first; fail if one is broken.")
@click.option("--watch", "is_watching", is_flag=True, help="Show it anew until Ctrl-C.")
@remote_options
def status(remote: Remote, audit: bool, is_watching: bool, is_json: bool) -> int:
    """Show a daemon in numbers."""
    if is_watching and (is_json or not is_terminal()):
        raise click.UsageError("--watch needs a terminal, and goes without --json")
    with remote.connect() as client:
        if is_watching:
            _watch(client, audit)
            return 0
        reply = client.status(audit=audit)
    if is_json:
        tiers = [to_dict(tier) for tier in reply.tiers]
        print_json(to_dict(reply) | {"tiers": tiers, "counters": dict(reply.counters)})
    else:
        print_rows(("", ""), status_rows(reply))
    return 0


@main.command("ls")
@click.option("--category", default="", metavar="NAME", help="Only chunks of this category.")
@click.option("--layout", default="", metavar="HEX", help="Only chunks of this layout.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=LIST_DEFAULT,
    show_default=True,
    help="At most so many chunks.",
)
@remote_options
def list_chunks(remote: Remote, category: str, layout: str, limit: int, is_json: bool) -> int:
    """List chunks. In a pipe, the first value of a line is the whole key."""
    # By key: chunks that come and go between two pages may be on both.
    chunks: dict[bytes, pb.ChunkInfo] = {}
    layouts: dict[bytes, pb.Layout] = {}
    is_partial = False
    with remote.connect() as client:
        for reply in pages(client, category, resolve_layout(client, layout)):
            chunks |= {chunk.key: chunk for chunk in reply.chunks}
            layouts |= layouts_of(reply)
            is_partial = len(chunks) > limit or (len(chunks) == limit and reply.cursor > 0)
            if is_partial:
                break
    listed = list(chunks.values())[:limit]
    if is_json:
        named = {fingerprint.hex(): to_dict(found) for fingerprint, found in layouts.items()}
        values = [chunk_dict(chunk) for chunk in listed]
        print_json({"chunks": values, "layouts": named, "is_partial": is_partial})
        return 0
    is_short = is_terminal()
    print_rows(CHUNK_HEADERS, [chunk_row(chunk, layouts, is_short=is_short) for chunk in listed])
    if is_partial:
        click.echo(f"kvd: there may be more, --limit {limit} ended the list", err=True)
    return 0


@main.command()
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option("--category", default="", metavar="NAME", help="Chunks of this category.")
@click.option("--layout", default="", metavar="HEX", help="Chunks of this layout.")
@click.option("--all", "is_all", is_flag=True, help="Every chunk.")
@click.option("--yes", "is_meant", is_flag=True, help="Do not ask whether --all is meant.")
@remote_options
def clear(
    remote: Remote,
    keys: tuple[str, ...],
    category: str,
    layout: str,
    is_all: bool,
    is_meant: bool,
    is_json: bool,
) -> int:
    """Drop chunks and what continues them. What is pinned or being written stays.

    KEY is a key or its first digits, eight at least.
    """
    if bool(keys) + bool(category or layout) + is_all != 1:
        raise click.UsageError("name what to drop: KEY..., or --category and --layout, or --all")
    with remote.connect() as client:
        resolved = resolve_keys(client, keys)
        fingerprint = resolve_layout(client, layout)
        if is_all and not is_meant:
            _confirm(client, is_json)
        named = resolved if keys else None
        count, size = client.clear(named, category=category, layout=fingerprint)
    if is_json:
        print_json({"count": count, "size": size})
    else:
        click.echo(f"dropped {count} chunks, {format_size(size)}")
    return 0


@main.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@remote_options
def pin(remote: Remote, keys: tuple[str, ...], is_json: bool) -> int:
    """Keep chunks from being evicted, until unpinned.

    KEY is a key or its first digits, eight at least.
    """
    return _hold(remote, keys, is_json, is_held=True)


@main.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@remote_options
def unpin(remote: Remote, keys: tuple[str, ...], is_json: bool) -> int:
    """Take back what pin did. What clients have pinned stays pinned.

    KEY is a key or its first digits, eight at least.
    """
    return _hold(remote, keys, is_json, is_held=False)


@main.command()
@click.option("--socket", metavar="PATH", help="Socket of a daemon that may be running.")
@click.option("--nvme-path", metavar="DIR", help="Folder where a tier on disk would be.")
@json_option
def doctor(socket: str | None, nvme_path: str | None, is_json: bool) -> int:
    """Say what this machine has for kvd. Fails if kvd cannot run here."""
    from kvd.daemon.doctor import examine, worst

    disk = Path(nvme_path) if nvme_path else None
    findings = examine(attach=Path(socket) if socket else None, disk=disk)
    verdict = worst(findings)
    if is_json:
        print_json({"verdict": verdict, "findings": [asdict(finding) for finding in findings]})
    else:
        rows = [(one.name, one.verdict, one.value, one.advice) for one in findings]
        print_rows(("what", "verdict", "found", "meaning"), rows)
    return FAILURE if verdict == "bad" else 0


@main.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@json_option
def completion(shell: str, is_json: bool) -> int:
    """Print the script that lets a shell complete kvd's commands.

    For example: source <(kvd completion bash)
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    script = found(main, {}, "kvd", "_KVD_COMPLETE").source()
    if is_json:
        print_json({"shell": shell, "script": script})
    else:
        click.echo(script)
    return 0


def _hold(remote: Remote, keys: tuple[str, ...], is_json: bool, *, is_held: bool) -> int:
    with remote.connect() as client:
        resolved = resolve_keys(client, keys)
        count = client.hold(resolved, is_held)
    done = "pinned" if is_held else "unpinned"
    if count < len(resolved):
        missing = f"{len(resolved) - count} of {len(resolved)} chunks are not here"
        raise Failure(f"{missing}, {done} the other {count}", code=InvalidRequest.code)
    if is_json:
        print_json({"count": count})
    else:
        click.echo(f"{done} {count} chunks")
    return 0


def _confirm(client: Client, is_json: bool) -> None:
    """Raise unless a person says that all chunks are to be dropped."""
    if is_json or not sys.stdin.isatty():
        raise click.UsageError("--all drops every chunk; say --yes if that is meant")
    count = client.status().num_chunks
    click.confirm(f"Drop all {count} chunks?", abort=True, err=True)


def _watch(client: Client, audit: bool) -> None:
    from rich.live import Live

    try:
        with Live(auto_refresh=False) as live:
            while True:
                rows = status_rows(client.status(audit=audit))
                live.update(make_table(("", ""), rows), refresh=True)
                time.sleep(WATCH_EVERY_S)
    except KeyboardInterrupt:
        return
