"""ctypes bindings of hop.c. Pointers are plain integers: the callers own the memory and have checked the sizes."""

import ctypes
import importlib.util
from ctypes import c_int32, c_int64, c_uint64, c_void_p
from typing import Any

PENDING, READY, CLOSED = 0, 1, 2
OUT_OF_RANGE = -(2**31)
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


class Waiter(ctypes.Structure):
    """One reply or request to wait for: see `struct waiter` in hop.c."""

    _fields_ = [
        ("flag", c_void_p),
        ("sleeping", c_void_p),
        ("want", c_uint64),
        ("fd", c_int32),
        ("state", c_int32),
    ]


class Post(ctypes.Structure):
    """One message to publish: see `struct post` in hop.c."""

    _fields_ = [
        ("flag", c_void_p),
        ("sleeping", c_void_p),
        ("value", c_uint64),
        ("fd", c_int32),
        ("pad", c_int32),
    ]


def _load() -> ctypes.CDLL:
    spec = importlib.util.find_spec("folkmoot.experts._hop")
    if spec is None or spec.origin is None:
        raise ImportError("folkmoot.experts._hop is not built: install Folkmoot again where a C compiler is at hand")
    return ctypes.CDLL(spec.origin)


def _function(library: ctypes.CDLL, name: str, restype: Any, *argtypes: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = restype, argtypes
    return function


_library = _load()
_int, _ptr = c_int32, c_void_p

post = _function(_library, "fm_post", None, _ptr, _int)
wait = _function(_library, "fm_wait", _int, _ptr, _int, c_int64, c_int64)
route = _function(_library, "fm_route", _int, _ptr, _int, _int, _ptr, _int, _int, _ptr, _int, *([_ptr] * 7))
pack = _function(_library, "fm_pack", None, _ptr, c_int64, _int, _int, *([_ptr] * 4), _int, _ptr, _ptr)
collect = _function(_library, "fm_collect", None, _int, _ptr, _ptr, _ptr, _int, _ptr, c_int64, _ptr)
combine = _function(_library, "fm_combine", None, _ptr, _int, _int, _int, c_int64, _ptr, _ptr)
