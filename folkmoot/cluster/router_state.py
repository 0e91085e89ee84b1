"""What the expert router knows, as pure data: hosts, engines, the expert map, and what is wished for.

    event -> apply(event, state) -> state -> plan(state) -> actions -> (the Ray actor carries them out) -> events

`apply` is in router_events.py, `plan` in router_plan.py. Nothing here does I/O or reads a clock: time enters as the
event `Tick`. So all of it is tested without a cluster, and the Ray actor in router.py is a thin shell around it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from folkmoot.cluster.host_speeds import RowsPerS, with_speeds
from folkmoot.cluster.placement import Extra, HostSlot
from folkmoot.cluster.wish import Wish
from folkmoot.experts import expert_map as maps
from folkmoot.experts.expert_map import ExpertMap, HostAddress

QUARANTINE_AFTER = 3
"""A host that has failed so often in a row is in quarantine: its columns go elsewhere until it may try again."""
BACKOFF_S, BACKOFF_FACTOR, BACKOFF_MAX_S = 0.25, 8.0, 60.0
HEALTHY_S = 60.0
"""Failures are forgotten after so long in service."""
PLACE_WAIT_S = 5.0
"""How long a host waits for Ray before its columns go elsewhere."""
ENGINE_SILENT_S = 60.0
"""An engine that has not asked for a map for so long is gone."""


class Phase(StrEnum):
    """Where one life of an expert host is. Only a READY one is in the map."""

    STARTING = "starting"
    """its actor has been asked to fork it"""
    LOADING = "loading"
    LOADED = "loaded"
    """it listens, and waits to take its predecessor's place in the map"""
    READY = "ready"
    DRAINING = "draining"
    """out of the map: it finishes what engines have sent"""
    DEAD = "dead"
    """given up; what may be left of it is to be cleared away"""


PENDING = (Phase.STARTING, Phase.LOADING, Phase.LOADED)


@dataclass(frozen=True)
class Life:
    """One process of an expert host, from its start to its end. What it holds never changes; `bytes` of weights."""

    incarnation: int
    columns: tuple[int, ...]
    phase: Phase = Phase.STARTING
    since_s: float = 0.0
    """when it entered this phase"""
    pid: int | None = None
    actor_pid: int | None = None
    address: HostAddress | None = None
    bytes: int = 0
    load_s: float = 0.0
    shared_bytes: int = 0
    threads: int = 0
    """that it computes with"""
    requests: int = 0
    rows: int = 0
    busy_s: float = 0.0
    out_version: int = 0
    """where DRAINING: the first map version without it"""
    extras: tuple[Extra, ...] = ()


@dataclass(frozen=True)
class HostState:
    """One expert host: its place, the columns and extras it ought to hold, and its lives, the oldest first.

    Usually there is one life; for a while two, when a successor with other columns takes over.
    """

    host: str
    node: str | None = None
    capacity: int | None = None
    speed: float = 1.0
    """as said, or guessed; what counts is `RouterState.slots`"""
    kind: int | None = None
    rows_s: RowsPerS = ()
    """what it measured first on this node"""
    waiting_since_s: float = 0.0
    """where `node` is None: since when Ray has had no room for it"""
    columns: tuple[int, ...] = ()
    extras: tuple[Extra, ...] = ()
    """replicas for the load's sake, beside those of the columns: nobody counts on them"""
    lives: tuple[Life, ...] = ()
    incarnation: int = 0
    """the largest that was ever given to a life"""
    failures: int = 0
    """deaths in a row, without HEALTHY_S in service between them"""
    not_before_s: float = 0.0
    """no new life before then"""
    reason: str | None = None
    """why the last life ended, until another one is in service"""

    @property
    def serving(self) -> Life | None:
        """The life that is in the map."""
        return next((life for life in self.lives if life.phase is Phase.READY), None)

    @property
    def pending(self) -> Life | None:
        """The life that is on its way into the map."""
        return next((life for life in self.lives if life.phase in PENDING), None)

    def extras_beside(self, columns: tuple[int, ...]) -> tuple[Extra, ...]:
        """The extras that it ought to hold where it holds these columns."""
        return tuple(extra for extra in self.extras if extra[1] not in columns)

    @property
    def slot(self) -> HostSlot:
        """Its place, before anything has been measured."""
        return HostSlot(self.host, self.node, self.capacity, self.speed, self.kind)

    def life(self, incarnation: int) -> Life | None:
        """The life of this incarnation, if it is known."""
        return next((life for life in self.lives if life.incarnation == incarnation), None)

    def is_quarantined(self, now_s: float) -> bool:
        """Whether it failed so often that nothing is expected of it for now."""
        return self.failures >= QUARANTINE_AFTER and now_s < self.not_before_s


@dataclass(frozen=True)
class EngineState:
    """One engine as it last reported: `phase` is "loading", "ready", "stopping" or "dead"; `info` goes to the status.
    `version` is of the expert map it has, -1 before the first."""

    engine: str
    phase: str = "loading"
    pid: int | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    version: int = -1
    seen_s: float = 0.0


@dataclass(frozen=True)
class RouterState:
    """Everything the expert router knows. `moe_layers` empty: a dense model, which needs no hosts."""

    moe_layers: tuple[int, ...]
    num_columns: int
    wish: Wish
    expert_map: ExpertMap
    hosts: Mapping[str, HostState] = field(default_factory=lambda: MappingProxyType({}))
    engines: Mapping[str, EngineState] = field(default_factory=lambda: MappingProxyType({}))
    now_s: float = 0.0
    has_slots: bool = False
    """whether it has looked around after its start; before, nothing is begun and nothing published"""
    was_complete: bool = False
    """whether every expert ever had a replica: from then on engines see every map, before only a complete one"""
    placed_for: tuple[tuple[int, ...], tuple[HostSlot, ...]] | None = None
    """what the hosts' columns were computed for"""

    @property
    def wanted(self) -> tuple[int, ...]:
        """Replicas wanted of each column."""
        return self.wish.wanted(self.num_columns)

    @property
    def is_publishable(self) -> bool:
        """Whether engines should see the map."""
        return self.num_columns == 0 or (self.has_slots and self.was_complete)

    @property
    def leaving(self) -> tuple[HostState, ...]:
        """Hosts that are no longer wanted."""
        wanted = set(self.wish.open_hosts)
        return tuple(h for h in self.hosts.values() if h.host not in wanted)

    @property
    def slots(self) -> dict[str, HostSlot]:
        """All hosts as placement sees them."""
        measured = {h.host: h.rows_s for h in self.hosts.values()}
        return with_speeds([h.slot for h in self.hosts.values()], measured)

    def is_usable(self, host: HostState) -> bool:
        """Whether a host may be counted on: it has a node that answers, and is not in quarantine. Before the cluster
        was ever complete any node will do, since importing vLLM takes its time."""
        if host.node is None or not self.was_complete:
            return host.node is not None
        stuck = host.serving is None and host.pending is not None and host.pending.phase is Phase.STARTING
        waits_s = self.now_s - host.pending.since_s if stuck and host.pending is not None else 0.0
        return waits_s <= PLACE_WAIT_S and not host.is_quarantined(self.now_s)

    def live(self, column: int) -> tuple[str, ...]:
        """The hosts that serve a column now."""
        return tuple(h.host for h in self.hosts.values() if h.serving is not None and column in h.serving.columns)


def initial(moe_layers: tuple[int, ...], num_columns: int, wish: Wish) -> RouterState:
    """A router that has placed nothing yet."""
    return RouterState(moe_layers, num_columns, wish, maps.empty(moe_layers, num_columns))


def with_host(state: RouterState, host: HostState) -> RouterState:
    """The state with one host replaced or added."""
    return replace(state, hosts=MappingProxyType({**state.hosts, host.host: host}))


def with_life(state: RouterState, host: HostState, life: Life) -> RouterState:
    """The state with one life of a host replaced, or added as its youngest."""
    others = tuple(other for other in host.lives if other.incarnation != life.incarnation)
    lives = tuple(sorted((*others, life), key=lambda one: one.incarnation))
    return with_host(state, replace(host, lives=lives, incarnation=max(host.incarnation, life.incarnation)))


def back_off_s(failures: int) -> float:
    """How long a host waits after so many failures in a row: not at all after the first, then longer each time."""
    return 0.0 if failures <= 1 else min(BACKOFF_MAX_S, BACKOFF_S * BACKOFF_FACTOR ** min(failures - 2, 10))
