"""Whoever speaks to a socket of the data plane may say anything, at any speed: nothing crashes or hangs, healthy
engines are served with exact rows meanwhile, and the offender is cut off.

To fuzz for longer, set FOLKMOOT_FUZZ to a number of examples.
"""

import contextlib
import fcntl
import json
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folkmoot.experts import expert_map as em
from folkmoot.experts import greeter, handshake, native, secret, warm, wire
from folkmoot.experts.dispatcher import Dispatcher
from folkmoot.experts.expert_map import HostAddress
from folkmoot.experts.node import node_id
from folkmoot.experts.wire import Hello
from tests.experts.hosts import Hosts, expected
from tests.experts.test_dispatcher import HIDDEN, batch, dispatcher

EXAMPLES = int(os.environ.get("FOLKMOOT_FUZZ", "60"))
fuzz = settings(deadline=None, max_examples=EXAMPLES)
MAX_ROWS = 64
SIZES = wire.sizes(HIDDEN, 2, MAX_ROWS)


def is_served(d: Dispatcher, seed: int = 0) -> None:
    x, w, ids = batch(5, 2, seed=seed)
    assert torch.equal(d.forward(0, x, w, ids)[0], expected(0, x, w, ids))


def connect(hosts: Hosts, transport: str) -> socket.socket:
    address = hosts.map.hosts["a"]
    if transport == "tcp":
        assert address.tcp is not None
        ip, _, port = address.tcp.rpartition(":")
        sock = socket.create_connection((ip, int(port)))
    else:
        assert address.unix_path is not None
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address.unix_path)
    sock.settimeout(10)
    return sock


def hello_to(hosts: Hosts, transport: str, /, **changes: object) -> dict[str, object]:
    incarnation = hosts.map.hosts["a"].incarnation
    good = Hello("evil", 7, "a", incarnation, transport, HIDDEN, "bfloat16", MAX_ROWS, 2)
    return {**asdict(good), **changes}


def introduce(hosts: Hosts, sock: socket.socket, hello: dict[str, object], fd: int | None = None) -> dict[str, object]:
    """Shake hands as one who knows the secret; what the host then says to the hello."""
    shared, nonce = secret.read(hosts.secret_file), "e" * handshake.NONCE_CHARS
    wire.send_line(sock, {**hello, "nonce": nonce}, fd)
    challenge, _ = wire.receive_line(sock, 10)
    nonces = nonce, str(challenge["nonce"])
    assert challenge["proof"] == handshake.proof(shared, "host", hello, nonces)
    wire.send_line(sock, {"proof": handshake.proof(shared, "engine", hello, nonces)})
    return wire.receive_line(sock, 10)[0]


def segment(size: int = SIZES.segment, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) -> int:
    fd = os.memfd_create("evil", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def is_cut_off(sock: socket.socket, at_end: bool = False) -> bool:
    """Whether the peer ends the connection (perhaps after telling why); `at_end`: once we have said all."""
    try:
        if at_end:
            sock.shutdown(socket.SHUT_WR)
        while sock.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def send(sock: socket.socket, *parts: bytes) -> None:
    with contextlib.suppress(OSError):  # cut off already
        for part in parts:
            sock.sendall(part)


texts = st.binary(max_size=300) | st.binary(max_size=300).map(lambda b: b + b"\n") | st.just(b"[" * 4000 + b"\n")
numbers = st.integers() | st.floats() | st.text(max_size=8) | st.none() | st.lists(st.integers(), max_size=2)
HARMLESS = {"engine", "engine_incarnation", "top_k", "hidden", "max_rows"}
"""what a host may take from an engine in many ways"""
hellos = st.dictionaries(st.sampled_from([*Hello.__slots__, "more"]), numbers, min_size=1, max_size=3)


@fuzz
@given(st.sampled_from(["tcp", "shm"]), texts)
def test_a_host_is_spoken_to_by_strangers(target: Hosts, healthy: Dispatcher, transport: str, text: bytes) -> None:
    with connect(target, transport) as sock:
        send(sock, text)
        assert is_cut_off(sock, at_end=True)
    is_served(healthy)


@fuzz
@given(st.sampled_from(["tcp", "shm"]), hellos)
def test_a_hello_with_wrong_fields(target: Hosts, healthy: Dispatcher, transport: str, changes: dict) -> None:
    """By one who knows the secret: it is a way to be trusted, and none to be believed."""
    hello = hello_to(target, transport, **changes)
    with connect(target, transport) as sock:
        answer = introduce(target, sock, json.loads(json.dumps(hello)))
        assert "error" in answer or (transport == "tcp" and set(changes) <= HARMLESS)
        assert is_cut_off(sock, at_end=True)
    is_served(healthy)


headers = st.fixed_dictionaries(
    {},
    optional={
        "magic": st.integers(0, 2**32 - 1), "kind": st.integers(0, 2**16 - 1), "flags": st.integers(0, 2**16 - 1),
        "seq": st.integers(0, 2**64 - 1), "engine_incarnation": st.integers(0, 2**64 - 1),
        "host_incarnation": st.integers(0, 2**64 - 1), "layer": st.integers(0, 2**32 - 1),
        "rows": st.integers(0, 2**32 - 1), "pairs": st.integers(0, 2**32 - 1),
        "payload_bytes": st.integers(0, 2**32 - 1), "map_version": st.integers(0, 2**64 - 1),
    },
)  # fmt: skip


def request(hosts: Hosts, **changes: int) -> native.Header:
    """The header of a sound request of two pairs, but for `changes`."""
    header = native.Header(
        magic=wire.MAGIC, kind=wire.REQUEST, seq=1, engine_incarnation=7, layer=0, rows=2, pairs=2,
        host_incarnation=hosts.map.hosts["a"].incarnation, payload_bytes=wire.align(2 * HIDDEN * 2) + 8,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(header, name, value)
    return header


@fuzz
@given(headers, st.binary(max_size=2000), st.booleans())
def test_requests_over_tcp(target: Hosts, healthy: Dispatcher, changes: dict, payload: bytes, whole: bool) -> None:
    """Right, wrong, too short, too long: answered, refused with a reason, or cut off."""
    header = request(target, **changes)
    with connect(target, "tcp") as sock:
        assert introduce(target, sock, hello_to(target, "tcp")) == {"ok": True}
        if whole:
            payload = payload.ljust(min(header.payload_bytes, 1 << 20), b"\0")[: header.payload_bytes]
        send(sock, bytes(header), payload)
        assert is_cut_off(sock, at_end=True)
    is_served(healthy)


@fuzz
@given(headers, st.binary(min_size=1, max_size=400), st.integers(0, 2**32 - 1), st.booleans())
def test_a_segment_that_is_scribbled_over(
    target: Hosts, healthy: Dispatcher, changes: dict, junk: bytes, seed: int, is_sound: bool
) -> None:
    """A request is published, and while the host reads it, header, slots, flags and rows change under its hands."""
    fd = segment()
    with connect(target, "shm") as sock, mmap.mmap(fd, SIZES.segment) as memory:
        assert introduce(target, sock, hello_to(target, "shm"), fd) == {"ok": True}
        os.close(fd)
        rng = np.random.default_rng(seed)
        for seq in range(1, 4):
            memory[wire.OFF_REQUEST_HEADER : wire.OFF_REQUEST_HEADER + 64] = bytes(
                request(target, **{"seq": seq, **({} if is_sound else changes)})
            )
            memory[0:8] = seq.to_bytes(8, "little")
            send(sock, b"!")
            for at in rng.integers(0, SIZES.segment - len(junk), 200).tolist():
                memory[at : at + len(junk)] = junk
        is_served(healthy)
        assert is_cut_off(sock, at_end=True)
    is_served(healthy)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("none", lambda: None),
        ("a pipe", lambda: os.pipe()[0]),
        ("no memory", lambda: os.open("/dev/null", os.O_RDWR)),
        ("unsealed", lambda: segment(seals=0)),
        ("too small", lambda: segment(size=4096)),
        ("read-only", lambda: segment(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)),
    ],
)
def test_a_segment_that_is_none(target: Hosts, healthy: Dispatcher, kind: str, make: Callable[[], int | None]) -> None:
    fd = make()
    with connect(target, "shm") as sock:
        assert "error" in introduce(target, sock, hello_to(target, "shm"), fd), kind
        assert is_cut_off(sock)
    if fd is not None:
        os.close(fd)
    is_served(healthy)


def test_descriptors_do_not_pile_up_in_a_host(target: Hosts, healthy: Dispatcher) -> None:
    """A line in pieces, each with a descriptor: all are closed."""
    pid = target.children["a"].pid
    is_served(healthy)
    before = len(os.listdir(f"/proc/{pid}/fd"))
    for _ in range(20):
        with connect(target, "shm") as sock:
            for piece in (b"{", b'"a":', b"1}\n"):
                fd = segment(size=4096)
                socket.send_fds(sock, [piece], [fd])
                os.close(fd)
            assert is_cut_off(sock)
    eventually(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before, "descriptors are closed")


def test_a_flood_of_doorbells(target: Hosts, healthy: Dispatcher) -> None:
    fd = segment()
    with connect(target, "shm") as sock:
        assert introduce(target, sock, hello_to(target, "shm"), fd) == {"ok": True}
        os.close(fd)
        for _ in range(200):
            send(sock, b"!" * 4096)
        assert is_cut_off(sock)
    is_served(healthy)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_half_open_handshakes_are_bounded_and_keep_nobody_out(
    target: Hosts, healthy: Dispatcher, transport: str
) -> None:
    """Far more silent connections than a host greets at once: its threads stay few, engines old and new are served."""
    pid = target.children["a"].pid
    silent = [connect(target, transport) for _ in range(4 * greeter.MAX_HALF_OPEN)]
    try:
        for sock in silent[::7]:
            send(sock, b"{")
        is_served(healthy)
        eventually(lambda: threads_of(pid) <= greeter.MAX_HALF_OPEN + 20, f"threads: {threads_of(pid)}")
        newcomer = dispatcher(target, transport=transport)
        is_served(newcomer)
        newcomer.close()
    finally:
        for sock in silent:
            sock.close()
    eventually(lambda: threads_of(pid) < greeter.MAX_HALF_OPEN, "and their threads end")


def test_a_slow_hello_is_cut_off(target: Hosts, healthy: Dispatcher) -> None:
    """A byte now and then: the whole handshake has a time limit, not each byte."""
    with connect(target, "tcp") as sock:
        sock.settimeout(0.2)
        began = time.monotonic()
        while not ended(sock):
            assert time.monotonic() - began < 60, "not cut off"
            is_served(healthy)
    assert time.monotonic() - began >= greeter.HANDSHAKE_TIMEOUT_S - 0.5


def ended(sock: socket.socket) -> bool:
    """One more space; whether the peer has had enough, within the socket's time-out."""
    try:
        sock.sendall(b" ")
        return not sock.recv(1)
    except TimeoutError:
        return False
    except OSError:
        return True


def threads_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def eventually(check: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


# Towards the dispatcher: a host that answers nonsense.


class EvilHost:
    """Listens like a host, greets with `welcome` (None: as it should be), and answers each request with `answer`."""

    def __init__(
        self, folder: Path, answer: bytes | dict, welcome: bytes | None = None, shm: bool = False, knows: bool = True
    ) -> None:
        self._answer, self._welcome, self._shm = answer, welcome, shm
        self._secret = secret.read(folder / "secret") if knows else b"s" * 64
        if shm:
            self._listener = socket.socket(socket.AF_UNIX)
            path = str(folder / f"evil-{time.monotonic_ns()}.sock")
            self._listener.bind(path)
            self._listener.listen()
            self.address = HostAddress("evil", 5, node_id(), path)
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.address = HostAddress("evil", 5, "far", None, f"127.0.0.1:{self._listener.getsockname()[1]}")
        self.was_asked = self.was_met = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError, wire.WireError), self._listener:
            sock, _ = self._listener.accept()
            sock.settimeout(10)
            with sock:
                if self._welcome is not None:
                    wire.receive_line(sock, 10)
                    self.was_asked = True
                    sock.sendall(self._welcome)
                else:
                    self.was_met = True
                    hello, fd = handshake.as_host(sock, self._secret, 10)
                    wire.send_line(sock, {"ok": True})
                    (self._serve_shm if self._shm else self._serve_tcp)(sock, hello, fd)
                while sock.recv(4096):
                    pass

    def _reply(self, header: native.Header) -> bytes:
        """A right reply's header, but for the changes; then the bytes."""
        if isinstance(self._answer, bytes):
            return self._answer
        header.kind, header.payload_bytes = wire.REPLY, header.rows * HIDDEN * 2
        for name, value in self._answer.items():
            setattr(header, name, value)
        return bytes(header) + bytes(min(header.payload_bytes, 1 << 16))

    def _serve_tcp(self, sock: socket.socket, hello: dict, fd: int | None) -> None:
        header = native.Header()
        wire.receive_exactly(sock, memoryview(header).cast("B"))
        payload = bytearray(header.payload_bytes)
        wire.receive_exactly(sock, memoryview(payload))
        self.was_asked = True
        sock.sendall(self._reply(header))
        sock.shutdown(socket.SHUT_WR)

    def _serve_shm(self, sock: socket.socket, hello: dict, fd: int | None) -> None:
        assert fd is not None
        with mmap.mmap(fd, os.fstat(fd).st_size) as memory:
            os.close(fd)
            while int.from_bytes(memory[:8], "little") == 0:
                time.sleep(0.001)
            header = native.Header.from_buffer_copy(memory, wire.OFF_REQUEST_HEADER)
            self.was_asked = True
            reply = self._reply(header)
            memory[wire.OFF_REPLY_HEADER : wire.OFF_REPLY_HEADER + 64] = reply[:64].ljust(64, b"\0")
            memory[wire.OFF_REPLY_FLAG : wire.OFF_REPLY_FLAG + 8] = memory[:8]
            sock.sendall(b"!")
            for _ in range(50):
                memory[: len(reply)] = reply

    def join(self) -> None:
        self._listener.close()
        self._thread.join(15)
        assert not self._thread.is_alive()


def with_evil(target: Hosts, evil: EvilHost) -> None:
    """An engine that has the evil host and the good one: exact rows, and the evil one is dropped."""
    both = em.add_host(target.map, evil.address, target.all_layers(range(8)))
    path = target.directory / "evil-map.json"
    path.write_text(both.to_json())
    sound, target.map = target.map, both
    try:
        d = dispatcher(target, stall_s=0.2, call_timeout_s=1.0)  # some evil hosts just never answer
    finally:
        target.map = sound
    is_served(d)
    is_served(d, 1)
    assert evil.was_asked
    assert d._dead == {("evil", 5)}
    d.close()
    evil.join()


def is_wrong(changes: dict[str, int]) -> bool:
    """Whether a reply with such changes differs from the right one, which has 1 to 10 rows, whatever else it says."""
    right = {"kind": {wire.REPLY}, "flags": {0}, "seq": {1}, "layer": {0}, "magic": {wire.MAGIC}, "map_version": {2}}
    right |= {"rows": set(range(11)), "pairs": set(range(11)), "payload_bytes": {n * 2 * HIDDEN for n in range(11)}}
    return any(value not in right.get(name, set()) for name, value in changes.items())


wrong_replies = headers.filter(is_wrong)


@fuzz
@given(st.binary(max_size=300) | wrong_replies, st.booleans())
def test_a_host_that_replies_nonsense(target: Hosts, healthy: Dispatcher, answer: bytes | dict, shm: bool) -> None:
    with_evil(target, EvilHost(target.directory, answer, shm=shm))
    is_served(healthy)


@pytest.mark.parametrize("welcome", [b"", b"\n", b"[]\n", b"{}\n", b"\xff\n", b"[" * 4000 + b"\n", b"x" * 9000, b"{"])
def test_a_host_that_greets_with_nonsense(target: Hosts, healthy: Dispatcher, welcome: bytes) -> None:
    with_evil(target, EvilHost(target.directory, b"", welcome=welcome + b"\n" * (welcome == b"{")))
    is_served(healthy)


# The warm parent and control channels.


@fuzz
@given(st.binary(max_size=200), st.booleans())
def test_a_warm_parent_is_spoken_to_by_strangers(plain_parent: warm.WarmParent, text: bytes, ends: bool) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(plain_parent.socket_path))
        sock.settimeout(10)
        send(sock, text + b"\n" * ends)
        if b"\n" in text or ends:
            assert is_cut_off(sock)


def test_silent_connections_keep_no_child_from_being_forked(plain_parent: warm.WarmParent, tmp_path: Path) -> None:
    silent = []
    try:
        for _ in range(2 * warm.MAX_WAITING):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(plain_parent.socket_path))
            send(sock, b'{"entry": ')
            silent.append(sock)
        began = time.monotonic()
        child = plain_parent.spawn("tests.experts.entries:echo", {}, tmp_path / "log")
        assert child.receive(10) == {"spec": {}}
        assert time.monotonic() - began < warm.REQUEST_TIMEOUT_S, "it did not wait for them"
        for sock in silent:
            sock.settimeout(2 * warm.REQUEST_TIMEOUT_S)
            assert is_cut_off(sock)  # also: the child has not inherited it
        child.control.close()
        assert child.wait(5)
    finally:
        for sock in silent:
            sock.close()


@pytest.mark.parametrize("line", [b"nonsense\n", b"[]\n", b"[" * 10_000 + b"\n", b"\xff\xfe\n"])
def test_a_child_ends_when_its_owner_speaks_nonsense(
    plain_parent: warm.WarmParent, tmp_path: Path, line: bytes
) -> None:
    child = plain_parent.spawn("tests.experts.entries:sleep", {}, tmp_path / "log")
    assert child.receive(10) == {"event": "ready"}
    child.control._sock.sendall(line)
    assert child.wait(5)
    child.control.close()
