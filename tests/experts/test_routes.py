"""Tables over the links that are alive: the same as by looking each replica up."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from folkmoot.experts import expert_map as em
from folkmoot.experts import native
from folkmoot.experts.expert_map import ExpertMap, HostAddress
from folkmoot.experts.routes import host_tables, routes_of


@dataclass
class FakeLink:
    raw: native.Link


@st.composite
def maps_and_live(draw: st.DrawFn) -> tuple[ExpertMap, list[str]]:
    """A map of some hosts, and those of them with a link, in any order."""
    made = em.empty((0, 2), 5)
    for i in range(draw(st.integers(0, 5))):
        held = {n: draw(st.lists(st.integers(0, 4), unique=True)) for n in (0, 2)}
        made = em.add_host(made, HostAddress(f"h{i}", 1, "node"), held)
    return made, draw(st.permutations(list(made.hosts)).flatmap(lambda names: st.just(names[: len(names) // 2 + 1])))


@given(maps_and_live())
def test_every_replica_with_a_link_is_there_in_order_and_no_other(case: tuple[ExpertMap, list[str]]) -> None:
    made, live = case
    links = {host: FakeLink(native.Link(page=1, number=i)) for i, host in enumerate(live)}
    routes = routes_of(made, host_tables(made), 7, links, 0)  # type: ignore[arg-type]
    assert (routes.expert_map, routes.generation, routes.links) == (made, 7, tuple(links.values()))
    for n, experts in made.layers.items():
        table = routes.tables[n]
        kept = [[[live.index(r.host), r.slot] for r in replicas if r.host in live] for replicas in experts]
        assert table.dtype == np.int32 and table.flags["C_CONTIGUOUS"]
        assert table.shape == (5, max(1, *map(len, kept)), 2)
        for e, replicas in enumerate(kept):
            assert table[e].tolist() == replicas + [[-1, -1]] * (table.shape[1] - len(replicas))
