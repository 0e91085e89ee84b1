"""Which layers to mend, and how far: the fewest moves with which the sum of the layers' times is small enough. Pure.

Layers add up, and do not depend on each other. So what counts is how much time a move takes away, in whichever layer:
the steps of all layers are taken in that order until the sum is reached (a knapsack, relaxed: each layer's offers are
first thinned out to those on the lower convex hull of time over moves).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol


@dataclass(frozen=True)
class Offer:
    """What one layer could be: each host's experts, the busiest host's time, and replicas to load."""

    held: tuple[tuple[int, ...], ...]
    time: float
    moves: int


class Task(Protocol):
    """One layer: what is good enough for it, and as it is."""

    goal: float
    first: Offer

    def offers(self) -> Iterable[Offer]:
        """What it could become by some moves, and by more. Asked for only where some layer has to change."""
        ...

    def fresh(self) -> Offer:
        """... or by very many. Asked for only where the others' offers do not suffice."""
        ...


def cheapest(tasks: Sequence[Task], enough: float) -> list[Offer]:
    """An offer of each, the sum of their times at most `enough`; where that cannot be, the quickest of each."""
    if sum(task.first.time for task in tasks) <= enough:
        return [task.first for task in tasks]
    offers = [[task.first, *task.offers()] for task in tasks]
    total = sum(many[-1].time for many in offers)
    for many, task in sorted(zip(offers, tasks, strict=True), key=lambda one: one[1].goal - one[0][-1].time):
        if total <= enough:
            break
        if many[-1].time > task.goal:
            many.append(task.fresh())
            total = sum(many[-1].time for many in offers)
    return _climbed([hull(many) for many in offers], enough)


def _climbed(ladders: Sequence[Sequence[Offer]], enough: float) -> list[Offer]:
    """Up the ladders, the step that saves the most time a move first, until the times' sum is at most `enough`."""
    at = [0] * len(ladders)
    steps = [(_slope(*pair), i) for i, ladder in enumerate(ladders) for pair in pairwise(ladder)]
    total = sum(ladder[0].time for ladder in ladders)
    for _, i in sorted(steps):  # of one ladder in its order, since each step of a hull saves less than the one before
        if total <= enough:
            break
        total += ladders[i][at[i] + 1].time - ladders[i][at[i]].time
        at[i] += 1
    return [ladder[step] for ladder, step in zip(ladders, at, strict=True)]


def hull(offers: Sequence[Offer]) -> list[Offer]:
    """Those that are the best for some price of a move, by moves; no other mix has less time for as many moves."""
    kept: list[Offer] = []
    for one in sorted(offers, key=lambda one: (one.moves, one.time)):
        if kept and one.time >= kept[-1].time:
            continue
        if kept and one.moves == kept[-1].moves:
            kept.pop()
        while len(kept) > 1 and _slope(kept[-1], one) <= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(one)
    return [one for one in kept if one.time < float("inf")]


def _slope(a: Offer, b: Offer) -> float:
    """Time that a move more adds; below 0."""
    return (b.time - a.time) / (b.moves - a.moves)
