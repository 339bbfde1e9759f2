"""Console: how a command speaks: tables for people, JSON for machines, one line for an error.

    on a terminal     a table
    in a pipe         a line for each row, tabs between its values
    with --json       one object on standard output; an error is {"error": {"code", "message"}}

Exit code 0 is success, 1 failure, 2 a command that cannot work as it was written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvd.errors import KvdError

if TYPE_CHECKING:
    from rich.table import Table

F = TypeVar("F", bound=Callable[..., Any])

FAILURE = 1
USAGE = 2

# Shorter values stay whole where a terminal is too narrow; longer ones go on in the next line.
FOLD_LENGTH_MIN = 12

_STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}


class Failure(click.ClickException):
    """Ends the command with a message, the wire code of an error and an exit code."""

    def __init__(self, message: str, *, code: str, exit_code: int = FAILURE) -> None:
        super().__init__(message)
        self.code = code
        self.status = exit_code


class Cli(click.Group):
    """A group whose commands return their exit code; its errors are one line or one object."""

    def main(self, args: Sequence[str] | None = None, **options: Any) -> Any:  # type: ignore[override]
        """Run the command line and leave the process with its exit code."""
        arguments = list(sys.argv[1:] if args is None else args)
        is_standalone = options.pop("standalone_mode", True)
        try:
            result = super().main(arguments, standalone_mode=False, **options)
        except (click.ClickException, click.Abort, KvdError) as error:
            if not is_standalone:
                raise
            result = _report(error, is_json="--json" in arguments)
        if is_standalone:
            sys.exit(result or 0)
        return result


def json_option(command: F) -> F:
    """Adds --json, as the argument `is_json`."""
    return click.option("--json", "is_json", is_flag=True, help="One JSON object instead of text.")(
        command
    )


def is_terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout.isatty()


def print_json(value: object) -> None:
    """One object on one line."""
    click.echo(json.dumps(value))


def print_rows(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Rows as a table on a terminal, else each as one line with tabs between its values."""
    if not is_terminal():
        for row in rows:
            click.echo("\t".join(map(printable, row)))
        return
    from rich.console import Console

    Console().print(make_table(headers, rows))


def make_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table to print with rich. Numbers stand to the right; a verdict has its colour."""
    from rich.table import Table
    from rich.text import Text

    listed = [list(row) for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(headers))
    for index, header in enumerate(headers):
        cells = [row[index] for row in listed]
        is_number = bool(cells) and all(isinstance(cell, int) for cell in cells)
        is_short = all(len(str(cell)) <= FOLD_LENGTH_MIN for cell in cells)
        table.add_column(
            header,
            justify="right" if is_number else "left",
            overflow="fold",
            no_wrap=is_short,
        )
    for row in listed:
        # Text, not markup: what clients named may contain brackets.
        table.add_row(*(Text(text, style=_STYLES.get(text, "")) for text in map(printable, row)))
    return table


def printable(value: object) -> str:
    """`value` as text that a terminal only shows: names come from clients, escapes could too."""
    text = str(value)
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _report(error: click.ClickException | click.Abort | KvdError, *, is_json: bool) -> int:
    code, message, exit_code, hint = "aborted", "aborted", FAILURE, ""
    if isinstance(error, KvdError):
        code, message = error.code, str(error)
    elif isinstance(error, Failure):
        code, message, exit_code = error.code, error.message, error.status
    elif isinstance(error, click.ClickException):
        code, message, exit_code = "usage", error.format_message(), USAGE
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f" (see `{context.command_path} --help`)" if context else ""
    if is_json:
        print_json({"error": {"code": code, "message": message}})
    else:
        click.echo(f"kvd: {printable(message)}{hint}", err=True)
    return exit_code
