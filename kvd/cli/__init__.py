"""The command `kvd`. `kvd --help` loads none of what is heavy: commands import what they need."""

from kvd.cli.commands import main

__all__ = ["main"]
