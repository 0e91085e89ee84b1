"""Expert hosts of several kinds: what is written, what fits, and that each gets its share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folkmoot.cluster.host_groups import HostGroup, check_fit, parse
from folkmoot.cluster.placement import HostSlot, PlacementError, rebalance

MIB = 2**20


def test_what_a_group_may_say() -> None:
    assert parse("3") == HostGroup(3)
    assert parse("2:cpu=4,memory=8GiB") == HostGroup(2, 4.0, 8 << 30, None)
    assert parse("1:memory=1.5MiB,speed=0.5") == HostGroup(1, None, 3 << 19, 0.5)
    assert [parse(text).guess for text in ("1", "1:cpu=4", "1:cpu=4,speed=10")] == [1, 4, 10]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "number of hosts"),
        ("0:cpu=1", "number of hosts"),
        ("cpu=1", "number of hosts"),
        ("1:gpu=1", "'gpu=1' is not one of"),
        ("1:cpu=1,cpu=2", "each once"),
        ("1:cpu=two", "cpu is a number above 0, not 'two'"),
        ("1:cpu=0", "cpu is a number above 0"),
        ("1:cpu=1GiB", "cpu is a number above 0"),
        ("1:memory=8GB", "memory is a size such as 8GiB, not '8GB'"),
    ],
)
def test_what_it_may_not_say(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        parse(text)


def test_capacity_is_what_memory_holds() -> None:
    assert HostGroup(1).capacity(MIB, None) is None
    assert HostGroup(1).capacity(MIB, 5) == 5
    assert HostGroup(1, memory=8 * MIB - 1).capacity(MIB, None) == 7
    assert HostGroup(1, memory=8 * MIB).capacity(MIB, 5) == 5


def test_too_little_memory_is_said() -> None:
    groups = [HostGroup(2, memory=3 * MIB), HostGroup(1, memory=2 * MIB)]
    check_fit(groups, 8, 1, MIB, None)
    check_fit([*groups, HostGroup(1)], 8, 2, MIB, None)
    with pytest.raises(PlacementError, match="9 experts x 1 replicas do not fit: the host groups have room for 8"):
        check_fit(groups, 9, 1, MIB, None)
    with pytest.raises(PlacementError, match="a host with 2 MiB has no room for one expert of every layer"):
        check_fit(groups, 4, 1, 3 * MIB - 1, None)


def test_each_host_gets_its_share() -> None:
    slots = [HostSlot("fast", "n", None, 4.0), HostSlot("slow", "n", None, 1.0), HostSlot("small", "n", 2, 4.0)]
    placed = rebalance([1] * 22, slots, {})
    assert {host: len(columns) for host, columns in placed.items()} == {"fast": 16, "slow": 4, "small": 2}


@given(
    speeds=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, 8.0]), min_size=1, max_size=6),
    capacities=st.lists(st.one_of(st.none(), st.integers(1, 12)), min_size=6, max_size=6),
    num_columns=st.integers(1, 24),
)
def test_no_move_would_make_the_slowest_quicker(
    speeds: list[float], capacities: list[int | None], num_columns: int
) -> None:
    slots = [HostSlot(f"h{i}", "n", capacities[i], speed) for i, speed in enumerate(speeds)]
    placed = rebalance([1] * num_columns, slots, {})
    held = {slot.host: len(placed[slot.host]) for slot in slots}
    fits = sum(num_columns if s.capacity is None else min(s.capacity, num_columns) for s in slots)
    assert sum(held.values()) == min(num_columns, fits)
    assert all(s.capacity is None or held[s.host] <= s.capacity for s in slots)
    busiest = max(held[s.host] / s.speed for s in slots)
    for slot in slots:
        if slot.capacity is None or held[slot.host] < slot.capacity:
            assert (held[slot.host] + 1) / slot.speed >= busiest
    assert rebalance([1] * num_columns, slots, placed) == placed  # and so it stays
