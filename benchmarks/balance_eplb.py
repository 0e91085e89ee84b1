"""DeepSeek's expert-parallelism load balancer, made again from its published description: the baseline to beat.

Described in "DeepSeek-V3 Technical Report" (2024), section 3.4, and in the README of github.com/deepseek-ai/EPLB.
Global: replicate the experts with the most load a replica until all slots are given away, then pack the replicas onto
hosts, the largest first, each onto the least loaded host with a free slot. Hierarchical: pack groups of experts onto
nodes first, then do the same within each node. Rows are split evenly over an expert's replicas.
"""

import heapq
from collections.abc import Sequence

import numpy as np


def eplb_global(rows: np.ndarray, hosts: int, slots: int) -> list[list[int]]:
    """The experts of each host, for rows [experts] of one layer; an expert may be twice on a host."""
    return _place(rows, range(len(rows)), hosts, slots)


def eplb_hierarchical(rows: np.ndarray, hosts: int, slots: int, nodes: int, groups: int) -> list[list[int]]:
    """The same with `groups` of neighbouring experts packed onto `nodes` first, of hosts / nodes hosts each."""
    members = np.arange(len(rows)).reshape(groups, -1)
    by_node = _pack(rows[members].sum(1).tolist(), nodes, groups // nodes)
    placed: list[list[int]] = []
    for chosen in by_node:
        experts = members[chosen].ravel().tolist()
        placed += _place(rows, experts, hosts // nodes, slots)
    return placed


def time_of_busiest(rows: np.ndarray, placed: Sequence[Sequence[int]]) -> float:
    """Rows of the busiest host where an expert's rows are split evenly over its replicas."""
    counts = np.bincount([e for experts in placed for e in experts], minlength=len(rows))
    return float(max(sum(rows[e] / counts[e] for e in experts) for experts in placed))


def _place(rows: np.ndarray, experts: Sequence[int], hosts: int, slots: int) -> list[list[int]]:
    replicas = list(experts)
    heap = [(-rows[e], e, 1) for e in experts]
    heapq.heapify(heap)
    counts = dict.fromkeys(experts, 1)
    for _ in range(hosts * slots - len(replicas)):
        _, e, number = heap[0]
        replicas.append(e)
        counts[e] = number + 1
        heapq.heapreplace(heap, (-rows[e] / (number + 1), e, number + 1))
    packed = _pack([rows[e] / counts[e] for e in replicas], hosts, slots)
    return [[replicas[i] for i in chosen] for chosen in packed]


def _pack(weights: Sequence[float], packs: int, size: int) -> list[list[int]]:
    """Items into packs of exactly `size`: the largest first, each into the lightest that is not full."""
    packed: list[list[int]] = [[] for _ in range(packs)]
    heap = [(0.0, p) for p in range(packs)]
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        weight, p = heapq.heappop(heap)
        packed[p].append(i)
        if len(packed[p]) < size:
            heapq.heappush(heap, (weight + weights[i], p))
    return packed
