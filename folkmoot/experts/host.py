"""The expert host: the process that holds a set of expert replicas and answers the dispatchers of all engines.

One thread computes. It waits for requests of every connection at once (shared-memory flags, and an eventfd for what
threads bring): a connection over TCP has a thread of its own that reads the next request while another computes, so
that no engine's sending ever blocks behind a host's. Connections are accepted and checked by threads as well.
"""

import collections
import ctypes
import gc
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from setproctitle import setproctitle

from folkmoot import logs
from folkmoot.experts import host_speed, keeper, native, secret, wire
from folkmoot.experts.connections import Areas, ShmConnection, TcpConnection
from folkmoot.experts.expert_dtype import CHECKPOINT
from folkmoot.experts.expert_map import HostAddress
from folkmoot.experts.greeter import Greeter
from folkmoot.experts.host_load import Load
from folkmoot.experts.node import node_id
from folkmoot.experts.warm import Control, exit_with_owner, serve_forks
from folkmoot.experts.wire import Hello, WireError

if TYPE_CHECKING:
    from folkmoot.experts.vllm_api import HostedExperts

log = logging.getLogger(__name__)

TITLE, TEMPLATE_TITLE, RESERVE_TITLE = "folkmoot::ExpertHost", "folkmoot::HostTemplate", "folkmoot::HostReserve"
"""What such a process is called in a list of processes."""
ALONE_WITHIN_S = 5.0
MAX_CONNECTIONS = 512
MAX_AREA_BYTES = 2 << 30
"""What an engine may make one connection's rows take in each direction: headers count bytes in 32 bits."""
REPORT_EVERY_S = 1.0
REPORT_EVERY_US = 1_000_000
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


class Kernel(Protocol):
    """Runs the experts of one layer: row p of `out` is expert slots[p] applied to x[p], unweighted.

    Where it has `hidden_size` and `dtype`, as vLLM's kernels do, engines with other rows are refused.
    """

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
    secret_file: str
    """the secret that engines must know, as this host does (secret.py)"""
    tcp: str | None = None
    """"ip:port" to listen on for engines on other nodes (port 0: any free one); None: not at all"""
    dtype: str = "auto"
    expert_dtype: str = CHECKPOINT
    """what the experts are quantised to (expert_dtype.py)"""
    expert_letters: Mapping[int, str] | None = None
    """... where that differs: of each MoE layer a letter an expert (expert_choice.py)"""
    device: str = "cpu"
    threads: int = 1
    yield_us: int = 100
    measures: bool = False
    """say how quick it is (host_speed.py)"""
    memory_fd: int | None = None
    """memory file that the warm parent keeps for the weights that the hosts of a node share; None: private weights"""

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "HostSpec":
        """Build from JSON data, whose layer numbers are strings. Raises TypeError for unknown keys."""
        experts = {int(n): tuple(int(e) for e in es) for n, es in raw["experts"].items()}
        letters = raw.get("expert_letters") and {int(n): str(row) for n, row in raw["expert_letters"].items()}
        return HostSpec(**{**raw, "experts": experts, "expert_letters": letters})


def main(spec: dict[str, Any], control: Control) -> None:
    """Entry point in a process forked by the warm parent: load, listen, report ready, serve until the owner goes."""
    host = HostSpec.from_dict(spec)
    logs.set_up("host", host=host.host, incarnation=host.incarnation)
    exit_with_owner(control)
    setproctitle(f"{TITLE} {host.host}")
    began = time.monotonic()
    torch.set_num_threads(host.threads)
    if (hosted := _loaded.get(_content(host))) is None:
        hosted = _load(host)
        keeper.give_back_unused()
    slots = _slots(host)
    load_s = time.monotonic() - began
    rows_s = host_speed.measure(hosted.layers, slots) if host.measures else {}
    if host.device == "cpu":
        keeper.keep_memory()
    server = ExpertServer(host, hosted.layers, slots, on_load=lambda load: offer_load(control, load))
    address = server.listen()
    log.info(
        "host %s holds %d bytes of experts, %d of them shared, loaded in %.2f s",
        *(host.host, hosted.bytes, hosted.shared_bytes, load_s),
    )
    facts = {"bytes": hosted.bytes, "shared_bytes": hosted.shared_bytes, "load_s": load_s}
    speed = {"threads": torch.get_num_threads(), "rows_s": rows_s}
    control.send({"event": "ready", "address": asdict(address), **facts, **speed})
    server.serve()


_loaded: dict[Any, "HostedExperts"] = {}
"""What the template loaded from which this process was forked."""


def template(spec: dict[str, Any], control: Control) -> None:
    """Entry point in a process forked by the warm parent: load, and fork hosts that need not load any more.

    `spec` is a HostSpec, whose `unix_path` is where forks are asked for. Nothing here may start a thread that stays.
    """
    host = HostSpec.from_dict(spec)
    logs.set_up("template", host=host.host)
    setproctitle(f"{TEMPLATE_TITLE} {host.host}")
    _quietly(_load_here, host)
    if not _loaded:
        raise RuntimeError("loading failed; the log says why")
    gc.collect()
    gc.freeze()  # as in the warm parent
    _check_alone()
    serve_forks(Path(host.unix_path), control, lambda: control.send({"event": "template"}))


def reserve(spec: dict[str, Any], control: Control) -> None:
    """Entry point in a process forked by a template: use its experts once, and wait to be told who it is, by {"spec": a
    HostSpec} of the same experts; then it is that host."""
    host = HostSpec.from_dict(spec)
    logs.set_up("reserve", host=host.host)
    setproctitle(f"{RESERVE_TITLE} {host.host}")
    _quietly(_touch, host)
    control.send({"event": "reserve"})
    try:
        while (message := control.receive()) is None:
            pass
    except EOFError:
        return
    main(message["spec"], control)


def _quietly(work: Callable[[HostSpec], None], host: HostSpec) -> None:
    """Do it where nobody else wants the core, and wait. In a thread of its own: one that has given its priority away
    may not take it back."""

    def run() -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        torch.set_num_threads(1)
        work(host)

    thread = threading.Thread(target=run, name="quiet")
    thread.start()
    thread.join()


def _load_here(host: HostSpec) -> None:
    _loaded[_content(host)] = _load(host)
    keeper.give_back_unused()


def _touch(host: HostSpec) -> None:
    host_speed.touch(_loaded[_content(host)].layers, _slots(host))


def _check_alone() -> None:
    """A thread beside this one would not be in a fork, and what it holds would be locked there for ever."""
    until = time.monotonic() + ALONE_WITHIN_S
    while len(threads := os.listdir("/proc/self/task")) > 1:
        if time.monotonic() > until:
            raise RuntimeError(f"loading has left {len(threads) - 1} threads behind: no host can be forked from here")
        time.sleep(0.01)


def _slots(host: HostSpec) -> dict[int, int]:
    """How many experts of each layer are held, where there are any."""
    return {n: len(experts) for n, experts in host.experts.items() if experts}


def _content(host: HostSpec) -> tuple[object, ...]:
    experts = tuple(sorted((n, tuple(es)) for n, es in host.experts.items()))
    letters = tuple(sorted((host.expert_letters or {}).items()))
    return host.checkpoint, host.dtype, host.expert_dtype, letters, host.device, experts


def _load(host: HostSpec) -> "HostedExperts":
    from folkmoot.experts import vllm_api

    return vllm_api.load_experts(
        Path(host.checkpoint),
        host.experts,
        dtype=host.dtype,
        device=host.device,
        memory_fd=host.memory_fd,
        expert_dtype=host.expert_dtype,
        expert_letters=host.expert_letters,
    )


def offer_load(control: Control, load: Load) -> bool:
    """Tell the owner, and whether that went: one that does not read must hold up nobody's rows."""
    return control.offer({"event": "load", **asdict(load)})


class ExpertServer:
    """Listens for engines and answers their requests with `kernels`, one per layer, of `slots[layer]` experts each."""

    def __init__(
        self,
        spec: HostSpec,
        kernels: Mapping[int, Kernel],
        slots: Mapping[int, int],
        on_load: Callable[[Load], bool] | None = None,
    ) -> None:
        self.spec, self.kernels, self.slots = spec, kernels, slots
        self.load = Load.of(slots)
        self._on_load = on_load
        self._reported_at = 0.0
        self._is_told = True
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._new: collections.deque[ShmConnection] = collections.deque()
        self._inbox: collections.deque[TcpConnection] = collections.deque()
        self._connections: list[ShmConnection] = []
        self._open: set[Areas] = set()
        self._greeter = Greeter(self._admit, secret.read(spec.secret_file))
        self._num_slots = np.zeros(max(slots, default=0) + 1, np.int32)
        for layer, num in slots.items():
            self._num_slots[layer] = num

    def listen(self) -> HostAddress:
        """Open the sockets, accept in threads, and say where: a unix socket, and TCP only where the spec says so."""
        path = Path(self.spec.unix_path)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix.bind(str(path))
        path.chmod(0o600)
        listeners, tcp_address = [unix], None
        if self.spec.tcp is not None:
            ip, _, port = self.spec.tcp.rpartition(":")
            tcp = socket.create_server((ip, int(port)))
            tcp_address = f"{ip}:{tcp.getsockname()[1]}"
            listeners.append(tcp)
        for listener in listeners:
            self._greeter.listen(listener)
        return HostAddress(self.spec.host, self.spec.incarnation, node_id(), str(path), tcp_address)

    def serve(self) -> None:
        """Compute for ever. Blocks without a time-out while there is nothing to do or to report."""
        waiters = self._arm_all()
        while True:
            native.wait(waiters, len(waiters), self.spec.yield_us, -1 if self._is_told else REPORT_EVERY_US)
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

    def _answer(self, connection: Areas) -> bool:
        """Check the request at hand, run it, answer; False after a bad one, whose connection must be closed."""
        began = time.monotonic()
        request = connection.raw
        wrong = native.take(ctypes.addressof(request))
        self._is_told = self._on_load is None
        if wrong:
            return self._refuse(connection, f"{REFUSALS[wrong]}: {request.header}")
        header = request.header
        self.load.waited(connection.came_s or header.posted_us / 1e6, began)
        kernel, pairs = self.kernels[header.layer], header.pairs
        try:
            if header.flags & wire.FLAG_SUM:
                _run_sum(kernel, connection, header.rows, pairs)
            else:
                kernel(connection.x[:pairs], connection.slots[:pairs], out=connection.out[:pairs])
        except Exception as e:  # other engines are to be served on
            log.exception("a kernel failed on %s", header)
            return self._refuse(connection, f"the kernel failed: {type(e).__name__}: {e}")
        size = header.rows * connection.row_bytes
        self.load.answered(header.layer, pairs, time.monotonic() - began, header.payload_bytes, size)
        native.answer(ctypes.addressof(request), wire.REPLY, size)
        return True

    def _drop(self, connection: ShmConnection) -> None:
        connection.close()
        self._open.discard(connection)

    def _admit(self, sock: socket.socket, raw: Mapping[str, Any], fd: int | None) -> Callable[[], None]:
        """For the greeter: the connection, and what serves it. Raises WireError, TypeError, ValueError, OSError."""
        hello = self._check_hello(raw)
        if hello.transport == "shm":
            shared = ShmConnection(sock, hello, self._num_slots, fd)
            return lambda: self._add(shared)
        stream = TcpConnection(sock, hello, self._num_slots, self._bring)
        return lambda: self._run(stream)

    def _add(self, connection: ShmConnection) -> None:
        log.info("engine %s connected by shared memory", connection.hello.engine)
        self._open.add(connection)
        self._new.append(connection)
        os.eventfd_write(self._wake, 1)

    def _run(self, connection: TcpConnection) -> None:
        log.info("engine %s connected by TCP", connection.hello.engine)
        self._open.add(connection)
        connection.run()
        self._open.discard(connection)

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
        dtype: torch.dtype = getattr(torch, hello.dtype)
        if hello.max_rows * hello.hidden * dtype.itemsize > MAX_AREA_BYTES:
            raise WireError(f"max_rows {hello.max_rows} of {hello.hidden} {hello.dtype} exceed {MAX_AREA_BYTES} bytes")
        for kernel in self.kernels.values():
            own = (getattr(kernel, "hidden_size", hello.hidden), getattr(kernel, "dtype", dtype))
            if own != (hello.hidden, dtype):
                raise WireError(f"rows are {own[0]} x {own[1]} here, not {hello.hidden} x {dtype}")
        if len(self._open) >= MAX_CONNECTIONS:
            raise WireError(f"{MAX_CONNECTIONS} connections are open already")
        return hello

    def _bring(self, connection: TcpConnection) -> None:
        self._inbox.append(connection)
        os.eventfd_write(self._wake, 1)

    def _report(self) -> None:
        if self._on_load is None or self._is_told or time.monotonic() - self._reported_at < REPORT_EVERY_S:
            return
        self._reported_at = time.monotonic()
        self._is_told = self._on_load(self.load)

    def _refuse(self, connection: Areas, text: str) -> bool:
        log.warning("a request of engine %s is refused: %s", connection.hello.engine, text)
        self.load.refused += 1
        native.answer(ctypes.addressof(connection.raw), wire.ERROR, connection.write_text(text))
        return False


def _run_sum(kernel: Kernel, areas: Areas, rows: int, pairs: int) -> None:
    """Row t of the reply is the weighted sum, in float32, of the rows of the pairs whose token is t."""
    results = kernel(areas.x[:pairs], areas.slots[:pairs])
    total = torch.zeros((rows, areas.hello.hidden), dtype=torch.float32)
    total.index_add_(0, areas.tokens[:pairs].long(), results.float() * areas.weights(pairs)[:, None])
    areas.out[:rows].copy_(total)
