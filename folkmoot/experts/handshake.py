"""How an engine and an expert host prove to each other that they are of one cluster, once for each connection.

    engine  hello with a nonce N, and with shared memory the memfd
    host    a nonce M, and HMAC-SHA256(secret, "host", hello, N, M)
    engine  HMAC-SHA256(secret, "engine", hello, N, M)
    host    {"ok": true}, or {"error": why} at any point

The secret is never sent. A proof holds for one connection (both nonces are in it), for one direction (who proves is in
it), and for what the hello says. It does not keep others from reading or changing rows on their way: they are neither
encrypted nor signed, so the network between nodes has to be one that is trusted.
"""

import hmac
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import asdict

from folkmoot.experts import wire
from folkmoot.experts.wire import Hello, WireError

NONCE_CHARS = 64
UCRED = struct.Struct("3i")


def proof(secret: bytes, who: str, hello: Mapping[str, object], nonces: tuple[str, str]) -> str:
    """What `who` ("engine" or "host") shows; `nonces` are the engine's and the host's."""
    said = json.dumps([who, hello, *nonces], sort_keys=True, separators=(",", ":"))
    return hmac.new(secret, said.encode(), "sha256").hexdigest()


def as_engine(sock: socket.socket, secret: bytes, hello: Hello, timeout_s: float, fd: int | None = None) -> None:
    """The engine's side, to the end. Raises WireError where the host refuses or cannot prove itself, OSError."""
    until, nonce = time.monotonic() + timeout_s, secrets.token_hex(NONCE_CHARS // 2)
    said = asdict(hello)
    wire.send_line(sock, {**said, "nonce": nonce}, fd)
    answer = _receive(sock, until)
    nonces = nonce, _nonce_of(answer)
    if not hmac.compare_digest(_text_of(answer, "proof"), proof(secret, "host", said, nonces)):
        raise WireError("the host does not know this cluster's secret")
    wire.send_line(sock, {"proof": proof(secret, "engine", said, nonces)})
    if _receive(sock, until).get("ok") is not True:
        raise WireError("the host did not say that it is ready")


def as_host(sock: socket.socket, secret: bytes, timeout_s: float) -> tuple[dict[str, object], int | None]:
    """The host's side, up to its {"ok": true}: what the engine said, and the descriptor that came beside it, which the
    caller closes. Raises WireError where the engine cannot prove itself, OSError."""
    until = time.monotonic() + timeout_s
    hello, fd = wire.receive_line(sock, timeout_s)
    try:
        nonces = _nonce_of(hello), secrets.token_hex(NONCE_CHARS // 2)
        del hello["nonce"]
        wire.send_line(sock, {"nonce": nonces[1], "proof": proof(secret, "host", hello, nonces)})
        if not hmac.compare_digest(_text_of(_receive(sock, until), "proof"), proof(secret, "engine", hello, nonces)):
            raise WireError("the peer does not know this cluster's secret")
    except BaseException:
        if fd is not None:
            os.close(fd)
        raise
    return hello, fd


def check_user(sock: socket.socket) -> None:
    """Raises WireError where the process at the other end of a unix socket is another user's, by the kernel's word."""
    _, uid, _ = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    if uid != os.geteuid():
        raise WireError(f"the peer is a process of user {uid}, not of {os.geteuid()}")


def _receive(sock: socket.socket, until: float) -> dict[str, object]:
    """A line without a descriptor. Raises WireError also for what the peer calls an error."""
    message, fd = wire.receive_line(sock, max(0.0, until - time.monotonic()))
    if fd is not None:
        os.close(fd)
    if "error" in message:
        raise WireError(f"refused: {str(message['error'])[: wire.MAX_ERROR_BYTES]}")
    return message


def _nonce_of(message: Mapping[str, object]) -> str:
    nonce = _text_of(message, "nonce")
    if len(nonce) != NONCE_CHARS:
        raise WireError(f"a nonce must have {NONCE_CHARS} characters, has {len(nonce)}")
    return nonce


def _text_of(message: Mapping[str, object], name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str) or not value.isascii():
        raise WireError(f"no {name} came")
    return value
