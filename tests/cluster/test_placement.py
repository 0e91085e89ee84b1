"""Placement: a golden example, then the invariants over many clusters, then the errors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folkmoot.cluster.placement import (
    HostSlot,
    PlacementError,
    as_placement,
    assign,
    columns_held,
    num_hosts_for,
)
from folkmoot.experts import expert_map as maps
from folkmoot.experts.expert_map import HostAddress


def hosts_on(nodes: list[str], capacity: int | None = None) -> list[HostSlot]:
    return [HostSlot(f"h{i}", node, capacity) for i, node in enumerate(nodes)]


def test_golden_example_of_the_module() -> None:
    slots = [
        HostSlot("a", "n1"),
        HostSlot("b", "n1"),
        HostSlot("c", "n2"),
        HostSlot("d", "n2"),
    ]
    assert assign(4, slots, 2) == {"a": (0, 2), "b": (1, 3), "c": (0, 2), "d": (1, 3)}


@st.composite
def clusters(draw: st.DrawFn) -> tuple[int, list[HostSlot], int]:
    num_nodes = draw(st.integers(1, 4))
    hosts = hosts_on([f"n{i % num_nodes}" for i in range(draw(st.integers(1, 12)))])
    return draw(st.integers(1, 64)), hosts, draw(st.integers(1, len(hosts)))


def holders(added: dict[str, tuple[int, ...]], column: int) -> list[str]:
    return [host for host, columns in added.items() for c in columns if c == column]


@given(clusters())
def test_every_column_has_its_replicas_on_different_hosts(
    cluster: tuple[int, list[HostSlot], int],
) -> None:
    num_columns, hosts, replicas = cluster
    added = assign(num_columns, hosts, replicas)
    for column in range(num_columns):
        held_by = holders(added, column)
        assert len(held_by) == replicas == len(set(held_by))


@given(clusters())
def test_replicas_use_as_many_nodes_as_there_are(
    cluster: tuple[int, list[HostSlot], int],
) -> None:
    num_columns, hosts, replicas = cluster
    added = assign(num_columns, hosts, replicas)
    node_of = {h.host: h.node for h in hosts}
    for column in range(num_columns):
        nodes = {node_of[host] for host in holders(added, column)}
        assert len(nodes) == min(replicas, len(set(node_of.values())))


@given(st.integers(1, 64), st.integers(1, 12), st.data())
def test_load_is_even_on_one_node(num_columns: int, num_hosts: int, data: st.DataObject) -> None:
    added = assign(num_columns, hosts_on(["n"] * num_hosts), data.draw(st.integers(1, num_hosts)))
    sizes = [len(columns) for columns in added.values()]
    assert max(sizes) - min(sizes) <= 1


@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=8),
    st.integers(1, 12),
    st.integers(1, 3),
    st.data(),
)
def test_capacities_hold_and_what_can_fit_does(
    capacities: list[int], num_columns: int, replicas: int, data: st.DataObject
) -> None:
    nodes = data.draw(st.lists(st.sampled_from("ab"), min_size=len(capacities), max_size=len(capacities)))
    hosts = [HostSlot(f"h{i}", node, c) for i, (node, c) in enumerate(zip(nodes, capacities, strict=True))]
    # Each column takes at most one place of a host: the replicas fit exactly when these places suffice.
    fits = sum(min(c, num_columns) for c in capacities) >= num_columns * replicas
    if not fits:
        with pytest.raises(PlacementError, match="do not fit"):
            assign(num_columns, hosts, replicas)
        return
    added = assign(num_columns, hosts, replicas)
    assert all(len(added[h.host]) <= (h.capacity or 0) for h in hosts)


@given(clusters(), st.data())
def test_after_a_loss_only_what_is_missing_is_added(
    cluster: tuple[int, list[HostSlot], int], data: st.DataObject
) -> None:
    num_columns, hosts, replicas = cluster
    first = assign(num_columns, hosts, replicas)
    lost = data.draw(st.sampled_from(sorted(first)))
    held = {host: columns for host, columns in first.items() if host != lost}
    spare = HostSlot("spare", "n0")
    added = assign(num_columns, [*(h for h in hosts if h.host != lost), spare], replicas, held)
    assert sum(len(columns) for columns in added.values()) == len(first[lost])
    for column in range(num_columns):
        now = holders(held, column) + holders(added, column)
        assert len(now) == replicas == len(set(now))


@pytest.mark.parametrize(
    ("num_columns", "replicas", "num_hosts", "experts_per_host", "expected"),
    [
        (8, 1, 2, None, 2),
        (8, 2, 2, None, 2),
        (8, 1, None, 1, 8),
        (8, 2, None, 4, 4),
        (8, 1, None, 3, 3),
        (8, 2, None, None, 2),
        (0, 2, 4, None, 0),
    ],
)
def test_number_of_hosts(
    num_columns: int,
    replicas: int,
    num_hosts: int | None,
    experts_per_host: int | None,
    expected: int,
) -> None:
    assert (
        num_hosts_for(
            num_columns,
            replicas,
            num_hosts=num_hosts,
            experts_per_host=experts_per_host,
        )
        == expected
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"replicas": 3, "num_hosts": 2, "experts_per_host": None},
            "3 replicas need 3 expert hosts",
        ),
        (
            {"replicas": 0, "num_hosts": 2, "experts_per_host": None},
            "replicas must be at least 1",
        ),
        (
            {"replicas": 1, "num_hosts": 9, "experts_per_host": None},
            "more than 8 experts x 1 replicas",
        ),
        (
            {"replicas": 2, "num_hosts": None, "experts_per_host": 16},
            "2 replicas need 2 expert hosts",
        ),
        (
            {"replicas": 1, "num_hosts": None, "experts_per_host": 0},
            "experts per host must be at least 1",
        ),
    ],
)
def test_errors_say_what_is_wrong(arguments: dict[str, int | None], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        num_hosts_for(8, **arguments)  # type: ignore[arg-type]


def test_columns_held_reads_a_map_back() -> None:
    added = assign(4, hosts_on(["n", "n"]), 1)
    expert_map = maps.empty([1, 3], 4)
    for host, columns in added.items():
        expert_map = maps.add_host(expert_map, HostAddress(host, 1, "n"), as_placement(columns, [1, 3]))
    assert columns_held(expert_map) == added
