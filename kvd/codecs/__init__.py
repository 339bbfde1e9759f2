"""Codecs turn chunks into bitstreams and back. `raw`, the bytes as they are, needs none."""
