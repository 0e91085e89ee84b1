"""What the expert router does about hot experts: extra replicas, beside those that placement.py placed. Pure functions.

Every host has some slots a layer beyond its columns. What is in them nobody counts on: a host may take such a replica
up or give it up at any time, so that balancing never takes away what was asked for, and healing need not know of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from folkmoot.cluster.balance import Plan, balance
from folkmoot.cluster.balance_layer import Hosts
from folkmoot.cluster.balance_loads import ExpertLoads
from folkmoot.cluster.healing import is_settled
from folkmoot.cluster.placement import Extra
from folkmoot.cluster.router_state import HostState, RouterState

LEAST_GAIN = 0.05
"""The busiest hosts' time must become shorter by this part, or nothing is moved."""
LEAST_ROWS = 50.0
"""Recent rows an expert, in the mean: what is uneven with fewer may be so by chance."""


@dataclass(frozen=True)
class Decision:
    """`extras` for the hosts that should hold others than they do, and why. `before` and `after`: the time of each
    layer's busiest host over that of an even share, in the mean over the rows."""

    reason: str
    before: float | None = None
    after: float | None = None
    extras: Mapping[str, tuple[Extra, ...]] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """For the status document."""
        return {"reason": self.reason, "busiest_over_even": _rounded(self.before), "aim": _rounded(self.after)}


def decide_extras(state: RouterState, loads: ExpertLoads, spare: int) -> Decision:
    """Which replicas hosts should hold beside their columns, `spare` in a layer at most, under these recent loads."""
    hosts = sorted((h for h in state.hosts.values() if h.columns), key=lambda h: h.host)
    if not hosts or not is_settled(state):
        return Decision("waits: hosts are being mended or changed")
    rows = loads.recent * (loads.half_life_s / math.log(2))
    if rows.mean() < LEAST_ROWS:
        return Decision(f"waits: {rows.mean():.0f} recent rows an expert, {LEAST_ROWS:.0f} tell something")
    slots = state.slots
    shape = _shape(hosts, [slots[h.host].speed for h in hosts], spare, state.num_columns)
    held = [[_held(h, layer) for h in hosts] for layer in loads.layers]
    plan = balance(loads.recent, shape, held, [set(h.columns) for h in hosts])
    even = float(loads.recent.sum()) / sum(shape.speed)
    before, after = plan.before / even, plan.after / even
    if after > before * (1 - LEAST_GAIN):
        return Decision(f"nothing to gain: {before:.3f} could become {after:.3f}", before, after)
    wanted = {h.host: _extras(plan, i, h, loads.layers) for i, h in enumerate(hosts)}
    changed = {h.host: wanted[h.host] for h in hosts if set(wanted[h.host]) != set(h.extras_beside(h.columns))}
    return Decision(f"{plan.moves} replicas to load on {len(changed)} hosts", before, after, changed)


def _shape(hosts: Sequence[HostState], speed: Sequence[float], spare: int, num_columns: int) -> Hosts:
    nodes = {node: i for i, node in enumerate(sorted({h.node or "" for h in hosts}))}
    room = [num_columns if h.capacity is None else h.capacity for h in hosts]
    slots = tuple(
        max(len(h.columns), min(len(h.columns) + spare, most, num_columns)) for h, most in zip(hosts, room, strict=True)
    )
    return Hosts(slots, tuple(speed), tuple(nodes[h.node or ""] for h in hosts))


def _held(host: HostState, layer: int) -> list[int]:
    return [*host.columns, *(e for n, e in host.extras_beside(host.columns) if n == layer)]


def _extras(plan: Plan, number: int, host: HostState, layers: Sequence[int]) -> tuple[Extra, ...]:
    return tuple(
        (layer, e) for layer, held in zip(layers, plan.held, strict=True) for e in held[number] if e not in host.columns
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
