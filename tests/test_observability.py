"""Metrics as documents, dashboard and alert rules name them, against the code that has them."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.prometheus import find_program
from folkmoot.cluster import metrics_engine, metrics_hosts, metrics_router
from folkmoot.gateway import metrics, metrics_queue
from folkmoot.gateway.metrics import Metric

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "k8s/components/monitoring"
ALL: tuple[Metric, ...] = tuple(
    metric
    for module in (metrics, metrics_queue, metrics_engine, metrics_hosts, metrics_router)
    for metric in module.METRICS
)
NAME = re.compile(r"\b(?:folkmoot_[a-z_]+|vllm:[a-z_]+)")
FIGURE = re.compile(r"(\w+)(?: by \([^)]*\) )?\((?:(?:rate|increase) ?\()?folkmoot_(?:queue|batch)")
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
"""What a metric's series are called."""


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def expressions() -> Iterator[str]:
    """Of the dashboard's panels and of the alert rules."""
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (rule["expr"] for rule in rules())


def test_every_metric_is_declared_once_and_named_as_prometheus_wants() -> None:
    names = [metric.name for metric in ALL]
    assert len(set(names)) == len(names)
    declared = [
        metric
        for module in (metrics, metrics_queue, metrics_engine, metrics_hosts, metrics_router)
        for metric in vars(module).values()
        if isinstance(metric, Metric)
    ]
    assert sorted(names) == sorted({metric.name for metric in declared})
    for metric in ALL:
        assert re.fullmatch(r"folkmoot_[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert not re.search(r"_(ms|us|millis|kib|mib|kb|mb|minutes)(_|$)", metric.name), "base units only"
        assert set(metric.labels) <= BOUNDED, metric.name


BOUNDED = {
    *("method", "lane", "code", "reason", "script", "outcome", "model", "state", "status", "engine", "host", "layer"),
    *("kind", "phase", "answer", "verdict"),
}
"""Labels whose values are few whatever clients send: none for a tenant, a request, an expert."""


def test_the_documents_table_is_the_code() -> None:
    text = (ROOT / "docs/observability.md").read_text()
    rows = re.findall(r"^\| `(folkmoot_\w+)` \| (\w+) \| ([\w, ]*) \| (.+) \|$", text, re.MULTILINE)
    documented = {name: (kind, labels, meaning) for name, kind, labels, meaning in rows}
    assert len(documented) == len(rows)
    assert documented == {m.name: (m.kind, ", ".join(m.labels), m.help) for m in ALL}


def test_panels_and_alerts_ask_for_what_there_is() -> None:
    series = {metric.name + suffix for metric in ALL for suffix in SUFFIXES[metric.kind]}
    asked = {name for expression in expressions() for name in NAME.findall(expression)}
    assert {name for name in asked if name.startswith("folkmoot_")} <= series
    assert {name for name in asked if name.startswith("vllm:")}, "the KV cache"


def test_figures_of_the_queue_are_not_summed_over_gateways() -> None:
    """Each gateway says the same of the store: their sum would be wrong with two of them."""
    assert sum(len(FIGURE.findall(expression)) for expression in expressions()) > 10
    for expression in expressions():
        for match in FIGURE.finditer(expression):
            assert match[1] == "max", expression


def test_every_alert_says_what_is_wrong_and_how_bad_it_is() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) > 5
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"].endswith(".")


def test_prometheus_takes_the_alert_rules(tmp_path: Path) -> None:
    promtool = find_program("promtool")
    if promtool is None:
        pytest.skip("promtool is not at hand (Debian: apt-get install prometheus)")
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "folkmoot", "rules": rules()}]}))
    done = subprocess.run([promtool, "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"{len(rules())} rules found" in done.stdout, done.stdout + done.stderr
