"""Real clusters for the tests: `folkmoot up --detach` on tiny float32 checkpoints, in which greedy answers do not
depend on what else is in the batch."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints import tiny
from benchmarks.clusters import processes_with_files_in, rows_of
from folkmoot.gateway.client import Client
from tests.otlp import Collector

UP_TIMEOUT_S = 240.0
FLOAT32 = ("--dtype", "float32", "--max-model-len", "512")
"""vLLM's "auto" makes bfloat16 of a float32 checkpoint."""
PATIENCE = 3
MARKER = "FOLKMOOT_TEST_CLUSTER"
STATE_LINK = "state-"
"""Begins the names of links, among a cluster's temporary files, to its folder of state."""


def processes_of(marker: str) -> dict[int, str]:
    """All processes, of whatever parent, that inherited this marker in their environment, or (since Ray's processes
    write their title over theirs, and what comes of a seed has the seed's) have a file of the cluster open."""
    temp = Path(temp_of(marker))
    pids = processes_with_files_in(temp, *(link.readlink() for link in temp.glob(f"{STATE_LINK}*")))
    return {pid: command[:120] for pid, (_, command) in rows_of({*pids, *_marked(marker)}).items()}


def _marked(marker: str) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARKER}={marker}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)


def temp_of(marker: str) -> str:
    """A folder for temporary files, short enough for unix sockets below it."""
    return f"/tmp/ft-{marker}"


def eventually(check: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Poll until `check` returns something true, and return that. `timeout_s` is as for a machine that has nothing else
    to do and is not slow: others are given PATIENCE times as long."""
    deadline = time.monotonic() + PATIENCE * timeout_s
    while not (result := check()):
        assert time.monotonic() < deadline, f"not within {PATIENCE} times {timeout_s:.0f} s: {what}"
        time.sleep(0.1)
    return result


@dataclass
class Cluster:
    """A cluster under test, seen through its command line and its gateway."""

    state_dir: Path
    marker: str
    name: str = "default"
    variables: dict[str, str] = field(default_factory=dict)
    """more of its environment"""

    def command(self, *arguments: str) -> list[str]:
        """A `folkmoot` command for this cluster; its name first, as "up" or "keys create"."""
        return [
            sys.executable, "-m", "folkmoot.cluster.cli", *arguments[0].split(),
            "--state-dir", str(self.state_dir), "--name", self.name, *arguments[1:],
        ]  # fmt: skip

    def run(self, *arguments: str, timeout_s: float = 60.0, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        """Run a command to its end."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    @property
    def environment(self) -> dict[str, str]:
        """Marks every process that comes of it."""
        temp = Path(temp_of(self.marker))
        temp.mkdir(exist_ok=True)
        link = temp / f"{STATE_LINK}{self.name}"
        if not link.is_symlink():
            link.symlink_to(self.state_dir / self.name)
        return {**os.environ, **self.variables, MARKER: self.marker, "TMPDIR": temp_of(self.marker)}

    def up(self, *arguments: str) -> None:
        """Start it in the background, and wait until it is ready."""
        done = self.run("up", "--detach", "--listen", "127.0.0.1:0", *arguments, timeout_s=UP_TIMEOUT_S)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    def down(self) -> None:
        """Stop it; asserts that no process is left."""
        done = self.run("down", timeout_s=90.0)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        eventually(lambda: not processes_of(self.marker), 10.0, f"processes gone: {processes_of(self.marker)}")

    @property
    def address(self) -> str:
        """The gateway's."""
        address: str = json.loads((self.state_dir / self.name / "state.json").read_text())["gateway"]
        return address

    def log_lines(self) -> list[dict[str, Any]]:
        """What its processes have logged in JSON, Ray's actors too."""
        run_dir = Path(json.loads((self.state_dir / self.name / "state.json").read_text())["run_dir"])
        files = [*(self.state_dir / self.name / "logs").glob("*.log"), *(run_dir / "ray").rglob("worker-*.err")]
        lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
        return [json.loads(line) for line in lines if line.startswith('{"time": ')]

    def client(self) -> Client:
        """A gRPC client; close it."""
        return Client(self.address)

    def status(self) -> dict[str, Any]:
        """The status document, through the gateway."""
        with self.client() as client:
            document: dict[str, Any] = json.loads(client.status().json)
        return document


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts: 4 layers of 8 experts, top-2, float32, with a tokenizer and a chat template."""
    return tiny("mixtral", tmp_path_factory.mktemp("models") / "tiny-mixtral", dtype="float32")


@contextmanager
def running(state_dir: Path, *arguments: str, **variables: str) -> Iterator[Cluster]:
    """A cluster that is up while the context is open; asserts at its end that no process is left."""
    cluster = Cluster(state_dir, secrets.token_hex(4), variables=variables)
    cluster.up(*arguments)
    try:
        yield cluster
    finally:
        cluster.down()
    shutil.rmtree(temp_of(cluster.marker))


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Has the spans of `cluster`."""
    with Collector() as one:
        yield one


@pytest.fixture(scope="session")
def cluster(mixtral: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """4 expert hosts, 3 replicas of each expert, one engine. Tests may kill two hosts of it, and no more. It makes
    traces, and logs in JSON."""
    options = ("--model", str(mixtral), "--hosts", "4", "--replicas", "3", "--log-format", "json", *FLOAT32)
    with running(tmp_path_factory.mktemp("state"), *options, **collector.environment) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with cluster.client() as client:
        yield client


@pytest.fixture
def no_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A name under which nothing runs; what a test starts under it must be gone by its end."""
    cluster = Cluster(tmp_path, secrets.token_hex(4))
    yield cluster
    left = processes_of(cluster.marker)
    for pid in left:
        os.kill(pid, 9)
    shutil.rmtree(temp_of(cluster.marker), ignore_errors=True)
    assert not left, f"left behind: {left}"
