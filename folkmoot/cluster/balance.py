"""Which host holds a replica of which logical expert, so that no host keeps a layer waiting: pure functions, no I/O.

A layer is finished when its slowest host is, so what is minimised is the sum over layers of the busiest host's time,
which is its rows over its speed. A replica is a slot of a layer on a host; slots are the memory budget. Layers do not
depend on each other. Rows of an expert may be split over its replicas, which are on different hosts.

A layer whose placement is good enough stays as it is. Else it is mended by single moves (balance_repair.py); where that
does not lead near enough to what a placement from nothing reaches (balance_pack.py, balance_window.py), that one is
taken, with its hosts named such that as much as possible is where it was.

>>> balance([[4.0, 1.0, 1.0, 2.0]], Hosts.alike(2, 3)).held
(((0, 2, 1), (0, 3)),)
"""

from collections import Counter
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from folkmoot.cluster.balance_flow import relieve
from folkmoot.cluster.balance_layer import Hosts, Layer
from folkmoot.cluster.balance_match import matched
from folkmoot.cluster.balance_pack import bound, pack, replica_counts
from folkmoot.cluster.balance_repair import repair
from folkmoot.cluster.balance_window import fill

TOLERANCE = 0.01
"""As part of the bound: a layer that is no further above it is left alone."""
AIM = 0.005
"""... and one that is mended is brought this near."""
MOST_MOVED = 4
"""Mending moves at most this fraction (one in so many) of the replicas; beyond, a placement from nothing is as good."""
LOOSER = (1.0, 1.01, 1.03)
"""Targets for a placement from nothing, times the bound."""

HeldLayer: TypeAlias = Sequence[Sequence[int]]
"""For each host the experts of one layer that it holds."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer: what hosts are to hold; the busiest host's time before and after, rows split as well as can be; the
    bound; and how many replicas hosts have to load that they do not hold."""

    held: tuple[tuple[int, ...], ...]
    before: float
    after: float
    bound: float
    moves: int


@dataclass(frozen=True)
class Plan:
    """All layers."""

    layers: tuple[LayerPlan, ...]

    @property
    def held(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """[layer][host]: its experts."""
        return tuple(layer.held for layer in self.layers)

    @property
    def before(self) -> float:
        """The objective as it was: the sum of the layers' times. inf where an expert had no replica."""
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> float:
        """The objective as it will be."""
        return sum(layer.after for layer in self.layers)

    @property
    def moves(self) -> int:
        """Replicas to load."""
        return sum(layer.moves for layer in self.layers)


def balance(
    loads: "Sequence[Sequence[float]] | np.ndarray",
    hosts: Hosts,
    held: Sequence[HeldLayer] | None = None,
    pinned: Sequence[AbstractSet[int]] | None = None,
    tolerance: float = TOLERANCE,
) -> Plan:
    """A placement for loads [layers, experts] (rows, at least 0) on these hosts.

    `held` is the present placement, [layer][host]: its experts (None: nothing). `pinned`: for each host the experts
    whose replicas stay, in all layers. Raises ValueError where slots do not suffice for a replica of each expert, and
    where what is held or pinned is more than there are slots.
    """
    layers = np.asarray(loads, float).tolist()
    pins = [frozenset(p) for p in pinned] if pinned is not None else [frozenset[int]()] * len(hosts.slots)
    nothing: HeldLayer = [()] * len(hosts.slots)
    present = held if held is not None else [nothing] * len(layers)
    for rows, here in zip(layers, present, strict=True):
        _check(rows, hosts, here, pins)
    return Plan(tuple(_plan(rows, hosts, here, pins, tolerance) for rows, here in zip(layers, present, strict=True)))


def _check(rows: Sequence[float], hosts: Hosts, held: HeldLayer, pinned: Sequence[AbstractSet[int]]) -> None:
    if len(held) != len(hosts.slots) or len(pinned) != len(hosts.slots):
        raise ValueError(f"{len(held)} hosts hold and {len(pinned)} pin experts, of {len(hosts.slots)}")
    if (most := _room(rows, hosts)) < len(rows):
        raise ValueError(f"{len(rows)} experts do not fit: hosts have slots for {most} replicas")
    for h, (experts, pins, slots) in enumerate(zip(held, pinned, hosts.slots, strict=True)):
        if len(set(experts) | pins) > slots:
            raise ValueError(f"host {h} holds {len(set(experts) | pins)} experts, and has {slots} slots")


def _plan(
    rows: Sequence[float], hosts: Hosts, held: HeldLayer, pinned: Sequence[AbstractSet[int]], tolerance: float
) -> LayerPlan:
    """What is aimed at: near the bound, where so many experts may be split that it can be reached (balance_window.py);
    else what the greedy placement reaches. Nothing is left alone that is worse than the greedy one as EPLB has it."""
    least, layer = bound(rows, hosts), _as_it_is(rows, hosts, held, pinned)
    greedy, ceiling = _greedy(rows, hosts, pinned)
    spare = _room(rows, hosts) - len(rows)
    target = least * (1 + AIM) if spare >= len(hosts.slots) - 1 else max(least * (1 + AIM), greedy.busiest)
    ceiling = max(ceiling, least)
    target, good = min(target, ceiling), min(target * (1 + tolerance), ceiling)
    is_whole = all(layer.where)
    is_good = is_whole and not relieve(layer, good)
    before = layer.busiest if is_whole else float("inf")
    if not is_good and not (is_whole and repair(layer, target, sum(hosts.slots) // MOST_MOVED)):
        fresh = _fresh(rows, hosts, pinned, target, greedy)
        if not is_whole or layer.busiest > max(fresh.busiest, min(fresh.busiest * (1 + tolerance), ceiling)):
            layer = matched(fresh, held)
    after = tuple(tuple(sorted(experts)) for experts in layer.on)
    moves = sum(len(set(now) - set(was)) for now, was in zip(after, held, strict=True))
    return LayerPlan(after, before, layer.busiest, least, moves)


def _as_it_is(rows: Sequence[float], hosts: Hosts, held: HeldLayer, pinned: Sequence[AbstractSet[int]]) -> Layer:
    """The present placement, with these loads."""
    places = [set(experts) | pins for experts, pins in zip(held, pinned, strict=True)]
    layer = _evenly(rows, hosts, places, pinned)
    layer.split_all()
    return layer


def _greedy(rows: Sequence[float], hosts: Hosts, pinned: Sequence[AbstractSet[int]]) -> tuple[Layer, float]:
    """As EPLB would place it (with pins: what is pinned, and nothing else), its rows split; and the busiest host's time
    as EPLB has it, which splits an expert's rows evenly."""
    if any(pinned):
        return _as_it_is(rows, hosts, [()] * len(hosts.slots), pinned), float("inf")
    wanted = replica_counts(rows, _room(rows, hosts), sum(slots > 0 for slots in hosts.slots))
    layer = _evenly(rows, hosts, pack(rows, hosts, wanted), pinned)
    evenly = layer.busiest
    layer.split_all()
    return layer, evenly


def _room(rows: Sequence[float], hosts: Hosts) -> int:
    """Replicas that fit."""
    return sum(min(slots, len(rows)) for slots in hosts.slots)


def _evenly(
    rows: Sequence[float], hosts: Hosts, places: Sequence[Collection[int]], pinned: Sequence[AbstractSet[int]]
) -> Layer:
    """The experts of each host, and each expert's rows split evenly."""
    counts = Counter(e for place in places for e in place)
    return Layer(rows, hosts, [{e: rows[e] / counts[e] for e in place} for place in places], pinned)


def _fresh(
    rows: Sequence[float], hosts: Hosts, pinned: Sequence[AbstractSet[int]], target: float, greedy: Layer
) -> Layer:
    """The best placement that does not begin with the present one."""
    best = greedy
    if repair(best, target, sum(hosts.slots)) or any(pinned):
        return best
    for looser in LOOSER:
        if (placed := fill(rows, hosts, target * looser)) is not None:
            other = Layer(rows, hosts, placed, pinned)
            if repair(other, target, sum(hosts.slots)):
                return other
            best = min(best, other, key=lambda layer: layer.busiest)
    return best
