"""What happens to the expert router's state: events, and `apply`, the only way in which the state changes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeAlias

from folkmoot.cluster.host_speeds import RowsPerS
from folkmoot.cluster.placement import Extra, HostSlot
from folkmoot.cluster.router_plan import settle
from folkmoot.cluster.router_state import (
    ENGINE_SILENT_S,
    HEALTHY_S,
    EngineState,
    HostState,
    Life,
    Phase,
    RouterState,
    back_off_s,
    with_host,
    with_life,
)
from folkmoot.cluster.wish import Wish
from folkmoot.experts import expert_map as maps
from folkmoot.experts.expert_map import HostAddress


@dataclass(frozen=True)
class Tick:
    """The time, in seconds of any clock that only grows; Unix time in the router."""

    now_s: float


@dataclass(frozen=True)
class Wished:
    """Someone asked for another cluster than there is."""

    wish: Wish


@dataclass(frozen=True)
class SlotsSeen:
    """Where Ray has room for the hosts that are wanted. The first one ends a router's look around."""

    slots: tuple[HostSlot, ...]


@dataclass(frozen=True)
class HostStarting:
    """The actor of a host has been asked to start a life of it."""

    host: str
    incarnation: int
    columns: tuple[int, ...]
    extras: tuple[Extra, ...] = ()


@dataclass(frozen=True)
class HostForked:
    """A life's process is there, and loads its experts."""

    host: str
    incarnation: int
    columns: tuple[int, ...]
    pid: int
    actor_pid: int
    extras: tuple[Extra, ...] = ()


@dataclass(frozen=True)
class HostReady:
    """A life has loaded its experts and listens. A router that was restarted learns of it here."""

    host: str
    incarnation: int
    address: HostAddress
    columns: tuple[int, ...]
    pid: int
    actor_pid: int
    bytes: int = 0
    load_s: float = 0.0
    shared_bytes: int = 0
    extras: tuple[Extra, ...] = ()
    threads: int = 0
    rows_s: RowsPerS = ()
    """what the host measured, when its actor was asked to"""


@dataclass(frozen=True)
class HostDied:
    """A life is gone, or never began. Who hears of it first tells; the second report changes nothing."""

    host: str
    incarnation: int
    reason: str


@dataclass(frozen=True)
class HostStopped:
    """A life that was dead or drained is being ended: it is forgotten."""

    host: str
    incarnation: int


@dataclass(frozen=True)
class HostRemoved:
    """A host has left the cluster."""

    host: str


@dataclass(frozen=True)
class HostLoad:
    """What a life has done since its start: requests, rows, and seconds spent computing."""

    host: str
    incarnation: int
    requests: int
    rows: int
    busy_s: float


@dataclass(frozen=True)
class Rebalanced:
    """Other extras have been decided on, for the hosts that are named."""

    extras: Mapping[str, tuple[Extra, ...]]


@dataclass(frozen=True)
class EngineReported:
    """An engine's own account of itself. One that is "stopping" and then "dead" is forgotten."""

    engine: str
    phase: str
    pid: int | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MapSeen:
    """An engine lives, and has a map of this version (-1: none). A restarted router counts on from there, so that
    versions only grow."""

    engine: str
    version: int


Event: TypeAlias = (
    Tick
    | Wished
    | SlotsSeen
    | HostStarting
    | HostForked
    | HostReady
    | HostDied
    | HostStopped
    | HostRemoved
    | HostLoad
    | Rebalanced
    | EngineReported
    | MapSeen
)


def apply(event: Event, state: RouterState) -> RouterState:
    """The state after an event. Events about unknown hosts or former incarnations leave it as it is."""
    changed = _apply(event, state)
    return state if changed is state else settle(changed)


def _apply(event: Event, state: RouterState) -> RouterState:
    match event:
        case Tick(now_s):
            return _tick(now_s, state)
        case Wished(wish):
            return replace(state, wish=wish)
        case SlotsSeen(slots):
            return _see_slots(slots, state)
        case HostStarting(host, incarnation, columns, extras):
            life = Life(incarnation, columns, since_s=state.now_s, extras=extras)
            return with_life(state, state.hosts[host], life) if host in state.hosts else state
        case HostForked():
            return _forked(event, state)
        case HostReady():
            return _ready(event, state)
        case HostDied(host, incarnation, reason):
            return _died(host, incarnation, reason, state)
        case HostStopped(host, incarnation):
            return _forget(host, incarnation, state)
        case HostRemoved(host):
            hosts = {name: h for name, h in state.hosts.items() if name != host}
            return replace(state, hosts=MappingProxyType(hosts)) if host in state.hosts else state
        case HostLoad(host, incarnation, requests, rows, busy_s):
            return _change_life(state, host, incarnation, requests=requests, rows=rows, busy_s=busy_s)
        case Rebalanced(extras):
            hosts = {n: replace(h, extras=extras.get(n, h.extras)) for n, h in state.hosts.items()}
            return replace(state, hosts=MappingProxyType(hosts))
        case EngineReported():
            return _engine_reported(event, state)
        case MapSeen(engine, version):
            return _map_seen(engine, version, state)


def _tick(now_s: float, state: RouterState) -> RouterState:
    """Time passes. Engines that are silent for long are forgotten."""
    if now_s <= state.now_s:
        return state
    engines = {n: e for n, e in state.engines.items() if now_s - e.seen_s <= ENGINE_SILENT_S}
    if len(engines) == len(state.engines):
        return replace(state, now_s=now_s)
    return replace(state, now_s=now_s, engines=MappingProxyType(engines))


def _see_slots(slots: tuple[HostSlot, ...], state: RouterState) -> RouterState:
    hosts = dict(state.hosts)
    for slot in slots:
        host = hosts.get(slot.host, HostState(slot.host, waiting_since_s=state.now_s))
        lost = slot.node is None and host.node is not None
        since_s = state.now_s if lost else host.waiting_since_s
        hosts[slot.host] = replace(
            host,
            node=slot.node,
            capacity=slot.capacity,
            speed=slot.speed,
            kind=slot.kind,
            rows_s=host.rows_s if host.node in (None, slot.node) else (),
            waiting_since_s=since_s,
        )
    if state.has_slots and hosts == state.hosts:
        return state
    return replace(state, hosts=MappingProxyType(hosts), has_slots=True)


def _forked(event: HostForked, state: RouterState) -> RouterState:
    host = state.hosts.get(event.host) or HostState(event.host, columns=event.columns, extras=event.extras)
    life = host.life(event.incarnation)
    if life is None and event.incarnation <= host.incarnation:
        return state
    if life is not None and life.phase is not Phase.STARTING:
        return state
    life = Life(event.incarnation, event.columns, Phase.LOADING, state.now_s, event.pid, event.actor_pid)
    return with_life(state, host, replace(life, extras=event.extras))


def _ready(event: HostReady, state: RouterState) -> RouterState:
    host = state.hosts.get(event.host) or HostState(event.host, columns=event.columns, extras=event.extras)
    life = host.life(event.incarnation)
    if life is None and event.incarnation <= host.incarnation:
        return state
    if life is not None and life.phase not in (Phase.STARTING, Phase.LOADING):
        return state
    loaded = Life(
        event.incarnation,
        event.columns,
        Phase.LOADED,
        state.now_s,
        event.pid,
        event.actor_pid,
        event.address,
        event.bytes,
        event.load_s,
        event.shared_bytes,
        event.threads,
        extras=event.extras,
    )
    return with_life(state, replace(host, rows_s=host.rows_s or event.rows_s), loaded)


def _died(name: str, incarnation: int, reason: str, state: RouterState) -> RouterState:
    """Out of the map at once. A failure counts against the host, unless the life was on its way out anyway."""
    host = state.hosts.get(name)
    life = host.life(incarnation) if host is not None else None
    if host is None or life is None or life.phase is Phase.DEAD:
        return state
    was_healthy = life.phase is Phase.READY and state.now_s - life.since_s >= HEALTHY_S
    was_serving = life.phase is Phase.READY
    if life.phase is not Phase.DRAINING:
        failures = 1 if was_healthy else host.failures + 1
        not_before_s = state.now_s + back_off_s(failures)
        host = replace(host, failures=failures, not_before_s=not_before_s, reason=reason)
    state = with_life(state, host, replace(life, phase=Phase.DEAD, since_s=state.now_s))
    return replace(state, expert_map=maps.remove_host(state.expert_map, name)) if was_serving else state


def _forget(name: str, incarnation: int, state: RouterState) -> RouterState:
    host = state.hosts.get(name)
    if host is None or host.life(incarnation) is None:
        return state
    lives = tuple(life for life in host.lives if life.incarnation != incarnation)
    return with_host(state, replace(host, lives=lives))


def _change_life(state: RouterState, name: str, incarnation: int, **changes: Any) -> RouterState:
    host = state.hosts.get(name)
    life = host.life(incarnation) if host is not None else None
    if host is None or life is None:
        return state
    return with_life(state, host, replace(life, **changes))


def _engine_reported(event: EngineReported, state: RouterState) -> RouterState:
    engines = dict(state.engines)
    before = engines.pop(event.engine, EngineState(event.engine))
    if event.phase == "dead" and before.phase == "stopping":
        return replace(state, engines=MappingProxyType(engines))
    phase = "stopping" if before.phase == "stopping" and event.phase != "dead" else event.phase
    engines[event.engine] = replace(before, phase=phase, pid=event.pid, info=event.info, seen_s=state.now_s)
    return replace(state, engines=MappingProxyType(engines))


def _map_seen(engine: str, version: int, state: RouterState) -> RouterState:
    if (known := state.engines.get(engine)) is not None and (known.version, known.seen_s) != (version, state.now_s):
        engines = {**state.engines, engine: replace(known, version=version, seen_s=state.now_s)}
        state = replace(state, engines=MappingProxyType(engines))
    if version <= state.expert_map.version:
        return state
    return replace(state, expert_map=replace(state.expert_map, version=version + 1), was_complete=True)
