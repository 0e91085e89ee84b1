"""The expert actors that the router knows: one a host, and a spare a node, since a new actor takes Ray seconds.

A spare has been imported and waits for a host whose actor died. It runs outside the host's bundle, whose room stays
reserved for it; where hosts have GPUs there are no spares, since Ray gives an actor its GPUs by its bundle.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Iterable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from folkmoot.cluster.expert_actor import Description, ExpertActor
from folkmoot.cluster.ray_slots import RaySlots
from folkmoot.cluster.spec import EXPERT_ACTOR_PREFIX, ClusterSpec

log = logging.getLogger(__name__)

DESCRIBE_TIMEOUT_S = 5.0


class ActorPool:
    """Handles of expert actors. Creating and ending one does not wait for Ray."""

    def __init__(self, spec: ClusterSpec, slots: RaySlots) -> None:
        self._spec, self._slots = spec, slots
        self._of_host: dict[str, Any] = {}
        self._spares: dict[str, Any] = {}

    def get(self, host: str) -> Any:
        """The host's actor; None where there is none."""
        return self._of_host.get(host)

    def ensure(self, host: str) -> Any:
        """The host's actor: the one it has, else its node's spare, else a new one."""
        if host not in self._of_host:
            spare = self._spares.pop(self._slots.node_of(host) or "", None)
            self._of_host[host] = spare or self._new(**self._slots.actor_options(host))
        return self._of_host[host]

    def end(self, host: str, actor: Any = None) -> None:
        """End the host's actor, if it is this one (None: whichever it is)."""
        known = self._of_host.get(host)
        if known is not None and actor in (None, known):
            del self._of_host[host]
            with contextlib.suppress(ValueError, RayError):  # it may be gone already
                ray.kill(known)

    def keep_spares(self, nodes: Iterable[str]) -> None:
        """See to it that each of these nodes has a spare."""
        for node in set(nodes) - set(self._spares):
            if not self._spec.host_gpus:
                affinity = NodeAffinitySchedulingStrategy(node, soft=False)
                self._spares[node] = self._new(num_cpus=0, scheduling_strategy=affinity)

    async def find(self) -> list[Description]:
        """Take over the actors that live from before the router's restart; what those that own a host say."""
        named = await asyncio.to_thread(ray.util.list_named_actors, True)
        ours = [a["name"] for a in named if a["namespace"] == self._spec.namespace]
        found = await asyncio.gather(*(self._find(name) for name in ours if name.startswith(EXPERT_ACTOR_PREFIX)))
        return [description for description in found if description is not None]

    async def _find(self, name: str) -> Description | None:
        try:
            actor = ray.get_actor(name, self._spec.namespace)
            description: Description = await asyncio.wait_for(actor.describe.remote(), DESCRIBE_TIMEOUT_S)
        except (ValueError, RayError, TimeoutError) as e:
            log.warning("%s does not answer: %s", name, e)
            return None
        if description.host is None:
            self._spares[description.node] = actor
            return None
        self._of_host[description.host] = actor
        return description

    def _new(self, **options: Any) -> Any:
        return ExpertActor.options(  # type: ignore[attr-defined]
            name=f"{EXPERT_ACTOR_PREFIX}{secrets.token_hex(6)}",
            namespace=self._spec.namespace,
            lifetime="detached",
            **options,
        ).remote(self._spec)
