"""ctypes bindings of hop.c, and its structs. Pointers are plain integers: their owners keep the memory alive."""

import ctypes
import importlib.util
from ctypes import c_int32, c_int64, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any

PENDING, READY, CLOSED = 0, 1, 2  # a Waiter
IDLE, WAITING, DONE, GONE, WRONG, READABLE = range(6)  # a Link
OUT_OF_RANGE = -(2**31)
ALL_DONE, ATTENTION, TIMEOUT = 0, 1, 2  # what `finish` returns
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


class Header(ctypes.Structure):
    """The 64 bytes before each payload: see wire.py."""

    _fields_ = (
        ("magic", c_uint32),
        ("kind", c_uint16),
        ("flags", c_uint16),
        ("seq", c_uint64),
        ("map_version", c_uint64),
        ("engine_incarnation", c_uint64),
        ("host_incarnation", c_uint64),
        ("layer", c_uint32),
        ("rows", c_uint32),
        ("pairs", c_uint32),
        ("payload_bytes", c_uint32),
        ("posted_us", c_uint64),
    )

    def __repr__(self) -> str:
        return "Header(" + ", ".join(f"{f[0]}={getattr(self, f[0])}" for f in self._fields_) + ")"


class Waiter(ctypes.Structure):
    """One thing to wait for: `struct waiter` in hop.c."""

    _fields_ = (
        ("flag", c_void_p),
        ("sleeping", c_void_p),
        ("want", c_uint64),
        ("fd", c_int32),
        ("state", c_int32),
    )


class Link(ctypes.Structure):
    """The engine's end of a connection: `struct link` in hop.c."""

    _fields_ = (
        ("header", Header),
        ("request", c_void_p),
        ("reply", c_void_p),
        ("page", c_void_p),
        ("reply_limit", c_int64),
        ("engine_incarnation", c_uint64),
        ("host_incarnation", c_uint64),
        ("seq", c_uint64),
        ("posted_us", c_int64),
        ("took_us", c_int64),
        ("fd", c_int32),
        ("state", c_int32),
        ("rows", c_int32),
        ("last_token", c_int32),
        ("number", c_int32),
        ("pad", c_int32),
    )


class Call(ctypes.Structure):
    """One layer's rows on their way: `struct call` in hop.c."""

    _fields_ = (
        ("x", c_void_p),
        ("ids", c_void_p),
        ("weights", c_void_p),
        ("table", c_void_p),
        ("done", c_void_p),
        ("host", c_void_p),
        ("row", c_void_p),
        ("rows", c_void_p),
        ("factors", c_void_p),
        ("served", c_void_p),
        ("scratch", c_void_p),
        ("cost", c_void_p),
        ("start", c_void_p),
        ("map_version", c_uint64),
        ("row_bytes", c_int64),
        ("pairs", c_int32),
        ("k", c_int32),
        ("experts", c_int32),
        ("replicas", c_int32),
        ("links", c_int32),
        ("expert_cost", c_int32),
        ("layer", c_int32),
        ("flags", c_int32),
    )


class Connection(ctypes.Structure):
    """The host's end of a connection: `struct connection` in hop.c."""

    _fields_ = (
        ("header", Header),
        ("request", c_void_p),
        ("reply", c_void_p),
        ("page", c_void_p),
        ("num_slots", c_void_p),
        ("slots", c_void_p),
        ("tokens", c_void_p),
        ("engine_incarnation", c_uint64),
        ("host_incarnation", c_uint64),
        ("seq", c_uint64),
        ("row_bytes", c_int64),
        ("fd", c_int32),
        ("max_rows", c_int32),
        ("num_layers", c_int32),
        ("pad", c_int32),
    )


def _load() -> ctypes.CDLL:
    spec = importlib.util.find_spec("folkmoot.experts._hop")
    if spec is None or spec.origin is None:
        raise ImportError("folkmoot.experts._hop is not built: install Folkmoot again where a C compiler is at hand")
    return ctypes.CDLL(spec.origin)


def _function(name: str, restype: Any, *argtypes: Any) -> Any:
    function = getattr(_library, name)
    function.restype, function.argtypes = restype, argtypes
    return function


def _is_of_this_version(library: ctypes.CDLL) -> bool:
    """Whether it was built from the hop.c that these structs belong to."""
    structs = (Waiter, Link, Call, Connection)
    sizes = (c_int32 * len(structs))()
    if not hasattr(library, "fm_sizes"):
        return False
    library.fm_sizes(sizes)
    return list(sizes) == [ctypes.sizeof(one) for one in structs]


_library = _load()
if not _is_of_this_version(_library):
    raise ImportError("folkmoot.experts._hop was built from other sources than these: install Folkmoot again")

wait = _function("fm_wait", c_int32, c_void_p, c_int32, c_int64, c_int64)
begin = _function("fm_begin", c_int32, c_void_p, c_void_p)
finish = _function("fm_finish", c_int32, c_void_p, c_void_p, c_int64, c_int64)
collect = _function("fm_collect", None, c_void_p, c_void_p, c_void_p)
combine = _function("fm_combine", c_int32, c_void_p, c_void_p, c_int32, c_int32)
doubt = _function("fm_doubt", c_int32, c_void_p, c_void_p, c_int32)
take = _function("fm_take", c_int32, c_void_p)
answer = _function("fm_answer", None, c_void_p, c_int32, c_uint32)
