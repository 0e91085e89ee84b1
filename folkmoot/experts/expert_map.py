"""The expert map: which expert host holds a replica of which logical expert. Pure data, no I/O.

A *logical expert* is the pair (layer, expert) of the checkpoint. A *replica* is one copy of it in one slot of one
expert host. Every change makes a new map with the next version; a map is never changed in place.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

Placement: TypeAlias = Mapping[int, Sequence[int]]
"""What one host holds: for each MoE layer its logical experts; an expert's position is its slot in that layer."""


class ExpertMapError(ValueError):
    """The map cannot be what was asked of it."""


class NoReplicaError(ExpertMapError):
    """A logical expert has no replica on any host."""

    def __init__(self, layer: int, expert: int, version: int) -> None:
        super().__init__(f"layer {layer}, expert {expert} has no replica on any host (expert map version {version})")
        self.layer, self.expert, self.version = layer, expert, version


class Replica(NamedTuple):
    """One copy of a logical expert: on which host, and at which index among that host's experts of the layer."""

    host: str
    slot: int


@dataclass(frozen=True, slots=True)
class HostAddress:
    """Where an expert host listens. `incarnation` grows with each start, so that a former life is told apart."""

    host: str
    incarnation: int
    node: str
    unix_path: str | None = None
    tcp: str | None = None


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """An immutable, versioned map. `layers[layer][expert]` is the tuple of that logical expert's replicas."""

    version: int = 0
    hosts: Mapping[str, HostAddress] = field(default_factory=lambda: MappingProxyType({}))
    layers: Mapping[int, tuple[tuple[Replica, ...], ...]] = field(default_factory=lambda: MappingProxyType({}))

    def to_json(self) -> str:
        """The map as one line of JSON; `from_json` makes an equal map of it."""
        return json.dumps(
            {
                "version": self.version,
                "hosts": [asdict(a) for a in self.hosts.values()],
                "layers": {str(n): experts for n, experts in self.layers.items()},  # [[[host, slot], ...], ...]
            },
            separators=(",", ":"),
        )

    @staticmethod
    def from_json(text: str | bytes) -> "ExpertMap":
        """Read what `to_json` wrote. Raises ExpertMapError for anything else."""
        try:
            raw = json.loads(text)
            hosts = {h["host"]: HostAddress(**h) for h in raw["hosts"]}
            layers = {
                int(n): tuple(tuple(Replica(str(h), int(s)) for h, s in replicas) for replicas in experts)
                for n, experts in raw["layers"].items()
            }
            parsed = ExpertMap(int(raw["version"]), MappingProxyType(hosts), MappingProxyType(layers))
        except (KeyError, TypeError, ValueError) as e:
            raise ExpertMapError(f"not an expert map: {e}") from e
        _check(parsed)
        return parsed


def empty(moe_layers: Iterable[int], num_experts: int) -> ExpertMap:
    """A map of version 0 in which no logical expert has a replica yet."""
    return ExpertMap(layers=MappingProxyType(dict.fromkeys(moe_layers, ((),) * num_experts)))


def lookup(expert_map: ExpertMap, layer: int, expert: int) -> tuple[Replica, ...]:
    """The replicas of one logical expert. Raises NoReplicaError if there is none, ExpertMapError if it is unknown."""
    experts = expert_map.layers.get(layer)
    if experts is None or not 0 <= expert < len(experts):
        raise ExpertMapError(f"layer {layer}, expert {expert} is not in the model (map version {expert_map.version})")
    if not experts[expert]:
        raise NoReplicaError(layer, expert, expert_map.version)
    return experts[expert]


def missing(expert_map: ExpertMap) -> list[tuple[int, int]]:
    """The logical experts (layer, expert) that have no replica."""
    return [(n, e) for n, experts in expert_map.layers.items() for e, replicas in enumerate(experts) if not replicas]


def placement_of(expert_map: ExpertMap, host: str) -> dict[int, dict[int, int]]:
    """What a host holds, as {layer: {expert: slot}}."""
    held: dict[int, dict[int, int]] = {}
    for n, experts in expert_map.layers.items():
        for e, replicas in enumerate(experts):
            for r in replicas:
                if r.host == host:
                    held.setdefault(n, {})[e] = r.slot
    return held


def add_host(expert_map: ExpertMap, address: HostAddress, placement: Placement) -> ExpertMap:
    """Add a host with all that it holds; one of the same name (a former incarnation) is replaced."""
    without = remove_host(expert_map, address.host) if address.host in expert_map.hosts else expert_map
    hosts = MappingProxyType({**without.hosts, address.host: address})
    slots = {n: {e: s for s, e in enumerate(experts)} for n, experts in placement.items()}
    return add_replicas(replace(without, version=expert_map.version, hosts=hosts), address.host, slots)


def remove_host(expert_map: ExpertMap, host: str) -> ExpertMap:
    """Remove a host and all its replicas. Raises ExpertMapError if the host is unknown."""
    if host not in expert_map.hosts:
        raise ExpertMapError(f"host {host!r} is not in the map (version {expert_map.version})")
    hosts = MappingProxyType({name: a for name, a in expert_map.hosts.items() if name != host})
    layers = {
        n: tuple(tuple(r for r in replicas if r.host != host) for replicas in experts)
        for n, experts in expert_map.layers.items()
    }
    return ExpertMap(expert_map.version + 1, hosts, MappingProxyType(layers))


def add_replicas(expert_map: ExpertMap, host: str, slots: Mapping[int, Mapping[int, int]]) -> ExpertMap:
    """Add replicas on a known host: slots[layer][expert] is the slot. Raises ExpertMapError on a clash."""
    layers = dict(expert_map.layers)
    for n, by_expert in slots.items():
        if n not in layers:
            raise ExpertMapError(f"layer {n} is not a MoE layer of the model")
        experts = list(layers[n])
        for e, slot in by_expert.items():
            if not 0 <= e < len(experts):
                raise ExpertMapError(f"layer {n} has {len(experts)} experts, so there is no expert {e}")
            experts[e] = (*experts[e], Replica(host, slot))
        layers[n] = tuple(experts)
    changed = ExpertMap(expert_map.version + 1, expert_map.hosts, MappingProxyType(layers))
    _check(changed)
    return changed


def remove_replicas(expert_map: ExpertMap, host: str, logical: Iterable[tuple[int, int]]) -> ExpertMap:
    """Take the replicas of the given (layer, expert) pairs on one host out of the map; its slots stay as they are."""
    gone = set(logical)
    held = {(n, e) for n, by_expert in placement_of(expert_map, host).items() for e in by_expert}
    if not gone <= held:
        raise ExpertMapError(f"host {host!r} holds no replica of {sorted(gone - held)}")
    layers = {
        n: tuple(
            tuple(r for r in replicas if not (r.host == host and (n, e) in gone)) for e, replicas in enumerate(experts)
        )
        for n, experts in expert_map.layers.items()
    }
    return ExpertMap(expert_map.version + 1, expert_map.hosts, MappingProxyType(layers))


def _check(expert_map: ExpertMap) -> None:
    """Every replica's host is known, and no slot of a host serves two experts of a layer, nor one expert twice."""
    for n, experts in expert_map.layers.items():
        if _is_sound(experts, expert_map.hosts):
            continue
        taken: set[tuple[str, int]] = set()
        for e, replicas in enumerate(experts):
            if len({r.host for r in replicas}) != len(replicas):
                raise ExpertMapError(f"layer {n}, expert {e} has two replicas on one host")
            for r in replicas:
                if r.host not in expert_map.hosts:
                    raise ExpertMapError(f"layer {n}, expert {e}: host {r.host!r} is not in the map")
                if r.slot < 0 or (r.host, r.slot) in taken:
                    raise ExpertMapError(
                        f"layer {n}, expert {e}: slot {r.slot} of host {r.host!r} is taken or negative"
                    )
                taken.add((r.host, r.slot))


def _is_sound(experts: Sequence[Sequence[Replica]], hosts: Mapping[str, HostAddress]) -> bool:
    """Whether `_check` finds nothing in a layer, said sooner: large models have ten thousands of replicas."""
    flat = [(e, r) for e, replicas in enumerate(experts) for r in replicas]
    held = {(e, r.host) for e, r in flat}
    slots = {r for _, r in flat}
    known = {host for _, host in held} <= hosts.keys()
    return known and len(held) == len(slots) == len(flat) and min((r.slot for _, r in flat), default=0) >= 0
