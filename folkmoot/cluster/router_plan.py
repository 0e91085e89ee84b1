"""What the expert router decides: `settle` follows every event, `plan` says what must be done. Pure functions.

A life's columns never change, so a host whose columns should change gets a second life, which takes the first one's
place in the map in one step. No change that is planned (as opposed to a death) takes an expert's replica out of the
map before another one is there: `may_drop` is the one place that decides it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

from folkmoot.cluster.placement import Extra, as_placement, rebalance
from folkmoot.cluster.router_state import HostState, Life, Phase, RouterState, with_life
from folkmoot.experts import expert_map as maps

DRAIN_S = 10.0
"""A host that left the map is stopped after so long, whatever engines say."""
EXTRAS_AT_ONCE = 2
"""So many hosts at most change over at once for the load's sake."""
DRAIN_GRACE_S = 0.5
"""... and not before: an engine that has the new map may still wait for a layer that it sent under the old one."""


def settle(state: RouterState) -> RouterState:
    """All that follows from the state by itself: columns for hosts, and lives that enter or leave the map."""
    state = _place(state)
    while (following := _step(state)) is not state:
        state = following
    if not state.was_complete and not maps.missing(state.expert_map):
        state = replace(state, was_complete=True)
    return state


def _place(state: RouterState) -> RouterState:
    """Give each host that can be counted on its columns, where the hosts or the wish have changed."""
    if not state.has_slots:
        return state
    open_hosts = set(state.wish.open_hosts)
    usable = [h for h in state.hosts.values() if h.host in open_hosts and state.is_usable(h)]
    slots = state.slots
    placed_for = state.wanted, tuple(slots[h.host] for h in usable)
    if placed_for == state.placed_for or not usable:
        return state
    columns = rebalance(*placed_for, {h.host: h.columns for h in usable})
    hosts = {
        h.host: replace(h, columns=columns.get(h.host, h.columns if h.host in open_hosts else ()))
        for h in state.hosts.values()
    }
    return replace(state, hosts=MappingProxyType(hosts), placed_for=placed_for)


def _step(state: RouterState) -> RouterState:
    """The first change of the map that can be made; the same state if there is none."""
    leaving = {h.host for h in state.leaving}
    for host in state.hosts.values():
        pending, serving = host.pending, host.serving
        if host.host in leaving and pending is not None:
            return with_life(state, host, replace(pending, phase=Phase.DEAD, since_s=state.now_s))
        has_nothing_to_do = host.host in leaving or (not host.columns and pending is None)
        if has_nothing_to_do and serving is not None and may_drop(state, host, serving.columns):
            return _drain(state, host, serving)
        if pending is not None and pending.phase is Phase.LOADED:
            dropped = set(serving.columns) - set(pending.columns) if serving is not None else set()
            if dropped & set(host.columns):  # planned for a placement that no longer is
                return with_life(state, host, replace(pending, phase=Phase.DEAD, since_s=state.now_s))
            if may_drop(state, host, sorted(dropped)):
                return _promote(state, host, pending)
    return state


def may_drop(state: RouterState, host: HostState, columns: Sequence[int]) -> bool:
    """Whether a host may give up these columns: enough others serve each of them, and are to go on with it."""
    return host.host in state.wish.forced or not _held_back(state, host, columns)


def _held_back(state: RouterState, host: HostState, columns: Sequence[int]) -> set[int]:
    """Those of the columns that the host must keep for now."""
    if not columns:
        return set()
    wanted, keeping = state.wanted, [h for h in state.hosts.values() if h.host != host.host]
    held_back = set()
    for column in columns:
        planned = sum(column in h.columns and state.is_usable(h) for h in keeping)
        live = sum(column in h.columns and h.serving is not None and column in h.serving.columns for h in keeping)
        if live < max(1, min(wanted[column], planned)):
            held_back.add(column)
    return held_back


def _promote(state: RouterState, host: HostState, life: Life) -> RouterState:
    """A loaded life takes its place in the map, and that of its predecessor."""
    assert life.address is not None
    placement = as_placement(life.columns, state.moe_layers, life.extras)
    state = replace(state, expert_map=maps.add_host(state.expert_map, life.address, placement))
    if (before := host.serving) is not None:
        state = with_life(state, host, _draining(before, state))
    ready = replace(life, phase=Phase.READY, since_s=state.now_s)
    return with_life(state, replace(state.hosts[host.host], reason=None), ready)


def _drain(state: RouterState, host: HostState, life: Life) -> RouterState:
    """A host leaves the map for good."""
    state = replace(state, expert_map=maps.remove_host(state.expert_map, host.host))
    return with_life(state, host, _draining(life, state))


def _draining(life: Life, state: RouterState) -> Life:
    return replace(life, phase=Phase.DRAINING, since_s=state.now_s, out_version=state.expert_map.version)


# Actions: what the shell must do now. It answers each with an event.


@dataclass(frozen=True)
class StartHost:
    """Ask the host's actor to start a life with these columns and extras. Answer: HostStarting, then its fate."""

    host: str
    incarnation: int
    columns: tuple[int, ...]
    extras: tuple[Extra, ...] = ()


@dataclass(frozen=True)
class StopHost:
    """End what may be left of a life that is dead or has drained. Answer: HostStopped."""

    host: str
    incarnation: int


@dataclass(frozen=True)
class RemoveHost:
    """A host that was not wanted any more has left: end its actor, give its place back. Answer: HostRemoved."""

    host: str


Action: TypeAlias = StartHost | StopHost | RemoveHost


def plan(state: RouterState) -> tuple[Action, ...]:
    """What has to be done in this state."""
    if not state.has_slots:
        return ()
    leaving = {h.host for h in state.leaving}
    starts = [start for h in state.hosts.values() if h.host not in leaving and (start := _start(state, h))]
    stops = [
        StopHost(h.host, life.incarnation)
        for h in state.hosts.values()
        for life in h.lives
        if life.phase is Phase.DEAD or _is_drained(state, life)
    ]
    removals = [RemoveHost(h.host) for h in state.leaving if not h.lives]
    return (*starts, *stops, *removals)


def _start(state: RouterState, host: HostState) -> StartHost | None:
    """A life for a host that has none, or the successor of one whose columns or extras should change."""
    if host.pending is not None or host.node is None or state.now_s < host.not_before_s:
        return None
    columns = _next_columns(state, host)
    if columns is None and host.serving is not None and _may_change_extras(state, host):
        columns = host.serving.columns
    if columns is None:
        return None
    incarnation = max(host.incarnation + 1, int(state.now_s))
    return StartHost(host.host, incarnation, columns, host.extras_beside(columns))


def _may_change_extras(state: RouterState, host: HostState) -> bool:
    """Whether the host holds other extras than it ought to, and nothing else is to be seen to first."""
    serving = host.serving
    if serving is None or serving.columns != host.columns or serving.extras == host.extras_beside(host.columns):
        return False
    is_whole = all(h.serving is not None for h in state.hosts.values() if h.columns)
    return is_whole and sum(h.pending is not None for h in state.hosts.values()) < EXTRAS_AT_ONCE


def _next_columns(state: RouterState, host: HostState) -> tuple[int, ...] | None:
    """What the host's next life holds: what it ought to, and what it cannot give up yet; None: no change now."""
    if host.serving is None:
        return host.columns or None
    serving, ought = set(host.serving.columns), set(host.columns)
    if serving == ought:
        return None
    held_back = _held_back(state, host, sorted(serving - ought))
    following = ought | held_back
    is_too_much = host.capacity is not None and len(following) > host.capacity
    only_gives = ought <= serving
    waits = is_too_much or following == serving or (only_gives and held_back)
    return None if waits or not following else tuple(sorted(following))


def _is_drained(state: RouterState, life: Life) -> bool:
    """Whether no engine can be waiting for this life any more."""
    if life.phase is not Phase.DRAINING:
        return False
    age_s = state.now_s - life.since_s
    adopted = all(e.version >= life.out_version for e in state.engines.values() if e.phase in ("loading", "ready"))
    return age_s > DRAIN_S or (adopted and age_s > DRAIN_GRACE_S)
