"""The warm parent: one process a node that imports vLLM once, and forks expert hosts and engines from itself.

Importing vLLM takes about 15 s of a core, a fork of a process that has imported it a few milliseconds: that is what
makes a replacement for a dead expert host quick. The parent listens on a unix socket in a directory that only its user
may enter, and takes no process of another user. A request names an entry point ("module:function"), its spec and a log
file; the child then owns the requester's end of the connection as its control channel: newline-delimited JSON both
ways. End-of-file on it means that the owner is gone, and the child exits.

The parent also keeps memory files (memfds) for its children: a request may name one, made at its first mention, and
the child finds its descriptor as `memory_fd` in its spec. What lies there outlives the children that put it there, and
this parent too (memory_files.py); it is gone with the last process that holds it.

The parent must fork before any use of OpenMP or CUDA, so it only ever imports.
"""

import argparse
import contextlib
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from folkmoot import logs
from folkmoot.experts.handshake import check_user
from folkmoot.experts.memory_files import MemoryFiles
from folkmoot.experts.wire import WireError

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20
"""A control message longer than this is refused: the largest real one is an expert map of a few megabytes."""

REQUEST_TIMEOUT_S = 5.0
MAX_WAITING = 64

SEEDS = "FOLKMOOT_WARM_SEEDS"
"""Names a socket where seeds are given out (warm_seed.py): warm parents are forked of those, and do not import vLLM."""

OPENMP: Mapping[str, str] = {"GOMP_SPINCOUNT": "20000"}
"""How long OpenMP's workers spin after a parallel region, where an engine and its hosts share cores with nobody else:
docs/performance.md."""

FEW_CORES: Mapping[str, str] = {"GOMP_SPINCOUNT": "1000"}
"""The same where gateways and the store share them too and there are few: docs/speed.md."""

SEVERAL_ENGINES: Mapping[str, str] = {"GOMP_SPINCOUNT": "0"}
"""The same where several engines share them: who spins takes a core from another engine's attention."""


class WarmParentError(RuntimeError):
    """The warm parent is not there, or could not do what was asked."""


class Control:
    """Newline-delimited JSON messages over a connected stream socket. Sending is safe from several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._send_lock = threading.Lock()
        self._unsent = b""  # of a message that was offered

    def fileno(self) -> int:
        """The socket's file descriptor, for event loops."""
        return self._sock.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message. Raises OSError if the peer is gone."""
        with self._send_lock:
            data, self._unsent = self._unsent + _line(message), b""
            self._sock.sendall(data)

    def offer(self, message: dict[str, Any]) -> bool:
        """Send one message unless that would wait, for another thread or a peer that does not read; whether it went.

        For who must not be held up by a peer that stalls. Raises OSError if the peer is gone.
        """
        if not self._send_lock.acquire(blocking=False):
            return False
        try:
            self._push()
            if self._unsent:
                return False
            self._unsent = line = _line(message)
            self._push()
            if self._unsent == line:
                self._unsent = b""
                return False
            return True
        finally:
            self._send_lock.release()

    def _push(self) -> None:
        """Under the lock: send as much of what is unsent as goes without waiting."""
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent, socket.MSG_DONTWAIT) :]

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The next message, or None once `timeout_s` has passed. Raises EOFError if the peer is gone, WarmParentError
        if it sends something else. What has come of a message is kept for the next call."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._sock], [], [], left)[0]:
                return None
            try:
                chunk = self._sock.recv(1 << 16)
            except ConnectionResetError:
                chunk = b""
            if not chunk:
                raise EOFError("the other end of the control channel is closed")
            self._buffer += chunk
            if len(self._buffer) > MAX_MESSAGE_BYTES:
                raise WarmParentError(f"a control message exceeds {MAX_MESSAGE_BYTES} bytes")
        line, _, rest = self._buffer.partition(b"\n")
        self._buffer = bytearray(rest)
        try:
            message = json.loads(bytes(line))
        except (ValueError, RecursionError) as e:
            raise WarmParentError("a control message must be JSON") from e
        if not isinstance(message, dict):
            raise WarmParentError("a control message must be a JSON object")
        return message

    def is_left(self) -> bool:
        """Whether the peer has closed its end, and all that it said has been read."""
        try:
            return not self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def hang_up(self) -> None:
        """Close this process's end; where another one has the channel too, it stays open."""
        self._sock.close()

    def close(self) -> None:
        """Close the channel: the other end sees end-of-file."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


@dataclass
class Child:
    """A process forked by the warm parent, seen from the one who asked for it. Closing `control` ends it."""

    pid: int
    control: Control
    _pidfd: int | None = field(repr=False)
    """None: it had ended before it could be looked at; what it said stands in `control`"""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to the child."""
        self.control.send(message)

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The child's next message; None after the time-out; EOFError once it is dead."""
        return self.control.receive(timeout_s)

    @property
    def pidfd(self) -> int:
        """A descriptor that becomes readable when the process ends. ProcessLookupError where it is not watched."""
        if self._pidfd is None:
            raise ProcessLookupError(f"process {self.pid} has ended")
        return self._pidfd

    def is_alive(self) -> bool:
        """Whether the process still runs (a zombie does not)."""
        return not self.wait(0)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the process to end; whether it has."""
        return self._pidfd is None or bool(select.select([self._pidfd], [], [], timeout_s)[0])

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send a signal; nothing happens if the process is gone already."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, sig)

    def close(self) -> None:
        """Close the control channel, which ends the child, and forget the process: it counts as ended from now on."""
        self.control.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


class WarmParent:
    """A client of a running warm parent; cheap, holds no connection."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path

    def spawn(
        self, entry: str, spec: dict[str, Any], log_path: Path, timeout_s: float = 30.0, *, memory: str | None = None
    ) -> Child:
        """Fork a child that calls `entry` ("module:function") as function(spec, control), output to `log_path`.

        `memory` names the memory file that the child shall have. Raises WarmParentError if the parent does not answer
        within `timeout_s` or refuses.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(self.socket_path))
            control = Control(sock)
            control.send({"entry": entry, "spec": spec, "log": str(log_path), "memory": memory})
            answer = control.receive(timeout_s)
            if answer is None:
                raise WarmParentError(f"no answer within {timeout_s} s")
            if "error" in answer:
                raise WarmParentError(str(answer["error"]))
            pid = int(answer["pid"])
            return Child(pid, control, _pidfd_of(pid))
        except (OSError, EOFError, WarmParentError) as e:
            sock.close()
            raise WarmParentError(f"the warm parent at {self.socket_path} could not start {entry}: {e}") from e


def _pidfd_of(pid: int) -> int | None:
    """A descriptor of the process; None where it has ended already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def start(
    socket_path: Path,
    log_path: Path,
    *,
    modules: Sequence[str] = (),
    environment: Mapping[str, str] = OPENMP,
) -> subprocess.Popen[bytes]:
    """Start a warm parent as a child of this process; it ends when this process does. Use `connect` to wait for it.

    It imports vLLM, or only `modules` where some are named. OpenMP reads its variables when it is loaded, so they are
    set here for all children: `environment` stands beside what the caller's own environment says, which comes first.
    """
    socket_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(log_path, "ab") as out:
        command = [sys.executable, "-m", "folkmoot.experts.warm", "--socket", str(socket_path), "--with-parent"]
        command += [word for name in modules for word in ("--import", name)]
        # A title that a child gives itself shall not be written over what /proc says of its environment.
        variables = {"SPT_NOENV": "1", **environment, **os.environ}
        return subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True
        )


def connect(socket_path: Path, timeout_s: float = 120.0) -> WarmParent:
    """Wait until the warm parent at `socket_path` has imported vLLM and listens. Raises WarmParentError if late."""
    deadline = time.monotonic() + timeout_s
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(socket_path))
                return WarmParent(socket_path)
            except OSError as e:
                if time.monotonic() > deadline:
                    raise WarmParentError(f"no warm parent listens at {socket_path} after {timeout_s:.0f} s") from e
        time.sleep(0.05)


def main(argv: list[str] | None = None) -> None:
    """Run a warm parent until SIGTERM, or until standard input closes with --with-parent."""
    p = argparse.ArgumentParser(prog="python -m folkmoot.experts.warm", description=__doc__)
    p.add_argument("--socket", type=Path, required=True, help="unix socket to listen on (its directory: mode 0700)")
    p.add_argument("--with-parent", action="store_true", help="end when standard input closes")
    p.add_argument("--import", dest="modules", action="append", help="import this module, and not vLLM (repeatable)")
    args = p.parse_args(argv)
    logs.set_up("warm")
    owner = sys.stdin if args.with_parent else None
    if (seeds := os.environ.get(SEEDS)) and not args.modules:
        from folkmoot.experts import warm_seed

        sys.exit(warm_seed.follow(Path(seeds), args.socket, owner))
    began = time.monotonic()
    gc.disable()  # what is imported stays: looking for garbage among it takes 7% of the time
    if args.modules:
        for name in args.modules:
            importlib.import_module(name)
    else:
        from folkmoot.experts import vllm_api

        vllm_api.preimport()
    gc.enable()
    gc.freeze()  # a collection in a child would touch, and so copy, every inherited page
    log.info("imported in %.1f s, %d threads", time.monotonic() - began, threading.active_count())
    with contextlib.suppress(SystemExit):  # SIGTERM
        serve_forks(args.socket, owner)
    logging.shutdown()
    os._exit(0)  # to take apart what was imported takes a third of a second, and brings warnings


def serve_forks(socket_path: Path, owner: Any = None, on_listening: Callable[[], None] = lambda: None) -> None:
    """Accept one request a connection; fork; go on, until `owner`, anything with a fileno, says something or is gone.

    The socket file appears only now, when children are cheap. No other thread may run.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel; owners watch a pidfd
    with contextlib.suppress(FileNotFoundError):
        socket_path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(socket_path))
    socket_path.chmod(0o600)
    listener.listen(64)
    on_listening()
    owners = [] if owner is None else [owner]
    not_for_child = [listener, *(o for o in owners if o.fileno() > 2)]  # standard streams are replaced there
    waiting: dict[Control, float] = {}  # who has not said yet what it wants, and until when it may
    memory = MemoryFiles(socket_path)
    try:
        while True:
            ready = select.select([listener, *owners, *waiting], [], [], 1.0 if waiting else None)[0]
            if owner is not None and owner in ready:
                return
            if listener in ready and (control := _accept(listener)) is not None:
                waiting[control] = time.monotonic() + REQUEST_TIMEOUT_S
            late = [c for c, until in waiting.items() if time.monotonic() > until or c is _oldest_of_many(waiting)]
            for control in {*ready, *late} & waiting.keys():
                if control in late or _answer(control, [*not_for_child, *waiting], memory):
                    del waiting[control]
                    control.hang_up()
    finally:
        listener.close()
        socket_path.unlink(missing_ok=True)


def _accept(listener: socket.socket) -> Control | None:
    """Who connects, if it is a process of this user."""
    sock, _ = listener.accept()
    try:
        check_user(sock)
    except (WireError, OSError) as e:
        log.warning("refused a connection: %s", e)
        sock.close()
        return None
    return Control(sock)


def _oldest_of_many(waiting: Mapping[Control, float]) -> Control | None:
    """Who has to give way, since too many wait."""
    return next(iter(waiting)) if len(waiting) > MAX_WAITING else None


def _answer(control: Control, not_for_child: Iterable[Any], memory: MemoryFiles) -> bool:
    """Read what has come of a request, and fork once it is whole; whether this connection is done with.

    A connection that closes without a request is a probe. A child closes `not_for_child`, but for its own, and of
    `memory` what it has not asked for.
    """
    try:
        request = control.receive(0.0)
        if request is None:
            return False
        entry, spec, log_path = str(request["entry"]), dict(request["spec"]), str(request["log"])
        if (name := request.get("memory")) is not None:
            spec["memory_fd"] = memory.descriptor(name)
    except EOFError:
        return True
    except (KeyError, TypeError, ValueError, WarmParentError, OSError) as e:
        with contextlib.suppress(OSError):
            control.send({"error": f"bad request: {e!r}"})
        return True
    if control.is_left():  # it has given up waiting for us, and may have gone elsewhere for the same
        return True
    if (pid := os.fork()) != 0:
        log.info("forked %d for %s", pid, entry)
        return True
    for other in not_for_child:
        if other is not control:
            os.close(other.fileno())
    memory.keep_only(name)
    _run_child(entry, spec, log_path, control)
    return True


def _run_child(entry: str, spec: dict[str, Any], log_path: str, control: Control) -> None:
    """In the fork: detach from the parent's surroundings, report the pid, run the entry, and never return."""
    status = 1
    try:
        os.setsid()
        for sig in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(sig, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's to handle
        out = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        control.send({"pid": os.getpid()})
        module, _, name = entry.partition(":")
        function: Callable[[dict[str, Any], Control], None] = getattr(importlib.import_module(module), name)
        function(spec, control)
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
    except BaseException as e:
        log.critical("%s has failed", entry, exc_info=e)
        with contextlib.suppress(OSError):
            control.send({"event": "error", "message": f"{type(e).__name__}: {e}"})
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def exit_with_owner(
    control: Control,
    on_message: Callable[[dict[str, Any]], None] | None = None,
    before_exit: Callable[[], None] = lambda: None,
) -> threading.Thread:
    """Watch control in a daemon thread: pass each message on, and end this process when the owner is gone, or speaks in
    another way than an owner does. A message that cannot be used is logged.

    `before_exit` runs on that thread first; it should not take long, and whatever it raises, the process ends.
    """

    def watch() -> None:
        try:
            while True:
                message = control.receive()
                if message is not None and on_message is not None:
                    _use(message, on_message)
        except EOFError:
            status = 0
        except Exception:
            log.exception("the control channel is of no use any more")
            status = 1
        try:
            before_exit()
        finally:
            os._exit(status)

    thread = threading.Thread(target=watch, name="owner-watch", daemon=True)
    thread.start()
    return thread


def _use(message: dict[str, Any], on_message: Callable[[dict[str, Any]], None]) -> None:
    try:
        on_message(message)
    except Exception:
        log.exception("a message of the owner could not be used")


if __name__ == "__main__":
    main()
