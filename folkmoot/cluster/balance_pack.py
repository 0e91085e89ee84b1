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
    spare = sum(min(slots, len(rows)) for slots in hosts.slots) - len(rows)
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


def replica_counts(rows: Sequence[float], slots: int, most: int) -> list[int]:
    """How many replicas each expert gets of so many slots, at most `most`: one more, again and again, for the one with
    the most rows a replica."""
    counts = [1] * len(rows)
    heap = [(-r, e) for e, r in enumerate(rows)]
    heapq.heapify(heap)
    for _ in range(slots - len(rows)):
        while heap and counts[heap[0][1]] >= most:
            heapq.heappop(heap)
        if not heap:
            break
        e = heap[0][1]
        counts[e] += 1
        heapq.heapreplace(heap, (-rows[e] / counts[e], e))
    return counts


def pack(rows: Sequence[float], hosts: Hosts, counts: Sequence[int]) -> list[list[int]]:
    """The experts of each host: each replica on the host that is then finished first, the largest first, and no two of
    an expert on one host: one that fits nowhere is left out, unless it is an expert's only one."""
    packing = _Packing(hosts)
    for e in sorted(range(len(rows)), key=lambda e: -rows[e] / counts[e]):
        for _ in range(counts[e]):
            packing.put(e, rows[e] / counts[e])
    return packing.held


class _Packing:
    """Hosts that fill up, each speed's in a heap by time."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self.held: list[list[int]] = [[] for _ in hosts.slots]
        self._heaps: dict[float, list[tuple[float, int]]] = {speed: [] for speed in sorted(set(hosts.speed))}
        for h, speed in enumerate(hosts.speed):
            if hosts.slots[h]:
                self._heaps[speed].append((0.0, h))

    def put(self, e: int, piece: float) -> None:
        """Place a replica with so many rows."""
        passed: list[tuple[float, int]] = []
        tops = [(top[0] + piece / speed, speed, top) for speed in self._heaps if (top := self._top(speed, e, passed))]
        if tops:
            time, speed, (_, h) = min(tops)
            heapq.heappop(self._heaps[speed])
            self.held[h].append(e)
            if len(self.held[h]) < self._hosts.slots[h]:
                heapq.heappush(self._heaps[speed], (time, h))
        for entry in passed:
            heapq.heappush(self._heaps[self._hosts.speed[entry[1]]], entry)
        if not tops:
            self._make_room(e)

    def _top(self, speed: float, e: int, passed: list[tuple[float, int]]) -> tuple[float, int] | None:
        """The host of this speed with the least time that has room and does not hold e; those before it that do are
        moved to `passed`."""
        heap = self._heaps[speed]
        while heap:
            is_full = len(self.held[heap[0][1]]) >= self._hosts.slots[heap[0][1]]
            if not is_full and e not in self.held[heap[0][1]]:
                return heap[0]
            entry = heapq.heappop(heap)
            passed += [] if is_full else [entry]
        return None

    def _make_room(self, e: int) -> None:
        """All hosts with a free slot hold e already: one of them takes an expert over from a host without e. Where none
        can, e has a replica fewer."""
        for taker, taken in enumerate(self.held):
            if len(taken) >= self._hosts.slots[taker]:
                continue
            for given in self.held:
                movable = [] if e in given else [x for x in given if x not in taken]
                if movable:
                    given.remove(movable[-1])
                    given.append(e)
                    taken.append(movable[-1])
                    return
