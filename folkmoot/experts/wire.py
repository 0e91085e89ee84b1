"""What stands on the wire between an engine's dispatcher and an expert host, whatever the transport.

A connection begins with lines of JSON (`Hello`, and handshake.py: both ends prove the cluster's secret); with shared
memory, a memfd of the segment travels beside the hello. Then requests and replies alternate, each a 64-byte header and
a payload:

    request  rows mode  x [pairs, hidden] | slots int32 [pairs]
             sum mode   the same, and | token int32 [pairs] | weight float32 [pairs]
    reply    rows mode  row p is expert slots[p] applied to x[p]
             sum mode   row t is the weighted sum of the rows whose token is t
    error    UTF-8 text; the host then closes the connection

The header (`Header` in native.py) carries kind, flags, sequence (from 1 on each connection), map version, both
incarnations, layer, rows of the reply, pairs, payload bytes, and when the request was posted (microseconds of the
engine's monotonic clock). A reply repeats its request's, but for kind and bytes.

Parts of a payload begin at multiples of 64 bytes. Integers are little-endian. Both ends check every field: what does
not match (magic, incarnations, sequence) is dropped with its connection.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

MAGIC = 0x316B4D46  # "FMk1"
PROTOCOL = 2
REQUEST, REPLY, ERROR = 1, 2, 3
FLAG_SUM = 1
MAX_HELLO_BYTES = 4096
MAX_ERROR_BYTES = 1024

HEADER_BYTES = 64

# Where things lie in a shared segment. Each flag has a cache line of its own, since the two ends poll them.
OFF_REQUEST_FLAG, OFF_HOST_SLEEPING, OFF_REPLY_FLAG, OFF_ENGINE_SLEEPING = 0, 64, 128, 192
OFF_REQUEST_HEADER, OFF_REPLY_HEADER = 256, 320
OFF_PAYLOAD = 4096


class WireError(RuntimeError):
    """The peer sent what the protocol does not allow, or went away in the middle of a message."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What an engine says first."""

    engine: str
    engine_incarnation: int
    host: str
    host_incarnation: int
    transport: str
    hidden: int
    dtype: str
    max_rows: int
    top_k: int
    protocol: int = PROTOCOL


class Sizes(NamedTuple):
    """Sizes in bytes of the areas of a connection that carries at most `max_rows` pairs."""

    request: int
    reply: int
    segment: int


def sizes(hidden: int, itemsize: int, max_rows: int) -> Sizes:
    """The areas for `max_rows` rows of `hidden` elements; slots, tokens and weights included."""
    reply = align(max_rows * hidden * itemsize, 4096)
    request = reply + align(3 * align(max_rows * 4), 4096)
    return Sizes(request, reply, OFF_PAYLOAD + request + reply)


def align(offset: int, to: int = 64) -> int:
    """The next multiple of `to`."""
    return -(-offset // to) * to


def send_line(sock: socket.socket, message: object, fd: int | None = None) -> None:
    """Send a Hello or a dict as one line of JSON, with a file descriptor beside it if given."""
    body = asdict(message) if isinstance(message, Hello) else message
    line = json.dumps(body).encode() + b"\n"
    if fd is None:
        sock.sendall(line)
    else:
        socket.send_fds(sock, [line], [fd])


def receive_line(sock: socket.socket, timeout_s: float) -> tuple[dict[str, object], int | None]:
    """Receive one line of JSON within `timeout_s`, and a file descriptor if one came (the caller closes it).

    The peer must not send more than the line before it is answered. Raises WireError, or OSError.
    """
    fds: list[int] = []
    try:
        data = _receive_line(sock, timeout_s, fds)
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as e:
            raise WireError("the first line is not JSON") from e
        if not isinstance(message, dict):
            raise WireError("the first line is not a JSON object")
        if len(fds) > 1:
            raise WireError("more than one file descriptor came")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return message, fds[0] if fds else None


def _receive_line(sock: socket.socket, timeout_s: float, fds: list[int]) -> bytes:
    """The line; descriptors that come are added to `fds`."""
    data, deadline = b"", time.monotonic() + timeout_s
    while not data.endswith(b"\n"):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise WireError(f"no whole line within {timeout_s:g} s")
        sock.settimeout(left_s)
        if sock.family == socket.AF_UNIX:
            chunk, new, _, _ = socket.recv_fds(sock, MAX_HELLO_BYTES, 1)
            fds += new
        else:
            chunk = sock.recv(MAX_HELLO_BYTES)
        data += chunk
        if not chunk or len(data) > MAX_HELLO_BYTES:
            raise WireError("the peer closed the connection" if not chunk else "the first line is too long")
    return data


def receive_exactly(sock: socket.socket, view: memoryview) -> None:
    """Fill `view` from a stream socket. Raises WireError if the stream ends before."""
    while view:
        got = sock.recv_into(view)
        if not got:
            raise WireError("the peer closed the connection")
        view = view[got:]
