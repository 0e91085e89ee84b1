"""One layer for `balance`: what is good enough for it, and what it could become. Pure, but that asking changes it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TypeAlias

from folkmoot.cluster.balance_choice import Offer
from folkmoot.cluster.balance_flow import relieve
from folkmoot.cluster.balance_layer import EXACT, Hosts, Layer
from folkmoot.cluster.balance_match import matched
from folkmoot.cluster.balance_pack import bound, pack, replica_counts
from folkmoot.cluster.balance_repair import adjust, repair
from folkmoot.cluster.balance_window import fill

AIM = 0.005
"""As part of the bound: a placement from nothing is brought this near where there are slots enough."""
WORTH = 0.01
"""Beside what is pinned a placement from nothing is taken only if it is quicker by this part."""
RUNGS = (1.01, 1.0, 0.99)
"""What a layer is mended to, one after the other, times what is good enough."""
MOST_MOVED = 4
"""Mending moves at most this fraction (one in so many) of the replicas; beyond, a placement from nothing is as good."""
NEAR = 1.05
"""A greedy placement is mended if it is as near as that to what is aimed at, as part of it. With the window's as the
beginning, which is quicker where that one is bad, traffic that drifts takes up to 1.6 times the moves later."""
LOOSER = (1.0, 1.01, 1.03)
"""Targets for the window, times what is aimed at."""

HeldLayer: TypeAlias = Sequence[Sequence[int]]
"""For each host the experts of one layer that it holds."""


class LayerTask:
    """One layer: what is good enough for it, and what it could become.

    Good enough is near the bound, where so many experts may be split that it can be reached (balance_window.py), and
    never worse than what EPLB would make of it, which splits an expert's rows evenly.
    """

    def __init__(
        self,
        rows: Sequence[float],
        hosts: Hosts,
        held: HeldLayer,
        pinned: Sequence[AbstractSet[int]],
        tolerance: float,
    ) -> None:
        self._rows, self._hosts, self._held, self._pinned = rows, hosts, held, pinned
        self.least = bound(rows, hosts)
        self._is_roomy = hosts.room(len(rows)) - len(rows) >= len(hosts.slots) - 1
        self._greedy, ceiling = _greedy(rows, hosts, pinned)
        if self._is_roomy or any(pinned):
            ceiling = min(ceiling, self.least * (1 + tolerance))
        self.goal = max(ceiling, self.least)
        self._layer = _as_it_is(rows, hosts, held, pinned)
        self._is_whole = all(self._layer.where)
        relieve(self._layer, self.goal * (1 - EXACT))
        self.first = self._offer(self._layer) if self._is_whole else Offer((), float("inf"), 0)

    def offers(self) -> Iterator[Offer]:
        """What it could become by some moves, and by more. At most once."""
        last, may_adjust = self.first.time, not any(self._pinned)
        for target in (rung * self.goal * (1 - EXACT) for rung in RUNGS):
            if not self._is_whole or target < self.least:
                return
            if self._layer.busiest <= target:
                continue
            is_reached = (self._is_roomy or not may_adjust) and self._mended(target)
            if not is_reached and may_adjust:
                adjust(self._layer, _counts(self._rows, self._hosts))
                is_reached, may_adjust = self._mended(target), False
            if self._layer.busiest < last:
                last = self._layer.busiest
                yield self._offer(self._layer)
            if not is_reached:
                return

    def fresh(self) -> Offer:
        """A placement from nothing, its hosts named such that most stays where it is."""
        layer = self._greedy
        if self._is_roomy or any(self._pinned):
            target = min(self.least * (1 + AIM), self.goal) * (1 - EXACT)
            layer = _fresh(self._rows, self._hosts, self._pinned, target, layer)
        if any(self._pinned) and self._is_whole and layer.busiest > self._layer.busiest * (1 - WORTH):
            return self._offer(self._layer)
        return self._offer(matched(layer, self._held))

    def _mended(self, target: float) -> bool:
        return repair(self._layer, target, sum(self._hosts.slots) // MOST_MOVED)

    def _offer(self, layer: Layer) -> Offer:
        held = tuple(tuple(sorted(experts)) for experts in layer.on)
        moves = sum(len(set(now) - set(was)) for now, was in zip(held, self._held, strict=True))
        return Offer(held, layer.busiest, moves)


def _as_it_is(rows: Sequence[float], hosts: Hosts, held: HeldLayer, pinned: Sequence[AbstractSet[int]]) -> Layer:
    """The present placement, with these loads."""
    places = [set(experts) | pins for experts, pins in zip(held, pinned, strict=True)]
    counts = Counter(e for place in places for e in place)
    layer = Layer(rows, hosts, [{e: rows[e] / counts[e] for e in place} for place in places], pinned)
    layer.split_all()
    return layer


def _greedy(rows: Sequence[float], hosts: Hosts, pinned: Sequence[AbstractSet[int]]) -> tuple[Layer, float]:
    """As EPLB would place it (with pins: what is pinned, and nothing else), its rows split; and the busiest host's time
    as EPLB has it, which splits an expert's rows evenly."""
    if any(pinned):
        return _as_it_is(rows, hosts, [()] * len(hosts.slots), pinned), float("inf")
    layer = Layer(rows, hosts, pack(rows, hosts, _counts(rows, hosts)), pinned)
    evenly = layer.busiest
    layer.split_all()
    return layer, evenly


def _counts(rows: Sequence[float], hosts: Hosts) -> list[int]:
    """How many replicas EPLB would give each expert."""
    return replica_counts(rows, hosts.room(len(rows)))


def _fresh(
    rows: Sequence[float], hosts: Hosts, pinned: Sequence[AbstractSet[int]], target: float, greedy: Layer
) -> Layer:
    """The best placement that does not begin with the present one."""
    best, is_near = greedy, any(pinned) or greedy.busiest < target * NEAR
    if (is_near and repair(best, target, sum(hosts.slots))) or any(pinned):
        return best
    for looser in LOOSER:
        if (placed := fill(rows, hosts, target * looser)) is not None:
            other = Layer(rows, hosts, placed, pinned)
            if repair(other, target, sum(hosts.slots)):
                return other
            best = min(best, other, key=lambda layer: layer.busiest)
    return best
