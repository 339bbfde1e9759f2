"""The tree of failures. An expected condition (a miss, a full tier) is a return value, never one of
these.

    KvdError
    ├── InvalidRequest        the caller asked for something that cannot be; nothing changed
    │   ├── LayoutMismatch    the chunk is of another layout than the one named
    │   ├── TooLarge          more than the tier (or a message) can ever hold
    │   └── UnknownLease      the lease ended already, or was never this session's
    ├── AccessDenied          the peer may not attach or may not do this
    ├── LeaseExpired          the deadline passed; the bytes must not be used
    ├── Corrupt               bytes do not match their checksum or format
    ├── DeadlineExceeded      no answer in time; the daemon undoes what it had begun
    ├── Unavailable           no daemon, or it went away; nothing half-done stays behind
    ├── TierFailed            a device or file system refused; what it held before is as it was
    ├── Unsupported           a model, option or machine that kvd cannot serve exactly
    └── ConfigError           the daemon cannot start like this

Each class has a wire `code` (docs/formats/protocol.md), so that an error crosses a process border
as itself.
"""

from __future__ import annotations


class KvdError(Exception):
    """An operation failed; the state is as it was before it."""

    code = "internal"


class InvalidRequest(KvdError):
    """The request can never succeed as it stands."""

    code = "invalid_request"


class LayoutMismatch(InvalidRequest):
    """The chunk has another layout than the caller expects."""

    code = "layout_mismatch"


class TooLarge(InvalidRequest):
    """The request is larger than the tier or the message limit allows."""

    code = "too_large"


class UnknownLease(InvalidRequest):
    """The lease is not open in this session: ended already, or never granted."""

    code = "unknown_lease"


class AccessDenied(KvdError):
    """The peer's identity does not allow this."""

    code = "access_denied"


class LeaseExpired(KvdError):
    """The lease's deadline has passed: what was read or written under it does not count."""

    code = "lease_expired"


class Corrupt(KvdError):
    """Bytes are not what their checksum or format says."""

    code = "corrupt"


class DeadlineExceeded(KvdError):
    """No outcome before the caller's deadline."""

    code = "deadline_exceeded"


class Unavailable(KvdError):
    """The daemon cannot be reached, or went away during the call."""

    code = "unavailable"


class TierFailed(KvdError):
    """The device or the file system refused; what was stored before is as it was."""

    code = "tier_failed"


class Unsupported(KvdError):
    """kvd cannot do this exactly, so it does not do it at all."""

    code = "unsupported"


class ConfigError(KvdError):
    """A setting is unknown, malformed or impossible on this machine."""

    code = "config"


def _subclasses(root: type[KvdError]) -> list[type[KvdError]]:
    return [root] + [found for child in root.__subclasses__() for found in _subclasses(child)]


_BY_CODE = {cls.code: cls for cls in _subclasses(KvdError)}


def from_code(code: str, message: str) -> KvdError:
    """The error that a wire code names; an unknown code (a newer daemon) is a plain `KvdError`."""
    return _BY_CODE.get(code, KvdError)(message)
