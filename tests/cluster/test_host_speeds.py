"""Unequal hosts: what they measure decides their share, and noise does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folkmoot.cluster.balance_live import decide_extras
from folkmoot.cluster.balance_loads import no_loads
from folkmoot.cluster.healing import is_settled
from folkmoot.cluster.host_groups import HostGroup
from folkmoot.cluster.host_speeds import RowsPerS, rounded, with_speeds
from folkmoot.cluster.placement import HostSlot
from folkmoot.cluster.router_events import HostForked, HostReady, HostStarting, HostStopped, SlotsSeen, Tick, apply
from folkmoot.cluster.router_plan import DRAIN_S, StartHost, StopHost, plan
from folkmoot.cluster.router_state import RouterState, initial
from folkmoot.cluster.wish import Wish
from folkmoot.experts import host_speed
from folkmoot.experts.expert_map import HostAddress
from tests.cluster.test_operation_runner import spec_of

FAST, SLOW = HostSlot("fast", "n", None, 4.0, 0), HostSlot("slow", "n", None, 1.0, 1)


def rows_s(value: float) -> RowsPerS:
    return ((4, value / 2), (16, value), (64, value * 2))  # the geometric mean is `value`


def speeds(slots: list[HostSlot], measured: dict[str, float]) -> dict[str, float]:
    found = with_speeds(slots, {host: rows_s(value) for host, value in measured.items()})
    return {host: slot.speed for host, slot in found.items()}


def test_before_anything_is_measured_hosts_count_by_their_guess() -> None:
    assert speeds([FAST, SLOW], {}) == {"fast": 4.0, "slow": 1.0}


def test_one_kind_s_figure_alone_changes_no_ratio() -> None:
    found = speeds([FAST, SLOW], {"fast": 900.0})
    assert found["fast"] == pytest.approx(rounded(900.0)) and found["fast"] / found["slow"] == pytest.approx(4.0)


def test_when_all_have_measured_that_counts() -> None:
    found = speeds([FAST, SLOW], {"fast": 900.0, "slow": 450.0})
    assert found["fast"] / found["slow"] == pytest.approx(1.25**3)  # the power next to 2


def test_hosts_of_a_kind_count_as_alike() -> None:
    slots = [replace(FAST, host=f"f{i}") for i in range(3)] + [SLOW]
    found = speeds(slots, {"f0": 1000.0, "f1": 100.0, "f2": 1010.0, "slow": 100.0})
    assert found["f0"] == found["f1"] == found["f2"] == rounded(1000.0) > found["slow"]


def test_a_speed_that_was_said_stays() -> None:
    slots = [replace(FAST, kind=None), replace(SLOW, kind=None)]
    assert speeds(slots, {"fast": 1.0, "slow": 900.0}) == {"fast": 4.0, "slow": 1.0}


@given(value=st.floats(1e-3, 1e9), noise=st.floats(0.9, 1.1))
def test_noise_changes_a_speed_by_one_step_at_most(value: float, noise: float) -> None:
    assert rounded(value) == pytest.approx(value, rel=0.125)
    assert rounded(value * noise) / rounded(value) == pytest.approx(1, rel=0.26)


def test_hosts_measure_only_where_nobody_says_how_quick_they_are() -> None:
    plain = spec_of()
    assert not plain.measures_speed
    assert replace(plain, host_groups=(HostGroup(1, 4.0), HostGroup(2))).measures_speed
    assert not replace(plain, host_groups=(HostGroup(1, speed=2.0), HostGroup(2))).measures_speed


def test_the_quickest_call_of_each_layer_counts() -> None:
    class Kernel:
        hidden_size, dtype = 8, torch.float32
        seen: list[tuple[int, int]] = []  # noqa: RUF012

        def __call__(self, x: torch.Tensor, slots: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            self.seen.append((len(x), int(slots.max())))
            assert out is not None and out.shape == x.shape == (len(x), 8)
            return out.copy_(x)

    found = host_speed.measure({0: Kernel(), 3: Kernel()}, {0: 3, 3: 9})
    assert list(found) == [4, 16, 64] and found[64] > found[4] > 0
    assert {most for rows, most in Kernel.seen if rows == 64} == {2, 3}, "no slot that there is not"
    assert host_speed.measure({}, {}) == {}


def carried_out(state: RouterState, measured: dict[str, float]) -> RouterState:
    """Every planned action succeeds at once; hosts have measured so much when they are ready."""
    while actions := plan(state):
        match actions[0]:
            case StartHost(host, incarnation, columns, extras):
                address = HostAddress(host, incarnation, "n", f"/run/{host}")
                found = rows_s(measured[host]) if host in measured else ()
                for event in (
                    HostStarting(host, incarnation, columns, extras),
                    HostForked(host, incarnation, columns, 2, 1, extras),
                    HostReady(host, incarnation, address, columns, 2, 1, extras=extras, rows_s=found),
                ):
                    state = apply(event, state)
            case StopHost(host, incarnation):
                state = apply(HostStopped(host, incarnation), state)
    return state


def begun(slots: list[HostSlot], measured: dict[str, float], columns: int = 20) -> RouterState:
    """A cluster that was started, and has come to rest."""
    names = [replace(slot, host=f"host-{i}") for i, slot in enumerate(slots)]
    state = apply(SlotsSeen(tuple(names)), initial((0,), columns, Wish(1, 1, (1,) * len(slots))))
    for now_s in (1.0, 2.0 + DRAIN_S, 4.0 + 2 * DRAIN_S):
        state = apply(Tick(now_s), carried_out(state, measured))
    state = carried_out(state, measured)
    assert is_settled(state)
    return state


def held(state: RouterState) -> list[int]:
    return [len(h.columns) for _, h in sorted(state.hosts.items())]


def test_a_router_places_by_cores_and_then_by_what_was_measured() -> None:
    assert held(begun([FAST, SLOW], {})) == [16, 4]
    state = begun([FAST, SLOW], {"host-0": 1000.0, "host-1": 1020.0})
    assert held(state) == [10, 10]
    assert not state.expert_map.layers[0].count(()), "every expert has its replica"
    again = apply(SlotsSeen(tuple(h.slot for h in state.hosts.values())), state)
    assert held(again) == [10, 10] and plan(again) == ()


def test_a_host_s_first_figure_stays_until_it_is_on_another_node() -> None:
    state = begun([FAST, SLOW], {"host-0": 1000.0, "host-1": 500.0})
    share, first = held(state), state.hosts["host-0"]
    assert first.serving is not None and first.serving.address is not None
    later = HostReady("host-0", 99, first.serving.address, first.columns, 3, 1, rows_s=rows_s(10.0))
    after = apply(later, state)
    assert after.hosts["host-0"].rows_s == rows_s(1000.0) and held(after) == share
    moved = tuple(replace(h.slot, node="elsewhere") for h in state.hosts.values())
    assert all(h.rows_s == () for h in apply(SlotsSeen(moved), state).hosts.values())
    lost = apply(SlotsSeen(tuple(replace(h.slot, node=None) for h in state.hosts.values())), state)
    assert all(h.rows_s == () for h in lost.hosts.values())


def test_balance_takes_hosts_as_quick_as_they_are() -> None:
    state = begun([FAST, replace(SLOW, capacity=10)], {"host-0": 1000.0, "host-1": 250.0})
    share = held(state)
    loads = no_loads((0,), 20, 60.0)
    even = np.ones((1, 20)) * 100
    seen = decide_extras(state, replace(loads, recent=even), 1)
    assert share[0] > 3 * share[1] and seen.before == pytest.approx(1.0, abs=0.1), "uneven shares, level times"
