"""The expert map: invariants under any sequence of changes, and clear errors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folkmoot.experts import expert_map as em
from folkmoot.experts.expert_map import ExpertMap, ExpertMapError, HostAddress, NoReplicaError, Replica

LAYERS, EXPERTS = (1, 4), 6


def address(name: str, incarnation: int = 1) -> HostAddress:
    return HostAddress(name, incarnation, "node", f"/tmp/{name}", None)


def test_example() -> None:
    m = em.add_host(em.empty(LAYERS, EXPERTS), address("a"), {1: [5, 0], 4: [2]})
    assert m.version == 1
    assert em.lookup(m, 1, 0) == (Replica("a", 1),)
    assert em.lookup(m, 4, 2) == (Replica("a", 0),)
    assert em.placement_of(m, "a") == {1: {5: 0, 0: 1}, 4: {2: 0}}
    m = em.add_host(m, address("b"), {1: [0]})
    assert em.lookup(m, 1, 0) == (Replica("a", 1), Replica("b", 0))
    assert em.lookup(em.remove_host(m, "a"), 1, 0) == (Replica("b", 0),)
    assert (1, 5) in em.missing(em.remove_replicas(m, "a", [(1, 5)]))
    assert em.lookup(em.remove_replicas(m, "a", [(1, 5)]), 1, 0) == em.lookup(m, 1, 0)


def test_errors_name_what_is_wrong() -> None:
    m = em.add_host(em.empty(LAYERS, EXPERTS), address("a"), {1: [0]})
    with pytest.raises(NoReplicaError, match=r"layer 1, expert 3 has no replica on any host \(expert map version 1\)"):
        em.lookup(m, 1, 3)
    with pytest.raises(ExpertMapError, match="layer 2, expert 0 is not in the model"):
        em.lookup(m, 2, 0)
    with pytest.raises(ExpertMapError, match="layer 1 has 6 experts, so there is no expert 6"):
        em.add_host(m, address("b"), {1: [6]})
    with pytest.raises(ExpertMapError, match="layer 3 is not a MoE layer"):
        em.add_host(m, address("b"), {3: [0]})
    with pytest.raises(ExpertMapError, match="host 'b' is not in the map"):
        em.remove_host(m, "b")
    with pytest.raises(ExpertMapError, match="two replicas on one host"):
        em.add_replicas(m, "a", {1: {0: 7}})
    with pytest.raises(ExpertMapError, match="slot 0 of host 'a' is taken"):
        em.add_replicas(m, "a", {1: {1: 0}})
    with pytest.raises(ExpertMapError, match="holds no replica of"):
        em.remove_replicas(m, "a", [(1, 1)])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version":1,"hosts":[],"layers":{"0":[[["a",0]]]}}', "null"])
def test_only_maps_are_read(text: str) -> None:
    with pytest.raises(ExpertMapError):
        ExpertMap.from_json(text)


change = st.tuples(
    st.sampled_from(["add", "remove"]),
    st.sampled_from("abcd"),
    st.integers(1, 3),
    st.dictionaries(st.sampled_from(LAYERS), st.lists(st.integers(0, EXPERTS - 1), unique=True)),
)


@given(st.lists(change, max_size=12))
def test_any_sequence_of_changes(changes: list[tuple[str, str, int, dict[int, list[int]]]]) -> None:
    """The map equals a plain model of it after every change; old versions stay as they were; JSON is faithful."""
    m = em.empty(LAYERS, EXPERTS)
    held: dict[str, dict[int, list[int]]] = {}
    for kind, host, incarnation, placement in changes:
        before, text = m, m.to_json()
        if kind == "add":
            m = em.add_host(m, address(host, incarnation), placement)
            held[host] = placement
        elif host in held:
            m = em.remove_host(m, host)
            del held[host]
        assert before.to_json() == text
        assert (m.version > before.version) == (m is not before)
        assert ExpertMap.from_json(m.to_json()) == m
        assert set(m.hosts) == set(held)
        for n in LAYERS:
            for e in range(EXPERTS):
                expected = {Replica(h, p[n].index(e)) for h, p in held.items() if e in p.get(n, [])}
                assert set(m.layers[n][e]) == expected
                assert ((n, e) in em.missing(m)) == (not expected)
