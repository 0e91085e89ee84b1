"""What router, hosts and engines tell Prometheus: pure functions, and the small things around the endpoint."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from folkmoot.cluster import app, metrics_engine, metrics_hosts, metrics_node, metrics_router
from folkmoot.cluster.launch import Supervisor
from folkmoot.cluster.metrics_hosts import HostFigures, Usage, usage_of
from folkmoot.cluster.metrics_router import RouterCounts
from folkmoot.cluster.router_events import EngineReported, Event, HostDied, Tick, apply
from folkmoot.cluster.router_state import QUARANTINE_AFTER
from folkmoot.cluster.state_file import ClusterState, StateFolder
from folkmoot.cluster.up_options import StartError, UpOptions
from folkmoot.gateway.holder import HolderCounts
from folkmoot.gateway.metrics import exposition
from folkmoot.gateway.queue import Held
from tests.cluster.test_operation_runner import spec_of
from tests.cluster.test_router_state import after, carried_out, slots
from tests.gateway.scrapes import Scrape, scrape


class Told:
    """A router's state and counts, fed as the actor feeds them."""

    def __init__(self, *events: Event, **wish: int) -> None:
        self.counts = RouterCounts()
        self.state = after(**wish)
        self(Tick(1000.0), *events)

    def __call__(self, *events: Event) -> Scrape:
        for event in events:
            before, self.state = self.state, apply(event, self.state)
            self.counts.saw(event, before, self.state)
        return Scrape(exposition(metrics_router.families(self.state, self.counts, 2)).decode())

    def act(self) -> Scrape:
        """What is planned succeeds at once."""
        before, self.state = self.state, carried_out(self.state)
        self.counts.saw(Tick(self.state.now_s), before, self.state)
        return self()

    @property
    def incarnation(self) -> int:
        return self.state.hosts["host-0"].incarnation


def test_a_router_that_has_nothing_yet() -> None:
    now = Told()()
    assert now("folkmoot_router_experts_missing") == 2 * 4
    assert now("folkmoot_router_replicas_lacking") == 2 * 4 * 2
    assert now("folkmoot_router_hosts") == now("folkmoot_router_engines") == 0
    assert now.labels("phase") == {*metrics_router.HOST_PHASES, *metrics_router.ENGINE_PHASES}


def test_a_death_is_counted_once_and_healing_timed() -> None:
    told = Told(slots("host-0", "host-1"))
    now = told.act()
    assert now("folkmoot_router_hosts", phase="ready") == 2 and now("folkmoot_router_replicas_least") == 2
    assert now("folkmoot_router_replicas_lacking") == now("folkmoot_router_experts_missing") == 0
    version = now("folkmoot_router_map_version")
    died = HostDied("host-0", told.incarnation, "killed")
    now = told(Tick(1001.0), died, replace(died, reason="told again"))
    assert now("folkmoot_router_host_deaths_total", host="host-0") == now("folkmoot_router_host_deaths_total") == 1
    assert now("folkmoot_router_replicas_lacking") == 4 * 2 and now("folkmoot_router_experts_missing") == 0
    assert now("folkmoot_router_map_version") > version and now("folkmoot_router_troubles") == 1
    assert now("folkmoot_router_healing_seconds_count") == 0
    told(Tick(1003.5))
    now = told.act()
    assert now("folkmoot_router_healing_seconds_count") == 1
    assert now("folkmoot_router_healing_seconds_sum") == 2.5
    assert now("folkmoot_router_replicas_lacking") == now("folkmoot_router_troubles") == 0
    assert now("folkmoot_router_host_deaths_total", host="host-0") == 1, "it counts on"


def test_a_host_that_fails_again_and_again_is_in_quarantine_once() -> None:
    told = Told(slots("host-0", "host-1"))
    told.act()
    for i in range(QUARANTINE_AFTER):
        now = told(Tick(told.state.now_s + 20.0))
        if i < QUARANTINE_AFTER:
            told.act()
        now = told(HostDied("host-0", told.incarnation, "again"))
    assert now("folkmoot_router_quarantines_total", host="host-0") == 1
    assert now("folkmoot_router_host_deaths_total", host="host-0") == QUARANTINE_AFTER
    assert now("folkmoot_router_hosts", phase="quarantined") == 1


def test_engines_by_phase() -> None:
    now = Told(EngineReported("a", "ready"), EngineReported("b", "loading"), EngineReported("c", "ready"))()
    assert now("folkmoot_router_engines", phase="ready") == 2
    assert now("folkmoot_router_engines") == 3 and now("folkmoot_router_engines_wanted") == 2


def test_hosts_tell_their_reports_by_host_and_layer() -> None:
    load: dict[str, Any] = {
        **{"event": "load", "requests": 5, "rows": 30, "busy_s": 1.5, "waited_s": 0.25, "refused": 1},
        **{"received_bytes": 3000, "sent_bytes": 2000},
        "layers": {"0": {"rows": 10, "busy_s": 0.5}, "3": {"rows": 20, "busy_s": 1.0}},
    }
    hosts = [
        HostFigures("host-0", 6, 100, 40, 0.5, Usage(7, 8, 9, 9.5), load),
        HostFigures("host-1", 2, 50, 0, 0.25),
    ]
    now = Scrape(exposition(metrics_hosts.families(hosts)).decode())
    assert now("folkmoot_host_rows_total", host="host-0", layer="3") == 20
    assert now("folkmoot_host_busy_seconds_total", host="host-0") == 1.5
    assert now("folkmoot_host_waited_seconds_total", host="host-0") == 0.25
    assert (now("folkmoot_host_received_bytes_total"), now("folkmoot_host_sent_bytes_total")) == (3000, 2000)
    assert now("folkmoot_host_calls_total", host="host-1") == 0, "it has not reported yet"
    assert now("folkmoot_host_weights_bytes", kind="private") == 60 + 50
    assert now("folkmoot_host_weights_bytes", kind="shared") == 40
    sizes = [now("folkmoot_host_resident_bytes", host="host-0", kind=kind) for kind in ("anonymous", "file", "shmem")]
    assert sizes == [7, 8, 9]
    assert now("folkmoot_host_cpu_seconds_total", host="host-0") == 9.5
    assert now("folkmoot_host_experts") == 8


def test_what_the_kernel_says_of_a_process() -> None:
    """One that has computed for a while and holds 64 MiB; and one that is gone."""
    code = "x = b'x' * (64 << 20); y = sum(range(3_000_000)); print(flush=True); input()"
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipe) as child:  # type: ignore[call-overload]
        child.stdout.readline()
        usage = usage_of(child.pid)
        child.kill()
    assert 64 << 20 < usage.anonymous < 256 << 20 and usage.file > 0
    assert 0.01 <= usage.cpu_s < 60
    assert usage_of(child.pid) == Usage()


def test_engines_tell_of_leases_and_dispatch() -> None:
    class Holder:
        num_held = 3
        counts = HolderCounts(7, 2, 100)

    Holder.counts.refused[Held.LOST] += 4
    generator = {"running": 3, "requests": 7, "failed": 1, "prompt_tokens": 50, "generated_tokens": 99}
    dispatch: dict[str, Any] = {
        **{"calls": 8, "rows": 64, "rows_again": 2, "late_hosts": 3, "dropped_hosts": 1},
        **{"waits": 1, "waited_s": 0.5, "given_up": 0},
        **{"host_rows": {"host-0": 40, "host-1": 24}, "host_s": {"host-0": 1.0, "host-1": 2.0}},
        "not_finite": {"confirmed": 0, "refuted": 5, "alone": 0},
    }
    holder: Any = Holder()
    now = Scrape(exposition(metrics_engine.families("e", holder, generator, dispatch)).decode())
    assert now("folkmoot_engine_leases_held", engine="e") == 3 and now("folkmoot_engine_leases_total") == 7
    assert now("folkmoot_engine_leases_again_total") == 2 and now("folkmoot_engine_journalled_tokens_total") == 100
    assert now("folkmoot_engine_refused_appends_total", answer="lost") == 4
    assert now("folkmoot_engine_generated_tokens_total") == 99
    assert now("folkmoot_dispatch_host_rows_total", host="host-0", engine="e") == 40
    assert now("folkmoot_dispatch_host_seconds_total") == 3.0
    assert now("folkmoot_dispatch_late_hosts_total") == 3 and now("folkmoot_dispatch_dropped_hosts_total") == 1
    assert now("folkmoot_dispatch_not_finite_rows_total", verdict="refuted") == 5
    dense = Scrape(exposition(metrics_engine.families("e", holder, generator, {})).decode())
    assert not any(name.startswith("folkmoot_dispatch") for name in dense.names)


async def test_an_actor_serves_in_a_folder_that_only_its_user_may_enter(tmp_path: Path) -> None:
    with metrics_node.hold("127.0.0.1:0") as held:
        listen = metrics_node.address_of(held, "127.0.0.1:0")
        spec = replace(spec_of(), run_dir=str(tmp_path / "run"), metrics=listen)

        async def text() -> bytes:
            return exposition(metrics_node.of_process())

        task = asyncio.create_task(metrics_node.keep_serving(spec, "router", text))
        now = await asyncio.wait_for(first_scrape(f"http://{listen}/metrics"), 30.0)
        assert now.has("process_cpu_seconds_total", process="router")
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
        task.cancel()


async def first_scrape(url: str) -> Scrape:
    while True:
        try:
            return await scrape(url)
        except OSError:
            await asyncio.sleep(0.05)


async def test_off_is_no_endpoint_and_no_folder(tmp_path: Path) -> None:
    spec = replace(spec_of(), run_dir=str(tmp_path / "run"), metrics="off")

    async def text() -> bytes:
        raise AssertionError("nobody asks")

    await asyncio.wait_for(metrics_node.keep_serving(spec, "router", text), 10.0)
    assert not (tmp_path / "run").exists()


def test_a_held_port_is_free_for_who_listens_and_for_nobody_else() -> None:
    with metrics_node.hold("127.0.0.1:0") as held:
        where = held.getsockname()
        with socket.create_server(where), pytest.raises(OSError):
            metrics_node.hold("{}:{}".format(*where))
        for _ in range(2):  # one after the other
            socket.create_server(where).close()
        with socket.socket() as other, pytest.raises(OSError):
            other.bind(where)


def test_up_says_which_address_of_metrics_cannot_be_had(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "{}:{}".format(*taken.getsockname())
        supervisor = Supervisor(UpOptions("m", metrics=address, state_dir=tmp_path), lambda text: None)
        with pytest.raises(StartError, match=f"--metrics {address}: Address already in use"):
            supervisor._hold_metrics_port()


def test_prometheus_finds_clusters_by_their_folders(tmp_path: Path) -> None:
    folder = StateFolder("x", tmp_path)
    folder.acquire()
    folder.write(ClusterState("x", "ready", os.getpid(), metrics="http://127.0.0.1:9464/metrics"))
    folder.write_scrapes()
    found = json.loads((tmp_path / "x.metrics.json").read_text())
    assert found == [{"targets": ["127.0.0.1:9464"], "labels": {"cluster": "x"}}]
    assert '"*.metrics.json"' in (tmp_path / "prometheus.yml").read_text()
    folder.release()
    assert not (tmp_path / "x.metrics.json").exists()


def test_a_cluster_without_metrics_leaves_nothing_to_find(tmp_path: Path) -> None:
    folder = StateFolder("x", tmp_path)
    folder.acquire()
    folder.write(ClusterState("x", "ready", os.getpid()))
    folder.write_scrapes()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    folder.release()


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.0.0.1:65536", "9464", "host:port", ""])
def test_an_application_has_a_port_that_is_known(address: str) -> None:
    with pytest.raises(ValueError, match="metrics: must be HOST:PORT"):
        app.parse({"model": "/m", "metrics": address})


def test_an_application_listens_on_loopback_unless_told() -> None:
    assert app.parse({"model": "/m"}).metrics == "127.0.0.1:9464"
    assert app.parse({"model": "/m", "metrics": "off"}).metrics == "off"
