"""One layer's replicas and rows while a placement is being made: a host's time, splitting rows, and single moves.

A host's *time* is its rows over its speed: the layer is finished when the host with the longest time is. All here works
in place, on plain lists and dictionaries, which for a few rows each are quicker than arrays.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

EXACT = 1e-3
"""Times that differ by less, as part of the target, are alike."""


@dataclass(frozen=True)
class Hosts:
    """Expert hosts by number: how many replicas of a layer fit on one, its speed relative to the others, its node."""

    slots: tuple[int, ...]
    speed: tuple[float, ...]
    node: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.slots) == len(self.speed) == len(self.node):
            raise ValueError(
                f"{len(self.slots)} slots, {len(self.speed)} speeds, {len(self.node)} nodes: not one a host"
            )
        if not all(speed > 0 for speed in self.speed):
            raise ValueError("speed: must be above 0 for each host")

    def room(self, experts: int) -> int:
        """How many replicas of so many experts fit."""
        return sum(min(slots, experts) for slots in self.slots)

    @staticmethod
    def alike(hosts: int, slots: int, per_node: int = 1) -> "Hosts":
        """So many equal hosts, `per_node` of them on each node."""
        return Hosts((slots,) * hosts, (1.0,) * hosts, tuple(h // per_node for h in range(hosts)))


class Layer:
    """`rows[e]` of expert e; `on[h][e]` of them go to its replica on host h; `where[e]` are the hosts that hold it;
    `shared[h]` are the experts on host h that other hosts hold as well."""

    def __init__(
        self, rows: Sequence[float], hosts: Hosts, on: Sequence[Mapping[int, float]], pinned: Sequence[Set[int]]
    ) -> None:
        self.rows, self.hosts, self.pinned = rows, hosts, pinned
        self.on = [dict(experts) for experts in on]
        self.where: list[set[int]] = [set() for _ in rows]
        for h, experts in enumerate(self.on):
            for e in experts:
                self.where[e].add(h)
        self.shared = [{e for e in experts if len(self.where[e]) > 1} for experts in self.on]
        self.time = [sum(experts.values()) / speed for experts, speed in zip(self.on, hosts.speed, strict=True)]

    def held(self) -> list[list[int]]:
        """The experts of each host."""
        return [list(experts) for experts in self.on]

    def give(self, e: int, h: int, rows: float) -> None:
        """So many more rows of expert e go to its replica on host h."""
        self.on[h][e] += rows
        self.time[h] += rows / self.hosts.speed[h]

    def add(self, e: int, h: int) -> None:
        """A new replica, without rows yet."""
        self.on[h][e] = 0.0
        self.where[e].add(h)
        if len(self.where[e]) > 1:
            for g in self.where[e]:
                self.shared[g].add(e)

    def drop(self, e: int, h: int) -> None:
        """A replica goes, and its rows to the others of this expert, which there must be."""
        rows = self.on[h].pop(e)
        self.time[h] -= rows / self.hosts.speed[h]
        self.where[e].remove(h)
        self.shared[h].discard(e)
        if len(self.where[e]) == 1:
            self.shared[next(iter(self.where[e]))].remove(e)
        if rows:
            self.give(e, next(iter(self.where[e])), rows)
            self.split(e)

    def has_room(self, h: int) -> bool:
        """Whether another replica fits."""
        return len(self.on[h]) < self.hosts.slots[h]

    def split(self, e: int) -> None:
        """Pour the expert's rows over its replicas so that their hosts' times are as level as they can be."""
        places, speed = self.where[e], self.hosts.speed
        if len(places) < 2:
            return
        bare = sorted((self.time[h] - self.on[h][e] / speed[h], h) for h in places)
        level, power, poured = bare[0][0], 0.0, self.rows[e]
        for i, (base, h) in enumerate(bare):
            needed = (base - level) * power
            if i and needed >= poured:
                break
            poured -= needed
            level, power = base, power + speed[h]
        level += poured / power
        for base, h in bare:
            rows = max(0.0, level - base) * speed[h]
            self.on[h][e], self.time[h] = rows, base + rows / speed[h]

    def split_all(self) -> None:
        """Split every expert's rows anew, each once."""
        for e in range(len(self.rows)):
            self.split(e)

    @property
    def busiest(self) -> float:
        """The longest time."""
        return max(self.time)
