"""The engine's end of the side channel to its dispatcher (folkmoot.experts.feed): maps down, events up.

Runs on a thread of its own, because the engine's event loop is busy while vLLM loads, and a dispatcher that waits for
its first map must not wait for that. Newline-delimited JSON both ways.
"""

import contextlib
import json
import logging
import selectors
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from folkmoot.experts.handshake import check_user
from folkmoot.experts.wire import WireError

log = logging.getLogger(__name__)

MAX_PEERS = 64
MAX_EVENT_BYTES = 1 << 20


class MapFeedServer:
    """Sends the latest map to each dispatcher that connects, and each new one to all. `on_event` runs on its thread."""

    def __init__(self, path: Path, on_event: Callable[[dict[str, Any]], None]) -> None:
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(8)
        self._on_event = on_event
        self._lock = threading.Lock()
        self._latest: bytes | None = None
        self._peers: dict[socket.socket, bytearray] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        threading.Thread(target=self._run, name="map-feed", daemon=True).start()

    def publish(self, expert_map: dict[str, Any]) -> None:
        """Send a map (as JSON data) to all dispatchers, and to those that will connect. Any thread may call."""
        with self._lock:
            self._latest = _line({"map": expert_map})
            for peer in list(self._peers):
                self._send(peer, self._latest)

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to all dispatchers that are connected. Any thread may call."""
        with self._lock:
            for peer in list(self._peers):
                self._send(peer, _line(message))

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._read(key.fileobj)

    def _accept(self) -> None:
        peer, _ = self._listener.accept()
        try:
            check_user(peer)
        except (WireError, OSError) as e:
            log.warning("refused a connection: %s", e)
            peer.close()
            return
        if len(self._peers) >= MAX_PEERS:
            log.warning("a dispatcher too many")
            peer.close()
            return
        peer.settimeout(5.0)  # a dispatcher reads on a thread of its own, so a full buffer means that it hangs
        with self._lock:
            self._peers[peer] = bytearray()
            self._selector.register(peer, selectors.EVENT_READ)
            if self._latest is not None:
                self._send(peer, self._latest)

    def _send(self, peer: socket.socket, line: bytes) -> None:
        try:
            peer.sendall(line)
        except OSError as e:
            log.warning("a dispatcher takes no map: %s", e)
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)  # the reader then sees its end, and forgets it

    def _read(self, peer: socket.socket) -> None:
        try:
            chunk = peer.recv(1 << 16)
        except OSError:
            chunk = b""
        if not chunk or len(self._peers[peer]) > MAX_EVENT_BYTES:
            with self._lock:
                self._selector.unregister(peer)
                del self._peers[peer]
            peer.close()
            return
        buffer = self._peers[peer]
        buffer += chunk
        *lines, rest = bytes(buffer).split(b"\n")
        self._peers[peer] = bytearray(rest)
        for line in lines:
            try:
                self._on_event(json.loads(line))
            except Exception:
                log.exception("an event of the dispatcher could not be used")


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"
