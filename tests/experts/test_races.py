"""Failures and map changes at awkward moments, against real host processes: rows stay exact, nothing waits in vain."""

import json
import random
import socket
import threading
import time

import pytest
import torch

from folkmoot.experts import expert_map as em
from folkmoot.experts.dispatch_config import DispatchConfig
from folkmoot.experts.dispatcher import Dispatcher
from folkmoot.experts.expert_map import HostAddress, NoReplicaError
from tests.experts.hosts import Hosts, expected
from tests.experts.test_dispatcher import batch, dispatcher
from tests.experts.test_feed import listen


def exact(d: Dispatcher, seed: int, tokens: int = 16, layer: int = 0) -> None:
    x, w, ids = batch(tokens, 2, seed=seed)
    assert torch.equal(d.forward(layer, x, w, ids)[0], expected(layer, x, w, ids))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_several_hosts_die_in_one_call(hosts: Hosts, transport: str) -> None:
    """Two of three die while rows are away; what they held moves on, to one another's replicas in part."""
    hosts.start("a", hosts.all_layers(range(8)), stall_s=0.2)
    victims = [hosts.start(name, hosts.all_layers(range(8)), stall_s=0.6) for name in "bc"]
    d = dispatcher(hosts, transport=transport)
    killer = threading.Timer(0.3, lambda: [child.kill() for child in victims])
    killer.start()
    exact(d, 1, tokens=32)
    assert all(child.wait(5) for child in victims)
    assert d.rows_served.keys() == {"a"}
    d.close()


def test_a_host_dies_in_the_middle_of_a_split_call(hosts: Hosts) -> None:
    """A call of more than max_tokens: some parts are answered, one is under way, others not yet sent."""
    hosts.start("a", hosts.all_layers(range(8)), stall_s=0.05)
    victim = hosts.start("b", hosts.all_layers(range(8)), stall_s=0.05)
    d = dispatcher(hosts, max_tokens=16)
    killer = threading.Timer(0.25, victim.kill)
    killer.start()
    exact(d, 2, tokens=16 * 10)
    assert victim.wait(5)
    assert d.rows_served["b"] > 0, "it had answered some parts"
    assert d.rows_served["b"] < 16 * 10
    d.close()


def test_all_replicas_of_an_expert_die_in_one_call_and_a_map_brings_another(hosts: Hosts) -> None:
    victims = [hosts.start(name, hosts.all_layers(range(8)), stall_s=0.4) for name in "ab"]
    d = dispatcher(hosts)
    arrived_s: list[float] = []

    def replace() -> None:
        for child in victims:
            child.kill()
        hosts.map = em.remove_host(em.remove_host(hosts.map, "a"), "b")
        d.use_map(hosts.map)  # nobody is left
        hosts.start("c", hosts.all_layers(range(8)))
        arrived_s.append(time.monotonic())
        d.use_map(hosts.map)

    threading.Timer(0.2, replace).start()
    exact(d, 3)
    assert arrived_s, "it waited for the replacement"
    assert d.rows_served.keys() == {"c"}
    d.close()


def test_an_unreachable_host_in_a_map_holds_up_no_layer(hosts: Hosts) -> None:
    """The map names a replacement, and a host that takes connections but never shakes hands: the layer goes on with
    the former long before the latter's time is up."""
    silent = socket.create_server(("127.0.0.1", 0))
    victim = hosts.start("a", hosts.all_layers(range(8)))
    d = dispatcher(hosts, connect_timeout_s=8.0)
    exact(d, 4)
    victim.kill()
    here = hosts.map.hosts["a"].node
    hosts.map = em.remove_host(hosts.map, "a")
    address = HostAddress("silent", 1, "elsewhere", None, f"127.0.0.1:{silent.getsockname()[1]}")
    hosts.map = em.add_host(hosts.map, address, hosts.all_layers(range(8)))
    hosts.start("b", hosts.all_layers(range(8)))
    assert hosts.map.hosts["b"].node == here
    adopting = threading.Thread(target=d.use_map, args=(hosts.map,))
    adopting.start()
    exact(d, 5)
    exact(d, 6)
    assert adopting.is_alive(), "the silent one is still waited for"
    assert d.rows_served["b"] == 64
    silent.close()
    adopting.join(10)
    assert not adopting.is_alive()
    d.close()


def test_maps_change_under_a_stream_of_calls(hosts: Hosts) -> None:
    """Hosts leave the map and come back while rows are on their links: every answer is exact, no host is dropped."""
    for name in "abc":
        hosts.start(name, hosts.all_layers(range(8)))
    d = dispatcher(hosts)
    full, rng, done = hosts.map, random.Random(0), threading.Event()
    versions = [full.version]

    def change() -> None:
        while not done.is_set():
            left = em.remove_host(full, rng.choice("abc")) if rng.random() < 0.7 else full
            versions.append(versions[-1] + 1)
            d.use_map(em.ExpertMap(versions[-1], left.hosts, left.layers))
            time.sleep(rng.random() * 0.004)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        for i in range(1500):
            exact(d, i % 50, tokens=1 + i % 9, layer=(0, 3)[i % 2])
    finally:
        done.set()
        changing.join(20)
    assert len(versions) > 50
    assert d._dead == set()
    assert all(child.is_alive() for child in hosts.children.values())
    d.close()


def test_hosts_die_and_are_replaced_under_a_stream_of_calls(hosts: Hosts) -> None:
    """Kills at random moments, each followed by a map with a new host; at times nobody is left for a moment."""
    for name in "ab":
        hosts.start(name, hosts.all_layers(range(8)))
    d = dispatcher(hosts)
    rng, failures = random.Random(1), list[str]()

    def replace() -> None:
        try:
            for i in range(12):
                time.sleep(rng.random() * 0.05)
                name = next(iter(hosts.map.hosts))
                hosts.children[name].kill()
                hosts.map = em.remove_host(hosts.map, name)
                if i % 2:
                    d.use_map(hosts.map)
                hosts.start(f"h{i}", hosts.all_layers(range(8)))
                d.use_map(hosts.map)
        except Exception as e:
            failures.append(repr(e))

    replacing = threading.Thread(target=replace)
    replacing.start()
    calls = 0
    while replacing.is_alive():
        exact(d, calls % 50, tokens=1 + calls % 9)
        calls += 1
    assert not failures
    exact(d, 0)
    assert len(d.rows_served) >= 8
    assert set(hosts.map.hosts) == {"h10", "h11"}
    d.close()


def test_after_the_bound_the_pass_is_given_up_and_the_next_one_waits_again(hosts: Hosts) -> None:
    """The feed confirms that requests are ended: zeros for the rest of the pass, at once; then a map, exact rows."""
    path = hosts.directory / "feed.sock"
    server = listen(path)
    victim = hosts.start("a", hosts.all_layers(range(8)))
    d = Dispatcher(DispatchConfig("test", hosts.secret_file, feed=str(path), no_replica_timeout_s=0.4))
    connection, _ = server.accept()
    connection.settimeout(10)
    lines = connection.makefile("rb")
    assert json.loads(lines.readline()) == {"event": "ready"}

    def send(message: dict) -> None:
        connection.sendall(json.dumps(message).encode() + b"\n")

    send({"map": json.loads(hosts.map.to_json())})
    exact(d, 0, layer=0)
    victim.kill()
    events: list[dict] = []

    def confirm() -> None:
        while not events or events[-1]["event"] != "no_replica":
            events.append(json.loads(lines.readline()))
        send({"ended": 3})

    confirming = threading.Thread(target=confirm)
    confirming.start()
    x, w, ids = batch(4, 2)
    shared_runs: list[int] = []
    routed, shared = d.forward(0, x, w, ids, lambda: shared_runs.append(1) or torch.ones(1))
    assert routed.eq(0).all() and shared is not None and shared_runs == [1]
    confirming.join(5)
    assert "layer 0, expert" in events[-1]["reason"] and "waited 0.4 s" in events[-1]["reason"]
    assert d.forward(3, x, w, ids)[0].eq(0).all(), "the rest of the pass asks nobody"

    hosts.map = em.remove_host(hosts.map, "a")
    hosts.start("b", hosts.all_layers(range(8)))
    threading.Timer(0.2, lambda: send({"map": json.loads(hosts.map.to_json())})).start()
    exact(d, 1, layer=0)
    exact(d, 1, layer=3)
    lines.close()
    connection.close()
    server.close()
    d.close()


def test_where_nobody_can_end_the_requests_it_is_an_error(hosts: Hosts) -> None:
    victim = hosts.start("a", hosts.all_layers(range(8)))
    d = dispatcher(hosts, no_replica_timeout_s=0.2)
    exact(d, 0)
    victim.kill()
    with pytest.raises(NoReplicaError):
        exact(d, 0)
    d.close()
