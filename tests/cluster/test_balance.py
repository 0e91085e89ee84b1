"""Placing replicas by load: what every plan must be, how good it is, and what it costs to follow the traffic."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.balance_bound import EXACT, lp_bound
from benchmarks.balance_eplb import eplb_global, eplb_hierarchical, time_of_busiest
from folkmoot.cluster.balance import AIM, TOLERANCE, Plan, balance
from folkmoot.cluster.balance_flow import relieve
from folkmoot.cluster.balance_layer import Hosts, Layer
from folkmoot.cluster.balance_pack import bound
from folkmoot.cluster.balance_window import fill


def check(plan: Plan, loads: np.ndarray, hosts: Hosts, pinned: list[set[int]] | None = None) -> None:
    """Every expert has a replica, no host holds more than fits or anything twice, and no bound is beaten."""
    for layer, rows in zip(plan.layers, loads, strict=True):
        assert {e for experts in layer.held for e in experts} == set(range(len(rows)))
        for h, experts in enumerate(layer.held):
            assert len(set(experts)) == len(experts) <= hosts.slots[h]
            assert pinned is None or pinned[h] <= set(experts)
        assert layer.after >= layer.bound * (1 - 1e-9)
        assert layer.after >= rows.sum() / sum(hosts.speed) * (1 - 1e-9)
        assert possible(layer.held, rows, hosts, layer.after * (1 + 2e-3)), "the time can be reached by splitting rows"


def possible(held: tuple[tuple[int, ...], ...], rows: np.ndarray, hosts: Hosts, time: float) -> bool:
    """Whether the rows can be split so that no host takes longer: the linear program of just that."""
    from scipy.optimize import linprog

    pairs = [(h, e) for h, experts in enumerate(held) for e in experts]
    of_host = np.array([[float(h == p) for h, _ in pairs] for p in range(len(held))])
    of_expert = np.array([[float(e == p) for _, e in pairs] for p in range(len(rows))])
    limit = time * np.array(hosts.speed) + 1e-6
    return bool(linprog(np.zeros(len(pairs)), of_host, limit, of_expert, rows, method="highs").status == 0)


@st.composite
def problem(draw: st.DrawFn) -> tuple[np.ndarray, Hosts]:
    experts, hosts = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    slots = draw(st.lists(st.integers(0, experts), min_size=hosts, max_size=hosts))
    while sum(slots) < experts:
        slots[slots.index(min(slots))] += 1
    speed = draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=hosts, max_size=hosts))
    rows = draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    return np.array([rows], float), Hosts(tuple(slots), tuple(speed), tuple(h // 2 for h in range(hosts)))


@settings(deadline=None, max_examples=150)
@given(problem(), st.randoms(use_true_random=False))
def test_any_plan_is_sound_also_after_any_change_of_loads(case: tuple[np.ndarray, Hosts], rng: object) -> None:
    loads, hosts = case
    first = balance(loads, hosts)
    check(first, loads, hosts)
    later = loads[:, ::-1].copy()
    second = balance(later, hosts, first.held)
    check(second, later, hosts)
    assert second.after <= second.before * (1 + 1e-9)
    pinned = [set(experts) for experts in first.held[0]]
    third = balance(later, hosts, first.held, pinned)
    check(third, later, hosts, pinned)


def skewed(layers: int, experts: int, exponent: float = 1.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ranked = 1e6 / np.arange(1, experts + 1) ** exponent
    return np.stack([rng.permutation(ranked) for _ in range(layers)])


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(("experts", "hosts", "slots"), [(64, 8, 9), (64, 16, 5), (64, 80, 1), (16, 16, 2)])
def test_near_the_bound_and_no_worse_than_eplb(experts: int, hosts: int, slots: int, exponent: float) -> None:
    loads, where = skewed(4, experts, exponent), Hosts.alike(hosts, slots, 4)
    plan = balance(loads, where)
    check(plan, loads, where)
    eplb = sum(time_of_busiest(rows, eplb_global(rows, hosts, slots)) for rows in loads)
    assert plan.after <= eplb * (1 + 2e-3)
    assert plan.after <= sum(layer.bound for layer in plan.layers) * (1 + AIM) * (1 + TOLERANCE)


def test_traffic_that_drifts_is_followed_with_few_moves() -> None:
    hosts, rng = Hosts.alike(16, 5, 4), np.random.default_rng(1)
    loads = skewed(6, 64)
    held, moved = balance(loads, hosts).held, 0
    for _ in range(5):
        loads = loads * np.exp(rng.normal(0, 0.05, loads.shape))
        plan = balance(loads, hosts, held)
        check(plan, loads, hosts)
        assert plan.after <= sum(layer.bound for layer in plan.layers) * 1.03
        held, moved = plan.held, moved + plan.moves
    assert moved < 0.1 * 5 * 6 * 16 * 5


def test_what_is_level_stays_where_it_is() -> None:
    hosts, loads = Hosts.alike(4, 5), skewed(3, 16)
    held = balance(loads, hosts).held
    again = balance(loads * 7, hosts, held)
    assert again.moves == 0 and again.held == tuple(tuple(tuple(sorted(e)) for e in layer) for layer in held)


def test_a_hot_expert_gets_the_spare_slots_and_pinned_ones_stay() -> None:
    loads = np.array([[1.0, 1.0, 1.0, 97.0]])
    pinned = [{0}, {1}, {2}, {3}]
    plan = balance(loads, Hosts.alike(4, 2), [[(0,), (1,), (2,), (3,)]], pinned)
    assert [3 in experts for experts in plan.held[0]] == [True] * 4
    assert plan.before == 97.0 and plan.after == pytest.approx(25.0, rel=0.01)
    assert plan.moves == 3


def test_replicas_of_a_hot_expert_are_on_different_nodes() -> None:
    plan = balance(np.array([[50.0, *[10.0] * 7]]), Hosts.alike(4, 3, per_node=2))
    nodes = {h // 2 for h, experts in enumerate(plan.held[0]) if 0 in experts}
    assert nodes == {0, 1}


def test_a_slow_host_gets_less() -> None:
    hosts = Hosts((4, 4), (3.0, 1.0), (0, 1))
    plan = balance(np.array([[30.0, 30.0, 30.0, 30.0]]), hosts)
    assert plan.after == pytest.approx(30.0, rel=0.02)


def test_bad_input_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="5 experts do not fit: hosts have slots for 4"):
        balance(np.ones((1, 5)), Hosts.alike(2, 2))
    with pytest.raises(ValueError, match="host 0 holds 3 experts, and has 2 slots"):
        balance(np.ones((1, 3)), Hosts.alike(2, 2), [[(0, 1, 2), ()]])
    with pytest.raises(ValueError, match="speed: must be above 0"):
        Hosts((1,), (0.0,), (0,))


@settings(deadline=None, max_examples=60)
@given(problem())
def test_the_linear_program_agrees_that_the_bound_is_one(case: tuple[np.ndarray, Hosts]) -> None:
    """The bound is below every placement; where hosts are alike it is also no weaker than the linear program."""
    (rows,), hosts = case
    reached = balance(rows[None], hosts).after
    assert bound(rows.tolist(), hosts) <= reached * (1 + 1e-9)
    assert lp_bound(rows, hosts) <= reached * (1 + EXACT)
    if len(set(zip(hosts.slots, hosts.speed, strict=True))) == 1:
        assert lp_bound(rows, hosts) <= bound(rows.tolist(), hosts) * (1 + EXACT) + 1e-9


def test_a_window_levels_hosts_exactly_where_there_are_slots_enough() -> None:
    for seed in range(20):
        (rows,) = skewed(1, 32, 1.3, seed)
        hosts = Hosts.alike(8, 5)  # 8 slots more than experts, and 7 splits are enough
        placed = fill(rows.tolist(), hosts, rows.sum() / 8)
        assert placed is not None
        assert [sum(experts.values()) for experts in placed] == pytest.approx([rows.sum() / 8] * 8, rel=0.02)


def test_rows_are_shifted_over_hosts_in_between() -> None:
    layer = Layer(
        [8.0, 4.0, 4.0], Hosts.alike(4, 2), [{0: 8.0}, {0: 0.0, 1: 4.0}, {1: 0.0, 2: 4.0}, {2: 0.0}], [set()] * 4
    )
    assert relieve(layer, 4.0) == set()
    assert layer.time == pytest.approx([4.0] * 4, rel=0.01)
    assert relieve(layer, 3.0) == {0, 1, 2, 3}, "nobody outside could help"


def test_eplb_as_published() -> None:
    """Its README's example in spirit: more replicas for more load, packs of equal size, groups stay within a node."""
    rows = np.array([90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], float)
    placed = eplb_hierarchical(rows, hosts=8, slots=2, nodes=2, groups=4)
    assert [len(experts) for experts in placed] == [2] * 8
    assert {e for experts in placed for e in experts} == set(range(12))
    for node in (placed[:4], placed[4:]):
        groups = {e // 3 for experts in node for e in experts}
        assert len(groups) == 2
    assert not math.isinf(time_of_busiest(rows, placed))
