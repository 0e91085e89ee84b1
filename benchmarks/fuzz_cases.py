"""What fuzz.py sends: messages with any values, bytes that are none, calls in the wrong order, raw HTTP/2. Each request
is a function of its random numbers alone, so that any of them can be sent again."""

import pkgutil
import random
import struct
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from folkmoot.gateway import pb
from folkmoot.gateway.pb import gateway_pb2

OWN = [import_module(f"{pb.__name__}.{m.name}") for m in pkgutil.iter_modules(pb.__path__) if m.name.endswith("_pb2")]
FILES = (*OWN, health_pb2, reflection_pb2)
METHODS: list[MethodDescriptor] = [
    method for file in FILES for service in file.DESCRIPTOR.services_by_name.values() for method in service.methods
]
WEIGHTS = [6 if m.name in ("Generate", "Follow", "GetRequest", "Cancel") else 1 for m in METHODS]
UNKNOWN = ("/folkmoot.v1.Folkmoot/Nothing", "/folkmoot.v1.Nobody/Generate", "/", "//", "/x", "/a/b/c", "/ä/ö")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
KINDS = {
    "sound": 35, "bytes": 20, "mutated": 15, "of another type": 5, "several messages": 6, "unknown method": 3,
    "odd metadata": 5, "left": 6, "too large": 1, "raw HTTP/2": 4,
}  # fmt: skip
TEXTS = ("", "x", "instant", "tenant", "alice/id-1", "../id-1", "\0", "\n", "ä" * 50, "\U0001f600", "a" * 129, "{}")


@dataclass(frozen=True)
class Case:
    """One request. `messages` are bytes as they go out; `leave_s`: the client hangs up after so long."""

    kind: str
    method: str = ""
    messages: tuple[bytes, ...] = ()
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    timeout_s: float = 2.0
    leave_s: float | None = None
    is_compressed: bool = False
    raw: bytes = b""


def path_of(method: MethodDescriptor) -> str:
    """As it stands in HTTP/2."""
    return f"/{method.containing_service.full_name}/{method.name}"


def case(rng: random.Random, keys: list[str]) -> Case:
    """The request of these random numbers; `keys` are good API keys."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "raw HTTP/2":
        return Case(kind, raw=raw(rng))
    method = rng.choices(METHODS, WEIGHTS)[0]
    data = message(rng, method.input_type).SerializeToString()
    messages: tuple[bytes, ...] = (data,)
    if kind == "bytes":
        messages = (rng.randbytes(rng.choice((1, 2, 8, 100, 5000))),)
    elif kind == "mutated":
        messages = (mutated(rng, data),)
    elif kind == "of another type":
        messages = (message(rng, rng.choice(METHODS).input_type).SerializeToString(),)
    elif kind == "several messages":
        messages = tuple(
            mutated(rng, data) if rng.random() < 0.3 else data for _ in range(rng.choice((0, 0, 2, 3, 20)))
        )
    elif kind == "too large":
        messages = (rng.randbytes(1 << 20),)
    return Case(
        kind,
        rng.choice(UNKNOWN) if kind == "unknown method" else path_of(method),
        messages,
        metadata(rng, keys, is_odd=kind == "odd metadata"),
        timeout_s=rng.choice((0.001, 0.05, 0.5, 2.0)) if kind == "left" or method.name == "Watch" else 2.0,
        leave_s=rng.choice((0.0, 0.001, 0.02)) if kind == "left" else None,
        is_compressed=rng.random() < 0.1,
    )


def message(rng: random.Random, descriptor: Any, depth: int = 0) -> Message:
    """A message with some of its fields set, to usual and unusual values; a request to generate is often sound."""
    made: Message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if rng.random() < 0.4 and depth < 4:
            _set(rng, made, field, depth)
    if isinstance(made, gateway_pb2.GenerateRequest) and rng.random() < 0.7:
        made.model = "instant"
        made.text = "Why is the sky blue?"
        for name in rng.sample(("tenant", "sampling", "request_id", "timeout_s"), rng.randint(1, 4)):
            made.ClearField(name)
        made.lane, made.on_disconnect = rng.randint(0, 2), rng.randint(0, 3)  # type: ignore[assignment]
    return made


def _set(rng: random.Random, into: Any, field: Field, depth: int) -> None:
    options = field.message_type.GetOptions() if field.message_type else None
    if options is not None and options.map_entry:
        entry: Any = field.message_type.fields_by_name  # type: ignore[union-attr]
        for _ in range(rng.randint(0, 3)):
            getattr(into, field.name)[_value(rng, entry["key"])] = _value(rng, entry["value"])
    elif field.message_type and field.is_repeated:
        getattr(into, field.name).extend(message(rng, field.message_type, depth + 1) for _ in range(rng.randint(0, 3)))
    elif field.message_type:
        getattr(into, field.name).CopyFrom(message(rng, field.message_type, depth + 1))
    elif field.is_repeated:
        count = rng.choice((0, 1, 3, 100, 5000) if rng.random() < 0.1 else (0, 1, 3))
        getattr(into, field.name).extend([_value(rng, field) for _ in range(count)])
    else:
        setattr(into, field.name, _value(rng, field))


def _value(rng: random.Random, field: Field) -> Any:
    kind = field.cpp_type
    if kind == Field.CPPTYPE_STRING:
        text = rng.choice((*TEXTS, f"id-{rng.randrange(200)}", "a" * 20_000 if rng.random() < 0.05 else "b"))
        return text.encode() if field.type == Field.TYPE_BYTES else text
    if kind in (Field.CPPTYPE_DOUBLE, Field.CPPTYPE_FLOAT):
        return rng.choice((0.0, 1.0, 0.5, -1.0, 1e30, -1e30, float("nan"), float("inf"), rng.random()))
    if kind == Field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == Field.CPPTYPE_ENUM:
        return rng.choice((0, 1, 2, 3, 99, -1))
    is_wide = kind in (Field.CPPTYPE_INT64, Field.CPPTYPE_UINT64)
    top = 2 ** (63 if is_wide else 31) - 1
    return rng.choice((0, 1, 2, 8, 100, rng.randrange(32_000), top))


def mutated(rng: random.Random, data: bytes) -> bytes:
    """With bits flipped, cut short, or twice."""
    changed = bytearray(data or b"\0")
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(
        rng.choice((changed, changed[: rng.randrange(len(changed) + 1)], changed + changed, data + b"\x0b" * 150))
    )


def metadata(rng: random.Random, keys: list[str], *, is_odd: bool) -> tuple[tuple[str, str | bytes], ...]:
    """Mostly a good key; now and then none, or one that is no good; and what else there can be."""
    key = rng.choices((rng.choice(keys), "", f"fmk_{'0' * 12}_{'A' * 43}", "x" * 300), (20, 1, 1, 1))[0]
    pairs: list[tuple[str, str | bytes]] = [("authorization", f"Bearer {key}")] if key else []
    if is_odd:
        odd: tuple[tuple[str, str | bytes], ...] = (
            ("authorization", "Bearer"), ("authorization", ""), ("authorization", "Bearer  x"), ("te", "gzip"),
            ("x", "y" * rng.choice((10, 3000, 20_000))), ("traceparent", "00-" + "z" * 60), ("accept-language", "x"),
            ("x-bin", b"\0\xff" * 40), ("authorization-bin", b"\xff"),
        )  # fmt: skip
        pairs += rng.sample(odd, rng.randint(1, 4)) * rng.choice((1, 1, 30))
    return tuple(pairs)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream & 0xFFFFFFFF) + payload


def raw(rng: random.Random) -> bytes:
    """Bytes for a bare connection: no HTTP/2, some, or much too much of it."""
    settings = frame(4, 0, 0, b"")
    kind = rng.randrange(8)
    if kind == 0:
        return rng.randbytes(rng.choice((0, 1, 24, 500, 4000)))
    if kind == 1:
        return PREFACE[: rng.randrange(len(PREFACE))] + rng.randbytes(rng.randrange(100))
    if kind == 2:
        return PREFACE + rng.randbytes(rng.randrange(1000))
    if kind == 3:  # frames of any kind, on any stream
        frames = (
            frame(
                rng.randrange(14), rng.randrange(256), rng.choice((0, 1, 2, 3, 2**31)), rng.randbytes(rng.randrange(60))
            )
            for _ in range(20)
        )
        return PREFACE + settings + b"".join(frames)
    if kind == 4:  # a block of headers that is none
        return PREFACE + settings + frame(1, 4, 1, rng.randbytes(100)) + frame(0, 1, 1, rng.randbytes(50))
    if kind == 5:  # pings, settings, window updates without end
        flood = rng.choice((frame(6, 0, 0, b"12345678"), settings, frame(8, 0, 0, b"\x7f\xff\xff\xff")))
        return PREFACE + settings + flood * 300
    if kind == 6:  # headers that never end
        return PREFACE + settings + frame(1, 0, 1, b"\x82") + frame(9, 0, 1, b"\x82" * 200) * 100
    streams = (frame(1, 5, n, b"\x83\x86\x44\x01/") + frame(3, 0, n, b"\0\0\0\x08") for n in range(1, 400, 2))
    return PREFACE + settings + b"".join(streams)  # begun and reset at once
