"""The expert router's state machine, without a cluster: events in, state and actions out."""

from dataclasses import replace

from folkmoot.cluster.healing import is_settled, phase_of, start_error, troubles
from folkmoot.cluster.placement import HostSlot
from folkmoot.cluster.router_events import (
    EngineReported,
    Event,
    HostDied,
    HostForked,
    HostLoad,
    HostReady,
    HostRemoved,
    HostStarting,
    HostStopped,
    MapSeen,
    SlotsSeen,
    Tick,
    Wished,
    apply,
)
from folkmoot.cluster.router_plan import DRAIN_GRACE_S, DRAIN_S, RemoveHost, StartHost, StopHost, plan
from folkmoot.cluster.router_state import HEALTHY_S, PLACE_WAIT_S, Phase, RouterState, back_off_s, initial
from folkmoot.cluster.wish import Wish
from folkmoot.experts import expert_map as maps
from folkmoot.experts.expert_map import HostAddress

ALL = (0, 1, 2, 3)


def ready(host: str, columns: tuple[int, ...], incarnation: int = 1) -> HostReady:
    return HostReady(host, incarnation, HostAddress(host, incarnation, "n", f"/run/{host}"), columns, 11, 10, 100, 0.5)


def slots(*hosts: str, node: str | None = "n", capacity: int | None = None) -> SlotsSeen:
    return SlotsSeen(tuple(HostSlot(host, node, capacity) for host in hosts))


def after(*events: Event, replicas: int = 2, hosts: int = 2) -> RouterState:
    state = initial((0, 1), 4, Wish(replicas, 1, (hosts,)))
    for event in events:
        state = apply(event, state)
    return state


def carried_out(state: RouterState) -> RouterState:
    """Every planned action succeeds at once, until nothing is planned."""
    while actions := plan(state):
        for action in actions:
            match action:
                case StartHost(host, incarnation, columns):
                    state = apply(HostStarting(host, incarnation, columns), state)
                    state = apply(HostForked(host, incarnation, columns, 11, 10), state)
                    state = apply(ready(host, columns, incarnation), state)
                case StopHost(host, incarnation):
                    state = apply(HostStopped(host, incarnation), state)
                case RemoveHost(host):
                    state = apply(HostRemoved(host), state)
    return state


def running(replicas: int = 2, hosts: int = 2) -> RouterState:
    names = [f"host-{i}" for i in range(hosts)]
    return carried_out(after(slots(*names), replicas=replicas, hosts=hosts))


def died(state: RouterState, host: str, reason: str = "killed") -> RouterState:
    """The youngest life of the host dies."""
    return apply(HostDied(host, state.hosts[host].incarnation, reason), state)


def test_nothing_is_begun_before_the_router_has_looked_around() -> None:
    state = after(Tick(5.0))
    assert plan(state) == () and not state.is_publishable
    assert [a.host for a in plan(apply(slots("host-0", "host-1"), state)) if isinstance(a, StartHost)] == [
        "host-0",
        "host-1",
    ]


def test_wanted_hosts_are_started_once_with_incarnations_from_the_clock() -> None:
    state = after(Tick(100.7), slots("host-0", "host-1"))
    assert plan(state) == (StartHost("host-0", 100, ALL), StartHost("host-1", 100, ALL))
    state = apply(HostStarting("host-0", 100, ALL), state)
    assert [a.host for a in plan(state)] == ["host-1"]


def test_the_map_is_published_once_it_is_complete_and_then_always() -> None:
    state = after(slots("host-0", "host-1"), replicas=1)
    state = apply(HostStarting("host-0", 1, (0, 2)), state)
    state = apply(ready("host-0", (0, 2)), state)
    assert not state.is_publishable
    state = apply(HostStarting("host-1", 1, (1, 3)), state)
    state = apply(ready("host-1", (1, 3)), state)
    assert state.is_publishable and is_settled(state)
    assert died(state, "host-0").is_publishable, "engines must learn that they cannot serve"


def test_a_dead_host_leaves_the_map_at_once_and_comes_back_at_once_with_a_larger_incarnation() -> None:
    before = running()
    state = died(before, "host-0")
    assert state.expert_map.version > before.expert_map.version
    assert set(state.expert_map.hosts) == {"host-1"}
    assert maps.missing(state.expert_map) == []
    assert plan(state) == (StartHost("host-0", 2, ALL), StopHost("host-0", 1))
    assert [t.host for t in troubles(state)] == ["host-0"]
    state = carried_out(state)
    assert set(state.expert_map.hosts) == {"host-0", "host-1"} and is_settled(state) and troubles(state) == ()


def test_two_reports_of_one_death_count_once() -> None:
    state = apply(HostDied("host-0", 1, "engine saw it"), running())
    assert apply(HostDied("host-0", 1, "actor saw it"), state) is state
    state = apply(HostStopped("host-0", 1), state)
    assert apply(HostDied("host-0", 1, "actor saw it"), state) is state
    assert state.hosts["host-0"].failures == 1


def test_news_of_a_former_incarnation_changes_nothing() -> None:
    state = carried_out(died(running(), "host-0"))
    assert apply(HostDied("host-0", 1, "late"), state) is state
    assert apply(ready("host-0", (0,), incarnation=1), state) is state
    assert apply(HostForked("host-0", 1, (0,), 1, 1), state) is state
    assert apply(HostLoad("host-0", 1, 9, 9, 9.0), state) is state


def test_a_host_that_keeps_dying_is_quarantined_and_stood_in_for_and_comes_back() -> None:
    state = running(replicas=1)
    for failures in (1, 2, 3):
        state = apply(Tick(state.hosts["host-0"].not_before_s + 0.1), state)
        state = carried_out(state)
        state = died(state, "host-0", "no luck")
        assert state.hosts["host-0"].failures == failures
        assert not any(isinstance(a, StartHost) and a.host == "host-0" for a in plan(state)) or failures == 1
    assert phase_of(state.hosts["host-0"], state) == "quarantined"
    assert any(t.state == "quarantined" and "no luck" in t.detail and "3 times" in t.detail for t in troubles(state))
    assert state.hosts["host-1"].columns == ALL, "its columns go to the other host"
    state = carried_out(state)
    assert maps.missing(state.expert_map) == []
    state = carried_out(apply(Tick(state.hosts["host-0"].not_before_s), state))
    assert {h.host: len(h.columns) for h in state.hosts.values()} == {"host-0": 2, "host-1": 2}
    state = carried_out(apply(Tick(state.now_s + DRAIN_S + 1), state))
    assert is_settled(state)


def test_back_off_grows_to_a_limit_and_health_forgets() -> None:
    assert [back_off_s(n) for n in range(7)] == [0, 0, 0.25, 2, 16, 60, 60]
    state = carried_out(died(running(), "host-0"))
    assert state.hosts["host-0"].failures == 1
    state = died(apply(Tick(state.now_s + HEALTHY_S), state), "host-0")
    assert state.hosts["host-0"].failures == 1


def test_a_host_without_a_node_is_stood_in_for_and_taken_back() -> None:
    state = running(replicas=1)
    lost = SlotsSeen((HostSlot("host-0", None), HostSlot("host-1", "n")))
    state = carried_out(apply(lost, died(state, "host-0")))
    assert state.hosts["host-1"].columns == ALL and maps.missing(state.expert_map) == []
    assert phase_of(state.hosts["host-0"], state) == "waiting"
    state = apply(Tick(state.now_s + DRAIN_S + 1), state)
    state = carried_out(apply(slots("host-0", "host-1", node="n2"), state))
    assert set(state.expert_map.hosts) == {"host-0", "host-1"}


def test_a_host_that_ray_does_not_start_is_stood_in_for_after_a_while() -> None:
    state = died(running(replicas=1), "host-0")
    state = apply(HostStopped("host-0", 1), apply(HostStarting("host-0", 2, (0, 2)), state))
    assert plan(apply(Tick(PLACE_WAIT_S - 1), state)) == ()
    state = apply(Tick(PLACE_WAIT_S + 1), state)
    assert plan(state) == (StartHost("host-1", int(PLACE_WAIT_S + 1), ALL),)
    loading = apply(HostForked("host-0", 2, (0, 2), 5, 6), apply(Tick(5.0), died(running(replicas=1), "host-0")))
    assert plan(apply(Tick(60.0), loading)) == (StopHost("host-0", 1),), "loading may take its time"


def test_after_the_loss_of_a_node_replicas_are_on_different_nodes_again() -> None:
    def seen(*nodes: str | None) -> SlotsSeen:
        return SlotsSeen(tuple(HostSlot(f"host-{i}", node) for i, node in enumerate(nodes)))

    def are_apart(state: RouterState) -> bool:
        node_of = {h.host: h.node for h in state.hosts.values()}
        return all(len({node_of[host] for host in state.live(column)}) == 2 for column in ALL)

    state = carried_out(after(seen("a", "a", "b", "b"), hosts=4))
    assert are_apart(state)
    state = apply(seen("a", "a", None, None), died(died(state, "host-2"), "host-3"))
    state = carried_out(apply(Tick(1.0), state))
    assert all(len(state.live(column)) == 2 for column in ALL), "better on one node than not at all"
    state = carried_out(apply(seen("a", "a", "c", "c"), apply(Tick(20.0), state)))
    state = carried_out(apply(Tick(40.0), state))
    assert are_apart(state) and is_settled(state)


def test_where_capacity_is_short_every_expert_keeps_one_replica_and_the_status_says_so() -> None:
    names = ("host-0", "host-1", "host-2")
    state = carried_out(after(slots(*names, capacity=3), replicas=2, hosts=3))
    assert maps.missing(state.expert_map) == []
    gone = SlotsSeen((HostSlot("host-0", None, 3), HostSlot("host-1", "n", 3), HostSlot("host-2", "n", 3)))
    state = carried_out(apply(gone, died(state, "host-0")))
    state = carried_out(apply(Tick(state.now_s + DRAIN_S + 1), state))
    assert maps.missing(state.expert_map) == []
    (lacking,) = [t for t in troubles(state) if t.state == "no capacity"]
    assert "2 replicas of experts" in lacking.detail


def test_a_successor_takes_over_in_one_step_and_its_predecessor_drains() -> None:
    state = running(replicas=1)
    state = apply(EngineReported("e", "ready", 7), state)
    state = apply(MapSeen("e", state.expert_map.version), state)
    state = apply(Wished(replace(state.wish, replicas=2)), state)
    assert plan(state) == (StartHost("host-0", 2, ALL), StartHost("host-1", 2, ALL))
    before = state.expert_map
    state = apply(HostStarting("host-0", 2, ALL), state)
    state = apply(ready("host-0", ALL, 2), state)
    assert state.expert_map.version > before.version and state.expert_map.hosts["host-0"].incarnation == 2
    assert state.hosts["host-0"].lives[0].phase is Phase.DRAINING
    stop = StopHost("host-0", 1)
    assert stop not in plan(apply(Tick(DRAIN_GRACE_S + 1), state)), "an engine has the old map"
    adopted = apply(MapSeen("e", state.expert_map.version), state)
    assert stop not in plan(adopted) and stop in plan(apply(Tick(DRAIN_GRACE_S + 1), adopted))
    assert stop in plan(apply(Tick(DRAIN_S + 1), state)), "bounded"


def test_a_drained_host_leaves_when_others_have_taken_over() -> None:
    state = running(replicas=1)
    state = apply(Wished(state.wish.without_host("host-0", forced=False)), state)
    assert plan(state) == (StartHost("host-1", 2, ALL),)
    assert maps.missing(state.expert_map) == []
    state = apply(HostStarting("host-1", 2, ALL), state)
    state = apply(ready("host-1", ALL, 2), state)
    assert set(state.expert_map.hosts) == {"host-1"} and maps.missing(state.expert_map) == []
    state = carried_out(apply(Tick(DRAIN_S + 1), state))
    assert set(state.hosts) == {"host-1"} and is_settled(state)


def test_a_drain_that_would_leave_an_expert_without_replica_waits_unless_forced() -> None:
    names = ("host-0", "host-1")
    state = carried_out(after(slots(*names, capacity=2), replicas=1))
    waiting = carried_out(apply(Wished(state.wish.without_host("host-0", forced=False)), state))
    assert set(waiting.expert_map.hosts) == set(names)
    forced = apply(Wished(state.wish.without_host("host-0", forced=True)), state)
    assert set(forced.expert_map.hosts) == {"host-1"}


def test_fewer_replicas_are_dropped_and_no_host_restarts_twice() -> None:
    state = running(replicas=2)
    state = apply(Wished(replace(state.wish, replicas=1)), state)
    starts = plan(state)
    assert all(isinstance(a, StartHost) and len(a.columns) == 2 for a in starts) and len(starts) == 2
    state = carried_out(state)
    state = carried_out(apply(Tick(DRAIN_S + 1), state))
    assert is_settled(state) and maps.missing(state.expert_map) == []


def test_a_restarted_router_learns_from_actors_and_counts_on() -> None:
    before = running()
    state = after(ready("host-0", ALL), HostForked("host-1", 7, ALL, 11, 10))
    assert plan(state) == () and not state.is_publishable
    state = apply(MapSeen("e", 40), state)
    assert state.expert_map.version == 41
    state = apply(slots("host-0", "host-1"), state)
    assert plan(state) == () and state.is_publishable, "host-1 is on its way"
    state = apply(ready("host-1", ALL, 7), state)
    assert state.expert_map.layers == before.expert_map.layers and is_settled(state)


def test_a_restarted_router_starts_what_died_meanwhile() -> None:
    state = after(Tick(50.0), ready("host-0", (0, 2)), slots("host-0", "host-1"), replicas=1)
    assert plan(state) == (StartHost("host-1", 50, (1, 3)),)


def test_a_restarted_router_finds_a_host_whose_successor_has_taken_over() -> None:
    state = after(ready("host-0", (0, 2)), ready("host-0", ALL, 2), slots("host-0", "host-1"))
    assert state.expert_map.hosts["host-0"].incarnation == 2
    assert [life.phase for life in state.hosts["host-0"].lives] == [Phase.DRAINING, Phase.READY]


def test_loads_are_kept() -> None:
    state = apply(HostLoad("host-0", 1, 3, 5, 0.1), running())
    serving = state.hosts["host-0"].serving
    assert serving is not None and serving.rows == 5
    assert apply(HostLoad("gone", 1, 9, 9, 9.0), state) is state


def test_a_dense_model_needs_no_host() -> None:
    state = initial((), 0, Wish(1, 1, ()))
    assert state.is_publishable
    assert plan(state) == ()


def test_no_room_at_the_start_is_an_error_after_a_while() -> None:
    state = after(slots("host-0", "host-1", node=None))
    assert start_error(state) is None
    assert "host-0, host-1" in str(start_error(apply(Tick(61.0), state)))


def test_engines_come_and_go() -> None:
    state = apply(EngineReported("e0", "ready", 7, {"running": 1}), running())
    assert state.engines["e0"].info == {"running": 1}
    stopping = apply(EngineReported("e0", "stopping", 7), state)
    assert apply(EngineReported("e0", "ready", 7), stopping).engines["e0"].phase == "stopping"
    assert apply(EngineReported("e0", "dead", 7), stopping).engines == {}
    assert apply(EngineReported("e0", "dead", 7), state).engines["e0"].phase == "dead"
    heard = apply(MapSeen("e0", 1), apply(Tick(50.0), state))
    assert "e0" in apply(Tick(100.0), heard).engines
    assert apply(Tick(111.0), heard).engines == {}
