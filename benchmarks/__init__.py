"""Benchmarks: one file, one question each. Run them from the repository's root with `python -m`."""
