"""Connectors: one engine, one file."""
