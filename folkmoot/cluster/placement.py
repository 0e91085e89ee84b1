"""Placement: which expert host holds a replica of which expert column. Pure functions, no I/O.

An *expert column* is expert e of every MoE layer: the finest unit that is placed. `assign` only ever adds replicas to
what is held already, so the same function makes the first placement (nothing held) and the one after a loss.

Example: 4 columns, 2 replicas, hosts a and b on one node, c and d on another: each column gets one host of each node.

>>> assign(4, [HostSlot("a", "n1"), HostSlot("b", "n1"), HostSlot("c", "n2"), HostSlot("d", "n2")], 2)
{'a': (0, 2), 'b': (1, 3), 'c': (0, 2), 'd': (1, 3)}
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from folkmoot.experts.expert_map import ExpertMap, placement_of


class PlacementError(ValueError):
    """The replicas that were asked for do not fit on the hosts that there are."""


@dataclass(frozen=True, slots=True)
class HostSlot:
    """An expert host that may be given columns: its name, its node, and how many columns fit (None: any number)."""

    host: str
    node: str
    capacity: int | None = None


def num_hosts_for(
    num_columns: int,
    replicas: int,
    *,
    num_hosts: int | None,
    experts_per_host: int | None,
) -> int:
    """How many hosts `--hosts N` or `--experts-per-host K` means; 0 for a dense model.

    Raises PlacementError when a column's replicas would share a host, or when a host would hold nothing.
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
    return num_hosts


def assign(
    num_columns: int,
    hosts: Sequence[HostSlot],
    replicas: int,
    held: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, tuple[int, ...]]:
    """The columns to add on each host so that every column has `replicas` replicas, each on another host.

    `held` names the columns that hosts hold already. Where there are several nodes, a column's replicas go to
    different nodes first; within that, to the host with the most room left (Gale and Ryser's greedy rule, which finds
    an assignment whenever one exists; the preference for other nodes is dropped where it would not fit).

    Raises PlacementError when the replicas do not fit.
    """
    for spread_nodes in (True, False):
        added = _greedy(num_columns, hosts, replicas, held or {}, spread_nodes)
        if added is not None:
            return {host.host: tuple(added[host.host]) for host in hosts}
    room = sum(num_columns if h.capacity is None else h.capacity for h in hosts)
    raise PlacementError(
        f"{num_columns} experts x {replicas} replicas do not fit on {len(hosts)} expert hosts "
        f"with room for {room} in all, each replica of an expert on another host"
    )


def _greedy(
    num_columns: int,
    hosts: Sequence[HostSlot],
    replicas: int,
    held: Mapping[str, Sequence[int]],
    spread_nodes: bool,
) -> dict[str, list[int]] | None:
    """One pass over the columns; None if one of them finds too few hosts with room."""
    room = {h.host: (num_columns if h.capacity is None else h.capacity) - len(held.get(h.host, ())) for h in hosts}
    added: dict[str, list[int]] = {h.host: [] for h in hosts}
    order = {h.host: i for i, h in enumerate(hosts)}

    def preference(host: HostSlot, nodes_used: dict[str, int]) -> tuple[int, int, int]:
        return (
            nodes_used.get(host.node, 0) if spread_nodes else 0,
            -room[host.host],
            order[host.host],
        )

    for column in range(num_columns):
        holders = [h for h in hosts if column in held.get(h.host, ())]
        nodes_used: dict[str, int] = {}
        for h in holders:
            nodes_used[h.node] = nodes_used.get(h.node, 0) + 1
        free = [h for h in hosts if h not in holders and room[h.host] > 0]
        for _ in range(replicas - len(holders)):
            if not free:
                return None
            chosen = min(free, key=lambda h: preference(h, nodes_used))
            free.remove(chosen)
            added[chosen.host].append(column)
            room[chosen.host] -= 1
            nodes_used[chosen.node] = nodes_used.get(chosen.node, 0) + 1
    return added


def columns_held(expert_map: ExpertMap) -> dict[str, tuple[int, ...]]:
    """The columns that each host of the map holds in every MoE layer."""
    columns: dict[str, tuple[int, ...]] = {}
    for host in expert_map.hosts:
        by_layer = [set(by_expert) for by_expert in placement_of(expert_map, host).values()]
        whole = set.intersection(*by_layer) if len(by_layer) == len(expert_map.layers) and by_layer else set()
        columns[host] = tuple(sorted(whole))
    return columns


def as_placement(columns: Sequence[int], moe_layers: Sequence[int]) -> dict[int, list[int]]:
    """The columns as an expert host wants them: for each MoE layer the experts, position = slot."""
    return {layer: list(columns) for layer in moe_layers}
