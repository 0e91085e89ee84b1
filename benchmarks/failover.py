"""Failover: what clients see when a process of a serving cluster dies, for each kind of process.

Under steady load (each client asks again as soon as it has its answer) one process after the other is killed with
SIGKILL, or stopped: an expert host that has a replica, one that has none, an engine, a gateway, the expert router, the
store. For each: requests that failed, tokens that were lost, doubled or (in float32, where answers may not depend on
what else is in the batch) different from the undisturbed answers; the longest gap between two tokens that any client
saw, less the usual one; how long until all replicas and engines are back; and the tokens of the windows around faults
over those of equally long windows without one (for an expert host, each right before its own).

The same is done to monolithic vLLM (`vllm serve`, its engine core killed, started again at once), as a peer.

    python -m benchmarks.failover --json failover.json
"""

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from benchmarks import faults, load, peer, report
from benchmarks.checkpoints import measure_sized, tiny
from benchmarks.clusters import Cluster, Role
from benchmarks.engines import prompts_of
from benchmarks.faults import Fault
from benchmarks.load import Answer, Faults, Load, Question
from folkmoot.cluster import demo_model
from folkmoot.cluster.bench import percentile

Owed: TypeAlias = Mapping[int, Sequence[int]]

PROMPT_TOKENS = 16
VOCABULARY = 500
RESTORE_TIMEOUT_S = 120.0
GAP_HORIZON_S = 15.0
"""Gaps that begin later than this after a fault are not its doing."""
PAIRED = "dead_host"
"""A window without a fault comes before each of these: what a machine does in a minute differs by a tenth anyway."""
CALM_END_S = 0.5
"""Gaps that begin so shortly before a fault do not count as without one: they may be of it."""


@dataclass(frozen=True)
class Plan:
    """What is done to one cluster: `faults` one after the other, each in the middle of a window of `window_s`."""

    name: str
    options: tuple[str, ...]
    faults: tuple[tuple[str, Fault], ...]
    num_questions: int
    max_tokens: int
    clients: int
    window_s: float
    gateways: int = 1
    pause_s: float = 0.0
    """of a client between two questions, on average"""


@dataclass
class Trial:
    """One fault, and what came of it. Seconds; `gaps_s` has one entry a client stream: its longest gap, less the
    usual one; `undisturbed_gaps_s` the same around a moment before the fault, at which nothing happened."""

    key: str
    fault: Fault
    gaps_s: list[float]
    undisturbed_gaps_s: list[float]
    restored_s: float | None
    tokens: int
    tokens_undisturbed: int
    deadline_s: float = 0.0
    """of a stalled host: `--stall-s` and some times its usual pace (folkmoot.experts.deadline)"""


@dataclass
class Outcome:
    """All trials on one cluster, and the account of all its requests."""

    plan: Plan
    trials: list[Trial] = field(default_factory=list)
    account: Faults = field(default_factory=Faults)
    tokens_owed: int = 0
    calm_share: float = 0.0
    """of tokens that were different in answers that ended before the first fault: in bf16 batches alone do that"""


async def run(
    cluster: Cluster, plan: Plan, questions: Sequence[Question], owed: Mapping[int, Sequence[int]]
) -> Outcome:
    """Load the cluster, and inject the plan's faults one after the other."""
    outcome, rng = Outcome(plan), random.Random(0)
    async with Load(cluster.addresses, questions, plan.clients, pause_s=plan.pause_s) as steady:
        await asyncio.sleep(3.0)
        undisturbed = await _calm(steady, plan.window_s)
        calm = [answer for answer in steady.answers if answer.finish_reason is not None]
        outcome.calm_share = load.faults_of(calm, owed).different / max(1, sum(len(a.token_ids) for a in calm))
        for key, fault in plan.faults:
            if key == PAIRED and outcome.trials:
                undisturbed = await _calm(steady, plan.window_s)
            outcome.trials.append(await _trial(cluster, plan, steady, key, fault, undisturbed, rng))
    outcome.account = load.faults_of(steady.answers, owed)
    outcome.tokens_owed = sum(len(owed[a.question.key]) for a in steady.answers)
    print(f"{plan.name}: {_account(outcome)}", flush=True)
    return outcome


async def _calm(steady: Load, window_s: float) -> int:
    """Tokens of a window in which nothing is done."""
    began = time.monotonic()
    await asyncio.sleep(window_s)
    return steady.tokens_between(began, began + window_s)


def _kept(trials: Sequence[Trial]) -> float:
    """Tokens of these windows over those of the windows without a fault."""
    return sum(t.tokens for t in trials) / sum(t.tokens_undisturbed for t in trials)


def _account(outcome: Outcome) -> str:
    account = outcome.account
    kept = ", ".join(f"{_kept([t]):.3f}" for t in outcome.trials)
    return (
        f"{account.requests} requests, {account.failed} failed, {account.lost_or_doubled} tokens lost or doubled, "
        f"{account.different} different; throughput of each window over one without a fault: {kept}"
    )


async def _trial(
    cluster: Cluster, plan: Plan, steady: Load, key: str, fault: Fault, undisturbed: int, rng: random.Random
) -> Trial:
    began = time.monotonic()
    await asyncio.sleep(plan.window_s / 2)
    stalled_before = Counter(cluster.stall_deadlines_s())
    injected = await faults.inject_soon(cluster, fault, rng)
    await asyncio.to_thread(cluster.tend)
    since_s = time.time() - (time.monotonic() - injected.at_s)
    dead_host = injected.pid if fault.role is Role.HOST and not fault.stop_s else None
    whole = await load.until(lambda: cluster.is_whole(since_s, dead_host), RESTORE_TIMEOUT_S)
    restored_s = time.monotonic() - injected.at_s if whole else None
    await asyncio.sleep(max(0.0, began + plan.window_s - time.monotonic()))
    usual_s = load.usual_gap_s(steady.answers, began, injected.at_s)
    gaps = _gaps(steady.answers, injected.at_s, GAP_HORIZON_S, usual_s)
    calm = _gaps(steady.answers, began, min(GAP_HORIZON_S, injected.at_s - CALM_END_S - began), usual_s)
    tokens = steady.tokens_between(began, began + plan.window_s)
    deadline_s = max(Counter(cluster.stall_deadlines_s()) - stalled_before, default=0.0)
    trial = Trial(key, fault, gaps, calm, restored_s, tokens, undisturbed, deadline_s)
    print(_line(trial), flush=True)
    return trial


def _gaps(answers: Sequence[Answer], at_s: float, horizon_s: float, usual_s: float) -> list[float]:
    """Of each stream that ran at a moment: its longest gap from then on, less the usual one."""
    return [
        max(0.0, load.longest_gap_s([answer], at_s, at_s + horizon_s) - usual_s)
        for answer in answers
        if _was_streaming(answer, at_s)
    ]


def _was_streaming(answer: Answer, at_s: float) -> bool:
    return bool(answer.arrivals_s) and answer.arrivals_s[0] <= at_s <= answer.arrivals_s[-1]


def _line(trial: Trial) -> str:
    restored = "not whole again" if trial.restored_s is None else f"whole again after {trial.restored_s:.1f} s"
    worst = 1e3 * max(trial.gaps_s, default=float("nan"))
    calm = 1e3 * max(trial.undisturbed_gaps_s, default=float("nan"))
    deadline = f", deadline {1e3 * trial.deadline_s:.0f} ms" if trial.deadline_s else ""
    return (
        f"{trial.fault.name}: longest gap {worst:.0f} ms over the usual one ({calm:.0f} before){deadline}, {restored}"
    )


def measure(model: Path, plan: Plan) -> Outcome:
    """Start a cluster, learn its undisturbed answers, break it, and take it down."""
    questions = load.greedy(prompts_of(plan.num_questions, PROMPT_TOKENS, VOCABULARY), plan.max_tokens)
    with Cluster(model, plan.options, plan.gateways) as cluster:
        owed = asyncio.run(load.record(cluster.addresses, questions, 1))
        return asyncio.run(run(cluster, plan, questions, owed))


def figures_of(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Pure: the flat figures. Gaps in milliseconds; a figure that no trial gave is left out."""
    exact = [o for o in outcomes if "float32" in o.plan.options]
    account = sum((o.account for o in outcomes), Faults())
    figures: dict[str, object] = {
        "requests": account.requests,
        "requests_failed": account.failed,
        "tokens_lost_or_doubled": account.lost_or_doubled,
        "tokens_different": sum(o.account.different for o in exact),
    }
    for name, key, choose in (
        ("dead_host_gap_p99_ms", "dead_host", lambda gaps: percentile(gaps, 99)),
        ("light_load_dead_host_gap_p99_ms", "dead_host_light", lambda gaps: percentile(gaps, 99)),
        ("no_replica_gap_ms", "no_replica", max),
        ("engine_gap_ms", "engine", max),
        ("gateway_gap_ms", "gateway", max),
        ("router_gap_ms", "router", max),
        ("store_gap_ms", "store", max),
    ):
        gaps = [gap for o in outcomes for t in o.trials if t.key == key for gap in t.gaps_s]
        if gaps:
            figures[name] = 1e3 * choose(gaps)
    if stalled := [t for o in outcomes for t in o.trials if t.key == "stalled_host" and t.gaps_s]:
        over = max(max(t.gaps_s) - t.deadline_s for t in stalled)
        figures["stalled_host_gap_over_deadline_ms"] = max(0.0, 1e3 * over)
        figures["stalled_host_gap_ms"] = max(1e3 * max(t.gaps_s) for t in stalled)
    if hosts := [t for o in outcomes for t in o.trials if t.key == "dead_host"]:
        figures["undisturbed_gap_p99_ms"] = 1e3 * percentile([g for t in hosts for g in t.undisturbed_gaps_s], 99)
        figures["throughput_retained"] = _kept(hosts)
        restored = [RESTORE_TIMEOUT_S if t.restored_s is None else t.restored_s for t in hosts]
        figures["replicas_restored_s"] = max(restored)
    return figures


def rows_of(outcome: Outcome) -> list[list[object]]:
    """Pure: one line a kind of fault."""
    rows: list[list[object]] = []
    for key in dict.fromkeys(t.key for t in outcome.trials):
        trials = [t for t in outcome.trials if t.key == key]
        gaps = [1e3 * gap for t in trials for gap in t.gaps_s] or [float("nan")]
        calm = [1e3 * gap for t in trials for gap in t.undisturbed_gaps_s] or [float("nan")]
        restored = [t.restored_s for t in trials if t.restored_s is not None]
        rows.append(
            [outcome.plan.name, trials[0].fault.name + (", no replica" if key == "no_replica" else ""), len(trials),
             percentile(gaps, 50), max(gaps), max(calm), max(restored) if len(restored) == len(trials) else "not",
             _kept(trials)]
        )  # fmt: skip
    return rows


ALONE = (("no_replica", faults.KILL_HOST),)
LIGHT = (("dead_host_light", faults.KILL_HOST),) * 8
OTHERS = (
    ("stalled_host", faults.STALL_HOST),
    ("engine", faults.KILL_ENGINE),
    ("gateway", faults.KILL_GATEWAY),
    ("router", faults.KILL_ROUTER),
    ("store", faults.KILL_STORE),
    ("engine", faults.KILL_CORE),
    ("gateway", faults.KILL_GATEWAY),
)
# In turn, since a host that dies once a minute is quarantined, as it should be.
EVERY = tuple(one for other in OTHERS for one in (("dead_host", faults.KILL_HOST), other))
FLOAT32 = ("--dtype", "float32", "--max-model-len", "512")
REPLICATED = ("--hosts", "2", "--replicas", "2")


def plans(quick: bool, window_s: float) -> list[tuple[str, Plan]]:
    """(model, plan) pairs: "tiny", "demo" or "measure"."""
    if quick:
        some = (("dead_host", faults.KILL_HOST), ("router", faults.KILL_ROUTER))
        return [("tiny", Plan("tiny, float32", (*FLOAT32, *REPLICATED), some, 8, 200, 4, 6.0))]
    two = ("--engines", "2")
    big = (("dead_host", faults.KILL_HOST), ("engine", faults.KILL_ENGINE), ("dead_host", faults.KILL_HOST))
    return [
        ("demo", Plan("demo, float32", (*FLOAT32, *REPLICATED, *two), EVERY, 16, 96, 8, window_s, gateways=2)),
        ("demo", Plan("demo, float32, light load", (*FLOAT32, "--hosts", "4", "--replicas", "4"), LIGHT, 16, 96, 2,
                      window_s / 3, pause_s=0.5)),
        ("demo", Plan("demo, float32, 1 replica", (*FLOAT32, "--hosts", "2", "--replicas", "1"), ALONE * 3, 16, 96, 8,
                      1.25 * window_s)),
        ("measure", Plan("1.5 GiB, bf16", ("--max-model-len", "512", *REPLICATED, *two), big, 16, 96, 8, window_s)),
    ]  # fmt: skip


def made(model: str, folder: Path) -> Path:
    """The checkpoint of that name, written into `folder` where it is not there yet."""
    if model == "demo":
        return demo_model.ensure()
    path = folder / model
    if path.exists():
        return path
    return measure_sized(path) if model == "measure" else tiny("mixtral", path, dtype="float32")


def main() -> None:
    """Measure and report."""
    parser = report.parser(__doc__)
    only = "the cluster of this name, or those whose names contain it, and no killed peer"
    parser.add_argument("--only", metavar="NAME", help=only)
    parser.add_argument("--window-s", type=float, default=60.0, help="length of the window around a fault")
    args = parser.parse_args()
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory(prefix="fm-ck-") as name:
        every = plans(args.quick, args.window_s)
        exact = args.only in [plan.name for _, plan in every]
        chosen = [(m, p) for m, p in every if (p.name == args.only if exact else (args.only or "") in p.name)]
        outcomes = [measure(made(model, Path(name)), plan) for model, plan in chosen]
        figures = figures_of(outcomes)
        for (model, plan), outcome in zip(chosen, outcomes, strict=True):
            if "bf16" in plan.name:
                figures |= bf16_figures(made(model, Path(name)), outcome)
        if not args.quick and args.only is None:
            line, more = peer.measure(made("demo", Path(name)), window_s=args.window_s)
            rows.append(line)
            figures |= more
    rows = [row for outcome in outcomes for row in rows_of(outcome)] + rows
    header = ["model", "fault", "times", "gap p50 ms", "gap max ms", "without a fault", "whole again s", "throughput"]
    print(report.table("Faults under load (gaps less the usual one)", header, rows))
    for error in sorted({e for o in outcomes for e in o.account.errors}):
        print(f"a client saw: {error}")
    report.finish(figures, args.json)


def bf16_figures(model: Path, outcome: Outcome) -> dict[str, object]:
    """How many tokens differ in bf16 from those of a question asked alone: here among faults, here before the first
    one, and in vLLM's own server under the same load."""
    plan = outcome.plan
    questions = load.greedy(prompts_of(plan.num_questions, PROMPT_TOKENS, VOCABULARY), plan.max_tokens)
    return {
        "tokens_different_bf16_share": outcome.account.different / outcome.tokens_owed,
        "tokens_different_bf16_share_calm": outcome.calm_share,
        "tokens_different_vllm_reshuffled": peer.reshuffled(model, questions, plan.clients, plan.window_s),
    }


if __name__ == "__main__":
    main()
