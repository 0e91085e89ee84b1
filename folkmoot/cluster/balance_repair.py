"""Makes one layer's placement better by single moves, until no host's time is above a target.

Rows that can be shifted over replicas that there are cost nothing. Where that does not suffice, the hosts with too much
and all to which they can shift rows are saturated; so one of their experts gets a replica on a host outside, in a free
slot or in that of a replica that is hardly needed (one expert's bytes), or two hosts exchange an expert (two experts').
"""

import heapq
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from folkmoot.cluster.balance_flow import relieve
from folkmoot.cluster.balance_layer import EXACT, Layer

RECEIVERS = 6
"""So many of the least busy hosts are looked at in one step."""
PATIENCE = 5
"""So many rounds may bring nothing."""
MEANT = 0.3
"""What a change of links must bring at least, as part of the room that there is."""


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
    moves, best, stale = 0, layer.busiest, 0
    while saturated := relieve(layer, target):
        stale = 0 if layer.busiest < best * (1 - EXACT) else stale + 1
        best = min(best, layer.busiest)
        if stale > PATIENCE:
            return False
        made = (
            _copy_all(layer, saturated, target)
            or _relink_all(layer, saturated, target)
            or _exchange(layer, saturated, target)
        )
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


def _relink_all(layer: Layer, saturated: AbstractSet[int], target: float) -> int:
    """Hosts outside that share an expert with a saturated one share another one with it instead, of which they can take
    more rows; moves made."""
    moves = 0
    outside = sorted((time, g) for g, time in enumerate(layer.time) if g not in saturated and time < target)
    for time, g in outside:
        room = (target - time) * layer.hosts.speed[g]
        found = _best_relink(layer, g, saturated, room)
        if found is not None and found.gain > MEANT * room:
            layer.drop(found.back, g)
            _help(layer, found.out, found.host, g, target)
            moves += 1
    return moves


def _best_relink(layer: Layer, g: int, saturated: AbstractSet[int], room: float) -> Exchange | None:
    found: Exchange | None = None
    for back, back_rows in layer.on[g].items():
        if back in layer.pinned[g]:
            continue
        for h in [k for k in layer.where[back] if k in saturated][:RECEIVERS]:
            for out, rows in layer.on[h].items():
                gain = min(rows - back_rows, room)
                if out not in layer.on[g] and (found is None or gain > found.gain):
                    found = Exchange(gain, h, out, g, back)
    return found


def _exchange(layer: Layer, saturated: AbstractSet[int], target: float) -> int:
    """A saturated host and one of the least busy ones exchange an expert; moves made."""
    busiest = heapq.nlargest(RECEIVERS, saturated, key=layer.time.__getitem__)
    least = heapq.nsmallest(RECEIVERS, range(len(layer.time)), key=layer.time.__getitem__)
    for g in (g for g in least if g not in saturated):
        room = (target - layer.time[g]) * layer.hosts.speed[g]
        options = [one for h in busiest if (one := _best_exchange(layer, h, g, room)) is not None]
        best = max(options, key=lambda one: one.gain, default=None)
        if best is not None and best.gain > EXACT * target * layer.hosts.speed[g]:
            _carry_out(layer, best)
            return 2
    return 0


def _best_exchange(layer: Layer, h: int, g: int, room: float) -> Exchange | None:
    """The one that brings g as many rows more as it has room for, and no more."""
    found: Exchange | None = None
    here = [(rows, e) for e, rows in layer.on[h].items() if e not in layer.on[g] and e not in layer.pinned[h]]
    there = [(rows, e) for e, rows in layer.on[g].items() if e not in layer.on[h] and e not in layer.pinned[g]]
    for rows, out in here:
        for back_rows, back in there:
            if 0 < (gain := rows - back_rows) <= room and (found is None or gain > found.gain):
                found = Exchange(gain, h, out, g, back)
    return found


def _carry_out(layer: Layer, one: Exchange) -> None:
    for e, source, destination in ((one.out, one.host, one.other), (one.back, one.other, one.host)):
        rows = layer.on[source][e]
        layer.add(e, destination)
        layer.give(e, source, -rows)
        layer.give(e, destination, rows)
        layer.drop(e, source)
