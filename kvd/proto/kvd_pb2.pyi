from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChunkState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRANTED: _ClassVar[ChunkState]
    EXISTS: _ClassVar[ChunkState]
    BUSY: _ClassVar[ChunkState]
    FULL: _ClassVar[ChunkState]
GRANTED: ChunkState
EXISTS: ChunkState
BUSY: ChunkState
FULL: ChunkState

class Request(_message.Message):
    __slots__ = ("id", "attach", "declare", "lookup", "reserve", "commit", "pin", "renew", "release", "write", "read", "status", "list", "clear", "hold", "wait", "persist", "scrub")
    ID_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    DECLARE_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    WRITE_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    CLEAR_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    PERSIST_FIELD_NUMBER: _ClassVar[int]
    SCRUB_FIELD_NUMBER: _ClassVar[int]
    id: int
    attach: AttachRequest
    declare: DeclareRequest
    lookup: LookupRequest
    reserve: ReserveRequest
    commit: CommitRequest
    pin: PinRequest
    renew: RenewRequest
    release: ReleaseRequest
    write: WriteRequest
    read: ReadRequest
    status: StatusRequest
    list: ListRequest
    clear: ClearRequest
    hold: HoldRequest
    wait: WaitRequest
    persist: PersistRequest
    scrub: ScrubRequest
    def __init__(self, id: _Optional[int] = ..., attach: _Optional[_Union[AttachRequest, _Mapping]] = ..., declare: _Optional[_Union[DeclareRequest, _Mapping]] = ..., lookup: _Optional[_Union[LookupRequest, _Mapping]] = ..., reserve: _Optional[_Union[ReserveRequest, _Mapping]] = ..., commit: _Optional[_Union[CommitRequest, _Mapping]] = ..., pin: _Optional[_Union[PinRequest, _Mapping]] = ..., renew: _Optional[_Union[RenewRequest, _Mapping]] = ..., release: _Optional[_Union[ReleaseRequest, _Mapping]] = ..., write: _Optional[_Union[WriteRequest, _Mapping]] = ..., read: _Optional[_Union[ReadRequest, _Mapping]] = ..., status: _Optional[_Union[StatusRequest, _Mapping]] = ..., list: _Optional[_Union[ListRequest, _Mapping]] = ..., clear: _Optional[_Union[ClearRequest, _Mapping]] = ..., hold: _Optional[_Union[HoldRequest, _Mapping]] = ..., wait: _Optional[_Union[WaitRequest, _Mapping]] = ..., persist: _Optional[_Union[PersistRequest, _Mapping]] = ..., scrub: _Optional[_Union[ScrubRequest, _Mapping]] = ...) -> None: ...

class Response(_message.Message):
    __slots__ = ("id", "error", "attach", "declare", "lookup", "reserve", "commit", "pin", "renew", "release", "write", "read", "status", "list", "clear", "hold", "wait", "persist", "scrub")
    ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    DECLARE_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    WRITE_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    CLEAR_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    PERSIST_FIELD_NUMBER: _ClassVar[int]
    SCRUB_FIELD_NUMBER: _ClassVar[int]
    id: int
    error: Error
    attach: AttachReply
    declare: DeclareReply
    lookup: LookupReply
    reserve: ReserveReply
    commit: CommitReply
    pin: PinReply
    renew: RenewReply
    release: ReleaseReply
    write: WriteReply
    read: ReadReply
    status: StatusReply
    list: ListReply
    clear: ClearReply
    hold: HoldReply
    wait: WaitReply
    persist: PersistReply
    scrub: ScrubReply
    def __init__(self, id: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., attach: _Optional[_Union[AttachReply, _Mapping]] = ..., declare: _Optional[_Union[DeclareReply, _Mapping]] = ..., lookup: _Optional[_Union[LookupReply, _Mapping]] = ..., reserve: _Optional[_Union[ReserveReply, _Mapping]] = ..., commit: _Optional[_Union[CommitReply, _Mapping]] = ..., pin: _Optional[_Union[PinReply, _Mapping]] = ..., renew: _Optional[_Union[RenewReply, _Mapping]] = ..., release: _Optional[_Union[ReleaseReply, _Mapping]] = ..., write: _Optional[_Union[WriteReply, _Mapping]] = ..., read: _Optional[_Union[ReadReply, _Mapping]] = ..., status: _Optional[_Union[StatusReply, _Mapping]] = ..., list: _Optional[_Union[ListReply, _Mapping]] = ..., clear: _Optional[_Union[ClearReply, _Mapping]] = ..., hold: _Optional[_Union[HoldReply, _Mapping]] = ..., wait: _Optional[_Union[WaitReply, _Mapping]] = ..., persist: _Optional[_Union[PersistReply, _Mapping]] = ..., scrub: _Optional[_Union[ScrubReply, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("version", "client", "stopped")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    version: int
    client: str
    stopped: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, version: _Optional[int] = ..., client: _Optional[str] = ..., stopped: _Optional[_Iterable[int]] = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("version", "session", "now_ns", "arena_size", "message_size_max", "instance", "daemon_version", "token")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NOW_NS_FIELD_NUMBER: _ClassVar[int]
    ARENA_SIZE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_SIZE_MAX_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    DAEMON_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    version: int
    session: int
    now_ns: int
    arena_size: int
    message_size_max: int
    instance: str
    daemon_version: str
    token: int
    def __init__(self, version: _Optional[int] = ..., session: _Optional[int] = ..., now_ns: _Optional[int] = ..., arena_size: _Optional[int] = ..., message_size_max: _Optional[int] = ..., instance: _Optional[str] = ..., daemon_version: _Optional[str] = ..., token: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("model", "revision", "dtype", "num_layers", "num_planes", "num_kv_heads", "head_dim", "chunk_tokens", "axes", "rope", "rank", "world_size", "group", "salt")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_PLANES_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AXES_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    dtype: str
    num_layers: int
    num_planes: int
    num_kv_heads: int
    head_dim: int
    chunk_tokens: int
    axes: str
    rope: str
    rank: int
    world_size: int
    group: str
    salt: str
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., dtype: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_planes: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., chunk_tokens: _Optional[int] = ..., axes: _Optional[str] = ..., rope: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., group: _Optional[str] = ..., salt: _Optional[str] = ...) -> None: ...

class DeclareRequest(_message.Message):
    __slots__ = ("layout",)
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ...) -> None: ...

class DeclareReply(_message.Message):
    __slots__ = ("fingerprint",)
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    def __init__(self, fingerprint: _Optional[bytes] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("keys", "standalone", "is_exact", "codecs")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    STANDALONE_FIELD_NUMBER: _ClassVar[int]
    IS_EXACT_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    standalone: bool
    is_exact: bool
    codecs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, keys: _Optional[bytes] = ..., standalone: bool = ..., is_exact: bool = ..., codecs: _Optional[_Iterable[str]] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("count", "present")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    count: int
    present: bytes
    def __init__(self, count: _Optional[int] = ..., present: _Optional[bytes] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("layout", "keys", "parent", "standalone", "start", "num_tokens", "category", "prefill_us", "lease_ns", "wait_ns", "is_approximate", "ttl_ns")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    STANDALONE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    PREFILL_US_FIELD_NUMBER: _ClassVar[int]
    LEASE_NS_FIELD_NUMBER: _ClassVar[int]
    WAIT_NS_FIELD_NUMBER: _ClassVar[int]
    IS_APPROXIMATE_FIELD_NUMBER: _ClassVar[int]
    TTL_NS_FIELD_NUMBER: _ClassVar[int]
    layout: bytes
    keys: bytes
    parent: bytes
    standalone: bool
    start: int
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    category: str
    prefill_us: int
    lease_ns: int
    wait_ns: int
    is_approximate: bool
    ttl_ns: int
    def __init__(self, layout: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., standalone: bool = ..., start: _Optional[int] = ..., num_tokens: _Optional[_Iterable[int]] = ..., category: _Optional[str] = ..., prefill_us: _Optional[int] = ..., lease_ns: _Optional[int] = ..., wait_ns: _Optional[int] = ..., is_approximate: bool = ..., ttl_ns: _Optional[int] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("lease", "deadline_ns", "states", "offsets", "sizes", "ttl_ns")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_NS_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    TTL_NS_FIELD_NUMBER: _ClassVar[int]
    lease: int
    deadline_ns: int
    states: _containers.RepeatedScalarFieldContainer[ChunkState]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    sizes: _containers.RepeatedScalarFieldContainer[int]
    ttl_ns: int
    def __init__(self, lease: _Optional[int] = ..., deadline_ns: _Optional[int] = ..., states: _Optional[_Iterable[_Union[ChunkState, str]]] = ..., offsets: _Optional[_Iterable[int]] = ..., sizes: _Optional[_Iterable[int]] = ..., ttl_ns: _Optional[int] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("lease", "checksums")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    lease: int
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease: _Optional[int] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("keys", "layout", "standalone", "lease_ns", "wait_ns", "is_exact", "codecs")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    STANDALONE_FIELD_NUMBER: _ClassVar[int]
    LEASE_NS_FIELD_NUMBER: _ClassVar[int]
    WAIT_NS_FIELD_NUMBER: _ClassVar[int]
    IS_EXACT_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    layout: bytes
    standalone: bool
    lease_ns: int
    wait_ns: int
    is_exact: bool
    codecs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, keys: _Optional[bytes] = ..., layout: _Optional[bytes] = ..., standalone: bool = ..., lease_ns: _Optional[int] = ..., wait_ns: _Optional[int] = ..., is_exact: bool = ..., codecs: _Optional[_Iterable[str]] = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ("lease", "deadline_ns", "offsets", "sizes", "num_tokens", "checksums", "present", "ready", "is_approximate", "codecs", "starts")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_NS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    IS_APPROXIMATE_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    lease: int
    deadline_ns: int
    offsets: _containers.RepeatedScalarFieldContainer[int]
    sizes: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    present: bytes
    ready: _containers.RepeatedScalarFieldContainer[int]
    is_approximate: bytes
    codecs: _containers.RepeatedScalarFieldContainer[str]
    starts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease: _Optional[int] = ..., deadline_ns: _Optional[int] = ..., offsets: _Optional[_Iterable[int]] = ..., sizes: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ..., present: _Optional[bytes] = ..., ready: _Optional[_Iterable[int]] = ..., is_approximate: _Optional[bytes] = ..., codecs: _Optional[_Iterable[str]] = ..., starts: _Optional[_Iterable[int]] = ...) -> None: ...

class WaitRequest(_message.Message):
    __slots__ = ("lease", "index", "size", "timeout_ns", "is_rest")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_NS_FIELD_NUMBER: _ClassVar[int]
    IS_REST_FIELD_NUMBER: _ClassVar[int]
    lease: int
    index: int
    size: int
    timeout_ns: int
    is_rest: bool
    def __init__(self, lease: _Optional[int] = ..., index: _Optional[int] = ..., size: _Optional[int] = ..., timeout_ns: _Optional[int] = ..., is_rest: bool = ...) -> None: ...

class WaitReply(_message.Message):
    __slots__ = ("ready", "is_lost", "num_ready")
    READY_FIELD_NUMBER: _ClassVar[int]
    IS_LOST_FIELD_NUMBER: _ClassVar[int]
    NUM_READY_FIELD_NUMBER: _ClassVar[int]
    ready: int
    is_lost: bool
    num_ready: int
    def __init__(self, ready: _Optional[int] = ..., is_lost: bool = ..., num_ready: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("lease", "lease_ns")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LEASE_NS_FIELD_NUMBER: _ClassVar[int]
    lease: int
    lease_ns: int
    def __init__(self, lease: _Optional[int] = ..., lease_ns: _Optional[int] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("deadline_ns",)
    DEADLINE_NS_FIELD_NUMBER: _ClassVar[int]
    deadline_ns: int
    def __init__(self, deadline_ns: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: int
    def __init__(self, lease: _Optional[int] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PersistRequest(_message.Message):
    __slots__ = ("keys", "timeout_ns")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_NS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    timeout_ns: int
    def __init__(self, keys: _Optional[bytes] = ..., timeout_ns: _Optional[int] = ...) -> None: ...

class PersistReply(_message.Message):
    __slots__ = ("num_durable", "num_pending", "reason")
    NUM_DURABLE_FIELD_NUMBER: _ClassVar[int]
    NUM_PENDING_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    num_durable: int
    num_pending: int
    reason: str
    def __init__(self, num_durable: _Optional[int] = ..., num_pending: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("lease", "index", "offset", "data")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    lease: int
    index: int
    offset: int
    data: bytes
    def __init__(self, lease: _Optional[int] = ..., index: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class WriteReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("lease", "index", "offset", "size")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    lease: int
    index: int
    offset: int
    size: int
    def __init__(self, lease: _Optional[int] = ..., index: _Optional[int] = ..., offset: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

class ReadReply(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("audit",)
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    audit: bool
    def __init__(self, audit: bool = ...) -> None: ...

class TierStatus(_message.Message):
    __slots__ = ("name", "size", "used", "largest_free", "num_extents", "pages", "path", "failure", "written", "write_amplification", "written_a_day", "disk_size", "reserve", "is_direct", "key_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    LARGEST_FREE_FIELD_NUMBER: _ClassVar[int]
    NUM_EXTENTS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    WRITE_AMPLIFICATION_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_A_DAY_FIELD_NUMBER: _ClassVar[int]
    DISK_SIZE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    IS_DIRECT_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    used: int
    largest_free: int
    num_extents: int
    pages: str
    path: str
    failure: str
    written: int
    write_amplification: float
    written_a_day: float
    disk_size: int
    reserve: int
    is_direct: bool
    key_id: bytes
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., used: _Optional[int] = ..., largest_free: _Optional[int] = ..., num_extents: _Optional[int] = ..., pages: _Optional[str] = ..., path: _Optional[str] = ..., failure: _Optional[str] = ..., written: _Optional[int] = ..., write_amplification: _Optional[float] = ..., written_a_day: _Optional[float] = ..., disk_size: _Optional[int] = ..., reserve: _Optional[int] = ..., is_direct: bool = ..., key_id: _Optional[bytes] = ...) -> None: ...

class ScrubRequest(_message.Message):
    __slots__ = ("start", "rate")
    START_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    start: bool
    rate: int
    def __init__(self, start: bool = ..., rate: _Optional[int] = ...) -> None: ...

class ScrubReply(_message.Message):
    __slots__ = ("is_running", "num_done", "num_all", "num_bad", "size_done", "size_all")
    IS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_DONE_FIELD_NUMBER: _ClassVar[int]
    NUM_ALL_FIELD_NUMBER: _ClassVar[int]
    NUM_BAD_FIELD_NUMBER: _ClassVar[int]
    SIZE_DONE_FIELD_NUMBER: _ClassVar[int]
    SIZE_ALL_FIELD_NUMBER: _ClassVar[int]
    is_running: bool
    num_done: int
    num_all: int
    num_bad: int
    size_done: int
    size_all: int
    def __init__(self, is_running: bool = ..., num_done: _Optional[int] = ..., num_all: _Optional[int] = ..., num_bad: _Optional[int] = ..., size_done: _Optional[int] = ..., size_all: _Optional[int] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("version", "pid", "instance", "state", "uptime_ns", "num_chunks", "num_layouts", "num_sessions", "num_pinned", "num_reserved", "tiers", "counters")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    UPTIME_NS_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_PINNED_FIELD_NUMBER: _ClassVar[int]
    NUM_RESERVED_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    version: str
    pid: int
    instance: str
    state: str
    uptime_ns: int
    num_chunks: int
    num_layouts: int
    num_sessions: int
    num_pinned: int
    num_reserved: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierStatus]
    counters: _containers.ScalarMap[str, int]
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., instance: _Optional[str] = ..., state: _Optional[str] = ..., uptime_ns: _Optional[int] = ..., num_chunks: _Optional[int] = ..., num_layouts: _Optional[int] = ..., num_sessions: _Optional[int] = ..., num_pinned: _Optional[int] = ..., num_reserved: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierStatus, _Mapping]]] = ..., counters: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("limit", "cursor", "category", "layout")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    cursor: int
    category: str
    layout: bytes
    def __init__(self, limit: _Optional[int] = ..., cursor: _Optional[int] = ..., category: _Optional[str] = ..., layout: _Optional[bytes] = ...) -> None: ...

class ChunkInfo(_message.Message):
    __slots__ = ("key", "parent", "layout", "start", "num_tokens", "category", "size", "tier", "codec", "pins", "is_held", "is_exact", "expires_in_ns")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    IS_HELD_FIELD_NUMBER: _ClassVar[int]
    IS_EXACT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_NS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    parent: bytes
    layout: bytes
    start: int
    num_tokens: int
    category: str
    size: int
    tier: str
    codec: str
    pins: int
    is_held: bool
    is_exact: bool
    expires_in_ns: int
    def __init__(self, key: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., layout: _Optional[bytes] = ..., start: _Optional[int] = ..., num_tokens: _Optional[int] = ..., category: _Optional[str] = ..., size: _Optional[int] = ..., tier: _Optional[str] = ..., codec: _Optional[str] = ..., pins: _Optional[int] = ..., is_held: bool = ..., is_exact: bool = ..., expires_in_ns: _Optional[int] = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("chunks", "cursor", "layouts")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[ChunkInfo]
    cursor: int
    layouts: _containers.RepeatedCompositeFieldContainer[Layout]
    def __init__(self, chunks: _Optional[_Iterable[_Union[ChunkInfo, _Mapping]]] = ..., cursor: _Optional[int] = ..., layouts: _Optional[_Iterable[_Union[Layout, _Mapping]]] = ...) -> None: ...

class ClearRequest(_message.Message):
    __slots__ = ("category", "layout", "keys", "limit", "cursor")
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    category: str
    layout: bytes
    keys: bytes
    limit: int
    cursor: int
    def __init__(self, category: _Optional[str] = ..., layout: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., limit: _Optional[int] = ..., cursor: _Optional[int] = ...) -> None: ...

class ClearReply(_message.Message):
    __slots__ = ("count", "size", "is_partial", "cursor")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    IS_PARTIAL_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    count: int
    size: int
    is_partial: bool
    cursor: int
    def __init__(self, count: _Optional[int] = ..., size: _Optional[int] = ..., is_partial: bool = ..., cursor: _Optional[int] = ...) -> None: ...

class HoldRequest(_message.Message):
    __slots__ = ("keys", "is_held")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    IS_HELD_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    is_held: bool
    def __init__(self, keys: _Optional[bytes] = ..., is_held: bool = ...) -> None: ...

class HoldReply(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...
