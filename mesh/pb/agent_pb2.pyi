from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoadRequest(_message.Message):
    __slots__ = ("model_id", "create_revision", "model_type", "model_path", "model_key", "host_bytes", "device_bytes", "idle_ms", "sha256", "expected_copies", "reason", "pinned", "generation")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    CREATE_REVISION_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    MODEL_KEY_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    IDLE_MS_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_COPIES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    create_revision: int
    model_type: str
    model_path: str
    model_key: str
    host_bytes: int
    device_bytes: int
    idle_ms: int
    sha256: str
    expected_copies: int
    reason: str
    pinned: bool
    generation: int
    def __init__(self, model_id: _Optional[str] = ..., create_revision: _Optional[int] = ..., model_type: _Optional[str] = ..., model_path: _Optional[str] = ..., model_key: _Optional[str] = ..., host_bytes: _Optional[int] = ..., device_bytes: _Optional[int] = ..., idle_ms: _Optional[int] = ..., sha256: _Optional[str] = ..., expected_copies: _Optional[int] = ..., reason: _Optional[str] = ..., pinned: _Optional[bool] = ..., generation: _Optional[int] = ...) -> None: ...

class LoadReply(_message.Message):
    __slots__ = ("loaded", "elsewhere", "refused", "failed", "stale")
    class Loaded(_message.Message):
        __slots__ = ("incarnation", "host_bytes", "device_bytes", "load_ms", "generation", "digest", "blamed")
        INCARNATION_FIELD_NUMBER: _ClassVar[int]
        HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
        DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
        LOAD_MS_FIELD_NUMBER: _ClassVar[int]
        GENERATION_FIELD_NUMBER: _ClassVar[int]
        DIGEST_FIELD_NUMBER: _ClassVar[int]
        BLAMED_FIELD_NUMBER: _ClassVar[int]
        incarnation: str
        host_bytes: int
        device_bytes: int
        load_ms: int
        generation: int
        digest: str
        blamed: bool
        def __init__(self, incarnation: _Optional[str] = ..., host_bytes: _Optional[int] = ..., device_bytes: _Optional[int] = ..., load_ms: _Optional[int] = ..., generation: _Optional[int] = ..., digest: _Optional[str] = ..., blamed: _Optional[bool] = ...) -> None: ...
    class Elsewhere(_message.Message):
        __slots__ = ("pod",)
        POD_FIELD_NUMBER: _ClassVar[int]
        pod: str
        def __init__(self, pod: _Optional[str] = ...) -> None: ...
    class Refused(_message.Message):
        __slots__ = ("reason", "text")
        REASON_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        reason: str
        text: str
        def __init__(self, reason: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...
    class Failed(_message.Message):
        __slots__ = ("reason", "text", "kind", "asked_ms")
        REASON_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        KIND_FIELD_NUMBER: _ClassVar[int]
        ASKED_MS_FIELD_NUMBER: _ClassVar[int]
        reason: str
        text: str
        kind: str
        asked_ms: int
        def __init__(self, reason: _Optional[str] = ..., text: _Optional[str] = ..., kind: _Optional[str] = ..., asked_ms: _Optional[int] = ...) -> None: ...
    class Stale(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    LOADED_FIELD_NUMBER: _ClassVar[int]
    ELSEWHERE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    loaded: LoadReply.Loaded
    elsewhere: LoadReply.Elsewhere
    refused: LoadReply.Refused
    failed: LoadReply.Failed
    stale: LoadReply.Stale
    def __init__(self, loaded: _Optional[_Union[LoadReply.Loaded, _Mapping]] = ..., elsewhere: _Optional[_Union[LoadReply.Elsewhere, _Mapping]] = ..., refused: _Optional[_Union[LoadReply.Refused, _Mapping]] = ..., failed: _Optional[_Union[LoadReply.Failed, _Mapping]] = ..., stale: _Optional[_Union[LoadReply.Stale, _Mapping]] = ...) -> None: ...

class UnloadRequest(_message.Message):
    __slots__ = ("model_id", "create_revision", "reason")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    CREATE_REVISION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    create_revision: int
    reason: str
    def __init__(self, model_id: _Optional[str] = ..., create_revision: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class UnloadReply(_message.Message):
    __slots__ = ("had_copy",)
    HAD_COPY_FIELD_NUMBER: _ClassVar[int]
    had_copy: bool
    def __init__(self, had_copy: _Optional[bool] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("model_id", "active", "models", "questions")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    QUESTIONS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    active: bool
    models: _containers.RepeatedScalarFieldContainer[str]
    questions: bool
    def __init__(self, model_id: _Optional[str] = ..., active: _Optional[bool] = ..., models: _Optional[_Iterable[str]] = ..., questions: _Optional[bool] = ...) -> None: ...

class CopyState(_message.Message):
    __slots__ = ("model_id", "create_revision", "state", "host_bytes", "device_bytes", "idle_ms", "calls", "in_flight", "busy_us", "load_ms", "age_ms", "pulled_bytes", "pull_bytes", "pull_rate", "rate", "peak_rate", "pinned", "model_type", "reason", "queue_ms", "ahead", "expected_ms", "generation", "digest")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    CREATE_REVISION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    IDLE_MS_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    BUSY_US_FIELD_NUMBER: _ClassVar[int]
    LOAD_MS_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PULL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PULL_RATE_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    PEAK_RATE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_MS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    create_revision: int
    state: str
    host_bytes: int
    device_bytes: int
    idle_ms: int
    calls: int
    in_flight: int
    busy_us: int
    load_ms: int
    age_ms: int
    pulled_bytes: int
    pull_bytes: int
    pull_rate: int
    rate: int
    peak_rate: int
    pinned: bool
    model_type: str
    reason: str
    queue_ms: int
    ahead: int
    expected_ms: int
    generation: int
    digest: str
    def __init__(self, model_id: _Optional[str] = ..., create_revision: _Optional[int] = ..., state: _Optional[str] = ..., host_bytes: _Optional[int] = ..., device_bytes: _Optional[int] = ..., idle_ms: _Optional[int] = ..., calls: _Optional[int] = ..., in_flight: _Optional[int] = ..., busy_us: _Optional[int] = ..., load_ms: _Optional[int] = ..., age_ms: _Optional[int] = ..., pulled_bytes: _Optional[int] = ..., pull_bytes: _Optional[int] = ..., pull_rate: _Optional[int] = ..., rate: _Optional[int] = ..., peak_rate: _Optional[int] = ..., pinned: _Optional[bool] = ..., model_type: _Optional[str] = ..., reason: _Optional[str] = ..., queue_ms: _Optional[int] = ..., ahead: _Optional[int] = ..., expected_ms: _Optional[int] = ..., generation: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("pod", "incarnation", "state", "capacity_bytes", "used_bytes", "resident_bytes", "copies", "decisions", "counters", "device_capacity_bytes", "device_used_bytes", "observed_bytes", "accounted_bytes", "factor", "observed", "unobserved")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    POD_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    OBSERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCOUNTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    OBSERVED_FIELD_NUMBER: _ClassVar[int]
    UNOBSERVED_FIELD_NUMBER: _ClassVar[int]
    pod: str
    incarnation: str
    state: str
    capacity_bytes: int
    used_bytes: int
    resident_bytes: int
    copies: _containers.RepeatedCompositeFieldContainer[CopyState]
    decisions: _containers.RepeatedScalarFieldContainer[str]
    counters: _containers.ScalarMap[str, int]
    device_capacity_bytes: int
    device_used_bytes: int
    observed_bytes: int
    accounted_bytes: int
    factor: float
    observed: str
    unobserved: str
    def __init__(self, pod: _Optional[str] = ..., incarnation: _Optional[str] = ..., state: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., copies: _Optional[_Iterable[_Union[CopyState, _Mapping]]] = ..., decisions: _Optional[_Iterable[str]] = ..., counters: _Optional[_Mapping[str, int]] = ..., device_capacity_bytes: _Optional[int] = ..., device_used_bytes: _Optional[int] = ..., observed_bytes: _Optional[int] = ..., accounted_bytes: _Optional[int] = ..., factor: _Optional[float] = ..., observed: _Optional[str] = ..., unobserved: _Optional[str] = ...) -> None: ...
