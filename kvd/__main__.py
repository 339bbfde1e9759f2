"""`python -m kvd` is `kvd`."""

from __future__ import annotations

from kvd.cli import main

main(prog_name="kvd")
