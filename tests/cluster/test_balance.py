"""Placing replicas by load: what every plan must be, how good it is, and what it costs to follow the traffic."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.balance_bound import EXACT, lp_bound
from benchmarks.balance_eplb import eplb_global, eplb_hierarchical, time_of_busiest
from folkmoot.cluster.balance import TOLERANCE, Plan, balance
from folkmoot.cluster.balance_choice import Offer, cheapest
from folkmoot.cluster.balance_flow import relieve
from folkmoot.cluster.balance_layer import Hosts, Layer
from folkmoot.cluster.balance_pack import bound
from folkmoot.cluster.balance_repair import adjust, repair
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
    assert plan.after <= eplb * (1 + 1e-9)
    assert plan.after <= sum(layer.bound for layer in plan.layers) * (1 + TOLERANCE)


@pytest.mark.parametrize(("hosts", "slots"), [(16, 5), (18, 4), (36, 2)])
def test_traffic_that_drifts_is_followed_with_few_moves(hosts: int, slots: int) -> None:
    """Whether there are slots enough to level hosts (16 x 5) or not; never worse than EPLB, which moves nearly all."""
    where, rng = Hosts.alike(hosts, slots, 2), np.random.default_rng(1)
    loads = skewed(6, 64)
    held, eplb_held, moved, eplb_moved = balance(loads, where).held, placed_by_eplb(loads, hosts, slots), 0, 0
    for _ in range(5):
        loads = loads * np.exp(rng.normal(0, 0.05, loads.shape))
        plan, eplb = balance(loads, where, held), placed_by_eplb(loads, hosts, slots)
        check(plan, loads, where)
        assert plan.after <= sum(map(time_of_busiest, loads, eplb)) * (1 + 1e-9)
        assert plan.moves == loaded(plan.held, held)
        moved, eplb_moved = moved + plan.moves, eplb_moved + loaded(eplb, eplb_held)
        held, eplb_held = plan.held, eplb
    assert 0 < moved < 0.1 * eplb_moved


def placed_by_eplb(loads: np.ndarray, hosts: int, slots: int) -> list[list[list[int]]]:
    return [eplb_global(rows, hosts, slots) for rows in loads]


def loaded(now: Sequence[Sequence[Sequence[int]]], was: Sequence[Sequence[Sequence[int]]]) -> int:
    """Replicas that hosts have to load."""
    layers = zip(now, was, strict=True)
    return sum(len(set(a) - set(b)) for layer, before in layers for a, b in zip(layer, before, strict=True))


class Offered:
    """A layer that could become this and that."""

    def __init__(self, goal: float, first: Offer, more: list[Offer], fresh: Offer) -> None:
        self.goal, self.first, self._more, self._fresh, self.asked = goal, first, more, fresh, 0

    def offers(self) -> list[Offer]:
        self.asked += 1
        return self._more

    def fresh(self) -> Offer:
        self.asked += 100
        return self._fresh


@st.composite
def offered(draw: st.DrawFn) -> Offered:
    times = sorted(draw(st.lists(st.integers(1, 100), min_size=3, max_size=5, unique=True)), reverse=True)
    moves = sorted(draw(st.lists(st.integers(1, 30), min_size=len(times) - 1, max_size=len(times) - 1, unique=True)))
    first, *more = [Offer((), time, n) for time, n in zip(times, (0, *moves), strict=True)]
    return Offered(draw(st.integers(1, 100)), first, more[:-1], more[-1])


@settings(deadline=None, max_examples=300)
@given(st.lists(offered(), min_size=1, max_size=4))
def test_the_fewest_moves_that_suffice_are_chosen(tasks: list[Offered]) -> None:
    """Against all combinations: enough where any is, and at most the last step's moves more than the best."""
    enough = sum(task.goal for task in tasks)
    chosen = cheapest(tasks, enough)
    time = sum(one.time for one in chosen)
    everything = [[task.first, *task._more, *([task._fresh] if task.asked > 100 else [])] for task in tasks]
    able = [mix for mix in itertools.product(*everything) if sum(one.time for one in mix) <= enough]
    if able:
        best = min(sum(one.moves for one in mix) for mix in able)
        largest_step = max(many[-1].moves for many in everything)
        assert time <= enough and sum(one.moves for one in chosen) <= best + largest_step
    else:
        assert chosen == [many[-1] for many in everything]
        assert all(task.asked > 100 or many[-1].time <= task.goal for task, many in zip(tasks, everything, strict=True))


def test_nothing_is_worked_out_where_all_is_good_enough() -> None:
    """A layer that is better than it need be makes up for one that is not."""
    tasks = [
        Offered(10.0, Offer((), 9.0, 0), [], Offer((), 1.0, 9)),
        Offered(10.0, Offer((), 11.0, 0), [], Offer((), 1.0, 9)),
    ]
    assert cheapest(tasks, 20.0) == [tasks[0].first, tasks[1].first]
    assert [task.asked for task in tasks] == [0, 0]


def test_one_exchange_helps_all_hosts_that_share_an_expert() -> None:
    """Three hosts share expert 0, each has a little too much, and one small expert for a smaller one is enough."""
    on = [{0: 10.0, 4: 1.3}, {0: 10.0, 1: 1.3}, {0: 10.0, 2: 1.3}, {3: 0.4, 5: 7.0}]
    rows = [30.0, 1.3, 1.3, 0.4, 1.3, 7.0]
    layer = Layer(rows, Hosts.alike(4, 2), on, [set()] * 4)
    assert repair(layer, 11.0, 10)
    changed = sum(len(set(now) - set(was)) for now, was in zip(layer.on, on, strict=True))
    assert changed == 2 and layer.busiest <= 11.0 * 1.001


def test_experts_get_the_replicas_that_are_wanted_in_the_places_of_others() -> None:
    on = [{0: 3.0, 2: 1.0}, {0: 3.0, 3: 1.0}, {1: 9.0, 4: 1.0}]
    layer = Layer([6.0, 9.0, 1.0, 1.0, 1.0], Hosts.alike(3, 2), on, [set()] * 3)
    adjust(layer, [1, 2, 1, 1, 1])
    assert sorted(map(len, layer.on)) == [2, 2, 2] and [len(hosts) for hosts in layer.where] == [1, 2, 1, 1, 1]
    assert sum(layer.time) == pytest.approx(18.0)
    assert [sum(on.get(e, 0.0) for on in layer.on) for e in range(5)] == pytest.approx(layer.rows)


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
