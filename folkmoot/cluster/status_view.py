"""The status document as tables on a terminal."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from folkmoot.experts.expert_choice import LETTERS
from folkmoot.gateway.client import Client
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import COUNTERS


def fetch(client: Client) -> dict[str, Any]:
    """The cluster's document, with the models' load beside it (which gateways know without the cluster)."""
    answer = client.status()
    document: dict[str, Any] = (
        json.loads(answer.json) if answer.json else {"error": "the cluster has not reported lately"}
    )
    document["models"] = [as_document(model) for model in answer.models]
    return document


def as_document(m: pb.Model) -> dict[str, Any]:
    """A model and its load."""
    return {
        "model": m.name,
        "engines": m.num_engines,
        "ready_engines": m.num_ready_engines,
        "max_model_len": m.max_model_len,
        "waiting_requests": m.load.waiting_requests,
        "running_requests": m.load.running_requests,
        "lanes": {pb.Lane.Name(lane.lane).lower(): _lane(lane) for lane in m.lanes},
    }


def _lane(lane: pb.LaneLoad) -> dict[str, Any]:
    return {**_load(lane.load), "tenants": [{"tenant": one.tenant, **_load(one.load)} for one in lane.tenants]}


def _load(load: pb.QueueLoad) -> dict[str, int]:
    return {name: getattr(load, name) for name in COUNTERS}


@dataclass(frozen=True)
class Rates:
    """What was done a second, between two documents: rows by host, tokens by engine."""

    rows: dict[str, float]
    tokens: dict[str, float]


def rates(before: dict[str, Any], now: dict[str, Any]) -> Rates | None:
    """Of hosts and engines that are the same process in both; None where there is no time between them."""
    seconds = now.get("time_s", 0.0) - before.get("time_s", 0.0)
    if seconds <= 0 or "hosts" not in before:
        return None
    rows = {(h["host"], h["incarnation"]): h["rows"] for h in before["hosts"]}
    tokens = {e["engine"]: e.get("generated_tokens", 0) for e in before["engines"]}
    return Rates(
        {h["host"]: (h["rows"] - rows[h["host"], h["incarnation"]]) / seconds
         for h in now["hosts"] if (h["host"], h["incarnation"]) in rows},
        {e["engine"]: (e.get("generated_tokens", 0) - tokens[e["engine"]]) / seconds
         for e in now["engines"] if e["engine"] in tokens},
    )  # fmt: skip


def show(console: Console, document: dict[str, Any]) -> None:
    """Print it."""
    for part in parts(document):
        console.print(part)


def parts(document: dict[str, Any], speed: Rates | None = None) -> Iterator[RenderableType]:
    """It, from the most general to the most particular."""
    if document.get("error"):
        yield Text(document["error"], "bold red")
    for one in document["models"]:
        yield (
            f"model [bold]{one['model']}[/]: {one['ready_engines']} of {one['engines']} engines "
            f"can serve, "
            f"{one['running_requests']} requests running, {one['waiting_requests']} waiting"
            + ("" if speed is None else f", [bold]{sum(speed.tokens.values()):.1f}[/] tokens/s")
        )
        if any(lane["tenants"] for lane in one["lanes"].values()):
            yield _lanes_table(one["lanes"])
    if "map" not in document:
        return
    if document["map"]["layers"]:
        yield _map_line(document["map"])
        if (choice := document.get("expert_choice")) is not None:
            yield _dtypes_line(document["expert_dtype"], choice)
        yield hosts_table(document["hosts"], speed=speed)
        for trouble in document["healing"]:
            yield Text(f"{trouble['host']} {trouble['state']}: {trouble['detail']}".strip())
    else:
        yield "a dense model: no expert hosts"
    if (balance := document["balance"])["on"]:
        yield Text(_balance_line(balance))
    if (scaling := document["autoscaling"])["least"] != scaling["most"]:
        yield Text(_scaling_line(scaling))
    yield _engines_table(document["engines"], speed)
    if document.get("metrics"):
        yield f"metrics for Prometheus: {document['metrics']}"


class Watch:
    """What `folkmoot status --watch` draws: a document, with what was done since the one before."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}
        self._rates: Rates | None = None

    def draw(self, document: dict[str, Any]) -> RenderableType:
        """The next one."""
        if document.get("time_s") != self._last.get("time_s"):
            self._rates = rates(self._last, document)
            self._last = document
        said_s = document.get("time_s")
        written = "" if said_s is None else f"; what the cluster said {max(0.0, time.time() - said_s):.0f} s ago"
        head = Text(f"{document.get('cluster', '')} {time.strftime('%H:%M:%S')}{written}".strip(), "dim")
        return Group(head, *parts(document, self._rates))


def hosts_table(hosts: list[dict[str, Any]], title: str = "expert hosts", speed: Rates | None = None) -> Table:
    """One line a host: where it is, what it holds, what it has served."""
    header = ("host", "state", "pid", "actor", "experts", "MiB", "calls", "rows", "busy s")
    table = Table(*header, *(() if speed is None else ("rows/s",)), title=title)
    table.columns[0].no_wrap = True
    for h in hosts:
        state = f"[green]{h['phase']}[/]" if h["alive"] else f"[red]{h['phase']}[/]"
        numbers = [str(n) for n in (h["bytes"] >> 20, h["requests"], h["rows"], h["busy_s"])]
        if speed is not None:
            numbers.append(_rate(speed.rows.get(h["host"])))
        table.add_row(h["host"], state, _or_dash(h["pid"]), _or_dash(h["actor_pid"]), ranges(h["experts"]), *numbers)
    return table


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and parts[-1][-1] == n - 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _map_line(facts: dict[str, Any]) -> str:
    line = (
        f"expert map version [bold]{facts['version']}[/]: "
        f"{facts['experts']} experts in each of {facts['layers']} layers, "
        f"{facts['replicas_least']} of {facts['replicas_wanted']} replicas"
    )
    return line + (f", [bold red]{facts['missing']} experts without a host[/]" if facts["missing"] else "")


def _dtypes_line(asked: str, facts: dict[str, Any]) -> str:
    counts = ", ".join(f"{facts[kind]} in {kind}" for kind in reversed(LETTERS) if kind in facts)
    size = f"{facts['bytes'] / 2**20:.1f} MiB, {facts['of_bf16']:.2f} of bf16's"
    return f"experts {asked}: {counts}; {size}; expected relative error {facts['relative_error']:.2%}"


def _lanes_table(lanes: dict[str, dict[str, Any]]) -> Table:
    header = ("lane", "tenant", "running", "waiting", "tokens running", "tokens waiting")
    table = Table(*header, title="load, by lane and by the tenants with the most of it")
    names = ("running_requests", "waiting_requests", "running_tokens", "waiting_tokens")
    for lane, load in lanes.items():
        table.add_row(lane, "all", *(str(load[name]) for name in names))
        for one in load["tenants"]:
            tenant = one["tenant"] if one["tenant"].isprintable() else repr(one["tenant"])
            table.add_row("", Text(tenant or "-"), *(str(one[name]) for name in names))
    return table


def _scaling_line(facts: dict[str, Any]) -> str:
    line = f"engines {facts['least']} to {facts['most']}, {facts['wanted']} wanted: {facts['reason']}"
    return line + ("" if facts["late_s"] is None else "; a deadline cannot be met with the most engines")


def _balance_line(facts: dict[str, Any]) -> str:
    even = facts["busiest_over_even"]
    measured = "" if even is None else f", busiest host {even:g} of an even share"
    return f"balance: {facts['extra_replicas']} extra replicas{measured}; {facts['reason']}"


def _engines_table(engines: list[dict[str, Any]], speed: Rates | None = None) -> Table:
    header = ["engine", "state", "pid", "running", "requests", "prompt tokens", "generated tokens"]
    header += ["TTFT ms", "ITL ms", *([] if speed is None else ["tokens/s"])]
    table = Table(*header, title="engines; latencies of the last interactive requests, p50 / p99")
    table.columns[0].no_wrap = True
    for e in engines:
        state = f"[green]{e['phase']}[/]" if e["phase"] == "ready" else f"[yellow]{e['phase']}[/]"
        counters = [str(e.get(name, 0)) for name in ("running", "requests", "prompt_tokens", "generated_tokens")]
        counters += [_latency(e, "ttft"), _latency(e, "itl")]
        if speed is not None:
            counters.append(_rate(speed.tokens.get(e["engine"])))
        table.add_row(e["engine"], state, _or_dash(e["pid"]), *counters)
    return table


def _latency(engine: dict[str, Any], name: str) -> str:
    found = [engine.get(f"{name}_{p}_s") for p in ("p50", "p99")]
    return " / ".join(f"{1000 * s:.0f}" for s in found if s is not None) or "-"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)
