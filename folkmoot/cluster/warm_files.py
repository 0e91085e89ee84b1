"""How processes of one node find its warm parent: its socket, and beside it a note of who will listen there. No Ray."""

import fcntl
from collections.abc import Mapping
from pathlib import Path
from subprocess import Popen

from folkmoot.cluster.processes import is_alive
from folkmoot.experts import warm


def pid_file(warm_socket: Path) -> Path:
    """Names the process that will listen on the socket, before it does."""
    return warm_socket.with_suffix(".pid")


def start_missing(warm_socket: Path, log_path: Path, openmp: Mapping[str, str] = warm.OPENMP) -> "Popen[bytes] | None":
    """Start a warm parent as a child of this process, unless one is there: `folkmoot up` and a node's agent may both
    see that one has died. A second one would double what the node keeps in memory. `openmp`: see `warm.start`."""
    with warm_socket.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_started(warm_socket):
            return None
        process = warm.start(warm_socket, log_path, environment=openmp)
        pid_file(warm_socket).write_text(str(process.pid))
    return process


def is_started(warm_socket: Path) -> bool:
    """Whether a warm parent listens on this socket, or is about to."""
    try:
        return is_alive(int(pid_file(warm_socket).read_text()))
    except (OSError, ValueError):
        return False
