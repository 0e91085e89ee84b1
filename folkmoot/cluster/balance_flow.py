"""Shifts rows between replicas that there are, over any number of hosts in between: a maximum flow (Dinic's algorithm).

Hosts with more time than the target are sources, those with less are sinks, and an expert's rows on a host may go to
each other host that holds it.
"""

from collections import deque

from folkmoot.cluster.balance_layer import EXACT, Layer

PHASES, WITH_SPLIT = 16, 3
"""A flow that takes more phases is cut short. Before each of the first few, rows are split anew, which is quick and
does most."""


def relieve(layer: Layer, target: float) -> set[int]:
    """Shift rows until no host has more time than `target`, as far as that goes. Where some have all the same: those,
    and all to which they could shift rows."""
    level: dict[int, int] = {}
    for number in range(PHASES):
        for e in {e for h in _over(layer, target) for e in layer.shared[h]} if number < WITH_SPLIT else ():
            layer.split(e)
        over = _over(layer, target)
        level = _levels(layer, over, target)
        phase = _Phase(layer, level, target)
        if not sum(phase.send(h, (layer.time[h] - target) * layer.hosts.speed[h], True) for h in over):
            break
    return set(level)


def _over(layer: Layer, target: float) -> list[int]:
    return [h for h, time in enumerate(layer.time) if time > target * (1 + EXACT)]


def _levels(layer: Layer, over: list[int], target: float) -> dict[int, int]:
    """How many shifts away from a host that has too much the others are, of those that can be reached."""
    level, queue, seen = dict.fromkeys(over, 0), deque(over), set[int]()
    while queue:
        h = queue.popleft()
        if layer.time[h] < target:
            continue
        for e in layer.shared[h]:
            if e in seen or layer.on[h][e] <= EXACT * target * layer.hosts.speed[h]:
                continue
            seen.add(e)
            for g in layer.where[e]:
                if g not in level:
                    level[g] = level[h] + 1
                    queue.append(g)
    return level


class _Phase:
    """A blocking flow along shortest ways. From one level an expert leads to the same hosts wherever it comes from, so
    what has been found to lead no further need not be tried again."""

    def __init__(self, layer: Layer, level: dict[int, int], target: float) -> None:
        self._layer, self._level, self._target = layer, level, target
        self._next: dict[tuple[int, int], list[int]] = {}

    def send(self, h: int, rows: float, is_source: bool = False) -> float:
        """Get rid of so many rows that h has, or is about to get; how many."""
        layer = self._layer
        room = (self._target - layer.time[h]) * layer.hosts.speed[h]
        if room > 0.0 and not is_source:
            return min(rows, room)
        sent, least = 0.0, EXACT * self._target * layer.hosts.speed[h]
        for e in layer.shared[h]:
            if sent >= rows - least:
                break
            ways = self._ways(e, self._level[h])
            while ways and (part := min(rows - sent, layer.on[h][e])) > least:
                got = self.send(ways[-1], part)
                layer.give(e, h, -got)
                layer.give(e, ways[-1], got)
                sent += got
                if got < part:
                    ways.pop()
        return sent

    def _ways(self, e: int, level: int) -> list[int]:
        if (e, level) not in self._next:
            self._next[e, level] = [g for g in self._layer.where[e] if self._level.get(g) == level + 1]
        return self._next[e, level]
