"""How many engines: the policy and what it measures, as pure functions."""

import math
import re
from dataclasses import replace

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from folkmoot.cluster.autoscale import Due, Limits, Memory, Policy, Seen, decide, first_late, for_batch, remembered
from folkmoot.cluster.autoscale_meter import Counts, Meter, known, measured, seen
from folkmoot.cluster.autoscaler import Work
from folkmoot.cluster.autoscaler import counts as shell_counts
from folkmoot.cluster.cli import main
from folkmoot.cluster.cli_common import SPAN
from folkmoot.cluster.router_state import EngineState
from folkmoot.gateway.demand import Demand, Owed
from folkmoot.gateway.queue import Load

LIMITS = Limits(0, 8)
POLICY = Policy(head_room=0.6, margin=0.0, idle_s=300.0)
IDLE = Seen(
    now_s=1000.0, ready=0, target=0, interactive_rate=0.0, interactive_waiting=0.0, interactive_idle_s=math.inf,
    due=(), tokens_per_s=100.0, start_s=60.0,
)  # fmt: skip


def engines(now: Seen, memory: Memory = Memory(), limits: Limits = LIMITS) -> int:  # noqa: B008
    return decide(now, memory, limits, POLICY).engines


def owing(tokens: float, within_s: float, **changes: object) -> Seen:
    return replace(IDLE, due=(Due(tokens, IDLE.now_s + within_s),), **changes)  # type: ignore[arg-type]


def test_nothing_owed_needs_nothing_but_the_least() -> None:
    assert engines(IDLE) == 0
    assert engines(IDLE, limits=Limits(2, 8)) == 2


@pytest.mark.parametrize(
    ("tokens", "within_s", "expected"),
    [
        (1, 3600, 1),
        (100 * 3540, 3600, 1),  # one engine, its start included
        (100 * 3541, 3600, 2),
        (100 * 3540 * 5, 3600, 5),
        (1e9, 3600, 8),  # not even the most can
        (1, 10, 8),  # due before anything could start
        (1e9, math.inf, 1),
    ],
)
def test_a_batch_gets_the_fewest_engines_that_meet_its_deadline(tokens: float, within_s: float, expected: int) -> None:
    assert engines(owing(tokens, within_s)) == expected


def test_engines_that_are_up_need_no_start() -> None:
    assert engines(owing(100 * 3600 * 2, 3600, ready=2, target=2)) == 2
    assert engines(owing(100 * 3600 * 2, 3600)) == 3


def test_the_densest_deadline_decides() -> None:
    due = (Due(100 * 940, 2000.0), Due(100 * 940, 2000.0), Due(1000, 90_000.0))
    assert engines(replace(IDLE, due=due)) == 2
    assert engines(replace(IDLE, due=due[1:])) == 1


def test_work_beside_interactive_requests_takes_what_those_leave() -> None:
    busy = owing(100 * 3600, 3600, ready=1, target=1, interactive_rate=80.0, interactive_idle_s=0.0)
    assert for_batch(busy, LIMITS, POLICY) == 2
    assert for_batch(replace(busy, interactive_rate=0.0), LIMITS, POLICY) == 1


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 1), (40.0, 1), (60.0, 2), (100.0, 2), (400.0, 6)])
def test_interactive_work_gets_square_root_head_room(rate: float, expected: int) -> None:
    assert engines(replace(IDLE, interactive_rate=rate, interactive_idle_s=0.0)) == expected


def test_interactive_work_that_waits_asks_for_engines_that_can_still_help() -> None:
    waiting = replace(IDLE, ready=1, target=1, interactive_idle_s=0.0)
    assert engines(replace(waiting, interactive_waiting=100.0)) == 1
    assert engines(replace(waiting, interactive_waiting=100.0 * 60 * 3)) == 5


def test_the_last_engine_stays_for_a_while_after_the_last_request() -> None:
    assert engines(replace(IDLE, ready=1, target=1, interactive_idle_s=299.0)) == 1
    assert engines(replace(IDLE, ready=1, target=1, interactive_idle_s=301.0)) == 0


def test_an_unmeasured_engine_is_tried_alone() -> None:
    assert engines(owing(1e9, 3600, tokens_per_s=None)) == 1
    assert engines(replace(IDLE, interactive_rate=1e9, interactive_idle_s=0.0, tokens_per_s=None)) == 1


def test_engines_stay_while_batch_work_fills_them_and_go_when_it_does_not() -> None:
    """Eight are up, two would do: to let go of six would save nothing."""
    assert engines(owing(100 * 3600 * 2, 3600, ready=8, target=8)) == 8
    assert engines(owing(100 * 60 * 3, 36_000, ready=8, target=8)) == 3
    assert engines(owing(100, 36_000, ready=8, target=8)) == 1


def test_fewer_only_when_no_more_were_needed_for_as_long_as_a_start_takes() -> None:
    needed = decide(owing(100 * 3540 * 5, 3600), Memory(), LIMITS, POLICY)
    assert needed.engines == 5
    for later_s, expected in ((59.0, 5), (61.0, 0)):
        assert engines(replace(IDLE, now_s=IDLE.now_s + later_s), needed.memory) == expected


def test_a_deadline_that_cannot_be_met_is_named() -> None:
    late = (Due(10, 5000.0), Due(1e9, 9000.0))
    assert decide(replace(IDLE, due=late), Memory(), LIMITS, POLICY).late == 9000.0
    assert decide(replace(IDLE, due=late[:1]), Memory(), LIMITS, POLICY).late is None
    assert first_late(replace(IDLE, due=late), 8, POLICY) == 9000.0


@given(
    due=st.lists(st.builds(Due, st.floats(0, 1e7), st.floats(0, 1e5) | st.just(math.inf)), max_size=6),
    ready=st.integers(0, 10), starting=st.integers(0, 4), rate=st.floats(0, 2000), waiting=st.floats(0, 1e6),
    speed=st.none() | st.floats(0.1, 1e5), start_s=st.floats(0, 600), least=st.integers(0, 4), more=st.integers(0, 6),
)  # fmt: skip
def test_within_limits_and_enough(
    due: list[Due], ready: int, starting: int, rate: float, waiting: float, speed: float | None, start_s: float,
    least: int, more: int,
) -> None:  # fmt: skip
    """Whatever is seen: within limits; and where fewer than the most are wanted, they meet every deadline."""
    limits = Limits(least, least + more)
    now = Seen(1000.0, ready, ready + starting, rate, waiting, 0.0 if waiting else math.inf, tuple(due), speed, start_s)
    decision = decide(now, Memory(), limits, POLICY)
    assert limits.least <= decision.engines <= limits.most
    assert decision.reason
    if decision.engines < limits.most and speed is not None:
        assert first_late(now, decision.engines, POLICY) is None
    if sum(d.tokens for d in due) > 0:
        assert decision.engines >= min(1, limits.most)


def test_memory_keeps_only_what_can_matter() -> None:
    memory = Memory()
    for second, needed in enumerate([1, 5, 3, 4, 2, 2, 2]):
        memory = remembered(memory, float(second), needed, 4.0)
    assert memory.needed == ((3.0, 4), (6.0, 2))


# ------------------------------------------------------------------------------------------------- the meter


def counts(now_s: float, **changes: float) -> Counts:
    return replace(Counts(now_s, 1, 1, 0.0, 0.0, 0.0, 0.0), **changes)


def look(meter: Meter, *all_counts: Counts) -> Meter:
    for one in all_counts:
        meter = measured(meter, one)
    return meter


def test_speed_is_measured_under_full_load_only() -> None:
    full = [counts(t, ready=2, target=2, processed=200.0 * t, batch_waiting=1.0) for t in range(0, 40, 5)]
    assert look(Meter(), *full).tokens_per_s == pytest.approx(100.0)
    idle = [replace(c, batch_waiting=0.0) for c in full]
    assert look(Meter(), *idle).tokens_per_s is None
    assert look(Meter(), *full[:2]).tokens_per_s is not None
    assert look(Meter(), full[0], replace(full[1], now_s=4.0)).tokens_per_s is None, "8 engine-seconds are too few"


def test_a_changed_speed_is_found_out() -> None:
    meter = known(1000.0, None)
    assert meter.tokens_per_s == 1000.0
    for t in range(0, 3000, 5):
        meter = measured(meter, counts(float(t), processed=50.0 * t, batch_waiting=1.0))
    assert meter.tokens_per_s == pytest.approx(50.0, rel=0.05)


def test_estimates_are_corrected_by_what_came_of_earlier_ones() -> None:
    half = [counts(float(t), processed=500.0 * t, finished=1000.0 * t, due=(Due(80.0, 9.0),)) for t in range(0, 60, 5)]
    early, late = look(Meter(), *half[:2]), look(Meter(), *half)
    assert early.truth == 1.0, "too little has finished"
    assert late.truth == pytest.approx(0.5, rel=0.01)
    assert seen(late, half[-1]).due == (Due(pytest.approx(40.0, rel=0.01), 9.0),)  # type: ignore[arg-type]
    cancelled = look(Meter(), counts(0.0), counts(5.0, finished=1e9))
    assert cancelled.truth == 0.1, "work that ended without an engine does not make the rest vanish"


def test_counters_that_begin_anew_measure_nothing() -> None:
    full = [counts(t, processed=100.0 * t, batch_waiting=1.0, submitted=7.0 * t) for t in range(0, 40, 5)]
    meter = look(Meter(), *full, counts(40, processed=0.0, submitted=0.0, batch_waiting=1.0))
    assert meter.tokens_per_s == pytest.approx(100.0)
    assert meter.rate >= 0


def test_starts_are_timed_from_asking() -> None:
    meter = look(
        Meter(), counts(0, ready=0, target=0), counts(10, ready=0, target=2), counts(50, ready=1, target=2),
        counts(90, ready=2, target=2),
    )  # fmt: skip
    assert meter.starts == 2
    assert meter.start_s == pytest.approx(40 + 0.3 * (80 - 40))
    dropped = look(Meter(), counts(0, ready=0, target=3), counts(10, ready=0, target=0), counts(20, ready=0, target=1))
    assert dropped.asked_s == (20,)


def test_interactive_work_is_a_rate_and_a_time() -> None:
    meter = look(Meter(), *[counts(float(t), submitted=30.0 * t) for t in range(0, 1200, 5)])
    assert meter.rate == pytest.approx(30.0, rel=0.01)
    quiet = counts(1300.0, submitted=30.0 * 1195)
    assert seen(measured(meter, quiet), quiet).interactive_idle_s == pytest.approx(105.0)
    running = replace(quiet, interactive_running=5.0)
    assert seen(measured(meter, running), running).interactive_idle_s == 0.0


# ------------------------------------------------------------------------------------------------- the shell


def engine(name: str, tokens: int, phase: str = "ready") -> EngineState:
    return EngineState(name, phase, info={"prompt_tokens": tokens // 2, "generated_tokens": tokens - tokens // 2})


def test_work_is_counted_over_engines_that_come_and_go() -> None:
    work = Work().after({"a": engine("a", 100)})
    work = work.after({"a": engine("a", 130), "b": engine("b", 7)})
    work = work.after({"b": engine("b", 10)})
    assert work.total == 100 + 30 + 7 + 3
    assert work.after({"b": engine("b", 10)}).total == work.total


def test_what_is_counted_of_the_store_and_the_engines() -> None:
    demand = Demand(
        Load(1, 10, 2, 20), Load(3, 300, 1, 50), 99, 1234, (Owed(330.0, 5000.0), Owed(70.0, math.inf)), 70.0
    )
    engines = {"a": engine("a", 5), "b": engine("b", 0, "loading"), "c": engine("c", 0, "stopping")}
    assert shell_counts(demand, Work(12), engines, 2, 1000.0) == Counts(
        now_s=1000.0, ready=1, target=2, processed=12, submitted=99, interactive_waiting=10, interactive_running=20,
        due=(Due(330.0, 5000.0), Due(70.0, math.inf)), batch_waiting=370, finished=1234,
    )  # fmt: skip


@pytest.mark.parametrize(("text", "limits"), [("2", Limits(2, 2)), ("0..4", Limits(0, 4)), ("3..3", Limits(3, 3))])
def test_limits_on_the_command_line(text: str, limits: Limits) -> None:
    assert SPAN.convert(text, None, None) == limits


@pytest.mark.parametrize("text", ["", "x", "-1", "1..", "..2", "1...3", "4..2", "0", "0..0", "1.5"])
def test_limits_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match=re.escape(repr(text))):
        SPAN.convert(text, None, None)


def test_replicas_have_no_limits() -> None:
    done = CliRunner().invoke(main, ["scale", "replicas", "1..4"])
    assert done.exit_code == 2 and "MIN..MAX is for engines and hosts" in done.output
