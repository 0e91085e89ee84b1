"""Arguments of the Serve application, and when it may take over a cluster that runs. The rest: tests/k8s."""

from dataclasses import replace
from typing import Any

import pytest

from folkmoot.cluster import app
from folkmoot.cluster.leave import remaining
from folkmoot.experts.expert_choice import Choice
from tests.cluster.test_operation_runner import spec_of


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "model"),
        ({"model": "m", "host": 2}, "unknown arguments: host; known ones: background_workers, "),
        ({"model": "m", "listen": "0.0.0.0:1"}, "unknown arguments: listen"),
        ({"model": "m", "address": "auto"}, "unknown arguments: address"),
        ({"model": "m", "hosts": "many"}, "hosts"),
        ({"model": "m", "hosts": 2.5}, "hosts"),
        ({"model": "m", "hosts": 0}, "hosts: 0 is not in the range x>=1"),
        ({"model": "m", "stall_s": 11}, "stall_s: 11.0 is not in the range 0.05<=x<=10.0"),
        ({"model": "m", "placement": "there"}, "placement: 'there' is not one of 'spread', 'pack'"),
        ({"model": "m", "hosts": 2, "experts_per_host": 4}, "exclude each other"),
        ({"model": "m", "expert_dtype": "int2"}, "expert_dtype: --expert-dtype int2: one of checkpoint, bf16, "),
        (
            {"model": "m", "expert_dtype": "auto:2"},
            "expert_dtype: --expert-dtype auto:2: a part of bf16's memory is at",
        ),
        ({"model": "m", "engine_resources": {"x": "much"}}, "engine_resources"),
    ],
)
def test_arguments_that_are_not_sound_are_refused_by_name(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        app.build(arguments)
    assert expected in str(caught.value)


def test_arguments_are_the_options_of_up() -> None:
    options = app.parse({"model": "/m", "hosts": 4, "share_weights": False, "host_resources": {"big": 1}})
    assert (options.model, options.hosts, options.share_weights, options.address) == ("/m", 4, False, "auto")
    assert options.host_resources == {"big": 1.0}
    assert {"engines", "replicas", "redis", "gpus_per_engine"} <= app.argument_names()


def test_a_cluster_without_a_store_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOLKMOOT_REDIS", raising=False)
    with pytest.raises(app.StartError, match="FOLKMOOT_REDIS"):
        app.wanted_spec(app.parse({"model": "/m"}))


def test_only_what_each_cluster_has_for_itself_may_differ() -> None:
    running = spec_of()
    assert app.differences(running, replace(running, run_dir="/run/2", log_dir="/run/2/logs")) == []
    chosen = replace(running, expert_choice=Choice({0: "48"}, 10, 20, 6, 0.01), column_bytes=6)
    assert app.differences(chosen, running) == [], "a budget's choice follows from the rest, when a cluster is begun"
    assert app.differences(running, replace(running, hosts=5, dtype="float32")) == ["hosts", "dtype"]


def host(name: str, node: str | None, *experts: int, alive: bool = True) -> dict[str, Any]:
    return {"host": name, "node": node, "experts": list(experts), "alive": alive}


def engine(node: str, phase: str = "ready") -> dict[str, Any]:
    return {"engine": f"engine-{node}", "node": node, "phase": phase}


@pytest.mark.parametrize(
    ("hosts", "engines", "expected"),
    [
        ([], [], ""),
        ([host("a", None, 0, 1), host("b", "n2", 0, 1)], [engine("n2")], ""),
        ([host("a", "n1", 0, 1), host("b", "n2", 0, 1)], [], "the expert router has not seen it yet"),
        ([host("a", None, 0, 1), host("b", "n2", 1)], [], "experts [0] are nowhere else yet"),
        ([host("a", None, 0, 1), host("b", "n2", 0, 1, alive=False)], [], "experts [0, 1] are nowhere else yet"),
        ([host("a", "n1", 0, alive=False), host("b", "n2", 0)], [], ""),
        ([], [engine("n1"), engine("n2")], "engine-n1 not stopped yet"),
        ([], [engine("n1", "stopping")], "engine-n1 not stopped yet"),
        ([], [engine("n1", "dead"), engine("n2")], ""),
    ],
)
def test_what_keeps_a_node_from_leaving(
    hosts: list[dict[str, Any]], engines: list[dict[str, Any]], expected: str
) -> None:
    assert remaining({"hosts": hosts, "engines": engines}, "n1") == expected
