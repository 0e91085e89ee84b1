"""The engine's end of the map feed, against dispatchers that misbehave."""

import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from folkmoot.cluster import map_feed
from folkmoot.cluster.map_feed import MapFeedServer

MAP = {"version": 1, "hosts": [], "layers": {}}


class Feed:
    """A server with a map, and what it was told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: Queue[dict[str, Any]] = Queue()
        self.server = MapFeedServer(path, self.events.put)
        self.server.publish(MAP)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        sock.settimeout(10)
        return sock

    def is_serving(self) -> None:
        """A sound dispatcher gets the map, and its event arrives."""
        with self.connect() as sock:
            assert json.loads(sock.makefile().readline()) == {"map": MAP}
            sock.sendall(b'{"event": "ready"}\n')
            assert self.events.get(timeout=10) == {"event": "ready"}


@pytest.fixture
def feed(short_folder: Path) -> Feed:
    return Feed(short_folder / "feed.sock")


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fm-") as name:
        yield Path(name)


def is_cut_off(sock: socket.socket) -> bool:
    try:
        while sock.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.parametrize("text", [b"nonsense\n", b"\xff\xfe\n", b"[" * 5000 + b"\n", b"\n\n\n"])
def test_nonsense_is_logged_and_the_next_event_counts(feed: Feed, text: bytes) -> None:
    with feed.connect() as sock:
        sock.sendall(text + b'{"event": "rows"}\n')
        assert feed.events.get(timeout=10) == {"event": "rows"}
    feed.is_serving()


def test_an_event_without_end_is_cut_off(feed: Feed) -> None:
    with feed.connect() as sock:
        sent = 0
        try:
            while sent < 4 * map_feed.MAX_EVENT_BYTES:
                sent += sock.send(b"x" * 65536)
        except OSError:
            pass
        assert is_cut_off(sock)
    assert sent < 4 * map_feed.MAX_EVENT_BYTES
    feed.is_serving()


def test_one_who_does_not_read_holds_up_nobody_for_long(feed: Feed) -> None:
    """Its buffers fill up; then it is given up, and the others have their maps."""
    with feed.connect() as deaf, feed.connect() as sound:
        lines = sound.makefile()
        assert json.loads(lines.readline()) == {"map": MAP}
        assert deaf.recv(1), "it is there too"
        large = {**MAP, "version": 2, "hosts": ["x" * (1 << 20)]}
        publishing = threading.Thread(target=feed.server.publish, args=(large,))
        publishing.start()
        assert json.loads(lines.readline()) == {"map": large}
        publishing.join(20)
        assert not publishing.is_alive()
        assert is_cut_off(deaf)


def test_peers_are_bounded(feed: Feed) -> None:
    peers = [feed.connect() for _ in range(map_feed.MAX_PEERS)]
    for sock in peers:
        assert sock.makefile().readline()
    with feed.connect() as extra:
        assert is_cut_off(extra)
    for sock in peers:
        sock.close()
    eventually_serving(feed)


def eventually_serving(feed: Feed) -> None:
    """Once it has seen that others have left."""
    for _ in range(100):
        with feed.connect() as sock:
            if sock.makefile().readline():
                return
    raise AssertionError("not serving any more")
