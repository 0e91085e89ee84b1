"""The expert router's state machine, without a cluster: events in, state and actions out."""

from hypothesis import given
from hypothesis import strategies as st

from folkmoot.cluster.placement import HostSlot
from folkmoot.cluster.router_state import (
    EngineReported,
    Event,
    HostDied,
    HostLoad,
    HostReady,
    HostReaped,
    HostsOffered,
    HostStarting,
    Phase,
    ReapHost,
    RouterState,
    StartHost,
    VersionSeen,
    apply,
    initial,
    plan,
)
from folkmoot.experts import expert_map as maps
from folkmoot.experts.expert_map import HostAddress

SLOTS = (HostSlot("h0", "n"), HostSlot("h1", "n"))


def ready(host: str, columns: tuple[int, ...], incarnation: int = 1) -> HostReady:
    return HostReady(
        host,
        incarnation,
        HostAddress(host, incarnation, "n", f"/run/{host}"),
        columns,
        11,
        10,
        100,
        0.5,
    )


def after(*events: Event, replicas: int = 2) -> RouterState:
    state = initial((0, 1), 4, replicas)
    for event in events:
        state = apply(event, state)
    return state


def running(replicas: int = 2) -> RouterState:
    state = after(HostsOffered(SLOTS), replicas=replicas)
    for action in plan(state):
        assert isinstance(action, StartHost)
        state = apply(HostStarting(action.host, action.incarnation), state)
        state = apply(ready(action.host, action.columns), state)
    return state


def test_offered_hosts_are_started_once() -> None:
    state = after(HostsOffered(SLOTS))
    assert plan(state) == (
        StartHost("h0", 1, (0, 1, 2, 3)),
        StartHost("h1", 1, (0, 1, 2, 3)),
    )
    state = apply(HostStarting("h0", 1), state)
    assert [a.host for a in plan(state)] == ["h1"]
    assert not state.is_settled


def test_ready_hosts_fill_the_map() -> None:
    state = running(replicas=1)
    assert maps.missing(state.expert_map) == []
    assert state.is_settled
    assert plan(state) == ()


def test_a_dead_host_leaves_the_map_at_once_and_is_reaped() -> None:
    before = running()
    state = apply(HostDied("h0", 1, "killed"), before)
    assert state.expert_map.version > before.expert_map.version
    assert set(state.expert_map.hosts) == {"h1"}
    assert maps.missing(state.expert_map) == []
    assert plan(state) == (ReapHost("h0", 1),)
    state = apply(HostReaped("h0", 1), state)
    assert plan(state) == ()
    assert state.hosts["h0"].reason == "killed"


def test_two_reports_of_one_death_count_once() -> None:
    state = apply(HostDied("h0", 1, "engine saw it"), running())
    assert apply(HostDied("h0", 1, "actor saw it"), state) is state


def test_news_of_a_former_incarnation_changes_nothing() -> None:
    state = apply(ready("h0", (0, 1, 2, 3), incarnation=2), running())
    assert apply(HostDied("h0", 1, "late"), state) is state
    assert apply(ready("h0", (0,), incarnation=1), state) is state


def test_a_host_that_never_came_up_is_dead_and_the_map_stays() -> None:
    before = after(HostsOffered(SLOTS), HostStarting("h0", 1))
    state = apply(HostDied("h0", 1, "no memory"), before)
    assert state.hosts["h0"].phase is Phase.DEAD
    assert state.expert_map is before.expert_map


def test_a_restarted_router_learns_from_actors_and_counts_on() -> None:
    before = running()
    state = after(ready("h0", (0, 1, 2, 3)), ready("h1", (0, 1, 2, 3)), VersionSeen(40))
    assert state.expert_map.layers == before.expert_map.layers
    assert state.expert_map.version == 41
    assert apply(VersionSeen(41), state) is state
    assert plan(apply(HostsOffered(SLOTS), state)) == ()


def test_loads_are_kept_and_those_of_unknown_hosts_or_former_lives_ignored() -> None:
    state = running()
    state = apply(HostLoad("h0", 1, 3, 5, 0.1), state)
    assert apply(HostLoad("gone", 1, 9, 9, 9.0), state) is state
    assert apply(HostLoad("h0", 0, 9, 9, 9.0), state) is state
    assert (state.hosts["h0"].rows, state.hosts["h1"].rows) == (5, 0)


def test_the_map_is_published_once_it_is_complete() -> None:
    state = after(HostsOffered(SLOTS))
    assert not state.is_publishable
    for host in ("h0", "h1"):
        state = apply(HostStarting(host, 1), state)
    assert apply(ready("h0", (0, 1, 2, 3)), state).is_publishable, "one replica of everything is enough to begin"
    assert not apply(ready("h0", (0, 1)), state).is_publishable
    assert apply(HostDied("h1", 1, "no memory"), apply(ready("h0", (0, 1)), state)).is_publishable


def test_incarnations_start_above_what_the_shell_says() -> None:
    state = after(HostsOffered(SLOTS, since=100))
    assert [a.incarnation for a in plan(state)] == [101, 101]


def test_a_dense_model_needs_no_host() -> None:
    state = initial((), 0, 1)
    assert state.is_publishable
    assert plan(state) == ()


def test_engines_report_themselves() -> None:
    state = apply(EngineReported("e0", "ready", 7, {"running": 1}), running())
    assert state.engines["e0"].info == {"running": 1}


EVENTS = st.one_of(
    st.just(HostsOffered(SLOTS)),
    st.builds(HostStarting, st.sampled_from(["h0", "h1"]), st.integers(1, 3)),
    st.builds(ready, st.sampled_from(["h0", "h1"]), st.just((0, 1, 2, 3)), st.integers(1, 3)),
    st.builds(
        HostDied,
        st.sampled_from(["h0", "h1", "h2"]),
        st.integers(1, 3),
        st.just("killed"),
    ),
    st.builds(HostReaped, st.sampled_from(["h0", "h1", "h2"]), st.integers(1, 3)),
    st.builds(HostLoad, st.sampled_from(["h0", "h2"]), st.integers(1, 3), st.just(1), st.just(2), st.just(0.5)),
    st.builds(VersionSeen, st.integers(0, 30)),
)


@given(st.lists(EVENTS, max_size=30))
def test_the_map_holds_exactly_the_ready_hosts_and_versions_only_grow(
    events: list[Event],
) -> None:
    state = after(HostsOffered(SLOTS))
    for event in events:
        before = state
        state = apply(event, state)
        assert set(state.expert_map.hosts) == {h.host for h in state.hosts.values() if h.phase is Phase.READY}
        assert state.expert_map.version >= before.expert_map.version
        if state.expert_map != before.expert_map:
            assert state.expert_map.version > before.expert_map.version
        for action in plan(state):
            assert state.hosts[action.host].phase in (Phase.WANTED, Phase.DEAD)
