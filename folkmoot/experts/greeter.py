"""Who may connect to an expert host: accepts connections and shakes hands (handshake.py), each in a thread of its own.

Anybody who reaches the socket can open connections and say nothing, so a handshake has a time limit, and there are
never more than MAX_HALF_OPEN of them: the oldest gives way to the newest, so that an engine, which is done within
milliseconds, gets through also where somebody holds all of them.
"""

import collections
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from folkmoot.experts import handshake, wire
from folkmoot.experts.wire import WireError

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
MAX_HALF_OPEN = 64
ACCEPT_PAUSE_S = 0.1

Admit: TypeAlias = Callable[[socket.socket, Mapping[str, Any], int | None], Callable[[], None]]
"""admit(socket, hello, file descriptor) checks who comes, and returns what serves the connection, to be run in its
thread. Whatever it raises refuses it, and the peer is told why. The descriptor is closed afterwards."""


class Greeter:
    """Accepts on any number of listening sockets."""

    def __init__(self, admit: Admit, secret: bytes) -> None:
        self._admit = admit
        self._secret = secret
        self._lock = threading.Lock()
        self._half_open: collections.OrderedDict[socket.socket, None] = collections.OrderedDict()

    def listen(self, listener: socket.socket) -> None:
        """Accept for ever, in a thread."""
        listener.listen(128)
        threading.Thread(target=self._accept, args=(listener,), name="accept", daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
                self._begin(sock)
                threading.Thread(target=self._greet, args=(sock,), name="greet", daemon=True).start()
            except (OSError, RuntimeError) as e:  # no file descriptor, no thread to be had
                log.error("accepting failed: %s", e)
                time.sleep(ACCEPT_PAUSE_S)

    def _begin(self, sock: socket.socket) -> None:
        with self._lock:
            self._half_open[sock] = None
            if len(self._half_open) > MAX_HALF_OPEN:
                oldest, _ = self._half_open.popitem(last=False)
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread then sees its end

    def _greet(self, sock: socket.socket) -> None:
        fd = None
        try:
            if sock.family == socket.AF_UNIX:
                handshake.check_user(sock)
            hello, fd = handshake.as_host(sock, self._secret, HANDSHAKE_TIMEOUT_S)
            serve = self._admit(sock, hello, fd)
            wire.send_line(sock, {"ok": True})
        except Exception as e:  # whatever a stranger says is no reason to fail
            log.warning("refused a connection: %s", e if isinstance(e, WireError | OSError) else repr(e))
            with contextlib.suppress(OSError):
                wire.send_line(sock, {"error": str(e)})
            sock.close()
            return
        finally:
            with self._lock:
                self._half_open.pop(sock, None)
            if fd is not None:
                os.close(fd)
        serve()
