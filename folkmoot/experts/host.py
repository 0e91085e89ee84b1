"""The expert host: the process that holds a set of expert replicas and answers the dispatchers of all engines.

One thread computes. It waits for requests of every connection at once (shared-memory flags, and an eventfd for what
threads bring): a connection over TCP has a thread of its own that reads the next request while another computes, so
that no engine's sending ever blocks behind a host's. Connections are accepted and checked by threads as well.
"""

import collections
import contextlib
import ctypes
import fcntl
import logging
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from folkmoot.experts import links, native, wire
from folkmoot.experts.expert_map import HostAddress
from folkmoot.experts.node import node_id
from folkmoot.experts.warm import Control, exit_with_owner
from folkmoot.experts.wire import Header, Hello, WireError

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 512
REPORT_EVERY_S = 1.0
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""A segment that could shrink would kill the host with SIGBUS."""


class Kernel(Protocol):
    """Runs the experts of one layer: row p of `out` is expert slots[p] applied to x[p], unweighted."""

    def __call__(self, x: torch.Tensor, slots: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class HostSpec:
    """What an expert host is told at its start. Unknown keys are an error."""

    host: str
    incarnation: int
    checkpoint: str
    experts: Mapping[int, Sequence[int]]
    """for each MoE layer the logical experts to hold; the position is the slot"""
    unix_path: str
    tcp: str | None = None
    """"ip:port" to listen on for engines on other nodes (port 0: any free one); None: not at all"""
    dtype: str = "auto"
    device: str = "cpu"
    threads: int = 1
    yield_us: int = 40

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "HostSpec":
        """Build from JSON data, whose layer numbers are strings. Raises TypeError for unknown keys."""
        experts = {int(n): tuple(int(e) for e in es) for n, es in raw["experts"].items()}
        return HostSpec(**{**raw, "experts": experts})


@dataclass
class Load:
    """What a host has done since its start."""

    requests: int = 0
    rows: int = 0
    busy_s: float = 0.0


def main(spec: dict[str, Any], control: Control) -> None:
    """Entry point in a process forked by the warm parent: load, listen, report ready, serve until the owner goes."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s host %(levelname)s %(message)s")
    exit_with_owner(control)
    host = HostSpec.from_dict(spec)
    began = time.monotonic()
    torch.set_num_threads(host.threads)
    from folkmoot.experts import vllm_api

    hosted = vllm_api.load_experts(Path(host.checkpoint), host.experts, dtype=host.dtype, device=host.device)
    slots = {n: len(experts) for n, experts in host.experts.items() if experts}
    server = ExpertServer(host, hosted.layers, slots, on_load=lambda load: _report(control, load))
    address = server.listen()
    load_s = time.monotonic() - began
    log.info("host %s holds %d bytes of experts, loaded in %.2f s", host.host, hosted.bytes, load_s)
    control.send({"event": "ready", "address": asdict(address), "bytes": hosted.bytes, "load_s": load_s})
    server.serve()


def _report(control: Control, load: Load) -> None:
    control.send({"event": "load", **asdict(load)})


class ExpertServer:
    """Listens for engines and answers their requests with `kernels`, one per layer, of `slots[layer]` experts each."""

    def __init__(
        self,
        spec: HostSpec,
        kernels: Mapping[int, Kernel],
        slots: Mapping[int, int],
        on_load: Callable[[Load], None] | None = None,
    ) -> None:
        self.spec, self.kernels, self.slots = spec, kernels, slots
        self.load = Load()
        self._on_load = on_load
        self._reported_at = 0.0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._new: collections.deque[_ShmConnection] = collections.deque()
        self._inbox: collections.deque[tuple[_TcpConnection, Header]] = collections.deque()
        self._connections: list[_ShmConnection] = []
        self._num_open = 0

    def listen(self) -> HostAddress:
        """Open the sockets, accept in threads, and say where."""
        path = Path(self.spec.unix_path)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix.bind(str(path))
        listeners, tcp_address = [unix], None
        if self.spec.tcp is not None:
            ip, _, port = self.spec.tcp.rpartition(":")
            tcp = socket.create_server((ip, int(port)))
            tcp_address = f"{ip}:{tcp.getsockname()[1]}"
            listeners.append(tcp)
        for listener in listeners:
            listener.listen(128)
            threading.Thread(target=self._accept, args=(listener,), name="accept", daemon=True).start()
        return HostAddress(self.spec.host, self.spec.incarnation, node_id(), str(path), tcp_address)

    def serve(self) -> None:
        """Compute for ever. Blocks without a time-out while there is nothing to do."""
        waiters = self._arm_all()
        while True:
            native.wait(waiters, len(waiters), self.spec.yield_us, -1)
            changed = waiters[0].state != native.PENDING and self._woken()
            for connection, waiter in zip(list(self._connections), list(waiters)[1:], strict=True):
                if waiter.state == native.READY:
                    self._serve_shm(connection)
                    connection.arm(waiter)
                elif waiter.state == native.CLOSED:
                    self._drop(connection)
                changed = changed or connection.closed
            waiters[0].state = native.PENDING
            if changed:
                waiters = self._arm_all()
            self._report()

    def _arm_all(self) -> Any:
        """The array to wait on: the eventfd first, then every shared-memory connection."""
        self._connections = [c for c in self._connections if not c.closed]
        while self._new:
            self._connections.append(self._new.popleft())
        waiters = (native.Waiter * (1 + len(self._connections)))()
        waiters[0].fd = self._wake
        for connection, waiter in zip(self._connections, list(waiters)[1:], strict=True):
            connection.arm(waiter)
        return waiters

    def _woken(self) -> bool:
        """Serve what threads brought; whether there are new connections to wait for."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return False
        while self._inbox:
            connection, header = self._inbox.popleft()
            try:
                connection.answer(self._compute(connection.areas, header))
            except WireError as e:
                connection.refuse(str(e))
        return bool(self._new)

    def _serve_shm(self, connection: "_ShmConnection") -> None:
        try:
            connection.answer(self._compute(connection.areas, connection.header()))
        except WireError as e:
            connection.refuse(str(e))
            self._drop(connection)

    def _compute(self, areas: "_Areas", header: Header) -> Header:
        """Check a request, run it, and return the header of its reply. Raises WireError for a bad one."""
        began = time.monotonic()
        kernel = self._check(areas, header)
        rows = areas.x[: header.rows]
        slots = areas.ints(wire.align(rows.nbytes), header.pairs).copy()  # the peer could still change its own
        if slots.min() < 0 or slots.max() >= self.slots[header.layer]:
            raise WireError(f"layer {header.layer} has slots 0..{self.slots[header.layer] - 1}")
        if header.flags & wire.FLAG_SUM:
            _run_sum(kernel, areas, header, slots)
        else:
            kernel(rows, torch.from_numpy(slots), out=areas.out[: header.rows])
        self.load.requests += 1
        self.load.rows += header.pairs
        self.load.busy_s += time.monotonic() - began
        return header._replace(kind=wire.REPLY, payload_bytes=rows.nbytes)

    def _check(self, areas: "_Areas", header: Header) -> Kernel:
        """The kernel of the layer asked for. Raises WireError if any field of the header is not as it must be."""
        hello = areas.hello
        if header.kind != wire.REQUEST or header.flags not in (0, wire.FLAG_SUM):
            raise WireError(f"kind {header.kind} with flags {header.flags} is not a request")
        if (header.engine_incarnation, header.host_incarnation) != (hello.engine_incarnation, self.spec.incarnation):
            raise WireError("the request is for another incarnation")
        if header.layer not in self.slots:
            raise WireError(f"no expert of layer {header.layer} is held here")
        if not 0 < header.rows <= header.pairs <= hello.max_rows:
            raise WireError(f"{header.rows} rows for {header.pairs} pairs, of at most {hello.max_rows}")
        end = wire.align(header.rows * areas.row_bytes)
        column = header.pairs * 4
        expected = end + (3 * wire.align(column) if header.flags & wire.FLAG_SUM else column)
        if header.payload_bytes != expected or (header.rows != header.pairs and not header.flags):
            raise WireError(f"{header.payload_bytes} bytes of payload instead of {expected}")
        return self.kernels[header.layer]

    def _drop(self, connection: "_ShmConnection") -> None:
        connection.close()
        self._num_open -= 1

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError as e:
                log.error("accepting failed: %s", e)
                time.sleep(0.1)
                continue
            threading.Thread(target=self._greet, args=(sock,), name="greet", daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        """Shake hands; for TCP, become the connection's thread."""
        sock.settimeout(HANDSHAKE_TIMEOUT_S)
        fd = None
        try:
            raw, fd = wire.receive_line(sock)
            hello = self._check_hello(raw)
            connection = (
                _ShmConnection(sock, hello, fd)
                if hello.transport == "shm"
                else _TcpConnection(sock, hello, self._bring)
            )
            wire.send_line(sock, {"ok": True})
        except (OSError, WireError, TypeError, ValueError) as e:
            log.warning("refused a connection: %s", e)
            _try_send(sock, {"error": str(e)})
            sock.close()
            return
        finally:
            if fd is not None:
                os.close(fd)
        self._num_open += 1
        log.info("engine %s connected by %s", hello.engine, hello.transport)
        if isinstance(connection, _ShmConnection):
            self._new.append(connection)
            os.eventfd_write(self._wake, 1)
        else:
            connection.run()
            self._num_open -= 1

    def _check_hello(self, raw: Mapping[str, Any]) -> Hello:
        hello = Hello(**raw)
        if hello.protocol != wire.PROTOCOL:
            raise WireError(f"protocol {hello.protocol} instead of {wire.PROTOCOL}")
        if (hello.host, hello.host_incarnation) != (self.spec.host, self.spec.incarnation):
            raise WireError(f"this is host {self.spec.host}, incarnation {self.spec.incarnation}")
        if hello.transport not in ("shm", "tcp") or hello.dtype not in native.DTYPES:
            raise WireError(f"transport {hello.transport!r} or dtype {hello.dtype!r} is unknown")
        if not (0 < hello.hidden <= 1 << 17 and 0 < hello.max_rows <= 1 << 20 and 0 < hello.top_k <= 1024):
            raise WireError("hidden, max_rows or top_k is out of range")
        if self._num_open >= MAX_CONNECTIONS:
            raise WireError(f"{MAX_CONNECTIONS} connections are open already")
        return hello

    def _bring(self, connection: "_TcpConnection", header: Header) -> None:
        self._inbox.append((connection, header))
        os.eventfd_write(self._wake, 1)

    def _report(self) -> None:
        if self._on_load is not None and time.monotonic() - self._reported_at > REPORT_EVERY_S:
            self._reported_at = time.monotonic()
            self._on_load(self.load)


def _run_sum(kernel: Kernel, areas: "_Areas", header: Header, slots: "np.ndarray[Any, Any]") -> None:
    """The weighted sum of each row's pairs, in float32, in the order of the pairs."""
    part = wire.align(header.pairs * 4)
    at = wire.align(header.rows * areas.row_bytes) + part
    token = areas.ints(at, header.pairs).copy()
    if token.min() < 0 or token.max() >= header.rows:
        raise WireError(f"token indices must be within 0..{header.rows - 1}")
    weight = torch.from_numpy(areas.ints(at + part, header.pairs).view(np.float32).copy())
    index = torch.from_numpy(token).long()
    rows = kernel(areas.x[index], torch.from_numpy(slots))
    total = torch.zeros((header.rows, areas.hello.hidden), dtype=torch.float32)
    total.index_add_(0, index, rows.float() * weight[:, None])
    areas.out[: header.rows].copy_(total)


class _Areas:
    """The request and reply areas of a connection, as tensors over the same memory: no row is copied."""

    def __init__(self, hello: Hello, memory: "np.ndarray[Any, Any]") -> None:
        """`memory`: uint8, the request area followed by the reply area."""
        self.hello = hello
        dtype: torch.dtype = getattr(torch, hello.dtype)
        self.row_bytes = hello.hidden * dtype.itemsize
        size = wire.sizes(hello.hidden, dtype.itemsize, hello.max_rows)
        self.request, self.reply = memory[: size.request], memory[size.request : size.request + size.reply]
        length = hello.max_rows * self.row_bytes
        self.x = torch.from_numpy(self.request[:length]).view(dtype).view(hello.max_rows, hello.hidden)
        self.out = torch.from_numpy(self.reply[:length]).view(dtype).view(hello.max_rows, hello.hidden)

    def ints(self, offset: int, count: int) -> "np.ndarray[Any, Any]":
        """`count` int32 values of the request from a byte offset on."""
        return self.request[offset : offset + 4 * count].view(np.int32)


class _ShmConnection:
    """The host's end of a ShmLink."""

    def __init__(self, sock: socket.socket, hello: Hello, fd: int | None) -> None:
        if fd is None:
            raise WireError("no memfd came with the hello")
        dtype: torch.dtype = getattr(torch, hello.dtype)
        segment = wire.sizes(hello.hidden, dtype.itemsize, hello.max_rows).segment
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS or os.fstat(fd).st_size != segment:
            raise WireError("the memfd has another size or is not sealed against changing it")
        self._map = mmap.mmap(fd, segment)
        memory = np.frombuffer(self._map, np.uint8)
        self.areas = _Areas(hello, memory[wire.OFF_PAYLOAD :])
        self._base = memory.ctypes.data
        self._sock, self._fd = sock, sock.fileno()
        self._seq = 1
        self.closed = False

    def arm(self, waiter: native.Waiter) -> None:
        """Wait for the request after the last one answered."""
        waiter.flag, waiter.sleeping = self._base + wire.OFF_REQUEST_FLAG, self._base + wire.OFF_HOST_SLEEPING
        waiter.want, waiter.fd, waiter.state = self._seq, self._fd, native.PENDING

    def header(self) -> Header:
        """The header of the request at hand. Raises WireError."""
        header = Header.unpack(self._map[wire.OFF_REQUEST_HEADER : wire.OFF_REQUEST_HEADER + wire.HEADER_BYTES])
        if header.seq != self._seq:
            raise WireError(f"sequence {header.seq} instead of {self._seq}")
        return header

    def answer(self, header: Header) -> None:
        """Publish the reply and ring."""
        self._map[wire.OFF_REPLY_HEADER : wire.OFF_REPLY_HEADER + wire.HEADER_BYTES] = header.pack()
        base = self._base
        post = native.Post(base + wire.OFF_REPLY_FLAG, base + wire.OFF_ENGINE_SLEEPING, self._seq, self._fd, 0)
        native.post(ctypes.byref(post), 1)
        self._seq += 1

    def refuse(self, reason: str) -> None:
        """Answer with an error; the caller closes."""
        log.warning("request refused: %s", reason)
        text = np.frombuffer(reason.encode()[:1024], np.uint8)
        self.areas.reply[: len(text)] = text
        self.answer(Header(wire.ERROR, 0, self._seq, 0, 0, 0, 0, 0, 0, len(text)))

    def close(self) -> None:
        """Close the socket; the mapping goes with this object."""
        self._sock.close()
        self.closed = True


class _TcpConnection:
    """The host's end of a TcpLink: a thread that reads a request, hands it on, and sends what comes of it."""

    def __init__(self, sock: socket.socket, hello: Hello, bring: Callable[["_TcpConnection", Header], None]) -> None:
        links.set_tcp_options(sock)
        dtype: torch.dtype = getattr(torch, hello.dtype)
        size = wire.sizes(hello.hidden, dtype.itemsize, hello.max_rows)
        self.areas = _Areas(hello, np.empty(size.request + size.reply, np.uint8))
        self._sock, self._bring = sock, bring
        self._answered = threading.Event()
        self._out: Header | None = None
        self._error = ""

    def run(self) -> None:
        """Serve until the peer is gone or breaks the protocol."""
        self._sock.settimeout(None)
        head = bytearray(wire.HEADER_BYTES)
        request, reply = self.areas.request.data, self.areas.reply.data
        seq = 0
        try:
            while True:
                wire.receive_exactly(self._sock, memoryview(head))
                header, seq = Header.unpack(head), seq + 1
                if header.seq != seq or header.payload_bytes > len(request):
                    raise WireError(f"sequence {header.seq} or size {header.payload_bytes} is not as agreed")
                wire.receive_exactly(self._sock, request[: header.payload_bytes])
                self._answered.clear()
                self._bring(self, header)
                self._answered.wait()
                if self._out is None:
                    raise WireError(self._error)
                self._sock.sendall(self._out.pack())
                self._sock.sendall(reply[: self._out.payload_bytes])
        except WireError as e:
            log.info("connection of %s ends: %s", self.areas.hello.engine, e)
            text = str(e).encode()[:1024]
            with contextlib.suppress(OSError):
                self._sock.sendall(Header(wire.ERROR, 0, seq, 0, 0, 0, 0, 0, 0, len(text)).pack() + text)
        except OSError as e:
            log.info("connection of %s broke: %s", self.areas.hello.engine, e)
        finally:
            self._sock.close()

    def answer(self, header: Header) -> None:
        """From the computing thread: the reply area is filled."""
        self._out = header
        self._answered.set()

    def refuse(self, reason: str) -> None:
        """From the computing thread: the request was bad."""
        self._out, self._error = None, reason
        self._answered.set()


def _try_send(sock: socket.socket, message: dict[str, str]) -> None:
    with contextlib.suppress(OSError):
        wire.send_line(sock, message)
