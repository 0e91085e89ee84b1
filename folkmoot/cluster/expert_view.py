"""Rows of experts for people: the heat map of all layers with what it does not show, or one layer expert by expert."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from folkmoot.cluster import heat_view
from folkmoot.cluster.status_view import ranges

BAR = 30
"""Columns of the longest bar."""
SHOWN_HOSTS = 16
ROOM_BELOW = 8
"""Lines that a view that fits the terminal keeps for all but the map."""


class UnknownLayer(ValueError):
    """There is no such layer of experts. The message names those that there are."""


def view(console: Console, document: dict[str, Any], layer: int | None, total: bool, *, fits: bool) -> RenderableType:
    """The view of a document of the expert router's (`ExpertRouter.expert_rows`). `fits`: it must not be longer than
    the terminal. Raises UnknownLayer."""
    rows = np.array(document["rows_total" if total else "rows_recent"], np.float64)
    unit = "rows since the beginning" if total else f"rows/s lately (half after {document['half_life_s']:g} s)"
    if layer is not None:
        return _layer(document, layer, unit)
    lines = max(1, console.height - ROOM_BELOW - min(SHOWN_HOSTS, len(document["hosts"]))) if fits else None
    is_coloured = console.color_system is not None and not console.no_color
    width = console.width
    drawn = heat_view.heat_map(document["layers"], rows, width, lines, is_coloured=is_coloured)
    return Group(
        Text(f"{unit}; right: the busiest expert of each layer, over the mean", "bold"),
        *drawn,
        Text(_replicas(document)),
        *(Text(line) for line in _hosts(document)),
    )


def _replicas(document: dict[str, Any]) -> str:
    counts = Counter(len(found) for experts in document["replicas"] for found in experts)
    several = ", ".join(f"{number} with {count}" for count, number in sorted(counts.items(), reverse=True))
    return f"replicas of the {counts.total()} logical experts: {several}"


def _hosts(document: dict[str, Any]) -> Iterator[str]:
    """What each host holds: the experts of all layers, and how many of single layers beside them."""
    held: dict[int, Counter[int]] = defaultdict(Counter)
    for experts in document["replicas"]:
        for expert, found in enumerate(experts):
            for host in found:
                held[host][expert] += 1
    names, layers = document["hosts"], len(document["layers"])
    for host, counts in sorted(held.items())[:SHOWN_HOSTS]:
        whole = [expert for expert, number in counts.items() if number == layers]
        single = counts.total() - layers * len(whole)
        beside = f", and {single} of single layers" if single else ""
        yield f"  {names[host]}: experts {ranges(whole) or '-'}{beside}"
    if len(held) > SHOWN_HOSTS:
        yield f"  and {len(held) - SHOWN_HOSTS} more hosts"


def _layer(document: dict[str, Any], layer: int, unit: str) -> RenderableType:
    if layer not in document["layers"]:
        raise UnknownLayer(f"layer {layer} has no experts; those that have: {ranges(document['layers'])}")
    at = document["layers"].index(layer)
    recent, total = (np.array(document[name][at], np.float64) for name in ("rows_recent", "rows_total"))
    shown = total if unit.startswith("rows since") else recent
    mean = shown.mean()
    table = Table(
        "expert", "rows/s lately", "rows in all", "over mean", "", "hosts", title=f"layer {layer}; bars: {unit}"
    )
    for expert, found in enumerate(document["replicas"][at]):
        hosts = ", ".join(document["hosts"][host] for host in found)
        over = f"{shown[expert] / mean:.2f}" if mean else "-"
        bar = Text("█" * round(BAR * shown[expert] / shown.max()) if mean else "", "blue")
        table.add_row(str(expert), f"{recent[expert]:.1f}", f"{total[expert]:.0f}", over, bar, Text(hosts or "none"))
    return table
