"""A whole Folkmoot cluster to measure and to break: started by the command line, its processes found by what they are.

`Cluster` runs `folkmoot up --detach` with files of its own, and takes everything down at the end. `pids` finds the
processes that play a role, so that a fault can be injected into any of them; `killed` and `stopped` prove it happened.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from folkmoot.cluster import processes, warm_files
from folkmoot.cluster.state_file import ClusterState, StateFolder
from folkmoot.experts import keeper, warm
from folkmoot.gateway.client import Client

UP_TIMEOUT_S = 300.0
HEARD_S = 0.2
STALLED = r"stalled: no answer for \d+ rows within ([\d.]+) s"
COMMAND = (sys.executable, "-m", "folkmoot.cluster.cli")

T = TypeVar("T")


class Role(StrEnum):
    """What a process of a cluster is."""

    HOST = "expert host"
    TEMPLATE = "host template"
    RESERVE = "host in reserve"
    ACTOR = "expert actor"
    ENGINE = "engine"
    CORE = "engine core"
    REPLICA = "serve replica"
    ROUTER = "expert router"
    GATEWAY = "gateway"
    STORE = "store"
    WARM = "warm parent"


TITLES = {
    Role.HOST: "folkmoot::ExpertHost",
    Role.TEMPLATE: "folkmoot::HostTemplate",
    Role.RESERVE: "folkmoot::HostReserve",
    Role.ENGINE: "folkmoot::Engine",
    Role.ACTOR: "ray::ExpertActor",
    Role.CORE: "VLLM::EngineCore",
    Role.REPLICA: "ray::ServeReplica",
    Role.ROUTER: "ray::ExpertRouter",
    Role.GATEWAY: "-m folkmoot.gateway",
    Role.STORE: "valkey-server",
}
"""Part of the command line, or of the title that a process gives itself."""


@dataclass
class Cluster:
    """`folkmoot up MODEL OPTIONS` as a context. `gateways`: how many to have in all; the first is the cluster's own."""

    model: Path
    options: tuple[str, ...] = ()
    gateways: int = 1
    name: str = "bench"
    _own: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def __enter__(self) -> "Cluster":
        self.directory = Path(tempfile.mkdtemp(prefix="fm-"))
        self.folder = StateFolder(self.name, self.directory)
        try:
            self.up()
            for _ in range(1, self.gateways):
                self.start_gateway()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._close()

    def up(self) -> None:
        """Start it, and wait until it serves."""
        self.run("up", "--detach", "--listen", "127.0.0.1:0", "--model", str(self.model), *self.options)

    def run(self, command: str, *arguments: str) -> str:
        """A `folkmoot` command for this cluster; its output. Raises RuntimeError with it where the command fails."""
        where = ("--state-dir", str(self.directory), "--name", self.name)
        done = subprocess.run(
            [*COMMAND, command, *where, *arguments], capture_output=True, text=True, timeout=UP_TIMEOUT_S, check=False
        )
        if done.returncode:
            raise RuntimeError(f"folkmoot {command} failed:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    @property
    def state(self) -> ClusterState:
        """As its supervisor wrote it last."""
        state = self.folder.read()
        assert state is not None
        return state

    @property
    def addresses(self) -> list[str]:
        """Of all gateways."""
        assert self.state.gateway is not None
        return [self.state.gateway, *self._own]

    @property
    def store_url(self) -> str:
        """Of the embedded store."""
        return f"unix://{self.folder.store / 'store.sock'}"

    @property
    def namespace(self) -> str:
        """Of all keys in the store."""
        return f"folkmoot-{self.name}"

    def stall_deadlines_s(self) -> list[float]:
        """The deadline of each host that an engine has given up as stalled, as the engines logged them."""
        texts = (log.read_text(errors="replace") for log in self.folder.logs.glob("*.log"))
        return [float(seconds) for text in texts for seconds in re.findall(STALLED, text)]

    def start_gateway(self, listen: str = "127.0.0.1:0") -> None:
        """One more gateway on the cluster's store, which nobody but us brings back."""
        log = self.directory / f"gateway-{len(self._own)}-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "folkmoot.gateway", "--listen", listen, "--namespace", self.namespace]
        # Not processes.start, whose hook between fork and exec upsets gRPC's threads here.
        environment = {**os.environ, "FOLKMOOT_REDIS": self.store_url}
        with log.open("ab") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
        line = eventually(lambda: [t for t in log.read_text().splitlines() if t.startswith("listening on ")], 30.0)
        self._own[line[0].removeprefix("listening on ").strip()] = process

    def tend(self) -> None:
        """Start our own gateways again where they died, at the same address, as an orchestrator would."""
        for address, process in list(self._own.items()):
            if process.poll() is not None:
                del self._own[address]
                self.start_gateway(address)

    def status(self) -> dict[str, Any]:
        """The status document, through a gateway."""
        with Client(self.addresses) as client:
            document: dict[str, Any] = json.loads(client.status().json or "{}")
        return document

    def is_whole(self, since_s: float = 0.0, dead_host: int | None = None) -> bool:
        """Whether all replicas of all experts and all engines that were asked for are there, as the router says in a
        document that it wrote after `since_s` (Unix time), when it had heard what happened until then: after HEARD_S,
        or when it knows nothing more of a host's process that was killed."""
        with contextlib.suppress(Exception):
            status = self.status()
            knows = dead_host is not None and dead_host not in [h["pid"] for h in status["hosts"]]
            if status["time_s"] < since_s + (0.0 if knows else HEARD_S):
                return False
            ready = sum(e["phase"] == "ready" for e in status["engines"])
            whole = status["map"]["replicas_least"] >= status["map"]["replicas_wanted"]
            return bool(whole) and ready >= self._wanted("--engines")
        return False

    def pids(self, role: Role) -> list[int]:
        """The living processes of a role."""
        table = self._table()
        if role in TITLES:
            found = [pid for pid, (_, command) in table.items() if TITLES[role] in command]
            own = [p.pid for p in self._own.values() if p.poll() is None] if role is Role.GATEWAY else []
            return sorted(found + own)
        # What a warm parent forks has its command line, until it calls itself something else.
        assert self.state.run_dir is not None
        warm = int(warm_files.pid_file(Path(self.state.run_dir) / "warm.sock").read_text())
        return [warm] if warm in table else []

    def all_pids(self) -> list[int]:
        """Every process of the cluster."""
        return [self.state.pid, *self._table(), *(p.pid for p in self._own.values())]

    def _table(self) -> dict[int, tuple[int, str]]:
        """All descendants of the supervisor, and what was forked from a seed, which is none but logs to its files."""
        seeded = processes_with_files_in(self.folder.logs) if warm.SEEDS in os.environ else []
        return process_table(self.state.pid) | rows_of(seeded)

    def _wanted(self, option: str) -> int:
        return int(self.options[self.options.index(option) + 1]) if option in self.options else 1

    def _close(self) -> None:
        for process in self._own.values():
            processes.stop(process)
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self.run("down")
        shutil.rmtree(self.directory, ignore_errors=True)


def process_table(root: int) -> dict[int, tuple[int, str]]:
    """All descendants of a process: {pid: (parent, command line)}."""
    return rows_of(processes.descendants(root))


def processes_with_files_in(*folders: Path) -> list[int]:
    """Those that have a file below one of `folders` open, but for this one."""
    found, begins = [], tuple(f"{folder}/" for folder in folders)
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(fd).startswith(begins) for fd in (entry / "fd").iterdir()):
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def rows_of(pids: Iterable[int]) -> dict[int, tuple[int, str]]:
    """{pid: (parent, command line)} of those that still run. A keeper's command line is its owner's, so it gets
    its name instead."""
    table = {}
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            entry = Path("/proc") / str(pid)
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            table[pid] = (parent, keeper.NAME if is_keeper(pid) else command)
    return table


def is_keeper(pid: int) -> bool:
    """Whether it only keeps the memory of another process. Raises OSError where there is none."""
    return Path(f"/proc/{pid}/comm").read_text().strip() == keeper.NAME


def eventually(check: Callable[[], T], timeout_s: float) -> T:
    """Poll until `check` returns something true, and return that. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not (result := check()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:.0f} s")
        time.sleep(0.02)
    return result


def kill(pid: int) -> None:
    """SIGKILL, and wait until the process is gone. Raises TimeoutError where it is not, ProcessLookupError."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not processes.is_alive(pid), 10.0)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP; SIGCONT at the end, if it still lives. Raises TimeoutError where it does not stop."""
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: process_state(pid) == "T", 5.0)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def process_state(pid: int) -> str:
    """The kernel's letter for it: R, S, D, T (stopped), Z; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
