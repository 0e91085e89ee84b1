"""How many expert hosts there should be, and how many replicas of each expert: from what hosts say they did. Pure.

A layer is finished when its slowest host is, so the signal is the busiest host, not the mean. How long requests wait
for it follows from how busy it is and how long it computes (Pollaczek-Khinchine, with computing times that hardly vary:
busy / (1 - busy) * service / 2). Where the busiest host stands out, its experts are hot: another replica lets engines
level them. Where all are busy alike there are too few hosts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from folkmoot.cluster.autoscale import Limits, Memory, remembered

BUSY_HIGH, BUSY_AIM = 0.7, 0.5
"""Above the first (requests wait longer than they are computed) something is done, so that the second is reached."""
UNEVEN = 1.5
"""The busiest host stands out when it is so many times as busy as the mean."""
HOLD_S = 300.0
"""Hosts go when so many were not needed for so long: each that leaves loads others with its experts."""
LEAST_SPAN_S = 5.0
"""A rate is taken over at least so long."""


@dataclass(frozen=True)
class HostWork:
    """What one life of a host has done since its start."""

    requests: int = 0
    rows: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True)
class HostRate:
    """What a host did lately. `busy`: part of the time that it computed; `service_s`: mean time of a request."""

    host: str
    busy: float
    rows_per_s: float
    service_s: float

    @property
    def wait_s(self) -> float:
        """How long a request waits for those before it, in the mean; inf where the host cannot keep up."""
        return math.inf if self.busy >= 1 else self.busy / (1 - self.busy) * self.service_s / 2


Life = tuple[str, int]
"""Name and incarnation of a host."""


@dataclass(frozen=True)
class ExpertMemory:
    """What was seen at the begin of the present span, and how many hosts were needed lately."""

    since_s: float = -math.inf
    works: Mapping[Life, HostWork] = field(default_factory=dict)
    rates: tuple[HostRate, ...] = ()
    needed: Memory = field(default_factory=Memory)


@dataclass(frozen=True)
class ExpertDecision:
    """Hosts and replicas wanted, and why. At most one of them differs from what there is."""

    hosts: int
    replicas: int
    reason: str


def looked(memory: ExpertMemory, works: Mapping[Life, HostWork], now_s: float) -> tuple[ExpertMemory, bool]:
    """The memory after a look, and whether it has new rates: once in LEAST_SPAN_S, of lives that were there before."""
    passed_s = now_s - memory.since_s
    if passed_s < LEAST_SPAN_S:
        return memory, False
    rates = () if math.isinf(passed_s) else tuple(_rates(memory.works, works, passed_s))
    return ExpertMemory(now_s, dict(works), rates, memory.needed), bool(rates)


def decide_experts(
    memory: ExpertMemory, hosts: int, replicas: int, limits: Limits, now_s: float
) -> tuple[ExpertMemory, ExpertDecision]:
    """What the latest rates ask for, where there are so many hosts and replicas now."""
    busiest = max(memory.rates, key=lambda r: r.busy)
    if busiest.busy > BUSY_HIGH and is_uneven(memory.rates) and replicas < hosts:
        reason = f"{busiest.host} is {busiest.busy:.0%} busy and stands out: its experts get another replica"
        return memory, ExpertDecision(hosts, replicas + 1, reason)
    fitting = math.ceil(hosts * busiest.busy / BUSY_AIM)
    needed = fitting if busiest.busy > BUSY_HIGH else min(hosts, max(fitting, 1))
    kept = remembered(memory.needed, now_s, needed, HOLD_S)
    wanted = max(limits.clip(max(count for _, count in kept.needed)), replicas)
    reason = f"{busiest.host} is the busiest: {busiest.busy:.0%} of the time, {busiest.rows_per_s:.0f} rows/s, "
    reason += f"requests wait {1000 * busiest.wait_s:.2g} ms" if busiest.busy < 1 else "it cannot keep up"
    return ExpertMemory(memory.since_s, memory.works, memory.rates, kept), ExpertDecision(wanted, replicas, reason)


def is_uneven(rates: Sequence[HostRate]) -> bool:
    """Whether one host is much busier than the mean of all."""
    return max(r.busy for r in rates) > UNEVEN * mean(r.busy for r in rates)


def _rates(before: Mapping[Life, HostWork], now: Mapping[Life, HostWork], passed_s: float) -> list[HostRate]:
    rates = []
    for life, work in now.items():
        if (old := before.get(life)) is None:
            continue
        requests, busy_s = work.requests - old.requests, work.busy_s - old.busy_s
        service_s = busy_s / requests if requests else 0.0
        rates.append(HostRate(life[0], min(1.0, busy_s / passed_s), (work.rows - old.rows) / passed_s, service_s))
    return rates
