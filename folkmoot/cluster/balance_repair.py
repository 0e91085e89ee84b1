"""Makes one layer's placement better by single moves, until no host's time is above a target.

Rows that can be shifted over replicas that there are cost nothing. Where that does not suffice, the hosts with too much
and all to which they can shift rows are saturated; so one of their experts gets a replica on a host outside, in a free
slot or in that of a replica that is hardly needed (one expert's bytes), or two hosts exchange an expert (two experts').
One exchange helps all hosts that share an expert, so it is chosen for what they have too much together.
"""

from bisect import bisect_left
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain

from folkmoot.cluster.balance_flow import relieve
from folkmoot.cluster.balance_layer import EXACT, Layer

PATIENCE = 2
"""So many rounds may bring nothing."""
LEAST_PROGRESS = 0.1
"""A round must make what hosts have too much smaller by this part, or it has brought nothing."""


@dataclass(frozen=True)
class Exchange:
    """An expert that leaves the host, and one that comes back for it from another; how many rows fewer that makes."""

    gain: float
    host: int
    out: int
    other: int
    back: int


def repair(layer: Layer, target: float, most_moves: int) -> bool:
    """Move until no host's time is above `target` (True), no move helps (a few of them), or `most_moves` are made."""
    moves, best, stale = 0, float("inf"), 0
    while saturated := relieve(layer, target):
        excess = sum(time - target for time in layer.time if time > target)
        stale = 0 if excess < best * (1 - LEAST_PROGRESS) else stale + 1
        best = min(best, excess)
        if stale > PATIENCE:
            return False
        made = _copy_all(layer, saturated, target) or _exchange(layer, saturated, target)
        moves += made
        if not made or moves > most_moves:
            return False
    return True


def _copy_all(layer: Layer, saturated: AbstractSet[int], target: float) -> int:
    """Each host that has too much gets help from hosts outside, each of which helps once; moves made."""
    moves, receivers = 0, _receivers(layer, saturated, target)
    over = sorted((h for h in saturated if layer.time[h] > target), key=lambda h: -layer.time[h])
    for h in over:
        while receivers and layer.time[h] > target * (1 + EXACT):
            g, victim = receivers.pop()
            moves += _copy(layer, h, g, victim, target)
    return moves


def _receivers(layer: Layer, saturated: AbstractSet[int], target: float) -> list[tuple[int, int | None]]:
    """Hosts outside that have a slot, or else a replica to give up for it; the least busy one, without that, last."""
    found: list[tuple[float, int, int | None]] = []
    for g, time in enumerate(layer.time):
        if g in saturated or time >= target * (1 - EXACT):
            continue
        if layer.has_room(g):
            found.append((time, g, None))
        elif (victim := _least_needed(layer, g, target)) is not None:
            found.append((time - layer.on[g][victim] / layer.hosts.speed[g], g, victim))
    return [(g, victim) for _, g, victim in sorted(found, key=lambda one: -one[0])]


def _copy(layer: Layer, h: int, g: int, victim: int | None, target: float) -> bool:
    """Whether g could help with one of h's experts, in the place of `victim`."""
    speed = layer.hosts.speed
    if victim is not None:
        if not _can_go(layer, victim, g, target):
            return False
        layer.drop(victim, g)
    movable = [(rows, e) for e, rows in layer.on[h].items() if e not in layer.on[g]]
    excess, room = (layer.time[h] - target) * speed[h], (target - layer.time[g]) * speed[g]
    if not movable or min(excess, room) <= EXACT * target * speed[h]:
        return False
    rows, e = _fitting(movable, min(excess, room))
    if rows <= 0.0:
        return False
    _help(layer, e, h, g, target)
    return True


def _fitting(movable: list[tuple[float, int]], rows: float) -> tuple[float, int]:
    """The largest expert that may move as a whole, if it makes up for most of `rows`; else the largest, to be split."""
    whole = max((one for one in movable if one[0] <= rows), default=None)
    return whole if whole is not None and whole[0] > 0.9 * rows else max(movable)


def _help(layer: Layer, e: int, h: int, g: int, target: float) -> None:
    """A replica of e on g takes as many rows from h as are good for both; where it takes all, h's replica goes."""
    speed = layer.hosts.speed
    all_of_them = layer.on[h][e]
    layer.add(e, g)
    rows = min(all_of_them, (target - layer.time[g]) * speed[g])
    layer.give(e, h, -rows)
    layer.give(e, g, rows)
    if layer.on[h][e] <= 0.0 and e not in layer.pinned[h]:
        layer.drop(e, h)


def _least_needed(layer: Layer, g: int, target: float) -> int | None:
    """The replica on g with the fewest rows among those that can go."""
    spare = sorted((rows, e) for e, rows in layer.on[g].items() if len(layer.where[e]) > 1)
    return next((e for _, e in spare if _can_go(layer, e, g, target)), None)


def _can_go(layer: Layer, e: int, g: int, target: float) -> bool:
    """Whether e's replica on g is not pinned, and its other hosts can take its rows and stay below the target."""
    if e in layer.pinned[g] or len(layer.where[e]) < 2:
        return False
    speed, rows = layer.hosts.speed, layer.on[g][e]
    return rows <= sum(max(0.0, target - layer.time[k]) * speed[k] for k in layer.where[e] if k != g)


def _exchange(layer: Layer, saturated: AbstractSet[int], target: float) -> int:
    """Each host that has too much, or another that shares an expert with it, exchanges an expert with a host outside,
    each of which takes part once; moves made."""
    speed, moves = layer.hosts.speed, 0
    outside = {g for g, time in enumerate(layer.time) if g not in saturated and time < target}
    offered = sorted((rows, f, g) for g in outside for f, rows in layer.on[g].items() if f not in layer.pinned[g])
    over = {h for h in saturated if layer.time[h] > target * (1 + EXACT)}
    for h in sorted(over, key=lambda h: -layer.time[h]):
        if h not in over:
            continue
        group = saturated & {h, *(k for e in layer.on[h] for k in layer.where[e])}
        excess = sum(max(0.0, layer.time[k] - target) * speed[k] for k in group)
        over -= group
        found = _best_exchange(layer, group, excess, target, offered, outside)
        if found is not None and found.gain > EXACT * target * speed[h]:
            _carry_out(layer, found)
            outside.remove(found.other)
            moves += 2
    return moves


def _best_exchange(
    layer: Layer,
    group: AbstractSet[int],
    excess: float,
    target: float,
    offered: list[tuple[float, int, int]],
    outside: AbstractSet[int],
) -> Exchange | None:
    """The one that takes just as many rows from one of the group as they have too many, or more; else the one that
    takes the most."""
    room = {g: (target - layer.time[g]) * layer.hosts.speed[g] for g in outside}
    most, best, rank = max(room.values(), default=0.0), None, (False, 0.0)
    for h in group:
        on = layer.on[h]
        for out, rows in on.items():
            if out in layer.pinned[h]:
                continue
            first, at, end = (bisect_left(offered, (rows - x,)) for x in (most, min(excess, most), 0.0))
            for i in chain(range(at - 1, first - 1, -1), range(at, end)):
                back_rows, back, g = offered[i]
                gain = rows - back_rows
                if gain <= room.get(g, -1.0) and back not in on and out not in layer.on[g]:
                    here = (True, -gain) if gain >= excess else (False, gain)
                    if here > rank:
                        best, rank = Exchange(gain, h, out, g, back), here
                    break
    return best


def adjust(layer: Layer, wanted: Sequence[int]) -> None:
    """Give experts that have fewer replicas than wanted the places of those that have more, largest pieces first."""
    lacking = [e for e, n in enumerate(wanted) for _ in range(n - len(layer.where[e]))]
    surplus = [e for e, n in enumerate(wanted) for _ in range(len(layer.where[e]) - n)]
    for e in sorted(lacking, key=lambda e: -layer.rows[e] / wanted[e]):
        for given in sorted(set(surplus), key=lambda e: -layer.rows[e] / wanted[e]):
            places = [g for g in layer.where[given] if e not in layer.on[g] and given not in layer.pinned[g]]
            if places:
                g = min(places, key=lambda g: layer.time[g] - layer.on[g][given] / layer.hosts.speed[g])
                layer.drop(given, g)
                layer.add(e, g)
                layer.split(e)
                surplus.remove(given)
                break


def _carry_out(layer: Layer, one: Exchange) -> None:
    for e, source, destination in ((one.out, one.host, one.other), (one.back, one.other, one.host)):
        rows = layer.on[source][e]
        layer.add(e, destination)
        layer.give(e, source, -rows)
        layer.give(e, destination, rows)
        layer.drop(e, source)
