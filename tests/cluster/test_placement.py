"""Placement: a golden example, then the invariants over many clusters, then the errors."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folkmoot.cluster.placement import HostSlot, PlacementError, num_hosts_for, rebalance, shortfall


def hosts_on(nodes: list[str], capacity: int | None = None) -> list[HostSlot]:
    return [HostSlot(f"h{i}", node, capacity) for i, node in enumerate(nodes)]


def placed(num_columns: int, hosts: Sequence[HostSlot], replicas: int) -> dict[str, tuple[int, ...]]:
    return rebalance([replicas] * num_columns, hosts, {})


def holders(columns_of: Mapping[str, Sequence[int]], column: int) -> list[str]:
    return [host for host, columns in columns_of.items() for c in columns if c == column]


def moved(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> int:
    """How many columns have to be loaded somewhere."""
    return sum(len(set(columns) - set(before.get(host, ()))) for host, columns in after.items())


def test_golden_example_of_the_module() -> None:
    slots = [HostSlot("a", "n1"), HostSlot("b", "n1"), HostSlot("c", "n2"), HostSlot("d", "n2")]
    assert placed(4, slots, 2) == {"a": (0, 2), "b": (1, 3), "c": (0, 2), "d": (1, 3)}


@st.composite
def clusters(draw: st.DrawFn) -> tuple[int, list[HostSlot], int]:
    num_nodes = draw(st.integers(1, 4))
    hosts = hosts_on([f"n{i % num_nodes}" for i in range(draw(st.integers(1, 10)))])
    return draw(st.integers(1, 32)), hosts, draw(st.integers(1, len(hosts)))


@given(clusters())
def test_every_column_has_its_replicas_on_different_hosts(cluster: tuple[int, list[HostSlot], int]) -> None:
    num_columns, hosts, replicas = cluster
    columns_of = placed(num_columns, hosts, replicas)
    for column in range(num_columns):
        held_by = holders(columns_of, column)
        assert len(held_by) == replicas == len(set(held_by))


@given(clusters())
def test_replicas_use_as_many_nodes_as_there_are(cluster: tuple[int, list[HostSlot], int]) -> None:
    num_columns, hosts, replicas = cluster
    columns_of = placed(num_columns, hosts, replicas)
    node_of = {h.host: h.node for h in hosts}
    for column in range(num_columns):
        nodes = {node_of[host] for host in holders(columns_of, column)}
        assert len(nodes) == min(replicas, len(set(node_of.values())))


@given(clusters())
def test_what_is_in_place_stays(cluster: tuple[int, list[HostSlot], int]) -> None:
    num_columns, hosts, replicas = cluster
    columns_of = placed(num_columns, hosts, replicas)
    assert rebalance([replicas] * num_columns, hosts, columns_of) == columns_of


@given(st.integers(1, 64), st.integers(1, 12), st.data())
def test_load_is_even_on_one_node(num_columns: int, num_hosts: int, data: st.DataObject) -> None:
    columns_of = placed(num_columns, hosts_on(["n"] * num_hosts), data.draw(st.integers(1, num_hosts)))
    sizes = [len(columns) for columns in columns_of.values()]
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
    columns_of = placed(num_columns, hosts, replicas)
    assert all(len(columns_of[h.host]) <= (h.capacity or 0) for h in hosts)
    lacking = shortfall([replicas] * num_columns, columns_of)
    # Each column takes at most one place of a host: the replicas fit exactly when these places suffice.
    fits = sum(min(c, num_columns) for c in capacities) >= num_columns * replicas
    assert bool(lacking) != fits
    if any(n == replicas for n in lacking.values()):  # no column goes without while another has two
        assert all(len(holders(columns_of, column)) <= 1 for column in range(num_columns))


@given(clusters(), st.data())
def test_after_a_loss_only_what_is_missing_is_loaded(
    cluster: tuple[int, list[HostSlot], int], data: st.DataObject
) -> None:
    num_columns, hosts, replicas = cluster
    hosts = [HostSlot(h.host, "n") for h in hosts]
    first = placed(num_columns, hosts, replicas)
    lost = data.draw(st.sampled_from(sorted(first)))
    held = {host: columns for host, columns in first.items() if host != lost}
    after = rebalance([replicas] * num_columns, [*(h for h in hosts if h.host != lost), HostSlot("spare", "n")], held)
    assert moved(held, after) == len(first[lost])
    assert shortfall([replicas] * num_columns, after) == {}


@given(st.integers(1, 32), st.integers(1, 8), st.integers(1, 4), st.data())
def test_growing_moves_no_more_than_the_new_hosts_take(
    num_columns: int, num_hosts: int, more: int, data: st.DataObject
) -> None:
    replicas = data.draw(st.integers(1, num_hosts))
    hosts = hosts_on(["n"] * (num_hosts + more))
    before = placed(num_columns, hosts[:num_hosts], replicas)
    after = rebalance([replicas] * num_columns, hosts, before)
    sizes = [len(columns) for columns in after.values()]
    assert max(sizes) - min(sizes) <= 1
    assert moved(before, after) == sum(len(after[h.host]) for h in hosts[num_hosts:])
    assert shortfall([replicas] * num_columns, after) == {}


@given(clusters(), st.data())
def test_more_or_fewer_replicas_move_nothing_else(
    cluster: tuple[int, list[HostSlot], int], data: st.DataObject
) -> None:
    num_columns, hosts, replicas = cluster
    hosts = [HostSlot(h.host, "n") for h in hosts]
    before = placed(num_columns, hosts, replicas)
    column, number = data.draw(st.integers(0, num_columns - 1)), data.draw(st.integers(1, len(hosts)))
    wanted = [number if c == column else replicas for c in range(num_columns)]
    after = rebalance(wanted, hosts, before)
    assert len(holders(after, column)) == number
    assert shortfall(wanted, after) == {}
    sizes = [len(columns) for columns in after.values()]
    assert max(sizes) - min(sizes) <= 1


def test_replicas_that_share_a_node_part_when_another_node_comes() -> None:
    hosts = [HostSlot("a", "n1"), HostSlot("b", "n1"), HostSlot("c", "n2")]
    after = rebalance([2, 2], hosts, {"a": (0, 1), "b": (0, 1), "c": ()})
    for column in (0, 1):
        assert "c" in holders(after, column)


def test_without_hosts_nothing_is_placed() -> None:
    assert rebalance([1, 1], [], {}) == {}
    assert shortfall([1, 1], {}) == {0: 1, 1: 1}


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
        (
            {"replicas": 2, "num_hosts": 3, "experts_per_host": None, "capacity": 5},
            "do not fit on 3 expert hosts with room for 5 each",
        ),
    ],
)
def test_errors_say_what_is_wrong(arguments: dict[str, int | None], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        num_hosts_for(8, **arguments)  # type: ignore[arg-type]
