"""The map feed against a real unix socket: maps down, events up, and it comes back after the server was gone."""

import json
import socket
import time
from pathlib import Path

import numpy as np
import torch

from folkmoot.experts import expert_map as em
from folkmoot.experts.dispatch_config import DispatchConfig
from folkmoot.experts.dispatcher import Dispatcher
from folkmoot.experts.expert_map import HostAddress
from folkmoot.experts.expert_rows import ExpertRows
from tests.experts.hosts import Hosts, expected
from tests.experts.test_dispatcher import batch


def listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    server.settimeout(10)
    return server


def test_maps_arrive_and_deaths_are_told(hosts: Hosts) -> None:
    """Map, work, a host dies, the event comes up; a new map after a reconnection brings its replacement."""
    path = hosts.directory / "feed.sock"
    server = listen(path)
    victim = hosts.start("a", hosts.all_layers(range(8)))
    hosts.start("b", hosts.all_layers(range(8)))
    d = Dispatcher(DispatchConfig("test", hosts.secret_file, feed=str(path)))
    x, w, ids = batch(8, 2)
    connection, _ = server.accept()
    connection.settimeout(10)
    lines = connection.makefile("rb")
    assert json.loads(lines.readline()) == {"event": "ready"}
    connection.sendall(b"nonsense\n" + json.dumps({"map": json.loads(hosts.map.to_json())}).encode() + b"\n")
    assert torch.equal(d.forward(0, x, w, ids)[0], expected(0, x, w, ids))
    connection.sendall(b'{"ask": "rows"}\n')
    answer = json.loads(lines.readline())
    rows = ExpertRows.from_json(answer)
    assert (answer["event"], rows.layers) == ("rows", (0,))
    assert rows.counts.tolist() == [np.bincount(ids.ravel().numpy(), minlength=8).tolist()]
    victim.kill()
    assert torch.equal(d.forward(3, x, w, ids)[0], expected(3, x, w, ids))
    event = json.loads(lines.readline())
    assert (event["event"], event["host"]) == ("host_dead", "a")
    assert event["incarnation"] == hosts.map.hosts["a"].incarnation

    lines.close()
    connection.close()  # the engine's frontend is gone for a moment
    again, _ = server.accept()
    hosts.start("c", hosts.all_layers(range(8)))
    newer = em.remove_host(em.remove_host(hosts.map, "a"), "b")
    again.sendall(json.dumps({"map": json.loads(newer.to_json())}).encode() + b"\n")
    deadline = time.monotonic() + 10
    while d.rows_served.get("c", 0) == 0:
        assert torch.equal(d.forward(0, x, w, ids)[0], expected(0, x, w, ids))
        assert time.monotonic() < deadline
    d.close()
    again.close()
    server.close()


def test_an_unreachable_host_is_reported_as_dead(hosts: Hosts) -> None:
    path = hosts.directory / "feed.sock"
    server = listen(path)
    hosts.start("a", hosts.all_layers(range(8)))
    gone = HostAddress("gone", 1, hosts.map.hosts["a"].node, str(hosts.directory / "gone.sock"), None)
    m = em.add_host(hosts.map, gone, hosts.all_layers(range(8)))
    d = Dispatcher(DispatchConfig("test", hosts.secret_file, feed=str(path)))
    connection, _ = server.accept()
    connection.settimeout(10)
    connection.sendall(json.dumps({"map": json.loads(m.to_json())}).encode() + b"\n")
    x, w, ids = batch(8, 2)
    d.forward(0, x, w, ids)
    lines = connection.makefile("rb")
    events = [json.loads(lines.readline()) for _ in range(2)]
    assert {"event": "ready"} in events
    assert [e["host"] for e in events if e["event"] == "host_dead"] == ["gone"]
    d.close()
    connection.close()
    server.close()
