"""The status document as tables on a terminal."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

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


def show(console: Console, document: dict[str, Any]) -> None:
    """Print it."""
    if document.get("error"):
        console.print(f"[bold red]{document['error']}[/]")
    for one in document["models"]:
        console.print(
            f"model [bold]{one['model']}[/]: {one['ready_engines']} of {one['engines']} engines "
            f"can serve, "
            f"{one['running_requests']} requests running, {one['waiting_requests']} waiting"
        )
        if any(lane["tenants"] for lane in one["lanes"].values()):
            console.print(_lanes_table(one["lanes"]))
    if "map" not in document:
        return
    if document["map"]["layers"]:
        console.print(_map_line(document["map"]))
        console.print(hosts_table(document["hosts"]))
        for trouble in document["healing"]:
            console.print(f"{trouble['host']} {trouble['state']}: {trouble['detail']}".strip(), markup=False)
    else:
        console.print("a dense model: no expert hosts")
    if (balance := document["balance"])["on"]:
        console.print(_balance_line(balance), markup=False)
    if (scaling := document["autoscaling"])["least"] != scaling["most"]:
        console.print(_scaling_line(scaling), markup=False)
    console.print(_engines_table(document["engines"]))


def hosts_table(hosts: list[dict[str, Any]], title: str = "expert hosts") -> Table:
    """One line a host: where it is, what it holds, what it has served."""
    table = Table("host", "state", "pid", "actor", "experts", "MiB", "calls", "rows", "busy s", title=title)
    for h in hosts:
        state = f"[green]{h['phase']}[/]" if h["alive"] else f"[red]{h['phase']}[/]"
        numbers = (h["bytes"] >> 20, h["requests"], h["rows"], h["busy_s"])
        table.add_row(
            h["host"], state, _or_dash(h["pid"]), _or_dash(h["actor_pid"]), ranges(h["experts"]), *map(str, numbers)
        )
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


def _engines_table(engines: list[dict[str, Any]]) -> Table:
    table = Table("engine", "state", "pid", "running", "requests", "prompt tokens", "generated tokens", title="engines")
    for e in engines:
        state = f"[green]{e['phase']}[/]" if e["phase"] == "ready" else f"[yellow]{e['phase']}[/]"
        counters = (e.get(name, 0) for name in ("running", "requests", "prompt_tokens", "generated_tokens"))
        table.add_row(e["engine"], state, _or_dash(e["pid"]), *map(str, counters))
    return table


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)
