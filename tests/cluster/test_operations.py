"""Operators' commands against the router's state, and wishes as they are kept: pure."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folkmoot.cluster.autoscale import Limits
from folkmoot.cluster.operations import Refused, decide, progress
from folkmoot.cluster.router_events import EngineReported, Tick, Wished, apply
from folkmoot.cluster.router_plan import DRAIN_S
from folkmoot.cluster.router_state import RouterState, initial
from folkmoot.cluster.wish import Place, Wish
from folkmoot.gateway.operations import Command
from tests.cluster.test_router_state import carried_out, running, slots


def wished(state: RouterState, command: Command, capacity: int | None = None) -> RouterState:
    return apply(Wished(decide(command, state, capacity)), state)


def test_hosts_grow_in_groups_and_the_newest_leave_first() -> None:
    wish = Wish(1, 1, (2,)).with_hosts(4)
    assert wish.groups == (2, 2) and wish.open_hosts == ("host-0", "host-1", "host-2", "host-3")
    assert wish.places["host-3"] == Place(1, 1)
    wish = wish.with_hosts(1)
    assert wish.open_hosts == ("host-0",) and wish.open_groups == {0}
    wish = wish.with_hosts(3)
    assert wish.open_hosts == ("host-0", "host-1", "host-4"), "a group that is gone does not come back"
    assert wish.groups == (2, 2, 1)


def test_a_drained_host_stays_away() -> None:
    wish = Wish(1, 1, (3,)).without_host("host-1", forced=False)
    assert wish.open_hosts == ("host-0", "host-2")
    assert wish.with_hosts(3).open_hosts == ("host-0", "host-2", "host-3")


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(0, 5))
def test_there_are_always_as_many_hosts_as_were_asked_for(counts: list[int], drained: int) -> None:
    wish = Wish(1, 1, (3,))
    for count in counts:
        wish = wish.with_hosts(count)
        assert len(wish.open_hosts) == count
        if count > 1:
            wish = wish.without_host(wish.open_hosts[drained % count], forced=False)
            assert len(wish.open_hosts) == count - 1


def test_a_wish_is_read_back_as_it_was_written() -> None:
    wish = Wish(2, 3, (2, 1), engine_version=4).without_host("host-1", forced=True).with_column(5, 3).with_hosts(1)
    assert Wish.from_json(wish.to_json()) == wish


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (Command("scale", "hosts", 1), 9, "count: 2 replicas of an expert need 2 hosts"),
        (Command("scale", "hosts", 9), 9, "count: 9 hosts are more than 8 replicas"),
        (Command("scale", "replicas", 4), 9, "replicas: 4 need as many hosts, there are 3"),
        (Command("scale", "engines", 65), 3, "count: must be at most 64 engines, is 65"),
        (Command("scale", "engines", 0, most=65), 3, "count: must be at most 64 engines, is 65"),
        (Command("replicate", expert=4, count=1), 3, "expert: must be below 4.*is 4"),
        (Command("replicate", expert=3, count=4), 9, "replicas: 4 need as many hosts"),
        (Command("drain", host="host-7"), 5, "no expert host 'host-7'; there are host-0, host-1, host-2"),
        (Command("scale", "replicas", 3), 9, "12 replicas in all do not fit on 3 hosts with room for 9"),
    ],
)
def test_what_cannot_be_is_refused(command: Command, code: int, message: str) -> None:
    with pytest.raises(Refused, match=message) as refused:
        decide(command, running(hosts=3), capacity=3)
    assert refused.value.code == code


def test_a_drain_may_not_leave_an_expert_without_replica_unless_forced() -> None:
    state = running(replicas=1, hosts=2)
    with pytest.raises(Refused, match="4 replicas in all do not fit on 1 hosts with room for 3"):
        decide(Command("drain", host="host-0"), state, capacity=3)
    assert decide(Command("drain", host="host-0", force=True), state, capacity=3).open_hosts == ("host-1",)
    alone = running(replicas=1, hosts=1)
    with pytest.raises(Refused, match="host-0 is the only expert host"):
        decide(Command("drain", host="host-0"), alone, capacity=None)


def test_a_dense_model_has_engines_and_no_hosts() -> None:
    state = initial((), 0, Wish(1, 1, ()))
    assert decide(Command("scale", "engines", 2), state, None).engines == 2
    with pytest.raises(Refused, match="dense"):
        decide(Command("scale", "hosts", 2), state, None)


def test_progress_says_what_is_waited_for_until_all_is_settled() -> None:
    command = Command("scale", "hosts", 3)
    state = wished(running(replicas=1, hosts=2), command)
    assert not progress(command, state).done
    state = apply(slots("host-0", "host-1", "host-2"), state)
    assert "host-2" in progress(command, state).message
    state = carried_out(state)
    assert not progress(command, state).done, "the predecessors of shrunk hosts drain"
    state = carried_out(apply(Tick(DRAIN_S + 1), state))
    assert progress(command, state).done


def test_a_drain_is_done_when_the_host_has_left() -> None:
    command = Command("drain", host="host-0")
    state = wished(running(replicas=1, hosts=2), command)
    assert not progress(command, state).done
    state = carried_out(apply(Tick(DRAIN_S + 1), carried_out(state)))
    assert progress(command, state).done


def test_a_later_operation_ends_an_earlier_one() -> None:
    command = Command("scale", "hosts", 3)
    state = wished(wished(running(hosts=2), command), Command("scale", "hosts", 2))
    with pytest.raises(Refused, match="a later operation changed the number of hosts"):
        progress(command, state)


def test_engines_are_done_when_all_are_ready_and_none_is_left_over() -> None:
    command = Command("scale", "engines", 2)
    state = apply(EngineReported("a", "ready", 1, {"version": 0}), wished(running(), command))
    assert progress(command, state).message == "1 of 2 engines ready"
    state = apply(EngineReported("b", "ready", 2, {"version": 0}), state)
    assert progress(command, state).done
    rolled = wished(state, Command("roll"))
    assert not progress(Command("roll"), rolled).done
    for event in (
        EngineReported("c", "ready", 3, {"version": 1}),
        EngineReported("d", "ready", 3, {"version": 1}),
        EngineReported("a", "stopping", 1, {"version": 0}),
    ):
        rolled = apply(event, rolled)
    assert "2 coming or going" in progress(Command("roll"), rolled).message
    for engine in "ab":
        rolled = apply(EngineReported(engine, "stopping"), rolled)
        rolled = apply(EngineReported(engine, "dead"), rolled)
    assert progress(Command("roll"), rolled).done
    assert replace(rolled.wish, engine_version=0) == state.wish


def test_engines_within_limits_come_and_go() -> None:
    """Any number of them will do, as long as it is within limits and none is of an old version."""
    command = Command("scale", "engines", 1, most=3)
    state = wished(running(), command)
    assert state.wish.engine_limits == Limits(1, 3)
    assert not progress(command, state).done
    state = apply(EngineReported("a", "ready", 1, {"version": 0}), state)
    assert progress(command, state).done
    coming = apply(EngineReported("b", "loading", 2, {"version": 0}), state)
    assert progress(command, coming).done
    rolled = wished(state, Command("roll"))
    assert not progress(Command("roll"), rolled).done
    rolled = apply(EngineReported("c", "ready", 3, {"version": 1}), rolled)
    assert not progress(Command("roll"), rolled).done
    rolled = apply(EngineReported("a", "dead"), apply(EngineReported("a", "stopping"), rolled))
    assert progress(Command("roll"), rolled).done
    with pytest.raises(Refused, match="a later operation changed the number of engines"):
        progress(command, wished(rolled, Command("scale", "engines", 1)))
    assert wished(rolled, Command("scale", "engines", 1)).wish.engine_limits == Limits(1, 1)


def test_no_engine_at_all_is_as_it_should_be_where_none_is_needed() -> None:
    command = Command("scale", "engines", 0, most=3)
    assert progress(command, wished(running(), command)).done
