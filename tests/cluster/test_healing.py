"""A cluster without spare replicas in which everything is killed: clients wait, and get the same tokens."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from folkmoot.cluster.processes import is_alive
from folkmoot.cluster.processes import kill as send_kill
from tests.cluster.changes import (
    host,
    is_healed,
    is_ready,
    kill,
    kill_router,
    ray_pid,
    stopped,
    tokens,
    tokens_with_kill,
)
from tests.cluster.conftest import FLOAT32, Cluster, eventually, processes_of, running

pytestmark = pytest.mark.slow

COLUMN_BYTES = 4 * 3 * 128 * 128 * 4  # 4 layers, 3 matrices, float32
SMALL_MIB = 3 * COLUMN_BYTES / 2**20 + 0.5


@pytest.fixture(scope="module")
def fragile(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """2 expert hosts, 1 replica of each expert, one engine: no expert can be missed. host-1 has one thread, and room
    for 3 of the 8 experts."""
    groups = ("--host-group", "1:cpu=2", "--host-group", f"1:cpu=1,memory={SMALL_MIB}MiB")
    options = ("--model", str(mixtral), *groups, "--replicas", "1", *FLOAT32)
    with running(tmp_path_factory.mktemp("state"), *options) as cluster:
        yield cluster


@pytest.fixture
def victim(fragile: Cluster) -> dict[str, Any]:
    """A host of the healed cluster, which is about to be killed."""
    eventually(lambda: is_healed(fragile), 90.0, f"healed: {fragile.status()['healing']}")
    return max(fragile.status()["hosts"], key=lambda h: int(h["rows"]))


@pytest.mark.parametrize("with_actor", [False, True], ids=["host", "host-and-actor"])
def test_without_a_replica_clients_wait_for_the_replacement_and_get_the_same_tokens(
    fragile: Cluster, victim: dict[str, Any], with_actor: bool
) -> None:
    with fragile.client() as client:
        expected = tokens(client, max_tokens=120)
        pids = [victim["pid"], *([victim["actor_pid"]] if with_actor else [])]
        assert tokens_with_kill(client, pids) == expected

    def is_replaced() -> bool:
        now = host(fragile, victim["host"])
        return now["alive"] and now["pid"] != victim["pid"] and is_healed(fragile)

    eventually(is_replaced, 20.0, f"{victim['host']} is replaced")
    now = host(fragile, victim["host"])
    assert now["incarnation"] > victim["incarnation"] and now["experts"] == victim["experts"]
    assert (now["actor_pid"] != victim["actor_pid"]) == with_actor
    assert is_alive(now["pid"])


def test_a_host_that_died_while_the_router_was_away_is_replaced_when_it_is_back(
    fragile: Cluster, victim: dict[str, Any]
) -> None:
    with fragile.client() as client:
        expected = tokens(client, max_tokens=120)
        router = kill_router(fragile)
        kill(victim["pid"])
        assert ray_pid(fragile, "ExpertRouter") in (None, router), "the router was away when the host died"
        assert tokens(client, max_tokens=120) == expected, "the request waited for the router, and for the host"
    now = eventually(lambda: h if (h := host(fragile, victim["host"])).get("alive") else None, 20.0, "it is back")
    assert now["pid"] != victim["pid"]
    assert ray_pid(fragile, "ExpertRouter") not in (None, router)
    eventually(lambda: is_healed(fragile), 20.0, "all is as it was")


def test_readiness_follows_a_death_while_the_router_is_away(fragile: Cluster, victim: dict[str, Any]) -> None:
    eventually(lambda: is_ready(fragile), 5.0, "ready")
    assert is_ready(fragile, "folkmoot.v1.Folkmoot")
    expected = answer(fragile)
    with killing(fragile, "ExpertRouter"):
        kill(victim["pid"])
        waiting = ThreadPoolExecutor(1).submit(answer, fragile)  # an engine hears of a death by using the host
        eventually(lambda: not is_ready(fragile), 15.0, "not ready")
        assert is_ready(fragile, "folkmoot.v1.Folkmoot"), "the gateway itself lives"
        assert models_ready(fragile) == 0
    assert waiting.result(90.0) == expected
    eventually(lambda: is_ready(fragile), 30.0, "ready again")
    assert models_ready(fragile) == 1


def test_a_host_that_keeps_dying_is_quarantined_and_stood_in_for_and_comes_back(
    fragile: Cluster,
) -> None:
    eventually(lambda: is_healed(fragile), 90.0, "healed")
    before = [h["experts"] for h in fragile.status()["hosts"]]
    with fragile.client() as client:
        expected = tokens(client)
        name, killed = "host-1", set()  # the other one has room for all

        def is_quarantined() -> bool:
            """Kills each life of the host that comes up."""
            status = fragile.status()
            pid = next(h["pid"] for h in status["hosts"] if h["host"] == name)
            if pid is not None and pid not in killed and is_alive(pid):
                kill(pid)
                killed.add(pid)
            return any(t["host"] == name and t["state"] == "quarantined" for t in status["healing"])

        eventually(is_quarantined, 60.0, "quarantined")
        assert len(killed) >= 3
        assert tokens(client) == expected, "the other host stands in"
    eventually(lambda: is_healed(fragile), 120.0, f"it comes back: {fragile.status()['healing']}")
    status = fragile.status()
    assert [len(h["experts"]) for h in status["hosts"]] == [len(experts) for experts in before]
    assert status["map"]["replicas_least"] == 1
    assert host(fragile, name)["pid"] not in killed


def test_the_status_of_a_healed_cluster_reads_well(fragile: Cluster, victim: dict[str, Any]) -> None:
    document = json.loads(fragile.run("status", "--json").stdout)
    assert document["models"][0]["ready_engines"] == 1
    assert "1 of 1 engines can serve" in fragile.run("status").stdout
    assert victim["host"] in fragile.run("status").stdout


def test_the_next_life_is_in_reserve_or_forked_from_the_template_or_from_the_warm_parent(fragile: Cluster) -> None:
    eventually(lambda: is_healed(fragile), 90.0, "healed")
    name = min(fragile.status()["hosts"], key=lambda h: int(h["failures"]))["host"]
    first, template = eventually(lambda: settled(fragile, name), 90.0, "it and its template have settled")
    reserve = eventually(lambda: reserve_of(fragile, name), 60.0, "a life in reserve")
    kill(first["pid"])
    second = next_life(fragile, first)
    assert second["pid"] == reserve
    reserve = eventually(lambda: reserve_of(fragile, name), 60.0, "another one")
    kill(reserve)
    kill(second["pid"])
    third = next_life(fragile, second)
    assert parent_of(third["pid"]) == template and third["pid"] != reserve
    with stopped(template):
        if (reserve := reserve_of(fragile, name)) is not None:
            kill(reserve)
        kill(third["pid"])
        fourth = next_life(fragile, third)
        assert parent_of(fourth["pid"]) != template
    kill(template)
    assert eventually(lambda: loaded_template(fragile, name), 60.0, "another template") != template
    assert next_life(fragile, third) == host(fragile, name), "the host itself lived on"


def test_hosts_of_two_kinds_hold_their_shares_and_come_back_with_what_is_theirs(fragile: Cluster) -> None:
    eventually(lambda: is_healed(fragile), 90.0, "healed")
    hosts = {h["host"]: h for h in fragile.status()["hosts"]}
    large, small = hosts["host-0"], hosts["host-1"]
    assert (large["threads"], large["capacity"], small["threads"], small["capacity"]) == (2, None, 1, 3)
    for one in hosts.values():
        assert list(one["rows_per_s"]) == ["4", "16", "64"] and min(one["rows_per_s"].values()) > 0
    assert len(large["experts"]) + len(small["experts"]) == 8 and len(small["experts"]) <= 3
    times = {h["host"]: len(h["experts"]) / h["speed"] for h in hosts.values()}
    assert (len(large["experts"]) + 1) / large["speed"] >= times["host-1"]
    assert len(small["experts"]) == 3 or (len(small["experts"]) + 1) / small["speed"] >= times["host-0"]
    with fragile.client() as client:
        expected = tokens(client, max_tokens=120)
        assert tokens_with_kill(client, [small["pid"]]) == expected
    again = next_life(fragile, small)
    kept = ("experts", "threads", "capacity", "speed", "rows_per_s", "bytes")
    assert {name: again[name] for name in kept} == {name: small[name] for name in kept}


def next_life(cluster: Cluster, before: dict[str, Any]) -> dict[str, Any]:
    """What the status says of the life that came after this one, once it serves."""

    def found() -> dict[str, Any] | None:
        now = host(cluster, before["host"])
        return now if now.get("alive") and now["pid"] != before["pid"] and is_healed(cluster) else None

    return eventually(found, 60.0, f"{before['host']} lives again")  # type: ignore[no-any-return]


def settled(cluster: Cluster, name: str) -> tuple[dict[str, Any], int] | None:
    """A host and its template, unless one has changed in three seconds: hosts that have just measured how quick they
    are may be given other experts, and with them come other templates."""
    before, template = host(cluster, name), loaded_template(cluster, name)
    time.sleep(3.0)
    after = host(cluster, name)
    is_same = (before["pid"], template) == (after["pid"], loaded_template(cluster, name))
    return (after, template) if is_same and template is not None and is_healed(cluster) else None


def loaded_template(cluster: Cluster, name: str) -> int | None:
    """The process from which this host's lives are forked, once it takes requests; it is then alone in its process."""
    title = f"folkmoot::HostTemplate {name}"
    pids = [pid for pid, command in processes_of(cluster.marker).items() if command.startswith(title)]
    sockets = Path("/proc/net/unix").read_text()
    return pids[0] if pids and f"/{name}.0.sock" in sockets else None


def reserve_of(cluster: Cluster, name: str) -> int | None:
    """The process that is this host's next life, once it waits to be told so."""
    title = f"folkmoot::HostReserve {name}"
    pids = [pid for pid, command in processes_of(cluster.marker).items() if command.startswith(title)]
    return pids[0] if pids and "sleeping" in Path(f"/proc/{pids[0]}/status").read_text() else None


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def answer(cluster: Cluster) -> list[int]:
    with cluster.client() as client:
        return tokens(client)


def models_ready(cluster: Cluster) -> int:
    with cluster.client() as client:
        (model,) = client.models()
    return int(model.num_ready_engines)


@contextmanager
def killing(cluster: Cluster, name: str) -> Iterator[None]:
    """Kill a Ray actor again and again, each time that it has come up."""
    stop = threading.Event()
    killed: set[int] = set()

    def run() -> None:
        while not stop.wait(0.05):
            pid = ray_pid(cluster, name)
            if pid is not None:
                send_kill([pid])
                killed.add(pid)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        eventually(lambda: killed, 10.0, f"{name} was killed")
        yield
    finally:
        stop.set()
        thread.join()
