"""The balancer, in the expert router: looks at the experts' loads now and then, and has hosts hold other extras."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from folkmoot.cluster.balance_live import Decision, decide_extras
from folkmoot.cluster.balance_loads import ExpertLoads, at
from folkmoot.cluster.router_events import Rebalanced
from folkmoot.cluster.router_state import RouterState
from folkmoot.cluster.spec import ClusterSpec

log = logging.getLogger(__name__)

LOOKS_A_HALF_LIFE = 2


class Balancer:
    """Shell around `decide_extras`. What it wants is in the router's state, and carried out by its plan."""

    def __init__(
        self,
        spec: ClusterSpec,
        state: Callable[[], RouterState],
        loads: Callable[[], ExpertLoads],
        report: Callable[[Rebalanced], Awaitable[None]],
    ) -> None:
        self._spec, self._state, self._loads, self._report = spec, state, loads, report
        self._decision = Decision("has not looked yet" if spec.rebalance else "off")
        self._times = 0

    async def run(self) -> None:
        """For ever, where it is on."""
        while self._spec.rebalance:
            await asyncio.sleep(self._spec.load_half_life_s / LOOKS_A_HALF_LIFE)
            before = self._state()
            loads = at(self._loads(), time.time())
            decision = await asyncio.to_thread(decide_extras, before, loads, self._spec.spare_experts)
            if decision.reason != self._decision.reason:
                log.info("balance: %s", decision.reason)
            self._decision = decision
            if decision.extras and self._state().expert_map.version == before.expert_map.version:
                self._times += 1
                await self._report(Rebalanced(decision.extras))

    def document(self) -> dict[str, Any]:
        """For the status document."""
        lives = [h.serving for h in self._state().hosts.values() if h.serving is not None]
        extras = sum(len(life.extras) for life in lives)
        facts = {"on": self._spec.rebalance, "times": self._times, "extra_replicas": extras}
        return {**facts, **self._decision.document()}
