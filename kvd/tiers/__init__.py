"""Tiers: bounded arenas of bytes, one kind of memory each."""
