"""Two nodes on one machine: network namespaces joined by a veth pair, each with processes, shared memory and temporary
files of its own.

Needs root, `unshare`, `nsenter` and `ip`. A node's first process is the init of its pid namespace: when that is killed
everything of the node is, and with the last process go namespaces, mounts and links.
"""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folkmoot.experts import warm

INIT = """
set -e
mount -t tmpfs none /dev/shm
mount --bind "$1" "$2"
ip link set lo up
echo ready
exec sleep 100000
"""


@dataclass
class Node:
    """One node. `private` is what it sees at `temp`."""

    ip: str
    private: Path
    temp: Path
    init: "subprocess.Popen[str]"
    environment: dict[str, str]
    pid: int

    def start(self, *command: str, **options: Any) -> "subprocess.Popen[str]":
        """Start a command in here."""
        enter = ["nsenter", "-t", str(self.pid), "-n", "-m", "-p", "--", *command]
        return subprocess.Popen(enter, env=self.environment, stdout=subprocess.PIPE, text=True, **options)

    def run(self, *command: str, timeout_s: float = 120.0) -> str:
        """Run a command in here; what it printed. Raises RuntimeError with it where the command fails."""
        with self.start(*command, stderr=subprocess.STDOUT) as process:
            out, _ = process.communicate(timeout=timeout_s)
        if process.returncode:
            raise RuntimeError(f"{command}: {out}")
        return out

    def python(self, code: str, *arguments: str) -> str:
        """Run a program given as text."""
        return self.run(sys.executable, "-c", code, *arguments)

    def kill(self) -> None:
        """SIGKILL to everything in here, by way of its init."""
        os.kill(self.pid, 9)
        self.init.wait(20)


def why_not() -> str | None:
    """What keeps this machine from having two nodes; None: nothing."""
    missing = [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    tried = subprocess.run(["unshare", "-n", "-m", "-p", "-f", "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"namespaces are not permitted: {tried.stderr.strip()}"
    pair = ["unshare", "-n", "ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"]
    tried = subprocess.run(pair, capture_output=True, text=True, check=False)
    return f"veth pairs are not permitted: {tried.stderr.strip()}" if tried.returncode else None


def _make(number: int, folder: Path, temp: Path, token: str) -> Node:
    private = folder / f"node-{number}"
    private.mkdir()
    environment = {
        **os.environ, "TMPDIR": str(temp), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(temp),
    }  # fmt: skip
    environment.pop(warm.SEEDS, None)  # what is forked from a seed is on the node where that was started
    command = ["unshare", "-n", "-m", "-p", "-f", "--mount-proc", "--kill-child", "sh", "-c", INIT, "init"]
    command += [str(private), str(temp)]
    init = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert init.stdout is not None and init.stdout.readline() == "ready\n"
    children = Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text().split()
    return Node(f"10.77.0.{number}", private, temp, init, environment, int(children[0]))


def _join(one: Node, two: Node) -> None:
    """A veth pair that only ever exists inside."""
    enter = ["nsenter", "-t", str(one.pid), "-n"]
    pair = ["ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", str(two.pid)]
    subprocess.run([*enter, *pair], check=True)
    for node in (one, two):
        # On the loopback too: with one end of the pair the other one vanishes, and a node keeps its address.
        node.run("ip", "address", "add", f"{node.ip}/32", "dev", "lo")
        node.run("ip", "address", "add", f"{node.ip}/24", "dev", "veth0")
        link_up(node)


def link_up(node: Node) -> None:
    """Its end of the link, and the way out."""
    node.run("ip", "link", "set", "veth0", "up")
    node.run("ip", "route", "add", "default", "dev", "veth0")  # Ray finds out its own address by it


def ray_start(node: Node, *arguments: str) -> None:
    """`ray start` in here, with a small object store."""
    options = ["--node-ip-address", node.ip, "--object-store-memory", str(80 << 20), "--disable-usage-stats"]
    node.run(str(Path(sys.executable).with_name("ray")), "start", *arguments, *options)


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Node, Node]]:
    """Joined by a link; at the end none of their processes is left. Raises RuntimeError where `why_not` says why."""
    if (reason := why_not()) is not None:
        raise RuntimeError(f"two nodes need network namespaces: {reason}")
    temp = Path(f"/tmp/fn-{secrets.token_hex(4)}")
    temp.mkdir()
    made: list[Node] = []
    try:
        token = secrets.token_hex(32)
        for number in (1, 2):
            made.append(_make(number, folder, temp, token))
        _join(*made)
        yield made[0], made[1]
    finally:
        for node in made:
            if node.init.poll() is None:
                node.kill()
        temp.rmdir()  # nothing was ever written there: each node had its own in its place
        assert [pid for pid in _members(made) if Path(f"/proc/{pid}").exists()] == []


def _members(made: list[Node]) -> list[int]:
    """Processes in any of the nodes' namespaces."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "environ").read_bytes()
            except OSError:
                continue
            if any(f"TMPDIR={node.temp}".encode() in command.split(b"\0") for node in made):
                found.append(int(entry.name))
    return found
