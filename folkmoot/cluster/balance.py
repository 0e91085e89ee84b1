"""Which host holds a replica of which logical expert, so that no host keeps a layer waiting: pure functions, no I/O.

A layer is finished when its slowest host is, so what is minimised is the sum over layers of the busiest host's time,
which is its rows over its speed. A replica is a slot of a layer on a host; slots are the memory budget. Layers do not
depend on each other. Rows of an expert may be split over its replicas, which are on different hosts.

What is good enough stays as it is, but for how rows are split. Else layers are mended by single moves
(balance_repair.py), those of them and so far that the sum is good enough with the fewest moves (balance_choice.py).
Where that cannot be, some get a placement from nothing (balance_pack.py, balance_window.py), with its hosts named such
that as much as possible is where it was.

>>> balance([[4.0, 1.0, 1.0, 2.0]], Hosts.alike(2, 3)).held
(((0, 2, 1), (0, 3)),)
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from folkmoot.cluster.balance_choice import cheapest
from folkmoot.cluster.balance_layer import Hosts
from folkmoot.cluster.balance_task import HeldLayer, LayerTask

TOLERANCE = 0.02
"""As part of the bound: layers that are no further above it, in the mean, are good enough."""


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
    tasks = [LayerTask(rows, hosts, here, pins, tolerance) for rows, here in zip(layers, present, strict=True)]
    chosen = cheapest(tasks, sum(task.goal for task in tasks))
    return Plan(
        tuple(
            LayerPlan(offer.held, task.first.time, offer.time, task.least, offer.moves)
            for task, offer in zip(tasks, chosen, strict=True)
        )
    )


def _check(rows: Sequence[float], hosts: Hosts, held: HeldLayer, pinned: Sequence[AbstractSet[int]]) -> None:
    if len(held) != len(hosts.slots) or len(pinned) != len(hosts.slots):
        raise ValueError(f"{len(held)} hosts hold and {len(pinned)} pin experts, of {len(hosts.slots)}")
    if (most := hosts.room(len(rows))) < len(rows):
        raise ValueError(f"{len(rows)} experts do not fit: hosts have slots for {most} replicas")
    for h, (experts, pins, slots) in enumerate(zip(held, pinned, hosts.slots, strict=True)):
        if len(set(experts) | pins) > slots:
            raise ValueError(f"host {h} holds {len(set(experts) | pins)} experts, and has {slots} slots")
