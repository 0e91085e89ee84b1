"""Metrics of the expert router: the map, what is wanted and what there is, deaths, and how long healing took."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.metrics_core import Metric as Family

from folkmoot.cluster.healing import phase_of, troubles
from folkmoot.cluster.placement import shortfall
from folkmoot.cluster.router_events import Event, HostDied
from folkmoot.cluster.router_state import QUARANTINE_AFTER, Phase, RouterState
from folkmoot.experts import expert_map as maps
from folkmoot.gateway.metrics import Histogram, Metric

HEALING_BOUNDS_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
HOST_PHASES = ("ready", "starting", "loading", "loaded", "draining", "quarantined", "waiting", "gone")
ENGINE_PHASES = ("loading", "ready", "stopping", "dead")

VERSION = Metric("folkmoot_router_map_version", "gauge", "Version of the expert map; grows with every change")
REPLICAS_WANTED = Metric("folkmoot_router_replicas_wanted", "gauge", "Replicas wanted of each expert, by default")
REPLICAS_LEAST = Metric("folkmoot_router_replicas_least", "gauge", "Live replicas of the rarest expert")
REPLICAS_LACKING = Metric(
    "folkmoot_router_replicas_lacking", "gauge", "Replicas that are wanted of experts (of all layers) and do not live"
)
MISSING = Metric("folkmoot_router_experts_missing", "gauge", "Experts, each layer's counted, without any live replica")
HOSTS = Metric("folkmoot_router_hosts", "gauge", "Expert hosts, by phase", ("phase",))
ENGINES = Metric("folkmoot_router_engines", "gauge", "Engines that the router knows of, by phase", ("phase",))
ENGINES_WANTED = Metric("folkmoot_router_engines_wanted", "gauge", "Engines that the autoscaler finds right")
TROUBLES = Metric(
    "folkmoot_router_troubles", "gauge", "Things that are being mended, or wait (`healing` in the status)"
)
DEATHS = Metric("folkmoot_router_host_deaths_total", "counter", "Times that a host died or did not come up", ("host",))
QUARANTINES = Metric(
    "folkmoot_router_quarantines_total", "counter", "Times that a host failed too often in a row", ("host",)
)
HEALING = Metric(
    "folkmoot_router_healing_seconds", "histogram", "From the death of a host in service until no replica was lacking"
)
METRICS = (
    *(VERSION, REPLICAS_WANTED, REPLICAS_LEAST, REPLICAS_LACKING, MISSING, HOSTS, ENGINES, ENGINES_WANTED),
    *(TROUBLES, DEATHS, QUARANTINES, HEALING),
)


@dataclass
class RouterCounts:
    """What has happened since this router began; fed with each event and the states around it."""

    deaths: Counter[str] = field(default_factory=Counter)
    quarantines: Counter[str] = field(default_factory=Counter)
    healing_s: Histogram = field(default_factory=lambda: Histogram(HEALING_BOUNDS_S))
    broken_since_s: float | None = None

    def saw(self, event: Event, before: RouterState, after: RouterState) -> None:
        """An event, and what it changed."""
        if isinstance(event, HostDied):
            self._died(event, before, after)
        has_changed = after.expert_map.version != before.expert_map.version
        if self.broken_since_s is not None and has_changed and not lacking(after):
            self.healing_s.observe(after.now_s - self.broken_since_s)
            self.broken_since_s = None

    def _died(self, event: HostDied, before: RouterState, after: RouterState) -> None:
        """The same death may be told of twice."""
        host = before.hosts.get(event.host)
        life = host.life(event.incarnation) if host is not None else None
        if host is None or life is None or life.phase in (Phase.DEAD, Phase.DRAINING):
            return
        self.deaths[event.host] += 1
        failures = after.hosts[event.host].failures if event.host in after.hosts else 0
        self.quarantines[event.host] += host.failures < failures >= QUARANTINE_AFTER
        if life.phase is Phase.READY and self.broken_since_s is None and lacking(after):
            self.broken_since_s = after.now_s


def lacking(state: RouterState) -> int:
    """Replicas that are wanted of columns, and that no host in service has."""
    serving = {host.host: host.serving.columns for host in state.hosts.values() if host.serving is not None}
    return sum(shortfall(state.wanted, serving).values())


def families(state: RouterState, counts: RouterCounts, engines_wanted: int | None) -> Iterator[Family]:
    """For Prometheus."""
    replicas = [len(found) for experts in state.expert_map.layers.values() for found in experts]
    yield VERSION.of(state.expert_map.version)
    yield REPLICAS_WANTED.of(state.wish.replicas)
    yield REPLICAS_LEAST.of(min(replicas, default=0))
    yield REPLICAS_LACKING.of(lacking(state) * len(state.moe_layers))
    yield MISSING.of(len(maps.missing(state.expert_map)))
    hosts = Counter(phase_of(host, state) for host in state.hosts.values())
    yield HOSTS.family(((phase,), hosts[phase]) for phase in HOST_PHASES)
    engines = Counter(engine.phase for engine in state.engines.values())
    yield ENGINES.family(((phase,), engines[phase]) for phase in ENGINE_PHASES)
    if engines_wanted is not None:
        yield ENGINES_WANTED.of(engines_wanted)
    yield TROUBLES.of(len(troubles(state)))
    for metric, found in ((DEATHS, counts.deaths), (QUARANTINES, counts.quarantines)):
        yield metric.family(((host,), found[host]) for host in sorted({*state.hosts, *found}))
    yield HEALING.of(counts.healing_s)
