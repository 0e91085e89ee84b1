"""Balance: where experts go and how often, ours against EPLB and against what no placement can do better than.

Made-up traffic (Zipf of several exponents, bursts, drift, correlated topics) on 61 x 256, 24 x 128 and 48 x 16 experts
and 8 to 288 hosts, six steps each. In each step both decide anew by the step's rows; ours begins with what it decided
before. Measured: the sum over layers of the busiest host's rows (over that of an even share, of EPLB, and of the
bound), replicas that have to be loaded, and seconds of a core to decide. With --trace also rows that
`folkmoot experts --record` wrote.

Live: a real cluster in which one expert of each layer gets all rows; tokens/s before and after it has extra replicas.

    python -m benchmarks.balance --json balance.json
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks import balance_live, report
from benchmarks.balance_bound import lp_bound
from benchmarks.balance_eplb import eplb_global, eplb_hierarchical, time_of_busiest
from benchmarks.balance_traces import DRIFTING, TRACES
from folkmoot.cluster.balance import balance
from folkmoot.cluster.balance_layer import Hosts
from folkmoot.cluster.balance_task import HeldLayer

PER_NODE = 8
STEPS, QUICK_STEPS = 6, 3
SHAPES = (
    (61, 256, 32, 9), (61, 256, 64, 5), (61, 256, 72, 4), (61, 256, 144, 2), (61, 256, 288, 1),
    (24, 128, 8, 18), (24, 128, 32, 5), (48, 16, 8, 3), (48, 16, 16, 2),
)  # fmt: skip
"""Layers, experts, hosts, slots of a layer on each host."""
QUICK_SHAPES = ((24, 128, 8, 18), (48, 16, 8, 3), (4, 256, 288, 1))
LP_LAYERS = 4
"""So many layers of a step are given to the linear program."""


@dataclass
class Case:
    """One trace on one shape: sums over its steps, each of the layers' busiest hosts."""

    name: str
    shape: tuple[int, int, int, int]
    even: float = 0.0
    ours: float = 0.0
    eplb: float = 0.0
    nodes: float = 0.0
    bound: float = 0.0
    worst_over_eplb: float = 0.0
    worst_over_bound: float = 0.0
    lp_over_bound: float = 0.0
    moved: int = 0
    eplb_moved: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def is_roomy(self) -> bool:
        """Whether there are slots enough to level hosts exactly."""
        _, experts, hosts, slots = self.shape
        return hosts * slots - experts >= hosts - 1

    def row(self) -> tuple[object, ...]:
        """As the table shows it."""
        ratios = (x / self.even for x in (self.eplb, self.nodes, self.ours, self.bound))
        moved = self.moved / max(1, self.eplb_moved)
        return (self.name, "x".join(map(str, self.shape)), *ratios, self.worst_over_bound, moved, max(self.seconds))


HEADER = ("trace", "shape", "EPLB/even", "by nodes", "ours/even", "bound", "worst/bound", "moved/EPLB", "decide s")


def run_case(name: str, shape: tuple[int, int, int, int], trace: Iterable[np.ndarray]) -> Case:
    """All steps of one trace."""
    _, _, hosts, slots = shape
    case, where = Case(name, shape), Hosts.alike(hosts, slots, PER_NODE)
    held: Sequence[HeldLayer] | None = None
    eplb_held: list[list[list[int]]] | None = None
    for step, loads in enumerate(trace):
        began = time.process_time()
        plan = balance(loads, where, held)
        case.seconds.append(time.process_time() - began)
        placed = [eplb_global(rows, hosts, slots) for rows in loads]
        eplb = sum(time_of_busiest(rows, one) for rows, one in zip(loads, placed, strict=True))
        bound = sum(layer.bound for layer in plan.layers)
        case.even += loads.sum() / hosts
        case.ours, case.eplb, case.bound = case.ours + plan.after, case.eplb + eplb, case.bound + bound
        case.nodes += sum(_by_nodes(rows, hosts, slots) for rows in loads)
        case.worst_over_eplb = max(case.worst_over_eplb, plan.after / eplb)
        case.worst_over_bound = max(case.worst_over_bound, plan.after / bound)
        for layer, rows in list(zip(plan.layers, loads, strict=True))[: LP_LAYERS if step == 0 else 0]:
            case.lp_over_bound = max(case.lp_over_bound, lp_bound(rows, where) / layer.bound)
        if eplb_held is not None:
            case.moved += plan.moves
            case.eplb_moved += sum(_moved(now, was) for now, was in zip(placed, eplb_held, strict=True))
        held, eplb_held = plan.held, placed
    return case


def _by_nodes(rows: np.ndarray, hosts: int, slots: int) -> float:
    """EPLB's hierarchical way, with eight groups of experts, where they fit nodes; else its global one."""
    nodes = hosts // PER_NODE
    if nodes > 8 or 8 % max(1, nodes) or hosts % PER_NODE:
        return time_of_busiest(rows, eplb_global(rows, hosts, slots))
    return time_of_busiest(rows, eplb_hierarchical(rows, hosts, slots, nodes, 8))


def _moved(now: list[list[int]], was: list[list[int]]) -> int:
    return sum(len(set(a) - set(b)) for a, b in zip(now, was, strict=True))


def cases(quick: bool) -> Iterator[Case]:
    """All made-up traces on all shapes."""
    for shape in QUICK_SHAPES if quick else SHAPES:
        for name, make in TRACES.items():
            steps = QUICK_STEPS if quick else STEPS
            yield run_case(name, shape, make(np.random.default_rng(0), steps, *shape[:2]))


def recorded(path: Path) -> Iterator[Case]:
    """Rows that were recorded, a line an interval: the first line is the beginning."""
    totals = [np.array(json.loads(line)["rows_total"], float) for line in path.read_text().splitlines()]
    steps = [after - before for before, after in pairwise(totals)]
    steps = [step for step in steps if step.sum() > 0] or totals[-1:]
    layers, experts = steps[0].shape
    for hosts in (2, 4, 8):
        shape = (layers, experts, hosts, -(-experts // hosts) + 1)
        yield run_case("recorded", shape, steps)


def figures(found: list[Case]) -> dict[str, object]:
    """The flat keys."""
    drifting = [case for case in found if case.name in DRIFTING]
    roomy = [case for case in found if case.is_roomy]
    return {
        "worst_over_eplb": max(case.worst_over_eplb for case in found),
        "worst_over_bound": max(case.worst_over_bound for case in found),
        "worst_over_bound_roomy": max(case.worst_over_bound for case in roomy),
        "moved_bytes_over_eplb": sum(c.moved for c in drifting) / max(1, sum(c.eplb_moved for c in drifting)),
        "moved_bytes_over_eplb_worst": max(c.moved / max(1, c.eplb_moved) for c in drifting),
        "decide_s_max": max(max(case.seconds) for case in found),
        "lp_over_bound_max": max(case.lp_over_bound for case in found),
        "cases": len(found),
    }


def main() -> None:
    """Run what is asked for."""
    parser = report.parser(__doc__)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="also rows that `folkmoot experts --record` wrote")
    parser.add_argument("--only", choices=("made-up", "live"), help="a part of it")
    options = parser.parse_args()
    result: dict[str, object] = {}
    if options.only != "live":
        found = list(cases(options.quick))
        found += recorded(options.trace) if options.trace is not None else ()
        print(report.table("busiest hosts, over an even share", HEADER, [case.row() for case in found]))
        result |= figures(found)
    if options.only != "made-up" and not options.quick:
        result |= balance_live.measure()
    report.finish(result, options.json)


if __name__ == "__main__":
    main()
