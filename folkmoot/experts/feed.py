"""The side channel by which a dispatcher gets new expert maps and tells what it saw.

A worker that is blocked in a layer cannot serve calls, so the maps come over a unix socket of their own, read by a
thread. Newline-delimited JSON: down {"map": {...}}; up {"event": "ready"} and {"event": "host_dead", "host",
"incarnation", "reason"}. Down {"ask": "rows"} is answered by {"event": "rows", ...}, the rows of each logical expert
(expert_rows.py), and {"ask": "counts"} alike by what was done (dispatch_counts.py). Also up: {"event": "no_replica",
"reason"}, which asks to end all running requests; {"ended": number} down says that they are.
"""

import contextlib
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from folkmoot.experts.expert_map import ExpertMap

log = logging.getLogger(__name__)

RECONNECT_S = 0.2
SEND_TIMEOUT = struct.pack("ll", 1, 0)
"""A second (a timeval): a layer must not wait for one who does not read."""


class MapFeed:
    """Calls `on_map` with each map that arrives, and one of `answers` when it is asked (both on its own thread), and
    sends events up. Reconnects for ever."""

    def __init__(
        self, path: str, on_map: Callable[[ExpertMap], None], answers: Mapping[str, Callable[[], dict[str, Any]]]
    ) -> None:
        self._path, self._on_map, self._answers = path, on_map, answers
        self._sock: socket.socket | None = None
        self._lock = threading.Lock()
        self._unsent: list[dict[str, Any]] = []
        self._closed = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="map-feed", daemon=True)
        self._thread.start()

    def send(self, event: dict[str, Any]) -> None:
        """Send an event now, or as soon as the feed is connected again. Never blocks for long, never raises."""
        with self._lock:
            self._unsent.append(event)
            self._flush()

    def end_requests(self, reason: str, timeout_s: float) -> bool:
        """Ask for the end of all running requests; whether that was confirmed within `timeout_s`. Blocks."""
        self._ended.clear()
        self.send({"event": "no_replica", "reason": reason})
        return self._ended.wait(timeout_s)

    def close(self) -> None:
        """Stop the thread and close the connection."""
        self._closed = True
        with self._lock:
            self._hang_up()

    def _flush(self) -> None:
        if self._sock is None:
            del self._unsent[:-1000]
            return
        try:
            while self._unsent:
                self._sock.sendall(json.dumps(self._unsent[0]).encode() + b"\n")
                self._unsent.pop(0)
        except OSError:  # gone, or it takes nothing; a part of a line may have been sent
            self._hang_up()

    def _hang_up(self) -> None:
        """The reader then sees the end, and reconnects."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        self._sock = None

    def _run(self) -> None:
        while not self._closed:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                    sock.connect(self._path)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SEND_TIMEOUT)
                    with self._lock:
                        self._sock = sock
                        self._unsent.insert(0, {"event": "ready"})
                        self._flush()
                    self._read(sock)
            except OSError as e:
                log.debug("map feed %s: %s", self._path, e)
            finally:
                with self._lock:
                    self._sock = None
            time.sleep(RECONNECT_S)

    def _read(self, sock: socket.socket) -> None:
        with sock.makefile("rb") as lines:
            for line in lines:
                try:
                    message = json.loads(line)
                    self._take(message)
                except Exception:
                    log.exception("a message of the map feed could not be used")

    def _take(self, message: dict[str, Any]) -> None:
        if "ended" in message:
            self._ended.set()
        elif "ask" in message:
            self.send({"event": message["ask"], **self._answers[message["ask"]]()})
        else:
            self._on_map(ExpertMap.from_json(json.dumps(message["map"])))


def read_map(path: str) -> ExpertMap:
    """The one map in a file, for tests and benchmarks that need no router."""
    return ExpertMap.from_json(Path(path).read_text())
