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
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from folkmoot.experts import links, native, wire
from folkmoot.experts.expert_map import HostAddress
from folkmoot.experts.node import node_id
from folkmoot.experts.warm import Control, exit_with_owner
from folkmoot.experts.wire import Hello, WireError

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 512
REPORT_EVERY_S = 1.0
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""A segment that could shrink would kill the host with SIGBUS."""
REFUSALS = {
    -1: "not a request",
    -2: "for another incarnation",
    -3: "out of sequence",
    -4: "no expert of this layer is held here",
    -5: "more or fewer rows than allowed",
    -6: "wrong payload size",
    -7: "a slot out of range",
    -8: "a token out of range",
}
"""What hop.c found wrong with a request."""

ByteArray: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
IntArray: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]


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
    memory_fd: int | None = None
    """memory file that the warm parent keeps for the weights that the hosts of a node share; None: private weights"""

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

    hosted = vllm_api.load_experts(
        Path(host.checkpoint), host.experts, dtype=host.dtype, device=host.device, memory_fd=host.memory_fd
    )
    slots = {n: len(experts) for n, experts in host.experts.items() if experts}
    server = ExpertServer(host, hosted.layers, slots, on_load=lambda load: _report(control, load))
    address = server.listen()
    load_s = time.monotonic() - began
    log.info(
        "host %s holds %d bytes of experts, %d of them shared, loaded in %.2f s",
        *(host.host, hosted.bytes, hosted.shared_bytes, load_s),
    )
    facts = {"bytes": hosted.bytes, "shared_bytes": hosted.shared_bytes, "load_s": load_s}
    control.send({"event": "ready", "address": asdict(address), **facts})
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
        self._inbox: collections.deque[_TcpConnection] = collections.deque()
        self._connections: list[_ShmConnection] = []
        self._num_slots = np.zeros(max(slots, default=0) + 1, np.int32)
        for layer, num in slots.items():
            self._num_slots[layer] = num
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
            waiters[0].state = native.PENDING
            for i, connection in enumerate(self._connections, 1):
                state = waiters[i].state
                if state == native.READY and self._answer(connection):
                    waiters[i].want, waiters[i].state = connection.raw.seq + 1, native.PENDING
                elif state != native.PENDING:
                    self._drop(connection)
                    changed = True
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
        for i, connection in enumerate(self._connections, 1):
            page = connection.raw.page
            waiters[i].flag, waiters[i].sleeping = page + wire.OFF_REQUEST_FLAG, page + wire.OFF_HOST_SLEEPING
            waiters[i].want, waiters[i].fd = connection.raw.seq + 1, connection.raw.fd
        return waiters

    def _woken(self) -> bool:
        """Serve what threads brought; whether there are new connections to wait for."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return False
        while self._inbox:
            connection = self._inbox.popleft()
            connection.finished(self._answer(connection))
        return bool(self._new)

    def _answer(self, connection: "_Areas") -> bool:
        """Check the request at hand, run it, answer; False after a bad one, whose connection must be closed."""
        began = time.monotonic()
        request = connection.raw
        wrong = native.take(ctypes.addressof(request))
        if wrong:
            text = f"{REFUSALS[wrong]}: {request.header}"
            log.warning("a request of engine %s is refused: %s", connection.hello.engine, text)
            native.answer(ctypes.addressof(request), wire.ERROR, connection.write_text(text))
            return False
        header = request.header
        kernel, pairs = self.kernels[header.layer], header.pairs
        if header.flags & wire.FLAG_SUM:
            _run_sum(kernel, connection, header.rows, pairs)
        else:
            kernel(connection.x[:pairs], connection.slots[:pairs], out=connection.out[:pairs])
        self.load.requests += 1
        self.load.rows += pairs
        self.load.busy_s += time.monotonic() - began
        native.answer(ctypes.addressof(request), wire.REPLY, header.rows * connection.row_bytes)
        return True

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
                _ShmConnection(sock, hello, self._num_slots, fd)
                if hello.transport == "shm"
                else _TcpConnection(sock, hello, self._num_slots, self._bring)
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

    def _bring(self, connection: "_TcpConnection") -> None:
        self._inbox.append(connection)
        os.eventfd_write(self._wake, 1)

    def _report(self) -> None:
        if self._on_load is not None and time.monotonic() - self._reported_at > REPORT_EVERY_S:
            self._reported_at = time.monotonic()
            self._on_load(self.load)


def _run_sum(kernel: Kernel, areas: "_Areas", rows: int, pairs: int) -> None:
    """Row t of the reply is the weighted sum, in float32, of the rows of the pairs whose token is t."""
    results = kernel(areas.x[:pairs], areas.slots[:pairs])
    total = torch.zeros((rows, areas.hello.hidden), dtype=torch.float32)
    total.index_add_(0, areas.tokens[:pairs].long(), results.float() * areas.weights(pairs)[:, None])
    areas.out[:rows].copy_(total)


class _Areas:
    """The host's end of a connection: request and reply as tensors over the areas themselves, so no row is copied."""

    def __init__(self, hello: Hello, num_slots: IntArray, memory: ByteArray, sock: socket.socket) -> None:
        """`memory` is the request area followed by the reply area."""
        self.hello, self._sock = hello, sock
        dtype: torch.dtype = getattr(torch, hello.dtype)
        self.row_bytes = hello.hidden * dtype.itemsize
        size = wire.sizes(hello.hidden, dtype.itemsize, hello.max_rows)
        self.request, self.reply = memory[: size.request], memory[size.request : size.request + size.reply]
        length = hello.max_rows * self.row_bytes
        self.x = torch.from_numpy(self.request[:length]).view(dtype).view(hello.max_rows, hello.hidden)
        self.out = torch.from_numpy(self.reply[:length]).view(dtype).view(hello.max_rows, hello.hidden)
        self.slots, self.tokens = torch.zeros((2, hello.max_rows), dtype=torch.int32)
        self.raw = native.Connection(
            request=self.request.ctypes.data,
            reply=self.reply.ctypes.data,
            num_slots=num_slots.ctypes.data,
            slots=self.slots.data_ptr(),
            tokens=self.tokens.data_ptr(),
            engine_incarnation=hello.engine_incarnation,
            host_incarnation=hello.host_incarnation,
            row_bytes=self.row_bytes,
            fd=sock.fileno(),
            max_rows=hello.max_rows,
            num_layers=len(num_slots),
        )

    def weights(self, pairs: int) -> torch.Tensor:
        """float32 [pairs], of a request in sum mode."""
        at = wire.align(pairs * self.row_bytes) + 2 * wire.align(pairs * 4)
        return torch.from_numpy(self.request[at : at + 4 * pairs].view(np.float32).copy())

    def write_text(self, text: str) -> int:
        """Put a text into the reply; its length in bytes."""
        data = text.encode()[: wire.MAX_ERROR_BYTES]
        self.reply[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)


class _ShmConnection(_Areas):
    """The host's end of a ShmLink."""

    def __init__(self, sock: socket.socket, hello: Hello, num_slots: IntArray, fd: int | None) -> None:
        if fd is None:
            raise WireError("no memfd came with the hello")
        dtype: torch.dtype = getattr(torch, hello.dtype)
        segment = wire.sizes(hello.hidden, dtype.itemsize, hello.max_rows).segment
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS or os.fstat(fd).st_size != segment:
            raise WireError("the memfd has another size or is not sealed against changing it")
        memory = np.frombuffer(mmap.mmap(fd, segment), np.uint8)
        super().__init__(hello, num_slots, memory[wire.OFF_PAYLOAD :], sock)
        self.raw.page = memory.ctypes.data
        self.closed = False

    def close(self) -> None:
        """Close the socket; the mapping goes with this object."""
        self._sock.close()
        self.closed = True


class _TcpConnection(_Areas):
    """The host's end of a TcpLink: a thread that reads a request, hands it on, and sends what comes of it."""

    def __init__(
        self, sock: socket.socket, hello: Hello, num_slots: IntArray, bring: Callable[["_TcpConnection"], None]
    ) -> None:
        links.set_tcp_options(sock)
        dtype: torch.dtype = getattr(torch, hello.dtype)
        size = wire.sizes(hello.hidden, dtype.itemsize, hello.max_rows)
        super().__init__(hello, num_slots, np.empty(size.request + size.reply, np.uint8), sock)
        self._bring = bring
        self._finished = threading.Event()
        self._good = True

    def run(self) -> None:
        """Serve until the peer is gone or breaks the protocol."""
        self._sock.settimeout(None)
        header = self.raw.header
        head = memoryview(header).cast("B")
        request, reply = self.request.data, self.reply.data
        try:
            while self._good:
                wire.receive_exactly(self._sock, head)
                if header.magic != wire.MAGIC or header.payload_bytes > len(request):
                    raise WireError(f"not a request that fits: {header}")
                wire.receive_exactly(self._sock, request[: header.payload_bytes])
                self._finished.clear()
                self._bring(self)
                self._finished.wait()
                self._sock.sendall(bytes(header))
                self._sock.sendall(reply[: header.payload_bytes])
        except (OSError, WireError) as e:
            log.info("connection of engine %s ends: %s", self.hello.engine, e)
        finally:
            self._sock.close()

    def finished(self, good: bool) -> None:
        """From the computing thread: header and reply are filled; after a bad request they are the last."""
        self._good = good
        self._finished.set()


def _try_send(sock: socket.socket, message: dict[str, str]) -> None:
    with contextlib.suppress(OSError):
        wire.send_line(sock, message)
