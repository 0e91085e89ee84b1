from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InputBlock(_message.Message):
    __slots__ = ("first", "lines")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    first: int
    lines: _containers.RepeatedCompositeFieldContainer[InputLine]
    def __init__(self, first: _Optional[int] = ..., lines: _Optional[_Iterable[_Union[InputLine, _Mapping]]] = ...) -> None: ...

class InputLine(_message.Message):
    __slots__ = ("text", "number", "too_long")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TOO_LONG_FIELD_NUMBER: _ClassVar[int]
    text: bytes
    number: int
    too_long: int
    def __init__(self, text: _Optional[bytes] = ..., number: _Optional[int] = ..., too_long: _Optional[int] = ...) -> None: ...
