"""The data plane is for those who know the cluster's secret, and for processes of its own user."""

import contextlib
import hashlib
import logging
import os
import socket
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from folkmoot.cluster.map_feed import MapFeedServer
from folkmoot.cluster.spec import ClusterSpec
from folkmoot.experts import handshake, secret, warm, wire
from folkmoot.experts.dispatch_config import DispatchConfig
from folkmoot.experts.dispatcher import Dispatcher
from folkmoot.experts.expert_map import NoReplicaError
from folkmoot.experts.secret import SecretError
from folkmoot.experts.wire import Hello, WireError
from tests.experts.hosts import Hosts
from tests.experts.test_dispatcher import batch
from tests.experts.test_hostile import EvilHost, connect, hello_to, is_cut_off, is_served, segment, with_evil

HELLO = Hello("engine", 1, "a", 2, "tcp", 64, "bfloat16", 8, 2)
NOBODY = 65534


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_an_engine_without_the_secret_is_refused(
    target: Hosts, healthy: Dispatcher, transport: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A whole real dispatcher, of another cluster; it takes the host for none of its own just as well."""
    other = str(secret.keep(tmp_path / "other"))
    config = DispatchConfig("x", other, map_path=target.write_map(), transport=transport, no_replica_timeout_s=0.05)
    d = Dispatcher(config)
    x, w, ids = batch(5, 2)
    with caplog.at_level(logging.WARNING), pytest.raises(NoReplicaError):
        d.forward(0, x, w, ids)
    assert "the host does not know this cluster's secret" in caplog.text
    assert d.rows_served == {}
    d.close()
    is_served(healthy)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("shown", ["nothing", "the host's own proof", "a wrong proof", "a number"])
def test_a_peer_that_cannot_prove_itself(target: Hosts, healthy: Dispatcher, transport: str, shown: str) -> None:
    """It is told so, and cut off, before anything of its hello counts."""
    with connect(target, transport) as sock:
        fd = segment() if transport == "shm" else None
        wire.send_line(sock, {**hello_to(target, transport), "nonce": "e" * handshake.NONCE_CHARS}, fd)
        if fd is not None:
            os.close(fd)
        challenge, _ = wire.receive_line(sock, 10)
        answers = {
            "nothing": {"ok": True},
            "the host's own proof": {"proof": challenge["proof"]},
            "a wrong proof": {"proof": "0" * 64},
            "a number": {"proof": 7},
        }
        wire.send_line(sock, answers[shown])
        refusal = str(wire.receive_line(sock, 10)[0]["error"])
        assert "secret" in refusal or "no proof" in refusal
        assert is_cut_off(sock)
    is_served(healthy)


def test_a_recorded_proof_is_of_no_use(target: Hosts, healthy: Dispatcher) -> None:
    """Each connection has a nonce of the host's."""
    hello, nonce = hello_to(target, "tcp"), "e" * handshake.NONCE_CHARS
    shared, recorded = secret.read(target.secret_file), ""
    for is_replay in (False, True):
        with connect(target, "tcp") as sock:
            wire.send_line(sock, {**hello, "nonce": nonce})
            challenge, _ = wire.receive_line(sock, 10)
            recorded = recorded or handshake.proof(shared, "engine", hello, (nonce, str(challenge["nonce"])))
            wire.send_line(sock, {"proof": recorded})
            assert ("error" if is_replay else "ok") in wire.receive_line(sock, 10)[0]
    is_served(healthy)


@pytest.mark.parametrize("shm", [False, True])
def test_a_host_without_the_secret_gets_no_row(target: Hosts, healthy: Dispatcher, shm: bool) -> None:
    """It listens where a host would, and is in the map: no engine proves anything to it, or sends it a row."""
    evil = EvilHost(target.directory, b"", shm=shm, knows=False)
    with pytest.raises(AssertionError):
        with_evil(target, evil)  # which expects that it was asked
    assert evil.was_met and not evil.was_asked
    evil.join()
    is_served(healthy)


@pytest.mark.parametrize("field", ["engine", "host", "transport", "max_rows", "engine_incarnation"])
def test_a_proof_holds_for_what_the_hello_says(field: str) -> None:
    """Someone in the middle changes the hello: neither end takes the other for one of its own."""
    shared = b"s" * 64
    (ours, near), (far, theirs) = socket.socketpair(), socket.socketpair()

    def relay() -> None:
        hello = dict(wire.receive_line(near, 5)[0])
        hello[field] = "x" if isinstance(hello[field], str) else 99
        wire.send_line(far, hello)
        wire.send_line(near, wire.receive_line(far, 5)[0])

    def engine() -> None:
        with pytest.raises(WireError, match="the host does not know this cluster's secret"):
            handshake.as_engine(ours, shared, HELLO, 5)
        wire.send_line(far, {"proof": handshake.proof(shared, "engine", asdict(HELLO), ("e" * 64, "f" * 64))})

    with ThreadPoolExecutor() as pool:
        ends = [pool.submit(relay), pool.submit(engine)]
        with pytest.raises(WireError, match="the peer does not know this cluster's secret"):
            handshake.as_host(theirs, shared, 5)
        for end in ends:
            end.result(10)
    for sock in (ours, near, far, theirs):
        sock.close()


# The file.


def test_the_file_is_its_users_own(tmp_path: Path) -> None:
    path = secret.keep(tmp_path / "secret")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first = secret.read(path)
    assert secret.read(secret.keep(path, secret.new())) == first, "who comes later finds it"
    assert os.listdir(tmp_path) == ["secret"]
    path.chmod(0o640)
    with pytest.raises(SecretError, match="0600"):
        secret.read(path)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(SecretError, match="too short"):
        secret.read(path)
    with pytest.raises(SecretError, match="cannot be read"):
        secret.read(tmp_path / "nothing")


def test_specs_do_not_show_secrets() -> None:
    spec = ClusterSpec("d", "/m", "m", "A", (0, 1), 4, "redis://:hunter2@store", "ns", "/run", "/logs")
    assert len(spec.secret) == 64
    assert spec.secret not in repr(spec) and "hunter2" not in repr(spec)


def test_the_secret_is_in_no_command_line_environment_or_log(target: Hosts, healthy: Dispatcher) -> None:
    is_served(healthy)
    shared = secret.read(target.secret_file)
    pid = target.children["a"].pid
    for name in ("cmdline", "environ"):
        assert shared not in Path(f"/proc/{pid}/{name}").read_bytes()
    logs = [path.read_bytes() for path in target.directory.glob("*.log")]
    assert logs and not any(shared in text for text in logs)


# Other users' processes.


def as_nobody(path: Path) -> str:
    """What a process of another user hears that connects there."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.setgroups([])
        os.setuid(NOBODY)
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(10)
                sock.connect(str(path))
                said = sock.recv(999)
        except OSError as e:
            said = type(e).__name__.encode()
        os.write(writing, said)
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with open(reading) as file:
        return file.read()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[None]:
    """As if an administrator had opened the way to a socket for everybody."""
    modes = {p: p.stat().st_mode for p in (path, *path.parents)}
    try:
        for p, mode in modes.items():
            p.chmod(stat.S_IMODE(mode) | (0o777 if p == path else 0o011))
        yield
    finally:
        for p, mode in modes.items():
            p.chmod(stat.S_IMODE(mode))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("kind", ["host", "warm parent", "map feed"])
def test_sockets_are_for_processes_of_the_same_user(
    target: Hosts, healthy: Dispatcher, plain_parent: warm.WarmParent, short_dir: Path, kind: str
) -> None:
    """By the modes of file and folder; and where those were opened, by the kernel's word on who connects."""
    unix = target.map.hosts["a"].unix_path
    paths = {"host": Path(unix or ""), "warm parent": plain_parent.socket_path, "map feed": short_dir / "x.feed"}
    path = paths[kind]
    if kind == "map feed":
        MapFeedServer(path, lambda event: None).publish({"version": hashlib.sha256().hexdigest()})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert as_nobody(path) == "PermissionError"
    with opened(path):
        said = as_nobody(path)
    assert "is a process of user 65534" in said if kind == "host" else said in ("", "ConnectionResetError")
    is_served(healthy)
