"""Room for expert hosts: Ray placement groups, one bundle a host, made and given back as the wish says.

Where a node is lost, Ray looks for room for its bundles on others by itself; until it has found some, the host has no
node. All of it blocks for a moment, so the router calls it from a thread.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from folkmoot.cluster.placement import HostSlot
from folkmoot.cluster.spec import ClusterSpec, group_name
from folkmoot.cluster.wish import Place, Wish


class RaySlots:
    """The placement groups of one cluster."""

    def __init__(self, spec: ClusterSpec) -> None:
        self._spec = spec
        self._groups: dict[int, PlacementGroup] = {}
        self._places: Mapping[str, Place] = {}
        self._nodes: dict[str, str] = {}
        self._gcs = gcs_client()

    def look(self, wish: Wish) -> tuple[HostSlot, ...]:
        """The hosts that are wanted, and where Ray has room for each now. Asks Ray for what was never asked for."""
        self._places = wish.places
        tables = {group: self._table(group, wish.groups[group]) for group in sorted(wish.open_groups)}
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        nodes -= set(self._gcs.get_draining_nodes())  # their hosts serve on, but are not counted on any more
        found = {h: tables[p.group].get(p.bundle, "") for h, p in self._places.items() if p.group in tables}
        self._nodes = {host: node for host, node in found.items() if node in nodes}
        return tuple(self._slot(host) for host in wish.open_hosts)

    def give_back(self, host: str, wish: Wish) -> None:
        """A host has left: without others that are wanted its placement group goes too."""
        group = wish.places[host].group
        if group not in wish.open_groups and (found := self._groups.pop(group, None)) is not None:
            remove_placement_group(found)

    def actor_options(self, host: str) -> dict[str, Any]:
        """Ray's options for an actor in the host's place."""
        place = self._places[host]
        return {
            "num_cpus": self._cpus(place.group),
            "num_gpus": self._spec.host_gpus,
            "resources": dict(self._spec.host_resources),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._groups[place.group], place.bundle),
        }

    def node_of(self, host: str) -> str | None:
        """Where Ray has room for the host."""
        return self._nodes.get(host)

    @property
    def nodes(self) -> frozenset[str]:
        """All nodes with room for a host."""
        return frozenset(self._nodes.values())

    def threads(self, host: str) -> int:
        """The host's share of its node's cores."""
        if (own := self._spec.host_group(self._places[host].group).cpus) is not None:
            return max(1, round(own))
        node = self._nodes.get(host)
        cores = {n["NodeID"]: n["Resources"].get("CPU", 1) for n in ray.nodes() if n["Alive"]}
        physical = os.cpu_count() or 1 if len(cores) == 1 else int(cores.get(node, 1))
        return max(1, physical // max(1, Counter(self._nodes.values())[node or ""]))

    def _slot(self, host: str) -> HostSlot:
        spec, number = self._spec, self._places[host].group
        group = spec.host_group(number)
        capacity = group.capacity(spec.column_bytes, spec.max_experts_per_host)
        return HostSlot(host, self._nodes.get(host), capacity, group.guess, number if spec.measures_speed else None)

    def _cpus(self, group: int) -> float:
        """What Ray reserves for each host of a group."""
        own = self._spec.host_group(group).cpus
        return self._spec.host_cpus if own is None else own

    def _table(self, group: int, size: int) -> dict[int, str]:
        """Bundle -> node, of those that have one."""
        if group not in self._groups:
            self._groups[group] = self._find(group, size)
        return dict(placement_group_table(self._groups[group])["bundles_to_node_id"])

    def _find(self, group: int, size: int) -> PlacementGroup:
        spec, name = self._spec, group_name(self._spec, group)
        try:
            return ray.util.get_placement_group(name)
        except ValueError:
            bundle = {
                "CPU": self._cpus(group),
                **({"GPU": spec.host_gpus} if spec.host_gpus else {}),
                **spec.host_resources,
            }
            bundles = [dict(bundle) for _ in range(size)]
            return placement_group(bundles, spec.placement.upper(), name=name, lifetime="detached")


def gcs_client() -> Any:
    """Ray's client of its control service, for what has no public API: draining nodes."""
    return ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)


def groups_of(spec: ClusterSpec) -> Iterator[str]:
    """Names of the placement groups that this cluster has in Ray."""
    base = group_name(spec, 0)
    for table in placement_group_table().values():
        name = str(table["name"])
        if table["state"] != "REMOVED" and (name == base or name.removeprefix(f"{base}.").isdigit()):
            yield name
