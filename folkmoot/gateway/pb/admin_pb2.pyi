from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScaleTarget(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCALE_TARGET_UNSPECIFIED: _ClassVar[ScaleTarget]
    HOSTS: _ClassVar[ScaleTarget]
    ENGINES: _ClassVar[ScaleTarget]
    REPLICAS: _ClassVar[ScaleTarget]

class OperationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_STATE_UNSPECIFIED: _ClassVar[OperationState]
    ACCEPTED: _ClassVar[OperationState]
    UNDER_WAY: _ClassVar[OperationState]
    SUCCEEDED: _ClassVar[OperationState]
    FAILED: _ClassVar[OperationState]
SCALE_TARGET_UNSPECIFIED: ScaleTarget
HOSTS: ScaleTarget
ENGINES: ScaleTarget
REPLICAS: ScaleTarget
OPERATION_STATE_UNSPECIFIED: OperationState
ACCEPTED: OperationState
UNDER_WAY: OperationState
SUCCEEDED: OperationState
FAILED: OperationState

class ScaleRequest(_message.Message):
    __slots__ = ("target", "count", "request_id", "most")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    target: ScaleTarget
    count: int
    request_id: str
    most: int
    def __init__(self, target: _Optional[_Union[ScaleTarget, str]] = ..., count: _Optional[int] = ..., request_id: _Optional[str] = ..., most: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("host", "force", "request_id")
    HOST_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    host: str
    force: bool
    request_id: str
    def __init__(self, host: _Optional[str] = ..., force: _Optional[bool] = ..., request_id: _Optional[str] = ...) -> None: ...

class ReplicateRequest(_message.Message):
    __slots__ = ("expert", "replicas", "request_id")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    expert: int
    replicas: int
    request_id: str
    def __init__(self, expert: _Optional[int] = ..., replicas: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class RollEnginesRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class GetOperationRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class Operation(_message.Message):
    __slots__ = ("request_id", "state", "message", "code", "submitted_ms", "updated_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_MS_FIELD_NUMBER: _ClassVar[int]
    UPDATED_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    state: OperationState
    message: str
    code: int
    submitted_ms: int
    updated_ms: int
    def __init__(self, request_id: _Optional[str] = ..., state: _Optional[_Union[OperationState, str]] = ..., message: _Optional[str] = ..., code: _Optional[int] = ..., submitted_ms: _Optional[int] = ..., updated_ms: _Optional[int] = ...) -> None: ...
