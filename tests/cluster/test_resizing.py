"""A cluster that is resized while it serves: no request fails, and every answer is the one of a quiet cluster."""

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from folkmoot.cluster.processes import is_alive
from folkmoot.gateway.admin_client import AdminClient
from folkmoot.gateway.client_errors import FolkmootError, InvalidRequest, NotFound, RequestIdInUse
from folkmoot.gateway.pb import admin_pb2 as pb
from tests.cluster.changes import Load, host, is_healed, kill_router
from tests.cluster.conftest import FLOAT32, Cluster, eventually, running

pytestmark = pytest.mark.slow

LOADS = {"layers": [0, 1, 2, 3], "rows_total": [[1000, 1] * 4] * 4}


@pytest.fixture(scope="module")
def elastic(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """2 expert hosts, 1 replica of each expert, one engine, to begin with; the tests change it in their order. Experts
    differ in dtype, those of even numbers count as used more; by the end nothing of that may have changed."""
    (loads := tmp_path_factory.mktemp("loads") / "experts.json").write_text(json.dumps(LOADS))
    dtypes = ("--expert-dtype", "auto:0.4", "--expert-loads", str(loads))
    options = ("--model", str(mixtral), "--hosts", "2", "--replicas", "1", *FLOAT32)
    with running(tmp_path_factory.mktemp("state"), *options, *dtypes) as cluster:
        begun = cluster.status()["expert_choice"]
        yield cluster
        assert cluster.status()["expert_choice"] == begun


@pytest.fixture
def admin(elastic: Cluster) -> Iterator[AdminClient]:
    with AdminClient(elastic.address) as admin:
        yield admin


def change(cluster: Cluster, *arguments: str) -> str:
    """A command of the cluster, under load; what it printed."""
    with Load(cluster) as load:
        done = cluster.run(*arguments, "--timeout", "120", timeout_s=150.0)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    load.check()
    ended_s = time.time()
    eventually(lambda: cluster.status()["time_s"] > ended_s and is_healed(cluster), 30.0, "the status says so too")
    return done.stdout


def sizes(cluster: Cluster) -> dict[str, int]:
    return {h["host"]: len(h["experts"]) for h in cluster.status()["hosts"]}


def test_a_budget_has_decided_the_dtypes(elastic: Cluster) -> None:
    status = elastic.status()
    choice = status["expert_choice"]
    assert status["expert_dtype"] == "auto:0.4" and 0.35 < choice["of_bf16"] <= 0.4
    assert choice["int8"] + choice["int4"] == 32 and 0 < choice["int8"] <= 16
    assert sum(h["bytes"] for h in status["hosts"]) == choice["bytes"]
    assert f"experts auto:0.4: {choice['int8']} in int8, {choice['int4']} in int4" in elastic.run("status").stdout


def test_more_hosts_take_experts_over(elastic: Cluster) -> None:
    assert "done" in change(elastic, "scale", "hosts", "4")
    assert sizes(elastic) == dict.fromkeys(["host-0", "host-1", "host-2", "host-3"], 2)
    assert elastic.status()["map"]["replicas_least"] == 1


def test_more_replicas(elastic: Cluster) -> None:
    change(elastic, "scale", "replicas", "2")
    assert elastic.status()["map"]["replicas_least"] == 2
    assert set(sizes(elastic).values()) == {4}


def test_more_replicas_of_one_expert(elastic: Cluster) -> None:
    change(elastic, "replicate", "5", "3")
    assert sum(5 in h["experts"] for h in elastic.status()["hosts"]) == 3
    assert elastic.status()["map"]["replicas_least"] == 2


def test_a_drained_host_leaves_when_others_have_its_experts(elastic: Cluster) -> None:
    leaving = host(elastic, "host-1")
    change(elastic, "drain", "host-1")
    assert set(sizes(elastic)) == {"host-0", "host-2", "host-3"}
    eventually(lambda: not is_alive(leaving["pid"]), 10.0, "its process has ended")
    assert elastic.status()["map"]["replicas_least"] == 2


def test_what_cannot_be_is_refused_with_its_limit(elastic: Cluster, admin: AdminClient) -> None:
    with pytest.raises(FolkmootError, match="3 replicas of an expert need 3 hosts") as refused:
        admin.scale("hosts", 2)
    assert refused.value.code == "FAILED_PRECONDITION"
    with pytest.raises(FolkmootError, match="4 need as many hosts, there are 3"):
        admin.scale("replicas", 4)
    with pytest.raises(InvalidRequest, match=r"expert: must be below 8.*is 99"):
        admin.replicate(99, 1)
    with pytest.raises(InvalidRequest, match="count: must be between 1 and 4096, is 0"):
        admin.scale("hosts", 0)
    with pytest.raises(NotFound, match=r"host-9.*host-0, host-2, host-3"):
        admin.drain("host-9")
    with pytest.raises(NotFound, match="unknown operation"):
        admin.operation("never")
    done = elastic.run("scale", "hosts", "99")
    assert done.returncode == 1 and "99 hosts are more than" in done.stderr


def test_the_same_id_is_the_same_operation(elastic: Cluster, admin: AdminClient) -> None:
    name = f"again-{secrets.token_hex(4)}"
    first = admin.replicate(5, 2, request_id=name)
    again = admin.replicate(5, 2, request_id=name)
    assert first.request_id == again.request_id == name and first.submitted_ms == again.submitted_ms
    with pytest.raises(RequestIdInUse):
        admin.replicate(5, 3, request_id=name)
    assert admin.wait(name, 60.0).state == pb.SUCCEEDED
    assert admin.replicate(5, 2, request_id=name).state == pb.SUCCEEDED


def test_fewer_hosts_leave_the_others_everything(elastic: Cluster) -> None:
    change(elastic, "scale", "hosts", "2")
    assert sizes(elastic) == {"host-0": 8, "host-2": 8}
    change(elastic, "scale", "replicas", "1")
    assert sizes(elastic) == {"host-0": 4, "host-2": 4}


def test_an_operation_outlives_the_router(elastic: Cluster, admin: AdminClient) -> None:
    with Load(elastic) as load:
        begun = admin.scale("hosts", 3)
        kill_router(elastic)
        operation = admin.wait(begun.request_id, 120.0)
    load.check()
    assert operation.state == pb.SUCCEEDED, operation.message
    eventually(lambda: len(sizes(elastic)) == 3 and is_healed(elastic), 10.0, f"three hosts: {sizes(elastic)}")


def engines(cluster: Cluster) -> set[int]:
    return {e["pid"] for e in cluster.status()["engines"] if e["phase"] == "ready"}


def test_engines_come_and_go_and_are_rolled(elastic: Cluster) -> None:
    before = engines(elastic)
    change(elastic, "scale", "engines", "2")
    eventually(lambda: len(engines(elastic)) == 2 and engines(elastic) > before, 30.0, "the status says so too")
    change(elastic, "scale", "engines", "1")
    eventually(lambda: len(engines(elastic)) == 1, 10.0, "one engine")
    (kept,) = engines(elastic)
    change(elastic, "roll", "engines")
    eventually(lambda: len(engines(elastic)) == 1 and kept not in engines(elastic), 10.0, "another engine")
    eventually(lambda: not is_alive(kept), 20.0, "the old one has ended")
