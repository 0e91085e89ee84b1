"""The expert router: a named Ray actor that owns the expert map. A thin shell around `router_state`.

It starts expert actors on a placement group, watches them, and lets engines wait for new maps. No token passes through
it: engines go on with the map they have while it is away, and since expert actors are detached and named, none of
them dies with it. A restarted router asks them what they hold and counts its map's version on from what engines have.
"""

import asyncio
import contextlib
import json
import logging
import os
import time
from collections import Counter
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from folkmoot.cluster.expert_actor import ExpertActor
from folkmoot.cluster.placement import HostSlot, PlacementError
from folkmoot.cluster.router_state import (
    EngineReported,
    Event,
    HostDied,
    HostReaped,
    HostsOffered,
    HostStarting,
    ReapHost,
    StartHost,
    VersionSeen,
    apply,
    initial,
    plan,
)
from folkmoot.cluster.spec import ClusterSpec, expert_actor_name
from folkmoot.cluster.status import document
from folkmoot.gateway.errors import StoreError
from folkmoot.gateway.queue import RequestQueue
from folkmoot.gateway.store import Store

log = logging.getLogger(__name__)

GROUP_TIMEOUT_S = 60
STATUS_EVERY_S = 1.0
STATUS_TTL_S = 10.0


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class ExpertRouter:
    """Shell: turns what Ray and engines say into events, and carries out the actions of `plan`."""

    async def __init__(self, spec: ClusterSpec) -> None:  # type: ignore[misc]  # Ray awaits it
        logging.basicConfig(level=logging.INFO, format="%(asctime)s router %(levelname)s %(message)s")
        self._spec = spec
        self._state = initial(spec.moe_layers, spec.num_experts, spec.replicas)
        self._changed = asyncio.Condition()
        self._group: PlacementGroup | None = None
        self._bundles: dict[str, int] = {}
        self._host_threads: dict[str, int] = {}
        self._error: str | None = None
        self._tasks = [asyncio.create_task(self._begin()), asyncio.create_task(self._publish_status())]

    async def wait_for_map(self, known_version: int, timeout_s: float = 20.0) -> str | None:
        """The expert map as JSON once there is a newer one than `known_version` (-1: none); None after the time-out."""
        if known_version >= 0:
            await self.report(VersionSeen(known_version))

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
        self._state = apply(event, before)
        if self._state is before:
            return
        if not isinstance(event, EngineReported):
            log.info("%s", event)
        self._act()
        async with self._changed:
            self._changed.notify_all()

    async def status(self) -> dict[str, Any]:
        """What is where, alive, and how loaded: the status document as JSON data."""
        return document(self._spec, self._state, self._error)

    def pid(self) -> int:
        """This actor's process."""
        return os.getpid()

    async def _begin(self) -> None:
        """Reserve slots, find the actors that live from before, and place what is missing."""
        if self._spec.hosts == 0:
            return
        try:
            slots = await self._slots()
            for slot in slots:
                await self._find(slot.host)
            # Incarnations that start from the clock are larger than any of a former router.
            await self.report(HostsOffered(slots, since=int(time.time())))
        except Exception as e:
            log.exception("expert hosts could not be placed")
            self._error = f"expert hosts could not be placed: {e}"

    async def _slots(self) -> tuple[HostSlot, ...]:
        """One slot for each bundle of the placement group, which is made at the first start."""
        spec, name = self._spec, f"experts-{self._spec.namespace}"
        try:
            group = ray.util.get_placement_group(name)
        except ValueError:
            bundle = {"CPU": spec.host_cpus, **({"GPU": spec.host_gpus} if spec.host_gpus else {})}
            bundles = [dict(bundle) for _ in range(spec.hosts)]
            group = placement_group(bundles, spec.placement.upper(), name=name, lifetime="detached")
        if not await asyncio.to_thread(group.wait, GROUP_TIMEOUT_S):
            raise PlacementError(
                f"Ray has not {spec.hosts} x {group.bundle_specs[0]} free (waited {GROUP_TIMEOUT_S} s)"
            )
        self._group = group
        nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
        cores = {n["NodeID"]: n["Resources"].get("CPU", 1) for n in ray.nodes()}
        sharing = Counter(nodes.values())
        self._bundles = {f"host-{i}": i for i in nodes}
        for host, i in self._bundles.items():
            physical = os.cpu_count() or 1 if len(cores) == 1 else int(cores[nodes[i]])
            self._host_threads[host] = max(1, physical // sharing[nodes[i]])
        return tuple(HostSlot(f"host-{i}", nodes[i]) for i in sorted(nodes))

    async def _find(self, host: str) -> None:
        """After a restart: take over a host whose actor lives."""
        try:
            actor = ray.get_actor(expert_actor_name(host), self._spec.namespace)
            ready = await actor.describe.remote()
        except (ValueError, RayError):
            return
        if ready is None:
            ray.kill(actor)
            return
        await self.report(ready)
        self._tasks.append(asyncio.create_task(self._watch(actor, ready.host, ready.incarnation)))

    def _act(self) -> None:
        """Carry out what is planned until nothing is. Each action changes the state at once, so none is begun twice."""
        while actions := plan(self._state):
            match actions[0]:
                case StartHost(host, incarnation, columns):
                    self._state = apply(HostStarting(host, incarnation), self._state)
                    self._tasks.append(asyncio.create_task(self._start_host(host, incarnation, columns)))
                case ReapHost(host, incarnation):
                    self._state = apply(HostReaped(host, incarnation), self._state)
                    with contextlib.suppress(ValueError, RayError):  # it may be gone already
                        ray.kill(ray.get_actor(expert_actor_name(host), self._spec.namespace))

    async def _start_host(self, host: str, incarnation: int, columns: tuple[int, ...]) -> None:
        spec = self._spec
        try:
            actor = ExpertActor.options(  # type: ignore[attr-defined]
                name=expert_actor_name(host),
                namespace=spec.namespace,
                lifetime="detached",
                num_cpus=spec.host_cpus,
                num_gpus=spec.host_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, self._bundles[host]),
            ).remote(spec, host, self._host_threads[host])
            ready = await actor.start.remote(incarnation, columns)
        except Exception as e:
            cause = getattr(e, "cause", None) or e
            await self.report(HostDied(host, incarnation, str(cause)))
            return
        await self.report(ready)
        await self._watch(actor, host, incarnation)

    async def _watch(self, actor: Any, host: str, incarnation: int) -> None:
        """Wait for the end of a host, or of its actor."""
        try:
            reason = await actor.closed.remote()
        except RayError as e:
            reason = f"its actor died ({type(e).__name__})"
        await self.report(HostDied(host, incarnation, reason))

    async def _publish_status(self) -> None:
        """Write the status document where gateways find it. It expires by itself when the router is gone."""
        queue = RequestQueue(Store(self._spec.redis, self._spec.store_namespace))
        while True:
            text = json.dumps(await self.status())
            try:
                await queue.set_cluster_status(text, STATUS_TTL_S)
            except StoreError as e:
                log.warning("the status could not be written: %s", e)
            await asyncio.sleep(STATUS_EVERY_S)
