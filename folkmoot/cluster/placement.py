"""Which expert goes on which host: pure functions, no I/O.

An *expert column* is expert e of every MoE layer: the finest unit that is placed. `rebalance` starts from what hosts
hold already and moves as little as it can, so the same function makes the first placement (nothing held), the one
after a loss, and the one after a change of the number of hosts or replicas.

Example: 4 columns, 2 replicas, hosts a and b on one node, c and d on another: each column gets one host of each node.

>>> rebalance([2] * 4, [HostSlot("a", "n1"), HostSlot("b", "n1"), HostSlot("c", "n2"), HostSlot("d", "n2")], {})
{'a': (0, 2), 'b': (1, 3), 'c': (0, 2), 'd': (1, 3)}
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias


class PlacementError(ValueError):
    """The replicas that were asked for do not fit on the hosts that there are."""


@dataclass(frozen=True, slots=True)
class HostSlot:
    """A place for an expert host: the host's name, its node (None: Ray has found none yet), how many columns fit
    (None: any number), its speed, of which only ratios to other hosts' matter, and its kind (None: its speed is as it
    was said, whatever it measures)."""

    host: str
    node: str | None
    capacity: int | None = None
    speed: float = 1.0
    kind: int | None = None


Extra: TypeAlias = tuple[int, int]
"""A layer and an expert: a replica of one logical expert, beside the columns (balance_live.py)."""

Held: TypeAlias = dict[str, set[int]]
Move: TypeAlias = tuple[int, str, str]
"""A column, from one host, to another."""


def num_hosts_for(
    num_columns: int,
    replicas: int,
    *,
    num_hosts: int | None,
    experts_per_host: int | None,
    capacity: int | None = None,
) -> int:
    """How many hosts `--hosts N` or `--experts-per-host K` means; 0 for a dense model.

    `capacity` is the most columns that fit on a host (None: all). Raises PlacementError when a column's replicas would
    share a host, when a host would hold nothing, or when they do not fit.
    """
    if num_columns == 0:
        return 0
    if replicas < 1:
        raise PlacementError(f"replicas must be at least 1, not {replicas}")
    if num_hosts is None:
        per_host = num_columns if experts_per_host is None else experts_per_host
        if per_host < 1:
            raise PlacementError(f"experts per host must be at least 1, not {per_host}")
        num_hosts = max(
            math.ceil(num_columns * replicas / per_host),
            replicas if experts_per_host is None else 1,
        )
    if num_hosts < 1:
        raise PlacementError(f"hosts must be at least 1, not {num_hosts}")
    if replicas > num_hosts:
        raise PlacementError(
            f"{replicas} replicas need {replicas} expert hosts, since two replicas on one host would die together; "
            f"there {'is' if num_hosts == 1 else 'are'} {num_hosts}: use more hosts, or fewer replicas"
        )
    if num_hosts > num_columns * replicas:
        raise PlacementError(
            f"{num_hosts} expert hosts are more than {num_columns} experts x {replicas} replicas can fill"
        )
    if capacity is not None and min(capacity, num_columns) * num_hosts < num_columns * replicas:
        raise PlacementError(
            f"{num_columns} experts x {replicas} replicas do not fit on {num_hosts} expert hosts with room for "
            f"{capacity} each: use more hosts, fewer replicas, or a larger --max-experts-per-host"
        )
    return num_hosts


def rebalance(
    wanted: Sequence[int], hosts: Sequence[HostSlot], held: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """The columns that each host ought to hold: `wanted[c]` replicas of column c, each on another host.

    `held` names what hosts hold now; what can stay, stays. Where there are several nodes, a column's replicas go to
    different nodes. Hosts end up level, by columns over speed, as far as their room allows. Where not all replicas fit,
    every column gets its first one before any gets its second; `shortfall` says what is missing.
    """
    kept = _without_surplus(wanted, hosts, held)
    chosen = (
        _fill(wanted, hosts, kept, spread_nodes=True)
        or _fill(wanted, hosts, kept, spread_nodes=False)
        or _fill_in_rounds(wanted, hosts, kept)
    )
    while move := _spreading_move(hosts, chosen) or _levelling_move(hosts, chosen):
        column, source, destination = move
        chosen[source].remove(column)
        chosen[destination].add(column)
    return {host.host: tuple(sorted(chosen[host.host])) for host in hosts}


def shortfall(wanted: Sequence[int], placed: Mapping[str, Sequence[int]]) -> dict[int, int]:
    """How many replicas each column lacks, of those that lack any."""
    have = Counter(column for columns in placed.values() for column in columns)
    return {column: n - have[column] for column, n in enumerate(wanted) if have[column] < n}


def _without_surplus(wanted: Sequence[int], hosts: Sequence[HostSlot], held: Mapping[str, Sequence[int]]) -> Held:
    """What stays of `held`: no host above its capacity, no column above its number; the fullest hosts give first."""
    kept = {h.host: set(held.get(h.host, ())[: h.capacity]) for h in hosts}
    for column, limit in enumerate(wanted):
        holders = [h for h in hosts if column in kept[h.host]]
        while len(holders) > limit:
            on_node = Counter(h.node for h in holders)
            giver = max(holders, key=lambda h: (on_node[h.node], len(kept[h.host])))
            kept[giver.host].remove(column)
            holders.remove(giver)
    return kept


def _fill(wanted: Sequence[int], hosts: Sequence[HostSlot], kept: Held, *, spread_nodes: bool) -> Held | None:
    """Add what is missing, a column at a time, to the hosts with the most room (Gale and Ryser's greedy rule, which
    finds an assignment whenever one exists, unless it must prefer other nodes); None if it does not fit."""
    chosen = {host: set(columns) for host, columns in kept.items()}
    for column, number in enumerate(wanted):
        while sum(column in columns for columns in chosen.values()) < number:
            if not _add(column, len(wanted), hosts, chosen, spread_nodes):
                return None
    return chosen


def _fill_in_rounds(wanted: Sequence[int], hosts: Sequence[HostSlot], kept: Held) -> Held:
    """As many as fit: first replicas first."""
    chosen = {host: set(columns) for host, columns in kept.items()}
    for least in range(1, max(wanted, default=0) + 1):
        for column, number in enumerate(wanted):
            if sum(column in columns for columns in chosen.values()) < min(least, number):
                _add(column, len(wanted), hosts, chosen, spread_nodes=True)
    return chosen


def _add(column: int, num_columns: int, hosts: Sequence[HostSlot], chosen: Held, spread_nodes: bool) -> bool:
    """Add one replica of a column to the best host; False if none has room."""
    free = [h for h in hosts if column not in chosen[h.host] and _room(h, num_columns, chosen) > 0]
    if not free:
        return False
    on_node = Counter(h.node for h in hosts if column in chosen[h.host]) if spread_nodes else Counter()
    best = min(free, key=lambda h: (on_node[h.node], -_room(h, num_columns, chosen)))
    chosen[best.host].add(column)
    return True


def _room(host: HostSlot, num_columns: int, chosen: Held) -> int:
    return (num_columns if host.capacity is None else host.capacity) - len(chosen[host.host])


def _spreading_move(hosts: Sequence[HostSlot], chosen: Held) -> Move | None:
    """A move after which a column's replicas are on one more node."""
    if len({h.node for h in hosts}) == 1:
        return None
    for column in sorted(set().union(*chosen.values())):
        on_node = Counter(h.node for h in hosts if column in chosen[h.host])
        crowded = [h for h in hosts if column in chosen[h.host] and on_node[h.node] > 1]
        free = [h for h in hosts if not on_node[h.node] and _has_room(h, chosen)]
        if crowded and free:
            source = max(crowded, key=lambda h: len(chosen[h.host]))
            return column, source.host, min(free, key=lambda h: len(chosen[h.host])).host
    return None


def _levelling_move(hosts: Sequence[HostSlot], chosen: Held) -> Move | None:
    """A move to a host that is less loaded with it than the source was, that leaves no column on fewer nodes."""
    by_load = sorted(hosts, key=lambda h: len(chosen[h.host]) / h.speed)
    after = {h.host: (len(chosen[h.host]) + 1) / h.speed for h in hosts}
    for source in reversed(by_load):
        for destination in sorted(hosts, key=lambda h: after[h.host]):
            if after[destination.host] >= len(chosen[source.host]) / source.speed:
                break
            if not _has_room(destination, chosen):
                continue
            for column in sorted(chosen[source.host] - chosen[destination.host]):
                nodes = Counter(h.node for h in hosts if column in chosen[h.host])
                if source.node == destination.node or nodes[source.node] > 1 or not nodes[destination.node]:
                    return column, source.host, destination.host
    return None


def _has_room(host: HostSlot, chosen: Held) -> bool:
    return host.capacity is None or len(chosen[host.host]) < host.capacity


def as_placement(
    columns: Sequence[int], moe_layers: Sequence[int], extras: Sequence[Extra] = ()
) -> dict[int, list[int]]:
    """The columns and extras as an expert host wants them: for each MoE layer the experts, position = slot."""
    placed = {layer: list(columns) for layer in moe_layers}
    for layer, expert in extras:
        placed[layer].append(expert)
    return placed
