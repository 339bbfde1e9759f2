"""Layouts to and from their message."""

from __future__ import annotations

from dataclasses import asdict, fields

from kvd.layout import KVLayout
from kvd.proto import kvd_pb2 as pb


def layout_to_message(layout: KVLayout) -> pb.Layout:
    """The message of a layout."""
    return pb.Layout(**asdict(layout))


def layout_from_message(message: pb.Layout) -> KVLayout:
    """The layout of a message. Raises `InvalidRequest` if no layout can be like that."""
    return KVLayout(**{field.name: getattr(message, field.name) for field in fields(KVLayout)})
