"""The expert router: a named Ray actor that owns the expert map. A thin shell around `router_events` and `router_plan`.

It starts expert actors on placement groups, watches them, starts again what dies, and lets engines wait for new maps.
No token passes through it: engines go on with the map they have while it is away, and since expert actors are detached
and named, none of them dies with it. A restarted router reads its wish from the store, asks the actors what they hold,
and counts its map's version on from what engines have.
"""

import asyncio
import contextlib
import json
import logging
import os
import time
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from folkmoot import logs
from folkmoot.cluster import environment, metrics_node, metrics_router
from folkmoot.cluster.actor_pool import ActorPool
from folkmoot.cluster.autoscaler import Autoscaler
from folkmoot.cluster.balance_loads import at, counted, no_loads
from folkmoot.cluster.balancer import Balancer
from folkmoot.cluster.charge import Charge
from folkmoot.cluster.healing import is_settled, phase_of
from folkmoot.cluster.operation_runner import OperationRunner
from folkmoot.cluster.ray_runtime import deploy_engines
from folkmoot.cluster.ray_slots import RaySlots
from folkmoot.cluster.router_events import (
    EngineReported,
    Event,
    HostDied,
    HostLoad,
    HostReady,
    HostRemoved,
    HostStarting,
    HostStopped,
    MapSeen,
    SlotsSeen,
    Tick,
    Wished,
    apply,
)
from folkmoot.cluster.router_plan import RemoveHost, StartHost, StopHost, plan
from folkmoot.cluster.router_state import initial
from folkmoot.cluster.spec import ClusterSpec
from folkmoot.cluster.status import document, replicas
from folkmoot.cluster.wish import Wish, first_wish
from folkmoot.cluster.wish_store import WishStore
from folkmoot.experts.expert_rows import ExpertRows
from folkmoot.gateway.errors import StoreError
from folkmoot.gateway.metrics import exposition
from folkmoot.gateway.operations import Operations
from folkmoot.gateway.queue import RequestQueue
from folkmoot.gateway.store import Store

log = logging.getLogger(__name__)

TICK_S = 0.25
LOOK_EVERY_S = 2.0
STATUS_EVERY_S = 1.0
DEPLOY_EVERY_S = 1.0
STATUS_PAUSE_S = 0.1
STATUS_TTL_S = 10.0
ROWS_EVERY_S = 2.0
ROWS_TTL_S = 3600.0
QUIET = (Tick, SlotsSeen, MapSeen, EngineReported, HostLoad)
"""Events that come all the time, and are not logged."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class ExpertRouter:
    """Shell: turns what Ray and engines say into events, and carries out the actions of `plan`."""

    async def __init__(self, spec: ClusterSpec) -> None:  # type: ignore[misc]  # Ray awaits it
        environment.enter(spec.environment, "router")
        self._spec = spec
        self._store = Store(spec.redis, spec.store_namespace)
        self._wishes = WishStore(self._store, spec)
        self._state = initial(spec.moe_layers, spec.num_experts, first_wish(spec))
        self._loads = no_loads(spec.moe_layers, spec.num_experts, spec.load_half_life_s)
        self._counts = metrics_router.RouterCounts()
        self._changed = asyncio.Condition()
        self._slots = RaySlots(spec)
        self._actors = ActorPool(spec, self._slots)
        self._error: str | None = None
        self._phases: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._engines_deployed = (self._state.wish.engine_limits, 0)
        self._autoscaler = Autoscaler(spec, self._store, lambda: self._state, self._change)
        self._balancer = Balancer(spec, lambda: self._state, lambda: self._loads, self.report)
        self._charge = Charge(self._store, spec)
        self._operations = OperationRunner(
            spec,
            Operations(self._store),
            self._wishes,
            lambda: self._state,
            lambda wish: self.report(Wished(wish)),
            lambda: self._charge.is_ours,
        )
        for work in (self._run(), self._publish_status(), self._publish_rows(), self._deploy_engines()):
            self._keep(work)
        for work in (self._autoscaler.run(), self._balancer.run()):
            self._keep(work)
        self._keep(metrics_node.keep_serving(spec, "router", self._metrics))

    async def wait_for_map(self, engine: str, known_version: int, timeout_s: float = 20.0) -> str | None:
        """The expert map as JSON once there is a newer one than `known_version` (-1: none); None after the time-out."""
        await self.report(MapSeen(engine, known_version))

        def is_news() -> bool:
            return self._state.is_publishable and self._state.expert_map.version > known_version

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(is_news), timeout_s)
            except TimeoutError:
                return None
            return self._state.expert_map.to_json()

    async def report(self, event: Event) -> None:
        """Take an event into the state, and do what the new state demands."""
        before = self._state
        self._state = apply(event, apply(Tick(time.time()), before))
        self._counts.saw(event, before, self._state)
        if not isinstance(event, QUIET):
            log.info("%s", event)
        self._act()
        if self._state.expert_map.version != before.expert_map.version or not before.is_publishable:
            async with self._changed:
                self._changed.notify_all()

    def report_rows(self, engine: str, rows: dict[str, Any]) -> None:
        """What an engine's dispatcher has counted since its start: `ExpertRows` as JSON data."""
        try:
            self._loads = counted(self._loads, engine, ExpertRows.from_json(rows), time.time())
        except (KeyError, TypeError, ValueError) as e:
            log.warning("the rows of %s cannot be used: %s", engine, e)

    def expert_rows(self) -> dict[str, Any]:
        """Rows of each logical expert, in all and lately, and where its replicas are, as JSON data: arrays
        [layer][expert]."""
        return {**at(self._loads, time.time()).document(), **replicas(self._state.expert_map)}

    async def status(self) -> dict[str, Any]:
        """What is where, alive, and how loaded: the status document as JSON data."""
        scaling, balance = self._autoscaler.document(), self._balancer.document()
        return document(self._spec, self._state, self._error, scaling, balance)

    async def _metrics(self) -> bytes:
        of_router = metrics_router.families(self._state, self._counts, self._autoscaler.engines)
        return exposition([*of_router, *metrics_node.of_process()])

    def engines_wanted(self) -> int | None:
        """How many engines the autoscaler finds right; None: it does not know yet."""
        return self._autoscaler.engines

    def spec(self) -> ClusterSpec:
        """What this cluster was started with."""
        return self._spec

    def pid(self) -> int:
        """This actor's process."""
        return os.getpid()

    async def _run(self) -> None:
        """Find what lives from before, then look around for ever: slots come and go, and time passes."""
        await self._remember()
        await self._find_hosts()
        for work in (self._operations.run(), self._operations.watch()):
            self._keep(work)
        looked_s = -LOOK_EVERY_S
        while True:
            await self.report(Tick(time.time()))
            self._tell_phases()
            is_due = time.monotonic() - looked_s > LOOK_EVERY_S or self._is_waiting
            if self._spec.hosts and is_due:
                looked_s = time.monotonic()
                await self._look()
            await asyncio.sleep(TICK_S)

    def _tell_phases(self) -> None:
        """Log what has become of each host since the last look: started, drained, quarantined, healed."""
        phases = {host.host: phase_of(host, self._state) for host in self._state.hosts.values()}
        for name in sorted(phases.keys() | self._phases.keys()):
            before, now = self._phases.get(name, "unknown"), phases.get(name, "removed")
            if before != now:
                level = logging.WARNING if now in ("quarantined", "gone", "waiting") else logging.INFO
                with logs.bound(host=name):
                    log.log(level, "%s: %s (was %s)", name, now, before)
        if phases != self._phases and is_settled(self._state):
            log.info("all %d hosts are as they ought to be", len(phases))
        self._phases = phases

    @property
    def _is_waiting(self) -> bool:
        """Whether there is a host that is wanted, and has no place that is known of."""
        hosts = self._state.hosts
        return any(host not in hosts or hosts[host].node is None for host in self._state.wish.open_hosts)

    async def _look(self) -> None:
        """What Ray has room for now."""
        try:
            await self.report(SlotsSeen(await asyncio.to_thread(self._slots.look, self._state.wish)))
            self._error = None
            if is_settled(self._state) and any(e.phase == "ready" for e in self._state.engines.values()):
                self._actors.keep_spares(self._slots.nodes)
        except Exception as e:
            log.exception("looking around failed")
            self._error = f"the expert router cannot place hosts: {type(e).__name__}: {e}"

    async def _remember(self) -> None:
        """The wish of a former life of this router, if there was one."""
        if (wish := await self._wishes.load()) is not None:
            await self.report(Wished(wish))

    async def _find_hosts(self) -> None:
        """After a restart: take over the hosts whose actors live."""
        for found in await self._actors.find():
            for life in found.lives:
                await self.report(life)
                self._keep(self._follow(self._actors.get(life.host), life.host, life.incarnation))

    def _act(self) -> None:
        """Carry out what is planned until nothing is. Each action changes the state at once, so none is begun twice."""
        while actions := plan(self._state):
            match actions[0]:
                case StartHost(host, incarnation, columns, extras) as start:
                    self._state = apply(HostStarting(host, incarnation, columns, extras), self._state)
                    self._keep(self._start_host(start))
                case StopHost(host, incarnation):
                    self._state = apply(HostStopped(host, incarnation), self._state)
                    if (actor := self._actors.get(host)) is not None:
                        actor.stop.remote(incarnation)
                case RemoveHost(host):
                    self._state = apply(HostRemoved(host), self._state)
                    self._actors.end(host)
                    self._keep(self._give_back(host))

    async def _give_back(self, host: str) -> None:
        try:
            await asyncio.to_thread(self._slots.give_back, host, self._state.wish)
        except Exception:
            log.exception("the place of %s was not given back", host)

    async def _start_host(self, start: StartHost) -> None:
        actor, host, incarnation = None, start.host, start.incarnation
        try:
            threads = await asyncio.to_thread(self._slots.threads, host)
            actor, rows_s = self._actors.ensure(host), self._state.hosts[host].rows_s
            held = start.columns, start.extras
            await self.report(await actor.start.remote(host, incarnation, *held, threads, rows_s))
        except Exception as e:
            await self._failed(actor, host, incarnation, e)
            return
        await self._follow(actor, host, incarnation)

    async def _follow(self, actor: Any, host: str, incarnation: int) -> None:
        """A life from its fork to its end."""
        try:
            ready: HostReady = await actor.ready.remote(incarnation)
            await self.report(ready)
            reason = await actor.closed.remote(incarnation)
        except Exception as e:
            await self._failed(actor, host, incarnation, e)
            return
        await self.report(HostDied(host, incarnation, reason))

    async def _failed(self, actor: Any, host: str, incarnation: int, error: Exception) -> None:
        """A life that did not come up, or was lost with its actor."""
        if isinstance(error, RayError) and not isinstance(error, RayTaskError):  # the actor, not what it raised
            reason = f"its actor died ({type(error).__name__})"
            self._actors.end(host, actor)
        else:
            reason = str(getattr(error, "cause", None) or error)
        await self.report(HostDied(host, incarnation, reason))

    async def _change(self, wish: Wish) -> None:
        """What the autoscaler asks for: saved before it is acted on, as operations are. Raises StoreError."""
        await self._wishes.save(wish)
        await self.report(Wished(wish))

    def _keep(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """What this actor does must not end with an error that nobody sees: then Ray starts it again, and it finds
        everything as it is."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the expert router failed, and is started again", exc_info=error)
            os._exit(1)

    async def _deploy_engines(self) -> None:
        """For ever: tell Serve of another number or version of engines than it was told last."""
        while True:
            wish = self._state.wish
            if (wanted := (wish.engine_limits, wish.engine_version)) != self._engines_deployed:
                try:
                    await asyncio.to_thread(deploy_engines, self._spec, *wanted, wait=False)
                    self._engines_deployed = wanted
                except Exception:
                    log.exception("Serve did not take %s engines of version %s", *wanted)
            await asyncio.sleep(DEPLOY_EVERY_S)

    async def _publish_status(self) -> None:
        """Where this cluster is in charge: write the status document where gateways find it, at every new map, and once
        a second. It expires by itself when the router is gone."""
        queue = RequestQueue(self._store)
        while True:
            written = self._published
            text = json.dumps(await self.status())
            can_serve = self._state.is_publishable and any(e.phase == "ready" for e in self._state.engines.values())
            try:
                if await self._charge.claim(can_serve=can_serve):
                    await queue.set_cluster_status(text, STATUS_TTL_S)
            except StoreError as e:
                log.warning("the status could not be written: %s", e)
            await asyncio.sleep(STATUS_PAUSE_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STATUS_EVERY_S - STATUS_PAUSE_S), self._changed:
                    while self._published == written:  # it may have changed in the pause, when nobody waited
                        await self._changed.wait()

    @property
    def _published(self) -> tuple[int, bool]:
        """What a status document is written for at once."""
        return self._state.expert_map.version, self._state.is_publishable

    async def _publish_rows(self) -> None:
        """Where they or the map have changed: write the rows of each expert where gateways find them."""
        queue, written, version = RequestQueue(self._store), self._loads, 0
        while True:
            await asyncio.sleep(ROWS_EVERY_S)
            loads, map_version = self._loads, self._state.expert_map.version
            if (loads is not written or map_version != version) and self._charge.is_ours:
                try:
                    await queue.set_expert_rows(json.dumps(self.expert_rows(), separators=(",", ":")), ROWS_TTL_S)
                    written, version = loads, map_version
                except StoreError as e:
                    log.warning("the rows of the experts could not be written: %s", e)
