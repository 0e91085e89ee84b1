"""The engine's end of a connection to one expert host, over shared memory or TCP, behind one small interface.

A link carries one request at a time: the dispatcher packs rows into `request`, posts, waits, and reads the rows of
the reply where they lie. Any failure makes the link useless: the dispatcher closes it and asks another replica.
"""

import ctypes
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from folkmoot.experts import native, wire
from folkmoot.experts.expert_map import HostAddress
from folkmoot.experts.wire import Header, Hello, WireError

TCP_USER_TIMEOUT_MS = 1500
"""How long sent bytes may stay unacknowledged before the kernel gives a connection up: a dead node is seen then."""


class LinkError(RuntimeError):
    """The host cannot be reached, is gone, refused, or broke the protocol."""


class Link(Protocol):
    """A connection to one host. `request` and `reply` are the addresses of areas for payloads."""

    address: HostAddress
    request: int
    reply: int
    seq: int
    """the last request's sequence number"""

    def post(self, header: Header) -> native.Post | None:
        """Send a request whose payload lies at `request`; or say what `native.post` has to publish for it."""

    def arm(self, waiter: native.Waiter) -> None:
        """Fill in what to wait for after a post."""

    def receive(self) -> Header:
        """The reply's header, its payload now at `reply`. Raises LinkError."""

    def close(self) -> None:
        """Close; the host sees end-of-file. The areas stay readable until the link is collected."""


def connect(address: HostAddress, hello: Hello, itemsize: int, timeout_s: float) -> Link:
    """Connect by hello.transport ("shm" or "tcp") and shake hands. Raises LinkError."""
    try:
        if hello.transport == "shm":
            return ShmLink(address, hello, itemsize, timeout_s)
        return TcpLink(address, hello, itemsize, timeout_s)
    except (OSError, WireError) as e:
        raise LinkError(f"host {address.host} cannot be reached by {hello.transport}: {e}") from e


def choose_transport(address: HostAddress, own_node: str, setting: str) -> str:
    """ "shm" where the peer shares our node and listens there, else "tcp"; a setting other than "auto" decides."""
    if setting != "auto":
        return setting
    return "shm" if address.node == own_node and address.unix_path else "tcp"


def post_all(links: Sequence[Link], headers: Sequence[Header]) -> list[tuple[Link, LinkError]]:
    """Post to all links; publish to every shared-memory peer before ringing any. Returns those that failed."""
    failed, posts = [], []
    for link, header in zip(links, headers, strict=True):
        try:
            if (post := link.post(header)) is not None:
                posts.append(post)
        except (OSError, WireError) as e:
            failed.append((link, LinkError(f"host {link.address.host}: sending failed: {e}")))
    if posts:
        native.post((native.Post * len(posts))(*posts), len(posts))
    return failed


class ShmLink:
    """A link over a memfd that both ends map, with a unix stream socket as doorbell and death notice."""

    def __init__(self, address: HostAddress, hello: Hello, itemsize: int, timeout_s: float) -> None:
        self.address = address
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
                wire.send_line(self._sock, hello, fd)
            finally:
                os.close(fd)
            _check_welcome(self._sock)
        except BaseException:
            self._sock.close()
            raise
        self._sock.setblocking(False)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._base, self._fd = base, self._sock.fileno()
        self.request = base + wire.OFF_PAYLOAD
        self.reply = base + wire.OFF_PAYLOAD + size.request
        self.seq, self._limit = 0, size.reply

    def post(self, header: Header) -> native.Post:
        self._map[wire.OFF_REQUEST_HEADER : wire.OFF_REQUEST_HEADER + wire.HEADER_BYTES] = header.pack()
        base = self._base
        return native.Post(base + wire.OFF_REQUEST_FLAG, base + wire.OFF_HOST_SLEEPING, header.seq, self._fd, 0)

    def arm(self, waiter: native.Waiter) -> None:
        waiter.flag, waiter.sleeping = self._base + wire.OFF_REPLY_FLAG, self._base + wire.OFF_ENGINE_SLEEPING
        waiter.want, waiter.fd, waiter.state = self.seq, self._fd, native.PENDING

    def receive(self) -> Header:
        header = _unpack(self._map[wire.OFF_REPLY_HEADER : wire.OFF_REPLY_HEADER + wire.HEADER_BYTES], self._limit)
        if header.kind == wire.ERROR:
            raise LinkError(f"host {self.address.host}: {ctypes.string_at(self.reply, header.payload_bytes)!r}")
        return header

    def close(self) -> None:
        self._sock.close()


class TcpLink:
    """A link over TCP: header and payload in the stream, keepalive and user time-out against a silent peer."""

    def __init__(self, address: HostAddress, hello: Hello, itemsize: int, timeout_s: float) -> None:
        self.address = address
        size = wire.sizes(hello.hidden, itemsize, hello.max_rows)
        if address.tcp is None:
            raise LinkError(f"host {address.host} does not listen on TCP")
        ip, _, port = address.tcp.rpartition(":")
        self._sock = socket.create_connection((ip, int(port)), timeout_s)
        try:
            set_tcp_options(self._sock)
            wire.send_line(self._sock, hello)
            _check_welcome(self._sock)
        except BaseException:
            self._sock.close()
            raise
        self.seq = 0
        self._request = np.empty(size.request, np.uint8)
        self._reply = np.empty(size.reply, np.uint8)
        self.request, self.reply = self._request.ctypes.data, self._reply.ctypes.data
        self._out, self._in = self._request.data, self._reply.data
        self._header = bytearray(wire.HEADER_BYTES)

    def post(self, header: Header) -> None:
        self._sock.sendall(header.pack())
        self._sock.sendall(self._out[: header.payload_bytes])

    def arm(self, waiter: native.Waiter) -> None:
        waiter.flag, waiter.sleeping, waiter.want = None, None, 0
        waiter.fd, waiter.state = self._sock.fileno(), native.PENDING

    def receive(self) -> Header:
        try:
            wire.receive_exactly(self._sock, memoryview(self._header))
            header = _unpack(self._header, len(self._in))
            wire.receive_exactly(self._sock, self._in[: header.payload_bytes])
        except (OSError, WireError) as e:
            raise LinkError(f"host {self.address.host}: {e}") from e
        if header.kind == wire.ERROR:
            raise LinkError(f"host {self.address.host}: {bytes(self._in[: header.payload_bytes])!r}")
        return header

    def close(self) -> None:
        self._sock.close()


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


def _check_welcome(sock: socket.socket) -> None:
    welcome, fd = wire.receive_line(sock)
    if fd is not None:
        os.close(fd)
    if welcome.get("ok") is not True:
        raise LinkError(f"refused: {welcome.get('error', 'no reason given')}")


def _unpack(data: bytes | bytearray, limit: int) -> Header:
    try:
        header = Header.unpack(data)
    except (struct.error, WireError) as e:
        raise LinkError(f"bad reply header: {e}") from e
    if header.payload_bytes > limit:
        raise LinkError(f"a reply of {header.payload_bytes} bytes exceeds the limit of {limit}")
    return header
