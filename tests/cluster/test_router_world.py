"""The router's decisions against a made-up world in which anything may happen: invariants, and that it all heals."""

from dataclasses import dataclass, field, replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from folkmoot.cluster.healing import is_settled, troubles
from folkmoot.cluster.placement import HostSlot
from folkmoot.cluster.router_events import (
    Event,
    HostDied,
    HostForked,
    HostReady,
    HostRemoved,
    HostStarting,
    HostStopped,
    Rebalanced,
    SlotsSeen,
    Tick,
    Wished,
    apply,
)
from folkmoot.cluster.router_plan import RemoveHost, StartHost, StopHost, plan
from folkmoot.cluster.router_state import RouterState, initial
from folkmoot.cluster.wish import Wish
from folkmoot.experts.expert_map import HostAddress, placement_of

COLUMNS = 5


@dataclass
class World:
    """Carries out what is planned; whether a start comes through is the test's to say."""

    state: RouterState
    starting: list[StartHost] = field(default_factory=list)
    lost_nodes: set[str] = field(default_factory=set)

    def tell(self, event: Event) -> None:
        before = self.state
        self.state = apply(event, before)
        check(before, event, self.state)

    def act(self) -> None:
        while actions := plan(self.state):
            match actions[0]:
                case StartHost(host, incarnation, columns, extras) as start:
                    assert columns and incarnation > self.state.hosts[host].incarnation
                    assert not any(s.host == host for s in self.starting if self.is_pending(s)), "one at a time"
                    self.starting.append(start)
                    self.tell(HostStarting(host, incarnation, columns, extras))
                case StopHost(host, incarnation):
                    self.tell(HostStopped(host, incarnation))
                case RemoveHost(host):
                    self.tell(HostRemoved(host))

    def is_pending(self, start: StartHost) -> bool:
        host = self.state.hosts.get(start.host)
        return host is not None and host.pending is not None and host.pending.incarnation == start.incarnation

    def come_up(self, index: int) -> None:
        if self.starting:
            start = self.starting.pop(index % len(self.starting))
            address = HostAddress(start.host, start.incarnation, "n", "/run/x")
            self.tell(HostForked(start.host, start.incarnation, start.columns, 2, 1, start.extras))
            self.tell(HostReady(start.host, start.incarnation, address, start.columns, 2, 1, extras=start.extras))

    def look(self) -> None:
        places = self.state.wish.open_hosts
        nodes = {h: f"n{i % 2}" for i, h in enumerate(self.state.wish.places)}
        self.tell(SlotsSeen(tuple(HostSlot(h, None if nodes[h] in self.lost_nodes else nodes[h]) for h in places)))

    def kill(self, index: int) -> None:
        lives = [(h.host, life.incarnation) for h in self.state.hosts.values() for life in h.lives]
        if lives:
            host, incarnation = lives[index % len(lives)]
            self.tell(HostDied(host, incarnation, "killed"))


def check(before: RouterState, event: Event, after: RouterState) -> None:
    serving = {h.host: h.serving for h in after.hosts.values() if h.serving is not None}
    assert {n: a.incarnation for n, a in after.expert_map.hosts.items()} == {
        n: life.incarnation for n, life in serving.items()
    }
    assert after.expert_map.version >= before.expert_map.version
    if after.expert_map != before.expert_map:
        assert after.expert_map.version > before.expert_map.version
    for name, life in serving.items():
        held = {e for by_expert in [placement_of(after.expert_map, name).get(0, {})] for e in by_expert}
        assert held == {*life.columns, *(e for _, e in life.extras)}, "what a host holds is what the map says"
    for host in after.hosts.values():
        assert sum(life.phase == "ready" for life in host.lives) <= 1
    if not isinstance(event, HostDied):
        enough = [min(n, len(after.wish.open_hosts)) for n in after.wanted]
        for column in range(COLUMNS):
            assert len(after.live(column)) >= min(len(before.live(column)), max(1, enough[column] - lost(after))), (
                column
            )


def lost(state: RouterState) -> int:
    """Hosts that nothing is expected of: so many replicas may be given up."""
    return sum(not state.is_usable(h) for h in state.hosts.values())


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("come_up"), st.integers(0, 9)),
        st.tuples(st.just("come_up"), st.integers(0, 9)),
        st.tuples(st.just("kill"), st.integers(0, 9)),
        st.tuples(st.just("wait"), st.integers(1, 30)),
        st.tuples(st.just("hosts"), st.integers(1, 6)),
        st.tuples(st.just("replicas"), st.integers(1, 3)),
        st.tuples(st.just("column"), st.integers(0, COLUMNS - 1)),
        st.tuples(st.just("drain"), st.integers(0, 9)),
        st.tuples(st.just("extras"), st.integers(0, 31)),
        st.tuples(st.just("node"), st.integers(0, 1)),
    ),
    max_size=40,
)


def do(world: World, what: str, number: int) -> None:
    wish = world.state.wish
    match what:
        case "come_up":
            world.come_up(number)
        case "kill":
            world.kill(number)
        case "wait":
            world.tell(Tick(world.state.now_s + number))
        case "hosts":
            world.tell(Wished(wish.with_hosts(number)))
        case "replicas":
            world.tell(Wished(replace(wish, replicas=number)))
        case "column":
            world.tell(Wished(wish.with_column(number, 2)))
        case "drain" if len(wish.open_hosts) > 1:
            world.tell(Wished(wish.without_host(wish.open_hosts[number % len(wish.open_hosts)], forced=False)))
        case "extras":
            extras = tuple((0, column) for column in range(COLUMNS) if number >> column & 1)
            world.tell(Rebalanced({h: extras for i, h in enumerate(sorted(world.state.hosts)) if i % 2}))
        case "node":
            world.lost_nodes ^= {f"n{number}"}
    world.look()
    world.act()


DRAINED_WHILE_OTHERS_CHANGE = [
    *[("drain", 2), ("node", 1), ("hosts", 6), ("come_up", 0), ("come_up", 0), ("come_up", 2), ("replicas", 1)],
    *[("replicas", 2), ("drain", 8), ("drain", 0), ("drain", 1)],
]
"""A successor came up that lacked what its host ought to hold by then, and was promoted all the same."""


@settings(max_examples=60, deadline=None)
@example([("hosts", 6), ("replicas", 1)])
@example(DRAINED_WHILE_OTHERS_CHANGE)
@given(STEPS)
def test_whatever_happens_no_plan_takes_an_expert_away_and_in_the_end_all_is_healed(
    steps: list[tuple[str, int]],
) -> None:
    world = World(initial((0,), COLUMNS, Wish(2, 1, (3,))))
    world.look()
    world.act()
    for what, number in steps:
        do(world, what, number)
    world.lost_nodes.clear()
    for _ in range(60):
        do(world, "wait", 20)
        while world.starting:
            do(world, "come_up", 0)
        if is_settled(world.state):
            break
    assert is_settled(world.state), troubles(world.state)
    hosts = len(world.state.wish.open_hosts)
    for column, wanted in enumerate(world.state.wanted):
        assert len(world.state.live(column)) == min(wanted, hosts)
