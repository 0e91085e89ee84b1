"""The autoscaler, in the expert router: looks at what is owed once a second, and says how many engines there should be.

Ray Serve asks for that number through its policy (autoscale_serve.py), and starts or stops replicas; where there is no
room for one, Ray's own autoscaler adds a node, and takes it away when nothing runs on it any more. With a fixed number
of engines it only measures. Expert hosts it changes itself, as an operator would.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from folkmoot.cluster.autoscale import Decision, Due, Limits, Memory, Policy, decide
from folkmoot.cluster.autoscale_experts import ExpertMemory, HostWork, decide_experts, looked
from folkmoot.cluster.autoscale_meter import Counts, Meter, known, measured, seen
from folkmoot.cluster.healing import is_settled
from folkmoot.cluster.operations import Refused, resized
from folkmoot.cluster.operations import decide as decide_operation
from folkmoot.cluster.router_state import EngineState, RouterState
from folkmoot.cluster.spec import ClusterSpec
from folkmoot.cluster.wish import Wish
from folkmoot.gateway.demand import Demand, Demands, Scaling
from folkmoot.gateway.errors import StoreError
from folkmoot.gateway.operations import Command
from folkmoot.gateway.store import Store

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
REMEMBER_EVERY_S = 10.0


@dataclass(frozen=True)
class Work:
    """Tokens that engines have worked off since the first look, whichever of them have come and gone since."""

    total: int = 0
    last: Mapping[str, int] = field(default_factory=dict)

    def after(self, engines: Mapping[str, EngineState]) -> "Work":
        """With what they report now."""
        now = {e.engine: e.info.get("prompt_tokens", 0) + e.info.get("generated_tokens", 0) for e in engines.values()}
        grown = sum(max(0, tokens - self.last.get(engine, 0)) for engine, tokens in now.items())
        return Work(self.total + grown, now)


def counts(demand: Demand, work: Work, engines: Mapping[str, EngineState], target: int, now_s: float) -> Counts:
    """What the meter is given."""
    return Counts(
        now_s=now_s,
        ready=sum(e.phase == "ready" for e in engines.values()),
        target=target,
        processed=work.total,
        submitted=demand.submitted,
        finished=demand.finished,
        interactive_waiting=demand.interactive.waiting_tokens,
        interactive_running=demand.interactive.running_tokens,
        due=tuple(Due(one.tokens, one.deadline_s) for one in demand.due),
        batch_waiting=demand.batch.waiting_tokens + demand.outside,
    )


class Autoscaler:
    """Shell: reads the store and the router's state, and keeps the pure functions' memory."""

    def __init__(
        self,
        spec: ClusterSpec,
        store: Store,
        state: Callable[[], RouterState],
        change: Callable[[Wish], Awaitable[None]],
    ) -> None:
        self._spec, self._demands, self._state, self._change = spec, Demands(store), state, change
        self._policy = Policy(idle_s=spec.idle_s)
        self._meter, self._memory, self._work = Meter(), Memory(), Work()
        self._decision: Decision | None = None
        self._counts: Counts | None = None
        self._was_ready = False
        self._remembered_s = 0.0
        self._experts = ExpertMemory()
        self._experts_reason = ""

    @property
    def engines(self) -> int | None:
        """How many there should be; None before the first look."""
        return None if self._decision is None else self._decision.engines

    async def run(self) -> None:
        """For ever. While the store is away the last number stands."""
        loaded = False
        while True:
            try:
                if not loaded:
                    await self._load()
                    loaded = True
                await self._look(time.time())
                await self._look_at_experts(time.time())
            except StoreError as e:
                log.warning("what is owed cannot be read: %s", e)
            await asyncio.sleep(LOOK_EVERY_S)

    def document(self) -> dict[str, Any]:
        """For the status document."""
        limits, now = self._state().wish.engine_limits, self._counts
        return {
            **asdict(limits),
            "wanted": self.engines,
            "reason": "" if self._decision is None else self._decision.reason,
            "late_s": None if self._decision is None else self._decision.late,
            "owed_tokens": 0 if now is None else round(sum(one.tokens for one in now.due)),
            "interactive_tokens_per_s": round(self._meter.rate, 1),
            "engine_tokens_per_s": self._meter.tokens_per_s,
            "engine_start_s": round(self._meter.start_s, 1),
            "host_limits": self._state().wish.host_limits,
            "hosts_reason": self._experts_reason,
            "busiest_host": max((round(r.busy, 3) for r in self._experts.rates), default=None),
        }

    async def _look(self, now_s: float) -> None:
        state = self._state()
        limits = state.wish.engine_limits
        demand = await self._demands.read(self._spec.model)
        self._work = self._work.after(state.engines)
        target = limits.clip(self._spec.first_engines if self.engines is None else self.engines)
        now = counts(demand, self._work, state.engines, target, now_s)
        self._meter = measured(self._meter, now)
        self._was_ready |= now.ready > 0
        if not self._was_ready:  # the first engine shows that the model loads, and tells gateways what it is
            self._meter = replace(self._meter, interactive_s=now_s)
        decision = decide(seen(self._meter, now), self._memory, limits, self._policy)
        if decision.engines != self.engines:
            log.info("%s engines: %s", decision.engines, decision.reason)
        self._decision, self._memory, self._counts = decision, decision.memory, now
        await self._tell(limits, now, now_s)

    async def _look_at_experts(self, now_s: float) -> None:
        """Where an operator allowed it, and nothing is under way, change the number of hosts or replicas."""
        state = self._state()
        works = {
            (host.host, life.incarnation): HostWork(life.requests, life.rows, life.busy_s)
            for host in state.hosts.values()
            if (life := host.serving) is not None
        }
        self._experts, has_rates = looked(self._experts, works, now_s)
        wish = state.wish
        if wish.host_limits is None or not has_rates or not is_settled(state):
            return
        limits, hosts = Limits(*wish.host_limits), len(wish.open_hosts)
        self._experts, asked = decide_experts(self._experts, hosts, wish.replicas, limits, now_s)
        self._experts_reason = asked.reason
        if (asked.hosts, asked.replicas) == (hosts, wish.replicas):
            return
        capacity = self._spec.max_experts_per_host
        try:
            if asked.replicas != wish.replicas:
                following = decide_operation(Command("scale", "replicas", asked.replicas), state, capacity)
            else:
                following = resized(state, asked.hosts, capacity)
        except Refused as e:
            self._experts_reason = f"{asked.reason}; {e}"
            return
        log.info("%s hosts, %s replicas: %s", asked.hosts, asked.replicas, asked.reason)
        await self._change(following)

    async def _tell(self, limits: Limits, now: Counts, now_s: float) -> None:
        """Gateways that engines come and go; a later life of this router what was found out."""
        if limits.least == limits.most:
            await self._demands.withdraw()
        else:
            wanted, start_s = self.engines or 0, self._meter.start_s
            scaling = Scaling(self._spec.model, limits.least, limits.most, now.ready, wanted, start_s)
            await self._demands.announce(scaling)
        if now_s - self._remembered_s > REMEMBER_EVERY_S and self._was_ready:
            self._remembered_s = now_s
            seen_s = self._meter.start_s if self._meter.starts else None
            facts = {"run": self._spec.run_dir, "tokens_per_s": self._meter.tokens_per_s, "start_s": seen_s}
            await self._demands.remember(self._spec.model, facts)

    async def _load(self) -> None:
        facts = await self._demands.remembered(self._spec.model)
        self._was_ready = facts.get("run") == self._spec.run_dir
        self._meter = known(facts.get("tokens_per_s"), facts.get("start_s"))
