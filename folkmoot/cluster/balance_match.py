"""Names the hosts of a new placement such that as many replicas as possible are where they are already. Pure.

A new placement says which experts are together, not where. Alike hosts may change names; where nodes are alike they do
so as wholes first, so that replicas that were on different nodes still are.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from folkmoot.cluster.balance_layer import Hosts, Layer


def matched(layer: Layer, held: Sequence[Sequence[int]]) -> Layer:
    """The layer with its hosts renamed; what is pinned to a host keeps it where it is."""
    if any(layer.pinned) or not any(held):
        return layer
    kept = _kept(layer, held)
    names = np.arange(len(held))
    for group, places in _groups(layer.hosts, kept):
        for row, column in _assign(kept[np.ix_(group, places)]):
            names[group[row]] = places[column]
    on: list[dict[int, float]] = [{} for _ in held]
    for h, name in enumerate(names.tolist()):
        on[name] = layer.on[h]
    return Layer(layer.rows, layer.hosts, on, layer.pinned)


def _kept(layer: Layer, held: Sequence[Sequence[int]]) -> np.ndarray:
    """float64 [hosts, hosts]: replicas that need not be loaded where host i's experts go to place j. Counted one by
    one, since a product of matrices wakes threads up, which takes longer."""
    kept = [[0.0] * len(held) for _ in held]
    for place, present in enumerate(held):
        for e in set(present):
            for h in layer.where[e]:
                kept[h][place] += 1.0
    return np.array(kept)


def _groups(hosts: Hosts, kept: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """Hosts, and the places among which they may change: the alike ones of a node and of the place of that node."""
    nodes: dict[int, list[int]] = defaultdict(list)
    for h, node in enumerate(hosts.node):
        nodes[node].append(h)
    kinds = [sorted((hosts.slots[h], hosts.speed[h]) for h in members) for members in nodes.values()]
    if any(kind != kinds[0] for kind in kinds):
        everywhere = list(range(len(hosts.slots)))
        return _alike(hosts, everywhere, everywhere)
    members = list(nodes.values())
    order, begins = [h for node in members for h in node], np.cumsum([0, *map(len, members[:-1])])
    gain = np.add.reduceat(np.add.reduceat(kept[np.ix_(order, order)], begins, 0), begins, 1)
    return [group for a, b in _assign(gain) for group in _alike(hosts, members[a], members[b])]


def _assign(gain: np.ndarray) -> list[tuple[int, int]]:
    """Each row with a column of its own, rows with the largest gain first: each its best column that is left."""
    left = gain.copy()
    pairs = []
    for row in np.argsort(-gain.max(axis=1), kind="stable").tolist():
        column = int(left[row].argmax())
        left[:, column] = -1.0
        pairs.append((row, column))
    return pairs


def _alike(hosts: Hosts, sources: Sequence[int], places: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    kinds: dict[tuple[int, float], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for h in sources:
        kinds[hosts.slots[h], hosts.speed[h]][0].append(h)
    for h in places:
        kinds[hosts.slots[h], hosts.speed[h]][1].append(h)
    return list(kinds.values())
