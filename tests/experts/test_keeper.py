"""A process whose memory is kept dies at once, however much of it there is; and nothing else of it is kept."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from folkmoot.experts import keeper

MEBIBYTES = 200


@contextmanager
def kept() -> Iterator[tuple[int, int, socket.socket]]:
    """A process with some memory that has a keeper: both ids, and a socket whose other end it holds."""
    ours, theirs = socket.socketpair()
    owner = os.fork()
    if owner == 0:
        ours.close()
        caught = []
        signal.signal(signal.SIGUSR1, lambda *_: caught.append(1))
        memory = bytearray(os.urandom(1 << 20) * MEBIBYTES)
        theirs.sendall(b"%d\n" % (keeper.keep_memory() or 0))
        while theirs.recv(1):
            theirs.sendall(b"%d %d\n" % (len(caught), len(memory)))
        os._exit(0)
    theirs.close()
    pid = int(ours.recv(100))
    assert pid
    try:
        yield owner, pid, ours
    finally:
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        os.waitpid(pid, 0)


def status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((line.split()[1] for line in lines if line.startswith(f"{name}:")), "")


def eventually(check: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30.0
    while not check():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_a_death_is_seen_before_the_memory_is_given_back() -> None:
    with kept() as (owner, pid, sock):
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: status(pid, "State") == "T")
        os.kill(owner, signal.SIGKILL)
        sock.settimeout(30.0)
        assert sock.recv(1) == b"", "its socket is closed"
        eventually(lambda: status(owner, "State") == "Z")
        assert int(status(pid, "VmRSS")) > MEBIBYTES << 10, "the memory is there"
        os.kill(pid, signal.SIGCONT)
        eventually(lambda: status(pid, "State") == "Z" and not status(pid, "VmRSS"))


def test_the_keeper_holds_no_file_takes_no_signal_and_gives_way() -> None:
    with kept() as (owner, pid, sock):
        assert Path(f"/proc/{pid}/comm").read_text().strip() == keeper.NAME
        (only,) = Path(f"/proc/{pid}/fd").iterdir()
        assert "pidfd" in os.readlink(only)
        assert status(pid, "PPid") == status(owner, "PPid") == str(os.getpid())
        assert os.getpriority(os.PRIO_PROCESS, pid) == 19 and os.getpriority(os.PRIO_PROCESS, owner) < 19
        os.kill(pid, signal.SIGUSR1)
        os.kill(pid, signal.SIGTERM)
        os.kill(owner, signal.SIGUSR1)
        sock.sendall(b"?")
        assert sock.recv(100) == b"1 %d\n" % (MEBIBYTES << 20), "the owner's own handler ran once, for its own signal"
        assert status(pid, "State") == "S"


def test_an_owner_that_ends_by_itself_leaves_no_keeper() -> None:
    with kept() as (owner, pid, sock):
        sock.shutdown(socket.SHUT_WR)
        eventually(lambda: status(owner, "State") == status(pid, "State") == "Z")


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert keeper.keep_memory() is None
    assert "not built" in caplog.text
