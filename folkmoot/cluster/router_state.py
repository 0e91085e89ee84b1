"""What the expert router knows, as pure data: state changes only through `apply`, decisions come only from `plan`.

    event -> apply(event, state) -> state -> plan(state) -> actions -> (the Ray actor carries them out) -> events

Nothing here does I/O or reads a clock, so all of it is tested without a cluster. The Ray actor in `router.py` is a
thin shell around these two functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, TypeAlias

from folkmoot.cluster.placement import HostSlot, as_placement, assign
from folkmoot.experts import expert_map as maps
from folkmoot.experts.expert_map import ExpertMap, HostAddress


class Phase(StrEnum):
    """Where an expert host is in its life."""

    WANTED = "wanted"
    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"
    REAPED = "reaped"


@dataclass(frozen=True)
class HostState:
    """One expert host: what it holds, and where it is in its life. `bytes` counts its experts' weights."""

    host: str
    node: str
    columns: tuple[int, ...]
    phase: Phase = Phase.WANTED
    incarnation: int = 0
    pid: int | None = None
    actor_pid: int | None = None
    address: HostAddress | None = None
    bytes: int = 0
    load_s: float = 0.0
    shared_bytes: int = 0
    requests: int = 0
    rows: int = 0
    busy_s: float = 0.0
    reason: str | None = None

    @property
    def is_gone(self) -> bool:
        """Whether this incarnation is dead for good."""
        return self.phase in (Phase.DEAD, Phase.REAPED)


@dataclass(frozen=True)
class EngineState:
    """One engine as it last reported: `phase` is "loading", "ready" or "dead", `info` goes to the status as it is."""

    engine: str
    phase: str = "loading"
    pid: int | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterState:
    """Everything the expert router knows. `moe_layers` empty: a dense model, which needs no hosts."""

    moe_layers: tuple[int, ...]
    num_columns: int
    replicas: int
    expert_map: ExpertMap
    hosts: Mapping[str, HostState] = field(default_factory=lambda: MappingProxyType({}))
    engines: Mapping[str, EngineState] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def is_settled(self) -> bool:
        """Whether every host that was wanted is up or given up."""
        return all(h.phase not in (Phase.WANTED, Phase.STARTING) for h in self.hosts.values())

    @property
    def is_publishable(self) -> bool:
        """Whether engines should see the map: it is complete, or as complete as it gets for now."""
        placed = bool(self.hosts) or self.num_columns == 0
        return placed and (self.is_settled or not maps.missing(self.expert_map))


def initial(moe_layers: tuple[int, ...], num_columns: int, replicas: int) -> RouterState:
    """A router that has placed nothing yet."""
    return RouterState(moe_layers, num_columns, replicas, maps.empty(moe_layers, num_columns))


# Events: what happened, told by expert actors, engines, or the router's own shell.


@dataclass(frozen=True)
class HostsOffered:
    """There are slots for expert hosts: place what the map lacks on them. Incarnations will be above `since`."""

    slots: tuple[HostSlot, ...]
    since: int = 0


@dataclass(frozen=True)
class HostStarting:
    """The actor of a host has been asked to start it."""

    host: str
    incarnation: int


@dataclass(frozen=True)
class HostReady:
    """A host has loaded its experts and listens. `columns` is what it holds (a restarted router learns it here)."""

    host: str
    incarnation: int
    address: HostAddress
    columns: tuple[int, ...]
    pid: int
    actor_pid: int
    bytes: int = 0
    load_s: float = 0.0
    shared_bytes: int = 0


@dataclass(frozen=True)
class HostDied:
    """A host is gone, or never came up. One of a former incarnation is news of the past, and changes nothing."""

    host: str
    incarnation: int
    reason: str


@dataclass(frozen=True)
class HostReaped:
    """What was left of a dead host (its actor) has been cleared away."""

    host: str
    incarnation: int


@dataclass(frozen=True)
class HostLoad:
    """What a host has done since its start: requests, rows, and seconds spent computing."""

    host: str
    incarnation: int
    requests: int
    rows: int
    busy_s: float


@dataclass(frozen=True)
class EngineReported:
    """An engine's own account of itself."""

    engine: str
    phase: str
    pid: int | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VersionSeen:
    """An engine has a map of this version. A restarted router counts on from there, so that versions only grow."""

    version: int


Event: TypeAlias = (
    HostsOffered | HostStarting | HostReady | HostDied | HostReaped | HostLoad | EngineReported | VersionSeen
)


def apply(event: Event, state: RouterState) -> RouterState:
    """The state after an event. Events about unknown hosts or former incarnations leave it as it is."""
    match event:
        case HostsOffered(slots, since):
            return _offer(slots, since, state)
        case HostStarting(host, incarnation):
            if host not in state.hosts or state.hosts[host].phase is not Phase.WANTED:
                return state
            return _set_host(state, host, phase=Phase.STARTING, incarnation=incarnation)
        case HostReady():
            return _ready(event, state)
        case HostDied(host, incarnation, reason):
            return _died(host, incarnation, reason, state)
        case HostReaped(host, incarnation):
            if not _is_current(state, host, incarnation) or state.hosts[host].phase is not Phase.DEAD:
                return state
            return _set_host(state, host, phase=Phase.REAPED)
        case HostLoad(host, incarnation, requests, rows, busy_s):
            if not _is_current(state, host, incarnation):
                return state
            return _set_host(state, host, requests=requests, rows=rows, busy_s=busy_s)
        case EngineReported(engine, phase, pid, info):
            engines = {**state.engines, engine: EngineState(engine, phase, pid, info)}
            return replace(state, engines=MappingProxyType(engines))
        case VersionSeen(version):
            if version <= state.expert_map.version:
                return state
            return replace(state, expert_map=replace(state.expert_map, version=version + 1))


def _offer(slots: tuple[HostSlot, ...], since: int, state: RouterState) -> RouterState:
    """Place the columns that lack replicas on the slots; a slot that is known already keeps what it has."""
    held = {h.host: h.columns for h in state.hosts.values() if not h.is_gone}
    added = assign(state.num_columns, slots, state.replicas, held)
    new = {
        slot.host: HostState(slot.host, slot.node, added[slot.host], incarnation=since)
        for slot in slots
        if slot.host not in state.hosts and added[slot.host]
    }
    return replace(state, hosts=MappingProxyType({**state.hosts, **new}))


def _ready(event: HostReady, state: RouterState) -> RouterState:
    known = state.hosts.get(event.host)
    if known is not None and (event.incarnation, False) < (
        known.incarnation,
        known.is_gone,
    ):
        return state
    host = HostState(
        event.host,
        known.node if known else event.address.node,
        event.columns,
        Phase.READY,
        event.incarnation,
        event.pid,
        event.actor_pid,
        event.address,
        event.bytes,
        event.load_s,
        event.shared_bytes,
    )
    placement = as_placement(event.columns, state.moe_layers)
    expert_map = maps.add_host(state.expert_map, event.address, placement)
    return replace(
        state,
        expert_map=expert_map,
        hosts=MappingProxyType({**state.hosts, event.host: host}),
    )


def _died(host: str, incarnation: int, reason: str, state: RouterState) -> RouterState:
    if not _is_current(state, host, incarnation) or state.hosts[host].is_gone:
        return state
    state = _set_host(state, host, phase=Phase.DEAD, reason=reason)
    if host not in state.expert_map.hosts:
        return state
    return replace(state, expert_map=maps.remove_host(state.expert_map, host))


def _is_current(state: RouterState, host: str, incarnation: int) -> bool:
    return host in state.hosts and state.hosts[host].incarnation == incarnation


def _set_host(state: RouterState, host: str, **changes: Any) -> RouterState:
    changed = replace(state.hosts[host], **changes)
    return replace(state, hosts=MappingProxyType({**state.hosts, host: changed}))


# Actions: what the shell must do now. It answers each with an event.


@dataclass(frozen=True)
class StartHost:
    """Ask the host's actor to start it with these columns. Answer: HostStarting, then HostReady or HostDied."""

    host: str
    incarnation: int
    columns: tuple[int, ...]


@dataclass(frozen=True)
class ReapHost:
    """Clear away the actor of a dead host, so that what it reserved is free. Answer: HostReaped."""

    host: str
    incarnation: int


Action: TypeAlias = StartHost | ReapHost


def plan(state: RouterState) -> tuple[Action, ...]:
    """What has to be done in this state. Bringing lost replicas back will be one more rule in this list."""
    return (*_start_wanted(state), *_reap_dead(state))


def _start_wanted(state: RouterState) -> tuple[Action, ...]:
    return tuple(
        StartHost(h.host, h.incarnation + 1, h.columns) for h in state.hosts.values() if h.phase is Phase.WANTED
    )


def _reap_dead(state: RouterState) -> tuple[Action, ...]:
    return tuple(ReapHost(h.host, h.incarnation) for h in state.hosts.values() if h.phase is Phase.DEAD)
