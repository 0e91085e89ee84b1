"""The engine's end of a connection to one expert host, over shared memory or TCP, behind one small interface.

A link carries one request at a time: hop.c packs rows into its request area, posts, waits, and reads the rows of the
reply where they lie. Any failure makes the link useless: the dispatcher closes it and asks another replica.
"""

import ctypes
import fcntl
import itertools
import mmap
import os
import select
import socket
import time
from typing import Protocol

import numpy as np

from folkmoot.experts import handshake, native, wire
from folkmoot.experts.deadline import Pace
from folkmoot.experts.expert_map import HostAddress
from folkmoot.experts.wire import Hello, WireError

TCP_USER_TIMEOUT_MS = 1500
"""How long sent bytes may stay unacknowledged before the kernel gives a connection up: a dead node is seen then. Once
all is acknowledged, keepalive's probes are what stays so: then it is this and a second of silence before."""

_numbers = itertools.count(1)


class LinkError(RuntimeError):
    """The host cannot be reached, is gone, refused, or broke the protocol."""


class Link(Protocol):
    """A connection to one host. `raw` is what hop.c packs into, posts and waits for."""

    address: HostAddress
    raw: native.Link
    pace: Pace | None

    def send(self, timeout_s: float) -> bool:
        """Send the request that lies packed, where shared memory has not done so already; False when the time is up
        (call again to send what is left). Raises LinkError."""

    def receive(self) -> native.Header | None:
        """Read what has come of the reply: its header once it is whole, its payload then at `raw.reply`; else None.
        Never blocks. Raises LinkError."""

    def has_answered(self) -> bool:
        """Of a request that nobody waits for any more: whether its reply is here, and may be forgotten. Never blocks.
        Raises LinkError."""

    def why(self) -> str:
        """What the host said when its reply was not as it should be."""

    def close(self) -> None:
        """Close; the host sees end-of-file. The areas stay readable until the link is collected."""


def connect(address: HostAddress, hello: Hello, itemsize: int, timeout_s: float, secret: bytes) -> Link:
    """Connect by hello.transport ("shm" or "tcp") and shake hands, with the cluster's secret. Raises LinkError."""
    try:
        if hello.transport == "shm":
            return ShmLink(address, hello, itemsize, timeout_s, secret)
        return TcpLink(address, hello, itemsize, timeout_s, secret)
    except (OSError, ValueError, WireError) as e:
        raise LinkError(f"host {address.host} cannot be reached by {hello.transport}: {e}") from e


def choose_transport(address: HostAddress, own_node: str, setting: str) -> str:
    """ "shm" where the peer shares our node and listens there, else "tcp"; a setting other than "auto" decides."""
    if setting != "auto":
        return setting
    return "shm" if address.node == own_node and address.unix_path else "tcp"


class ShmLink:
    """A link over a memfd that both ends map, with a unix stream socket as doorbell and death notice."""

    def __init__(self, address: HostAddress, hello: Hello, itemsize: int, timeout_s: float, secret: bytes) -> None:
        self.address = address
        self.pace: Pace | None = None
        size = wire.sizes(hello.hidden, itemsize, hello.max_rows)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(timeout_s)
        try:
            if address.unix_path is None:
                raise LinkError(f"host {address.host} has no unix socket")
            self._sock.connect(address.unix_path)
            fd = os.memfd_create("folkmoot-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(fd, size.segment)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
                self._map = mmap.mmap(fd, size.segment)
                handshake.as_engine(self._sock, secret, hello, timeout_s, fd)
            finally:
                os.close(fd)
        except BaseException:
            self._sock.close()
            raise
        self._sock.setblocking(False)
        page = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        request = page + wire.OFF_PAYLOAD
        self.raw = _native(hello, request, request + size.request, size.reply, page, self._sock)

    def send(self, timeout_s: float) -> bool:
        """Nothing: hop.c has published it."""
        return True

    def receive(self) -> native.Header | None:
        raise LinkError("shared memory is not received")

    def has_answered(self) -> bool:
        flag = wire.OFF_REPLY_FLAG
        if int.from_bytes(self._map[flag : flag + 8], "little") == self.raw.seq:
            return True
        try:
            is_gone = not self._sock.recv(1 << 8)
        except BlockingIOError:
            return False
        except OSError as e:
            raise LinkError(str(e)) from e
        if is_gone:
            raise LinkError("connection closed")
        return False

    def why(self) -> str:
        reply = native.Header.from_buffer_copy(self._map, wire.OFF_REPLY_HEADER)
        return _why(self.raw, reply)

    def close(self) -> None:
        self._sock.close()


class TcpLink:
    """A link over TCP: header and payload in the stream, keepalive and user time-out against a silent peer."""

    def __init__(self, address: HostAddress, hello: Hello, itemsize: int, timeout_s: float, secret: bytes) -> None:
        self.address = address
        self.pace: Pace | None = None
        size = wire.sizes(hello.hidden, itemsize, hello.max_rows)
        if address.tcp is None:
            raise LinkError(f"host {address.host} does not listen on TCP")
        ip, _, port = address.tcp.rpartition(":")
        self._sock = socket.create_connection((ip, int(port)), timeout_s)
        try:
            set_tcp_options(self._sock)
            handshake.as_engine(self._sock, secret, hello, timeout_s)
        except BaseException:
            self._sock.close()
            raise
        self._sock.setblocking(False)
        self._request, self._reply = np.empty(size.request, np.uint8), np.empty(size.reply, np.uint8)
        request, reply = self._request.ctypes.data, self._reply.ctypes.data
        self.raw = _native(hello, request, reply, size.reply, None, self._sock)
        self._header = native.Header()
        self._received = 0  # bytes of the reply
        self._left: list[memoryview] = []  # what is still to be sent
        self._left_of = 0  # the request that it belongs to

    def send(self, timeout_s: float) -> bool:
        raw, until = self.raw, time.monotonic() + timeout_s
        if self._left_of != raw.seq:
            self._left_of, self._received = raw.seq, 0
            self._left = [memoryview(bytes(raw.header)), self._request.data[: raw.header.payload_bytes]]
        try:
            while self._left:
                try:
                    self._sent(self._sock.sendmsg(self._left))
                except BlockingIOError:
                    left_s = until - time.monotonic()
                    if left_s <= 0 or not _wait_writable(self._sock, left_s):
                        return False
        except OSError as e:
            raise LinkError(f"sending failed: {e}") from e
        return True

    def _sent(self, count: int) -> None:
        while self._left and count >= len(self._left[0]):
            count -= len(self._left.pop(0))
        if count:
            self._left[0] = self._left[0][count:]

    def receive(self) -> native.Header | None:
        header, head = self._header, memoryview(self._header).cast("B")
        try:
            if self._received < len(head):
                self._received += self._read(head[self._received :])
                if self._received < len(head):
                    return None
            if header.magic != wire.MAGIC or header.payload_bytes > len(self._reply):
                raise LinkError(f"bad reply {header}")
            payload = self._reply.data[: header.payload_bytes]
            if (at := self._received - len(head)) < len(payload):
                self._received += self._read(payload[at:])
        except BlockingIOError:
            return None
        except (OSError, WireError) as e:
            raise LinkError(str(e)) from e
        return header if self._received == len(head) + len(payload) else None

    def has_answered(self) -> bool:
        return self.send(0.0) and self.receive() is not None

    def _read(self, into: memoryview) -> int:
        got = self._sock.recv_into(into)
        if not got:
            raise WireError("the peer closed the connection")
        return got

    def why(self) -> str:
        return _why(self.raw, self._header)

    def close(self) -> None:
        self._sock.close()


def _native(
    hello: Hello, request: int, reply: int, reply_limit: int, page: int | None, sock: socket.socket
) -> native.Link:
    return native.Link(
        request=request,
        reply=reply,
        page=page,
        reply_limit=reply_limit,
        engine_incarnation=hello.engine_incarnation,
        host_incarnation=hello.host_incarnation,
        fd=sock.fileno(),
        number=next(_numbers),
    )


def _why(link: native.Link, reply: native.Header) -> str:
    if reply.kind == wire.ERROR and reply.payload_bytes <= wire.MAX_ERROR_BYTES:
        return ctypes.string_at(link.reply, reply.payload_bytes).decode(errors="replace")
    return f"the reply {reply} does not match the request {link.header}"


def set_tcp_options(sock: socket.socket) -> None:
    """No delay; a peer that is silent or gone is noticed within about TCP_USER_TIMEOUT_MS."""
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS),
    ):
        sock.setsockopt(level, option, value)


def _wait_writable(sock: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(timeout_s * 1000))
