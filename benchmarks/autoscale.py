"""Autoscaling: deadlines met and engine-hours spent, in the simulator and on real engines.

First days of interactive work and batches in the simulator: the policy that the cluster uses and, without --quick,
variants of it and the rule that counts requests in a queue, against an oracle that knows the day beforehand and against
the smallest fixed fleet that does as well. Then a real cluster with a tiny model, whose engines go up to two, down to
none and up again while requests run; and, without --quick, the same on nodes that Ray's own autoscaler adds and takes
away (fake ones, on this machine, in namespaces of their own).

    python -m benchmarks.autoscale --json autoscale.json
"""

import argparse
import asyncio
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import autoscale_nodes, report
from benchmarks.autoscale_real import Run, come_and_go
from benchmarks.checkpoints import tiny
from benchmarks.clusters import Cluster
from folkmoot.cluster import simulate_oracle
from folkmoot.cluster.autoscale import Limits, Policy
from folkmoot.cluster.autoscale_meter import Counts
from folkmoot.cluster.simulate import Autoscaled, Outcome, Planner, World, run, smallest_fixed
from folkmoot.cluster.simulate_trace import Arrival, day

LIMITS = Limits(0, 16)
ENGINES = 2
OPTIONS = (
    *("--dtype", "float32", "--max-model-len", "512", "--hosts", "2", "--max-num-seqs", "8"),
    *("--engines", f"0..{ENGINES}", "--idle-s", "2"),
)


@dataclass
class ByQueue:
    """So many tokens owed a replica, as queue-length scalers count: fewer only after `hold_s`."""

    limits: Limits
    tokens_each: float
    hold_s: float = 300.0
    _since: list[tuple[float, int]] = field(default_factory=list)

    def __call__(self, counts: Counts) -> int:
        owed = counts.interactive_waiting + counts.interactive_running + sum(d.tokens for d in counts.due)
        needed = math.ceil(owed / self.tokens_each)
        self._since = [(t, n) for t, n in self._since if t > counts.now_s - self.hold_s] + [(counts.now_s, needed)]
        return self.limits.clip(max(n for _, n in self._since))


OURS = "the policy"
PLANNERS: dict[str, Callable[[World], Planner]] = {
    OURS: lambda world: Autoscaled(LIMITS),
    "no head room": lambda world: Autoscaled(LIMITS, Policy(head_room=0.0)),
    "more head room (1)": lambda world: Autoscaled(LIMITS, Policy(head_room=1.0)),
    "no reserve": lambda world: Autoscaled(LIMITS, Policy(margin=0.0)),
    "queue length, a minute's work each": lambda world: ByQueue(LIMITS, 60 * world.tokens_per_s),
    "queue length, an hour's work each": lambda world: ByQueue(LIMITS, 3600 * world.tokens_per_s),
}


@dataclass(frozen=True)
class Day:
    """One trace in one world."""

    trace: Sequence[Arrival]
    world: World


def simulate(days: Sequence[Day], planners: Sequence[str]) -> dict[str, object]:
    """These planners, of which one is the policy, on all days; prints the table, and returns the policy's figures."""
    outcomes = {name: [run(d.trace, PLANNERS[name](d.world), d.world) for d in days] for name in planners}
    ours = outcomes[OURS]
    oracles = [_oracle(d, o, Policy.head_room) for d, o in zip(days, ours, strict=True)]
    bounds = [_oracle(d, o, 0.0) for d, o in zip(days, ours, strict=True)]
    fleets = [
        smallest_fixed(d.trace, d.world, LIMITS.most, max(1.0, o.ttft_s(0.99))) for d, o in zip(days, ours, strict=True)
    ]
    fixed = [outcome for _, outcome in fleets]
    rows: list[Sequence[object]] = [
        _row(name, some, oracles, bounds, fixed) for name, some in {**outcomes, "fixed fleet": fixed}.items()
    ]
    header = ["", "missed", "engine-hours", "/ oracle", "/ bare oracle", "/ fixed", "starts", "TTFT p99 s", "p99.9 s"]
    print(
        report.table(f"{len(days)} simulated days, means (missed: of {sum(o.deadlines for o in ours)})", header, rows)
    )
    return {
        "deadline_misses": sum(o.misses for o in ours),
        "deadlines": sum(o.deadlines for o in ours),
        "engine_hours_over_oracle": _ratio(ours, oracles),
        "engine_hours_over_oracle_worst": max(o.engine_hours / h for o, h in zip(ours, oracles, strict=True)),
        "engine_hours_over_bare_oracle": _ratio(ours, bounds),
        "engine_hours_over_fixed_fleet": _ratio(ours, [o.engine_hours for o in fixed]),
        "simulated_ttft_p99_s": statistics.mean(o.ttft_s(0.99) for o in ours),
    }


def _oracle(day: Day, outcome: Outcome, head_room: float) -> float:
    return simulate_oracle.engine_hours(day.trace, day.world, outcome.tokens_per_s, head_room)


def _ratio(outcomes: Sequence[Outcome], hours: Sequence[float]) -> float:
    return sum(o.engine_hours for o in outcomes) / sum(hours)


def _row(
    name: str, some: Sequence[Outcome], oracles: Sequence[float], bounds: Sequence[float], fixed: Sequence[Outcome]
) -> list[object]:
    others = (oracles, bounds, [o.engine_hours for o in fixed])
    means = (
        statistics.mean(f(o) for o in some) for f in (_starts, lambda o: o.ttft_s(0.99), lambda o: o.ttft_s(0.999))
    )
    hours = statistics.mean(o.engine_hours for o in some)
    return [name, sum(o.misses for o in some), hours, *(_ratio(some, h) for h in others), *means]


def _starts(outcome: Outcome) -> float:
    return outcome.starts


def real(name: str, outcome: Run) -> dict[str, object]:
    """Print what happened, and return the figures."""
    rows: list[Sequence[object]] = [
        [f"engines 1 -> {outcome.most}, after the flood began", f"{outcome.up_s:.1f} s"],
        ["one engine less, after its end", f"{outcome.down_s:.1f} s"],
        ["no engine, after the last request", f"{outcome.zero_s:.1f} s"],
        ["first token where no engine was up", f"{outcome.from_zero_s:.1f} s"],
        ["engines taken away that held requests", outcome.taken_with_work],
        ["requests; failed, tokens lost, tokens different", f"{outcome.faults.requests}; {_faults(outcome)}"],
        ["attempts beyond the first", outcome.attempts],
    ]
    print(report.table(f"Real engines: {name}", ["what", "figure"], rows))
    for error in outcome.faults.errors[:5]:
        print(f"  {error}")
    return {
        "leased_work_killed": outcome.faults.failed + outcome.faults.lost_or_doubled + outcome.attempts,
        "tokens_different": outcome.faults.different,
        "engines_taken_with_work": outcome.taken_with_work,
        "engines_most": outcome.most,
        "from_zero_first_token_s": outcome.from_zero_s,
        "to_zero_s": outcome.zero_s,
    }


def _faults(outcome: Run) -> str:
    faults = outcome.faults
    return f"{faults.failed}, {faults.lost_or_doubled}, {faults.different}"


def here() -> dict[str, object]:
    """On a local Ray."""
    with tempfile.TemporaryDirectory(prefix="fm-as-") as name:
        model = tiny("mixtral", Path(name) / "tiny-mixtral", dtype="float32")
        with Cluster(model, OPTIONS) as cluster:
            return real("one node", asyncio.run(come_and_go(cluster.addresses, ENGINES)))


def days(quick: bool) -> list[Day]:
    """Days of both kinds, overnight and due within two hours; with each seed another truth about the engines."""
    if quick:
        return [Day(day(seed, 1.0, 8), World(tokens_per_s=400.0, step_s=10.0, seed=seed)) for seed in range(2)]
    overnight = [Day(day(seed), World(seed=seed)) for seed in range(4)]
    return overnight + [Day(day(seed, batches=12, due_h=(1.0, 2.0)), World(seed=seed)) for seed in range(4, 8)]


def main() -> None:
    """Measure and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--only", choices=("simulated", "real", "nodes"), help="one part, whatever --quick says")
    args: argparse.Namespace = parser.parse_args()
    figures: dict[str, object] = {}
    if args.only in (None, "simulated"):
        figures |= simulate(days(args.quick), [OURS] if args.quick else list(PLANNERS))
    if args.only in (None, "real"):
        figures |= here()
    if args.only == "nodes" or (args.only is None and not args.quick):
        if (reason := autoscale_nodes.why_not()) is None:
            figures |= {f"nodes_{key}": value for key, value in autoscale_nodes.figures().items()}
        else:
            print(f"\nno run with Ray's autoscaler: {reason}")
    report.finish(figures, args.json)


if __name__ == "__main__":
    main()
