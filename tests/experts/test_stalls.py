"""Hosts that stop answering: the deadline that follows the work, and what it must not kill."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folkmoot.experts import deadline, warm
from folkmoot.experts.deadline import SLICE_S, Pace, Waited
from folkmoot.experts.dispatcher import Dispatcher
from tests.experts.hosts import Hosts, expected
from tests.experts.test_dispatcher import batch, dispatcher

STALL_S, HEDGE_S = 0.4, 0.2


def forward(d: Dispatcher, seed: int, tokens: int = 16) -> float:
    """One exact layer call; how long it took."""
    x, w, ids = batch(tokens, 2, seed=seed)
    began = time.monotonic()
    assert torch.equal(d.forward(0, x, w, ids)[0], expected(0, x, w, ids))
    return time.monotonic() - began


def until(check: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 30.0
    while not check():
        assert time.monotonic() < deadline_s


def stop(child: warm.Child) -> None:
    os.kill(child.pid, signal.SIGSTOP)


def one_of_two_stopped(hosts: Hosts, transport: str = "shm") -> tuple[Dispatcher, warm.Child, warm.Child]:
    """A dispatcher that has been served by two hosts and waits long before it calls one stalled, the host that has just
    been stopped, and its replica."""
    replica, victim = (hosts.start(name, hosts.all_layers(range(8))) for name in "ab")
    d = dispatcher(hosts, transport=transport, hedge_s=HEDGE_S, stall_s=60.0, call_timeout_s=60.0)
    for i in range(30):
        forward(d, i)
    assert d.rows_served.keys() == {"a", "b"}
    stop(victim)
    return d, victim, replica


def is_stopped(child: warm.Child) -> bool:
    with open(f"/proc/{child.pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0] == "T"


def test_an_owner_that_does_not_read_holds_no_host_up(hosts: Hosts) -> None:
    """As an expert actor that is stopped: what its host reports fills the channel, and the host goes on answering."""
    host = hosts.start("a", hosts.all_layers(range(8)), report_every_s=0.0)
    d = dispatcher(hosts)
    calls = 4000
    for _ in range(calls):
        forward(d, seed=0, tokens=1)
    d.close()
    reports = []
    while (report := host.receive(1.5)) is not None:
        reports.append(report["requests"])
    assert 100 < len(reports) < calls, "the channel was full"
    assert reports == sorted(reports)
    assert reports[-1] == calls, "the last one is said again once there is room"


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_late_hosts_rows_are_asked_of_a_replica_until_it_has_answered(hosts: Hosts, transport: str) -> None:
    """SIGSTOP in a stream of calls: every one is exact, one of them waits, but not for the deadline of a stalled host.
    After SIGCONT the late answer is put away, and the host is asked again, over the same link."""
    d, victim, _ = one_of_two_stopped(hosts, transport)
    took_s = [forward(d, i) for i in range(30, 60)]
    assert is_stopped(victim)
    assert HEDGE_S <= max(took_s) < 60.0, "it was waited for, a little"
    assert (d.counts.late_hosts, d.counts.dropped_hosts) == (1, 0)
    rows_of_victim = d.rows_served["b"]
    os.kill(victim.pid, signal.SIGCONT)
    until(lambda: forward(d, 60) and d.rows_served["b"] > rows_of_victim)
    for i in range(61, 90):
        forward(d, i)
    assert d.counts.dropped_hosts == 0
    d.close()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("hedge_s", [0.05, 60.0])
def test_a_stopped_host_is_dropped_at_its_deadline_and_late_rows_change_nothing(
    hosts: Hosts, transport: str, hedge_s: float
) -> None:
    """Whether it is set aside before, or waited for until then; SIGCONT later finds the link closed."""
    hosts.start("a", hosts.all_layers(range(8)))
    victim = hosts.start("b", hosts.all_layers(range(8)))
    d = dispatcher(hosts, transport=transport, hedge_s=hedge_s, stall_s=STALL_S)
    for i in range(30):
        forward(d, i)
    assert d.rows_served["b"] > 0
    stop(victim)
    began = time.monotonic()
    until(lambda: forward(d, 30) and d.counts.dropped_hosts)
    assert time.monotonic() - began >= STALL_S
    assert is_stopped(victim)
    rows_of_victim = d.rows_served["b"]
    os.kill(victim.pid, signal.SIGCONT)
    for i in range(60, 120):
        forward(d, i)
    assert d.rows_served["b"] == rows_of_victim
    d.close()


def test_a_late_host_that_dies_is_dropped(hosts: Hosts) -> None:
    d, victim, _ = one_of_two_stopped(hosts)
    for i in range(30, 40):
        forward(d, i)
    assert (d.counts.late_hosts, d.counts.dropped_hosts) == (1, 0)
    victim.kill()
    until(lambda: forward(d, 40) and d.counts.dropped_hosts)
    d.close()


def test_a_late_host_is_the_last_one_that_is_left(hosts: Hosts) -> None:
    """Its replica dies while it is late: the layer waits until it has answered, and then asks it."""
    d, victim, replica = one_of_two_stopped(hosts)
    forward(d, 30)
    forward(d, 31)
    assert d.counts.late_hosts == 1
    replica.kill()
    assert replica.wait(10.0)
    timer = resume_later([victim], 0.5)
    assert forward(d, 32) >= 0.4
    timer.wait()
    assert (d.counts.late_hosts, d.counts.dropped_hosts) == (1, 1)
    d.close()


def test_a_newer_map_keeps_a_late_host_aside(hosts: Hosts) -> None:
    """Neither is it connected to once more, nor asked before it has answered."""
    d, victim, _ = one_of_two_stopped(hosts)
    forward(d, 30)
    forward(d, 31)
    rows_of_victim = d.rows_served["b"]
    d.use_map(replace(hosts.map, version=hosts.map.version + 1))
    forward(d, 32)
    assert d.rows_served["b"] == rows_of_victim
    os.kill(victim.pid, signal.SIGCONT)
    until(lambda: forward(d, 33) and d.rows_served["b"] > rows_of_victim)
    assert (d.counts.late_hosts, d.counts.dropped_hosts) == (1, 0)
    d.close()


def test_a_host_that_stops_in_the_middle_of_its_reply_is_replaced(hosts: Hosts) -> None:
    """Over TCP a part of a reply may have come: the rest is waited for no longer than for a whole one."""
    hosts.start("a", hosts.all_layers(range(8)))
    victim = hosts.start("b", hosts.all_layers(range(8)), half_replies=True)
    d = dispatcher(hosts, transport="tcp", stall_s=STALL_S, call_timeout_s=1.0)
    assert forward(d, 0) >= STALL_S
    assert d.rows_served == {"a": 32}
    assert victim.is_alive()
    d.close()


def test_slow_hosts_are_waited_for_in_proportion_to_their_work(hosts: Hosts) -> None:
    """A host that has always needed longer than stall_s is slow, not stalled; one that gets much more work as well."""
    hosts.start("a", hosts.all_layers(range(8)), stall_s=0.15)
    hosts.start("b", hosts.all_layers(range(8)), stall_s=0.15)
    d = dispatcher(hosts, stall_s=0.1)
    for i in range(4):
        forward(d, i)
    assert d.rows_served.keys() == {"a", "b"}
    d.close()


def test_the_last_replica_gets_the_ceiling(hosts: Hosts) -> None:
    """Nobody else holds these experts, so a pause beyond the deadline is waited out."""
    only = hosts.start("a", hosts.all_layers(range(8)))
    d = dispatcher(hosts, stall_s=0.1, call_timeout_s=20.0)
    forward(d, 0)
    forward(d, 1)
    stop(only)
    timer = resume_later([only], 0.8)
    assert forward(d, 2) >= 0.7
    timer.wait()
    assert d.rows_served["a"] == 3 * 32
    d.close()


def test_when_all_hosts_pause_none_is_dropped(hosts: Hosts) -> None:
    """As on an overloaded machine: each of two replicas is overdue, and both are still there afterwards."""
    pair = [hosts.start(name, hosts.all_layers(range(8))) for name in "ab"]
    d = dispatcher(hosts, stall_s=0.1, call_timeout_s=20.0)
    for i in range(3):
        forward(d, i)
    for child in pair:
        stop(child)
    timer = resume_later(pair, 0.8, apart_s=0.08)
    assert forward(d, 3) >= 0.7
    timer.wait()
    before = dict(d.rows_served)
    forward(d, 4)
    assert all(d.rows_served[name] > before[name] for name in "ab"), "both still serve"
    d.close()


def test_a_suspended_engine_drops_nobody(hosts: Hosts) -> None:
    """The engine itself is stopped for longer than the ceiling while a slow host works: time that it did not run
    does not count."""
    hosts.start("a", hosts.all_layers(range(8)), stall_s=0.5)
    hosts.start("b", hosts.all_layers(range(8)), stall_s=0.5)
    settings = {"stall_s": 0.7, "call_timeout_s": 0.9}
    if (pid := os.fork()) == 0:  # the engine
        try:
            d = dispatcher(hosts, **settings)
            forward(d, 0)
            (hosts.directory / "begun").touch()
            forward(d, 1)
            os._exit(0 if set(d.rows_served) == {"a", "b"} else 3)
        except BaseException as e:
            print(repr(e))
            os._exit(4)
    deadline_s = time.monotonic() + 20
    while not (hosts.directory / "begun").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    time.sleep(0.1)  # it is inside the second call, which takes half a second
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class resume_later:
    """SIGCONT to stopped processes after a while, from a process of its own."""

    def __init__(self, children: list[warm.Child], after_s: float, apart_s: float = 0.0) -> None:
        self._pid = os.fork()
        if self._pid == 0:
            time.sleep(after_s)
            for child in children:
                os.kill(child.pid, signal.SIGCONT)
                time.sleep(apart_s)
            os._exit(0)

    def wait(self) -> None:
        assert os.waitpid(self._pid, 0)[1] == 0


paces = st.none() | st.builds(Pace, st.floats(1e-7, 1.0), st.floats(1e-6, 5.0))


@given(paces, st.integers(1, 100_000), st.floats(0.01, 5.0), st.floats(5.0, 60.0))
def test_a_deadline_lies_between_floor_and_ceiling_and_grows_with_the_work(
    pace: Pace | None, rows: int, floor_s: float, ceiling_s: float
) -> None:
    allowed = deadline.allowed_s(pace, rows, floor_s, ceiling_s)
    assert floor_s <= allowed <= ceiling_s
    assert deadline.allowed_s(pace, 2 * rows, floor_s, ceiling_s) >= allowed
    if pace is None:
        assert allowed == ceiling_s


@given(paces, st.integers(1, 10_000), st.floats(1e-5, 3.0))
def test_a_host_may_take_again_what_it_took(pace: Pace | None, rows: int, took_s: float) -> None:
    """Right after a call, the same call may take MARGIN times as long; and the memory of it fades."""
    after = deadline.measured(pace, rows, took_s)
    assert deadline.allowed_s(after, rows, 0.5, 1e9) >= deadline.MARGIN * took_s
    for _ in range(200):
        after = deadline.measured(after, rows, 1e-6)
    assert deadline.allowed_s(after, rows, 0.5, 1e9) < 0.51


@pytest.fixture
def table() -> np.ndarray:
    """Expert 0 on links 0 and 1; expert 1 on 0 and 2; expert 2 on 0 alone."""
    return np.array([[[0, 0], [1, 0]], [[0, 1], [2, 0]], [[0, 2], [-1, -1]]], np.int32)


def test_a_look_comes_with_the_next_deadline_once_another_host_has_answered() -> None:
    assert deadline.next_look_s([0.2, 0.012, -1.0], is_one_done=True) == 0.012
    assert deadline.next_look_s([0.2, -1.0], is_one_done=True) == SLICE_S
    assert deadline.next_look_s([1e-9], is_one_done=True) == deadline.LOOK_S, "no spinning"
    assert deadline.next_look_s([0.2, 0.012], is_one_done=False) == SLICE_S


def test_replaceable_means_another_fit_replica_for_every_expert(table: np.ndarray) -> None:
    assert deadline.replaceable(0, [0], table, {0})
    assert deadline.replaceable(0, [0, 1], table, {0})
    assert not deadline.replaceable(0, [0, 1], table, {0, 2}), "the other one is late or dead as well"
    assert not deadline.replaceable(0, [0, 2], table, {0}), "nobody else holds expert 2"


@given(st.lists(st.floats(0.0, 100.0), max_size=20))
def test_time_in_which_we_did_not_run_does_not_count(slices: list[float]) -> None:
    waited = Waited()
    for elapsed in slices:
        waited.add(elapsed)
    assert waited.total_s <= sum(slices) + 1e-9
    assert waited.total_s <= 2 * SLICE_S * len(slices) + 1e-9
    waited.late_answer()
    assert waited.recent_s == 0.0
