"""Eviction policies: which chunk is the cheapest loss."""
