"""How many expert hosts and replicas: the policy on what hosts say they did, and limits as operators give them."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folkmoot.cluster.autoscale import Limits
from folkmoot.cluster.autoscale_experts import (
    HOLD_S,
    LEAST_SPAN_S,
    ExpertDecision,
    ExpertMemory,
    HostRate,
    HostWork,
    decide_experts,
    looked,
)
from folkmoot.cluster.operations import Refused, decide, progress, resized
from folkmoot.cluster.wish import Wish
from folkmoot.gateway.operations import Command
from tests.cluster.test_operations import running, wished

LIMITS = Limits(1, 8)


def busy(*parts: float) -> ExpertMemory:
    return ExpertMemory(rates=tuple(HostRate(f"host-{n}", part, 100.0, 0.001) for n, part in enumerate(parts)))


def asked(memory: ExpertMemory, replicas: int = 1, limits: Limits = LIMITS, now_s: float = 0.0) -> ExpertDecision:
    return decide_experts(memory, len(memory.rates), replicas, limits, now_s)[1]


@pytest.mark.parametrize(
    ("parts", "hosts", "replicas"),
    [
        ((0.6, 0.5), 2, 1),  # busy enough
        ((0.8, 0.75), 4, 1),  # all alike: more hosts
        ((1.0,) * 6, 8, 1),  # no more than the most
        ((0.9, 0.1, 0.1), 3, 2),  # one stands out: its experts get another replica
        ((0.3, 0.01), 2, 1),  # uneven, but nobody waits
        ((0.1, 0.1, 0.1, 0.1), 1, 1),
        ((0.0, 0.0), 1, 1),
    ],
)
def test_the_busiest_host_decides(parts: tuple[float, ...], hosts: int, replicas: int) -> None:
    decision = asked(busy(*parts))
    assert (decision.hosts, decision.replicas) == (hosts, replicas)


def test_a_host_that_stands_out_with_every_replica_it_can_have_needs_more_hosts() -> None:
    assert asked(busy(0.9, 0.1, 0.1), replicas=3).hosts == 6


def test_no_fewer_hosts_than_replicas() -> None:
    assert asked(busy(0.0, 0.0, 0.0), replicas=2).hosts == 2


def test_hosts_go_only_when_they_were_not_needed_for_long() -> None:
    memory, decision = decide_experts(busy(0.9, 0.9), 2, 1, LIMITS, 0.0)
    assert decision.hosts == 4
    idle = replace(busy(0.1, 0.1, 0.1, 0.1), needed=memory.needed)
    assert asked(idle, now_s=HOLD_S - 1).hosts == 4
    assert asked(idle, now_s=HOLD_S + 1).hosts == 1


def test_rates_are_taken_of_lives_that_were_there_before() -> None:
    memory, has_rates = looked(ExpertMemory(), {("a", 1): HostWork(10, 100, 5.0)}, 1000.0)
    assert not has_rates
    memory, has_rates = looked(memory, {("a", 1): HostWork(20, 100, 5.0)}, 1000.0 + LEAST_SPAN_S / 2)
    assert not has_rates
    now = {("a", 1): HostWork(1010, 8100, 9.0), ("a", 2): HostWork(5, 5, 5.0), ("b", 1): HostWork()}
    memory, has_rates = looked(memory, now, 1008.0)
    (rate,) = memory.rates
    assert has_rates and rate == HostRate("a", 0.5, 1000.0, 0.004)
    assert rate.wait_s == pytest.approx(0.002)
    assert HostRate("a", 1.0, 1.0, 1.0).wait_s == math.inf


@given(
    parts=st.lists(st.floats(0, 1), min_size=1, max_size=12), replicas=st.integers(1, 12), least=st.integers(1, 6),
    more=st.integers(0, 6),
)  # fmt: skip
def test_within_limits_one_thing_at_a_time(parts: list[float], replicas: int, least: int, more: int) -> None:
    replicas = min(replicas, len(parts))
    decision = asked(busy(*parts), replicas, Limits(least, least + more))
    assert decision.reason
    assert decision.replicas in (replicas, replicas + 1) and decision.replicas <= len(parts)
    if decision.replicas == replicas:
        assert max(least, replicas) <= decision.hosts <= max(least + more, replicas)
    else:
        assert decision.hosts == len(parts)


def test_limits_are_an_operators_wish() -> None:
    command = Command("scale", "hosts", 3, most=4)
    state = running(replicas=1, hosts=2)
    wish = decide(command, state, None)
    assert wish.host_limits == (3, 4) and len(wish.open_hosts) == 3
    assert Wish.from_json(wish.to_json()) == wish
    state = wished(state, command)
    more = replace(state, wish=resized(state, 4, None))
    assert more.wish.host_limits == (3, 4), "the autoscaler keeps to them"
    progress(command, more)
    fixed = decide(Command("scale", "hosts", 2), more, None)
    assert fixed.host_limits is None and len(fixed.open_hosts) == 2
    with pytest.raises(Refused, match="a later operation changed the number of hosts"):
        progress(command, replace(more, wish=fixed))
    with pytest.raises(Refused, match="hosts are more than"):
        resized(state, 99, None)
