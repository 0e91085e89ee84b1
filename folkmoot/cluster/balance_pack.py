"""A layer's placement from nothing, and how good one can be at most. Pure functions.

The packing is the greedy one that EPLB is known for (DeepSeek's "expert parallelism load balancer": replicate what has
the most rows a replica, then give the largest piece to the host with the least): a good beginning for `balance`.
"""

import heapq
from collections.abc import Sequence

from folkmoot.cluster.balance_layer import Hosts


def bound(rows: Sequence[float], hosts: Hosts) -> float:
    """A time that no placement's busiest host stays below, however rows are split.

    The largest of: all rows over all speeds; the least T for which no more pieces are needed than there are slots,
    where an expert that has more rows than the quickest host computes in T needs several; and, since an expert that is
    not split is whole on one host, the time of k + 1 of them that must share one of the hosts (k times the hosts, and
    one). As many as there are slots to spare, the largest, may be split.
    """
    fastest, total = max(hosts.speed), sum(hosts.speed)
    ordered = sorted(rows, reverse=True)
    spare = hosts.room(len(rows)) - len(rows)
    whole, count = ordered[max(0, spare) :], len(hosts.slots)
    shared = (sum(whole[k * count - k : k * count + 1]) for k in range(1, (len(whole) - 1) // count + 1))
    least = max(sum(rows) / total, _by_pieces(ordered, len(rows) + spare) / fastest)
    return max(least, max(shared, default=0.0) / fastest)


def _by_pieces(ordered: Sequence[float], slots: int) -> float:
    """The least T for which sum(max(1, ceil(rows / T))) <= slots: the largest piece once all slots are given away."""
    pieces = [(-rows, rows, 1) for rows in ordered]
    heapq.heapify(pieces)
    for _ in range(slots - len(ordered)):
        _, rows, number = pieces[0]
        heapq.heapreplace(pieces, (-rows / (number + 1), rows, number + 1))
    return -pieces[0][0] if pieces else 0.0


def replica_counts(rows: Sequence[float], slots: int) -> list[int]:
    """How many replicas each expert gets of so many slots: one more, again and again, for the one with the most rows a
    replica."""
    counts = [1] * len(rows)
    heap = [(-r, e) for e, r in enumerate(rows)]
    heapq.heapify(heap)
    for _ in range(slots - len(rows)):
        e = heap[0][1]
        counts[e] += 1
        heapq.heapreplace(heap, (-rows[e] / counts[e], e))
    return counts


def pack(rows: Sequence[float], hosts: Hosts, counts: Sequence[int]) -> list[dict[int, float]]:
    """Each host's experts and how many rows of them it gets, an expert's replicas all alike: each on the host that is
    then finished first, the largest first. Several of an expert on one host are one, with the rows of all."""
    placed: list[dict[int, float]] = [{} for _ in hosts.slots]
    left = [min(slots, len(rows)) for slots in hosts.slots]
    heaps: dict[float, list[tuple[float, int]]] = {speed: [] for speed in sorted(set(hosts.speed))}
    for h, speed in enumerate(hosts.speed):
        if left[h]:
            heaps[speed].append((0.0, h))
    for e in sorted(range(len(rows)), key=lambda e: -rows[e] / counts[e]):
        piece = rows[e] / counts[e]
        for _ in range(counts[e]):
            time, speed = min((heap[0][0] + piece / speed, speed) for speed, heap in heaps.items() if heap)
            _, h = heapq.heappop(heaps[speed])
            placed[h][e] = placed[h].get(e, 0.0) + piece
            left[h] -= 1
            if left[h]:
                heapq.heappush(heaps[speed], (time, h))
    return placed
