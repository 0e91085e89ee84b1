"""What hosts and dispatchers count, against real host processes: each number as it must be."""

import threading
import time
from typing import Any

import pytest
import torch

from folkmoot.experts.host_load import MAX_WAIT_S, Load
from folkmoot.experts.warm import Child
from tests.experts.hosts import Hosts, expected
from tests.experts.test_dispatcher import HIDDEN, batch, dispatcher


def last_load(host: Child, requests: int) -> dict[str, Any]:
    """A host's report once it has told of so many requests; it tells of each, also where no more come."""
    deadline_s = time.monotonic() + 30.0
    while time.monotonic() < deadline_s:
        message = host.receive(5.0)
        if message is not None and message["requests"] == requests:
            return message
    raise AssertionError(f"the host never told of {requests} requests")


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_host_tells_what_it_did_and_falls_silent(hosts: Hosts, transport: str) -> None:
    """Two calls of layer 0, one of layer 3, all by one host; then there is nothing more to tell."""
    host = hosts.start("a", hosts.all_layers(range(8)), stall_s=0.02)
    d = dispatcher(hosts, transport=transport)
    sizes = {0: (5, 7), 3: (11,)}
    for layer, tokens in sizes.items():
        for number in tokens:
            x, w, ids = batch(number, 2, dtype=torch.float32)
            assert torch.equal(d.forward(layer, x, w, ids)[0], expected(layer, x, w, ids))
    load = last_load(host, 3)
    rows = 2 * (5 + 7 + 11)
    assert load["rows"] == rows and load["refused"] == 0
    assert load["sent_bytes"] == rows * HIDDEN * 4
    assert rows * HIDDEN * 4 + rows * 4 <= load["received_bytes"] <= rows * HIDDEN * 4 + rows * 4 + 3 * 2 * 64
    assert {layer: share["rows"] for layer, share in load["layers"].items()} == {"0": 24, "3": 22}
    assert load["busy_s"] == pytest.approx(sum(share["busy_s"] for share in load["layers"].values()))
    assert load["busy_s"] >= 0.06 and 0 < load["waited_s"] < 30
    assert host.receive(1.5) is None, "an idle host has nothing to say"
    assert d.counts.host_s["a"] > load["busy_s"], "the way there and back takes longer than computing"
    d.close()


def test_a_request_waits_behind_another_engines(hosts: Hosts) -> None:
    """Two engines ask one host at once, whose calls take 0.3 s: the second one's lies that long."""
    host = hosts.start("a", hosts.all_layers(range(8)), stall_s=0.3)
    engines = [dispatcher(hosts) for _ in range(2)]
    x, w, ids = batch(4, 2)
    for d in engines:
        d.forward(0, x, w, ids)
    waited_s = last_load(host, 2)["waited_s"]
    asking = [threading.Thread(target=d.forward, args=(0, x, w, ids)) for d in engines]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert last_load(host, 4)["waited_s"] - waited_s > 0.15
    for d in engines:
        d.close()


def test_a_dispatcher_counts_calls_rows_and_a_host_that_dies(hosts: Hosts) -> None:
    hosts.start("a", hosts.all_layers(range(8)))
    victim = hosts.start("b", hosts.all_layers(range(8)), stall_s=0.5)
    d = dispatcher(hosts)
    x, w, ids = batch(16, 2)
    threading.Timer(0.2, victim.kill).start()
    assert torch.equal(d.forward(0, x, w, ids)[0], expected(0, x, w, ids))
    assert victim.wait(5), "it really died"
    counts = d.counts
    assert (counts.calls, counts.rows, counts.dropped_hosts) == (1, 32, 1)
    assert 0 < counts.rows_again < 32 and counts.waits == counts.given_up == 0
    assert set(counts.host_s) == {"a"}
    d.forward(3, x, w, ids)
    assert (counts.calls, counts.rows, counts.dropped_hosts) == (2, 64, 1)
    d.close()


def test_a_dispatcher_counts_waits_for_a_replica(hosts: Hosts) -> None:
    victim = hosts.start("a", hosts.all_layers(range(8)))
    d = dispatcher(hosts)
    x, w, ids = batch(4, 2)
    d.forward(0, x, w, ids)
    before_s = d.counts.waited_s
    victim.kill()
    assert victim.wait(5)
    hosts.start("a", hosts.all_layers(range(8)))
    threading.Timer(0.4, d.use_map, (hosts.map,)).start()
    assert torch.equal(d.forward(0, x, w, ids)[0], expected(0, x, w, ids))
    assert d.counts.waits >= 1 and d.counts.waited_s - before_s > 0.2
    d.close()


def test_a_wait_that_a_peer_made_up_counts_as_nothing() -> None:
    load = Load.of((0,))
    for posted_s in (0.0, 101.0, 100.0 - MAX_WAIT_S - 1.0, -1.0, 1.8e13):
        load.waited(posted_s, 100.0)
    assert load.waited_s == 0.0
    load.waited(98.5, 100.0)
    assert load.waited_s == 1.5
