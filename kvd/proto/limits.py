"""Limits of the protocol, the same on both sides (docs/formats/protocol.md)."""

from __future__ import annotations

PROTOCOL_VERSION = 2

# A packet must fit the default send buffer of a Unix socket (212,992 bytes with its own overhead).
MESSAGE_SIZE_MAX = 128 << 10

# Keys in one message: 512k tokens of 256-token chunks, 64 KiB of keys, and an answer that fits a
# packet as well.
KEYS_MAX = 2048

# The longest time to live: ten years. Who means longer means none.
TTL_NS_MAX = 10 * 365 * 86400 * 10**9

# Codecs that one Pin or Lookup may name, and letters of a name: as many as a bitstream has for it.
CODECS_MAX = 16
CODEC_SIZE_MAX = 16

# Bytes of one Write or Read on gRPC, below its default message limit of 4 MiB.
DATA_SIZE_MAX = 2 << 20

# A message on gRPC, either way: its default, named so that neither side depends on it.
GRPC_MESSAGE_SIZE_MAX = 4 << 20

LIST_LIMIT_MAX = 500
# Half a packet: a page stops at the chunk that crosses it, layout and all.
LIST_SIZE_MAX = MESSAGE_SIZE_MAX // 2

CLEAR_LIMIT_MAX = 10_000

# The longest that the daemon keeps one request waiting (Wait, Persist): a client that wants to wait
# longer asks again, so that neither side takes a long wait for a lost one.
WAIT_NS_MAX = 200_000_000

# The longest that a reservation or a pin waits for room in memory, while chunks are written to
# disk.
ROOM_WAIT_NS_MAX = 10 * 10**9
