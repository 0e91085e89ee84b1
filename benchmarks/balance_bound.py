"""What no placement can do better than, by linear programming (scipy's HiGHS): fractional replicas, equal memory.

For a time T: expert e sends x[e] of its rows to hosts of a kind, and has y[e] replicas there, which may be fractions; a
replica takes at most what its host does in T, an expert has at least one and at most one a host, all together no more
than there are slots, and hosts do in T what they are sent. T is found by bisection. What fractions hide is added by
`folkmoot.cluster.balance_pack.bound`: replicas are whole ones, and an expert that is not split is whole on one host.
"""

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, hstack, identity, kron, vstack

from folkmoot.cluster.balance_layer import Hosts

EXACT = 1e-3


def lp_bound(rows: np.ndarray, hosts: Hosts) -> float:
    """The least T, to one part in a thousand, for rows [experts] of one layer. At most that: a bound from below."""
    low = float(rows.sum()) / sum(hosts.speed)
    if low == 0.0 or _fits(rows, hosts, low * (1 + EXACT)):
        return low
    high = float(rows.max()) / min(hosts.speed) + low
    while high > low * (1 + EXACT):
        middle = (low + high) / 2
        low, high = (low, middle) if _fits(rows, hosts, middle) else (middle, high)
    return low


def _fits(rows: np.ndarray, hosts: Hosts, time: float) -> bool:
    kinds = sorted(set(zip(hosts.slots, hosts.speed, strict=True)))
    every = list(zip(hosts.slots, hosts.speed, strict=True))
    number = np.array([every.count(kind) for kind in kinds], float)
    slots, speed = (np.array(column, float) for column in zip(*kinds, strict=True))
    n, k = len(rows), len(kinds)
    one, nothing = identity(n * k), csr_matrix((k, n * k))
    of_expert, of_kind = kron(identity(n), np.ones((1, k))), kron(np.ones((1, n)), identity(k))
    takes = kron(identity(n), np.diag(speed * time))
    least_one = hstack([csr_matrix((n, n * k)), -of_expert])
    limits = vstack([hstack([one, -takes]), least_one, hstack([nothing, of_kind]), hstack([of_kind, nothing])])
    upper = np.concatenate([np.zeros(n * k), -np.ones(n), number * slots, number * speed * time])
    found = linprog(
        np.zeros(2 * n * k),
        A_ub=limits,
        b_ub=upper,
        A_eq=hstack([of_expert, csr_matrix((n, n * k))]),
        b_eq=rows,
        bounds=[(0, None)] * (n * k) + [(0, most) for most in np.tile(number, n)],
        method="highs",
    )
    return bool(found.status == 0)
