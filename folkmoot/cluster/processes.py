"""Small things about processes: end one for certain, tie a child to its parent, read the end of a log."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def start(
    command: Sequence[str], log_path: Path, environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a child that gets SIGTERM when this process ends, however that happens. Call from the main thread."""
    with open(log_path, "ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=None if environment is None else {**os.environ, **environment},
            start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone
            preexec_fn=_die_with_parent(),
        )


def _die_with_parent() -> Callable[[], None]:
    libc = ctypes.CDLL(None)  # loaded before the fork: the child must not take locks
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM) and None


def stop(process: "subprocess.Popen[bytes]", timeout_s: float = 10.0) -> None:
    """SIGTERM, then SIGKILL once `timeout_s` has passed."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def is_alive(pid: int) -> bool:
    """Whether a process of this id runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")


def descendants(pid: int) -> list[int]:
    """All children of a process, their children, and so on, as they are now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def adopt_orphans() -> None:
    """From now on descendants whose parent dies become children of this process: `end_descendants` finds them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def reap_orphans() -> None:
    """Take note of adopted children that have ended, which else stay as zombies. Whoever polls a child of its own still
    learns that it has ended, though not always how."""
    for listing in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in map(int, listing.read_text().split()):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


def end_descendants(grace_s: float) -> None:
    """Wait for all descendants of this process to end; kill those that have not after `grace_s`, and theirs."""
    deadline = time.monotonic() + grace_s
    while left := descendants(os.getpid()):
        for pid in left:
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                os.waitpid(pid, os.WNOHANG)  # an orphan that has ended waits for us to take note
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def wait_gone(pids: Iterable[int], timeout_s: float) -> list[int]:
    """Wait until none of these processes runs; those that still do after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    left = [pid for pid in pids if is_alive(pid)]
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [pid for pid in left if is_alive(pid)]
    return left


def kill(pids: Iterable[int], sig: int = signal.SIGKILL) -> None:
    """Send a signal to each process that still runs."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sig)


def tail(log_path: Path, lines: int = 15) -> str:
    """The last lines of a log, for an error message."""
    try:
        return "\n".join(log_path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"
