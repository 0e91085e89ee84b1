"""A layer's placement from nothing in which every host ends with the same time, where there are slots enough. Pure.

Bin packing of splittable items with a bound on the items of a bin, by a sliding window (after Kling, Maecker, Riechers
and Skopalik, "Sharing is Caring: Multiprocessor Scheduling with a Sharable Resource", 2017): one host after the other
is filled to the target with as many experts as it has slots for, of which only the largest is split, and the rest of
that one goes back among the others. With H hosts at most H - 1 experts are split, so slots for so many more replicas
than there are experts are enough to level them exactly.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate

from folkmoot.cluster.balance_layer import Hosts

Item = tuple[float, int]
"""Rows of an expert that have no host yet, and which expert."""
LEAST_PIECE = 1e-3
"""As part of the target: less than that is not worth a replica."""


def fill(rows: Sequence[float], hosts: Hosts, target: float) -> list[dict[int, float]] | None:
    """Each host's experts and how many rows of them it gets, its time near `target`; None where they do not fit so."""
    items = sorted((r, e) for e, r in enumerate(rows))
    spare = hosts.room(len(rows)) - len(items)
    placed: list[dict[int, float]] = [{} for _ in hosts.slots]
    for h in _order(hosts):
        if not items or not hosts.slots[h]:
            continue
        whole, cut = _choose(items, hosts.slots[h], target * hosts.speed[h], spare > 0)
        for one in whole:
            items.remove(one)
            placed[h][one[1]] = one[0]
        if cut is not None:
            items.remove(cut[0])
            placed[h][cut[0][1]] = cut[1]
            insort(items, (cut[0][0] - cut[1], cut[0][1]))
        spare -= hosts.slots[h] - len(whole)
    return _squeeze(items, placed, hosts)


def _order(hosts: Hosts) -> list[int]:
    """Hosts with few slots for their speed first. Of alike ones neighbours are on different nodes, since an expert that
    is split is on neighbours."""
    turn: dict[int, int] = {}
    keys = []
    for h, node in enumerate(hosts.node):
        turn[node] = turn.get(node, -1) + 1
        keys.append((-hosts.speed[h] / max(1, hosts.slots[h]), turn[node], node, h))
    return [h for *_, h in sorted(keys)]


def _choose(
    items: list[Item], slots: int, room: float, may_split: bool
) -> tuple[list[Item], tuple[Item, float] | None]:
    """What a host takes whole, and the one of which it takes a part: the largest beside neighbours in size, the
    smallest neighbours with which there is enough."""
    largest, others = items[-1], items[:-1]
    sums = [0.0, *accumulate(rows for rows, _ in others)]
    beside = min(slots - 1, len(others), max(0, bisect_left(sums, room) - 1))
    last = len(others) - beside
    at = bisect_left(range(last), room - largest[0], key=lambda i: sums[i + beside] - sums[i])
    whole = others[at : at + beside]
    part = room - (sums[at + beside] - sums[at])
    if not may_split or part >= largest[0] * (1 - LEAST_PIECE):
        if part < largest[0] * (1 - LEAST_PIECE) and at > 0:  # the neighbours before these leave room for it
            whole = others[at - 1 : at - 1 + beside]
        return [*whole, largest], None
    return whole, (largest, part) if part > LEAST_PIECE * room else None


def _squeeze(items: list[Item], placed: list[dict[int, float]], hosts: Hosts) -> list[dict[int, float]] | None:
    """Rows that are left over: to a host that has the expert already, or has a slot left, and the least time."""
    for rows, e in reversed(items):
        time = [sum(on.values()) / hosts.speed[h] for h, on in enumerate(placed)]
        able = [h for h, on in enumerate(placed) if e in on or len(on) < hosts.slots[h]]
        if not able:
            return None
        best = min(able, key=lambda h: time[h] + rows / hosts.speed[h])
        placed[best][e] = placed[best].get(e, 0.0) + rows
    return placed
