"""Two lanes: what interactive requests feel of a saturating batch beside them, and what the batch loses to them.

One engine serves, in turn and several times over: interactive requests alone, batch requests alone (always more than
it can run at once), and both. Interactive clients think between two requests (exponentially distributed), so that the
engine is not always busy with them. From that: time to first token and inter-token latency beside the batch over those
alone, and batch tokens/s beside interactive requests over those alone. In float32 every answer is also compared with
the undisturbed one: batch requests are paused and preempted, and must not change by that.

How short a step can be is the floor: a request that comes in while the engine computes a step waits for its end, and
on a CPU a step with B rows takes longer than one with 1. `batch_step_ms` is that step; --max-batch-seqs is the lever.

    python -m benchmarks.lanes --json lanes.json
    python -m benchmarks.lanes --compare          # also: the ways that were tried, one cluster each
"""

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import load, report
from benchmarks.clusters import Cluster
from benchmarks.engines import prompts_of
from benchmarks.failover import made
from benchmarks.load import Answer, Faults, Load
from folkmoot.cluster.bench import percentile

VOCABULARY = 500
SETTLE_S = 1.5
BATCH: dict[str, Any] = {"lane": "batch", "tenant": "nightly"}
COMMON = ("--dtype", "float32", "--max-model-len", "512", "--hosts", "1", "--replicas", "1")


@dataclass(frozen=True)
class Way:
    """A way to run the lanes: options of `folkmoot up`, and how the batch's requests are sent."""

    name: str
    options: tuple[str, ...] = ()
    batch: tuple[tuple[str, Any], ...] = tuple(BATCH.items())


@dataclass(frozen=True)
class Plan:
    """How much is asked of a cluster."""

    model: str
    rounds: int
    window_s: float
    batch_clients: int
    clients: int = 2
    pause_s: float = 0.2
    prompt_tokens: int = 48
    answer_tokens: int = 24


FULL = Plan("demo", 4, 12.0, 24)
QUICK = Plan("tiny", 1, 3.0, 24, pause_s=0.05)
NARROW = ("--max-batch-seqs", "4")
WIDE = ("--max-batch-seqs", "16", "--max-num-seqs", "16")
WAYS = (
    Way("one lane for all", ("--max-num-seqs", "16"), (("lane", "interactive"),)),
    Way("vLLM's priority alone, lease over, preempt", (*WIDE, "--batch-rows", "64", "--batch-prompt-tokens", "2048")),
    Way("and room kept", ("--max-num-seqs", "16", "--batch-rows", "64", "--batch-prompt-tokens", "2048")),
    Way("and short batch prefills", ("--max-num-seqs", "16", "--batch-rows", "64")),
    Way("and 4 batch rows beside", ("--max-num-seqs", "16", "--batch-rows", "4")),
    Way("and 1 batch row beside", ("--max-num-seqs", "16")),
    Way("and none beside", ("--max-num-seqs", "16", "--batch-rows", "0")),
    Way("1 beside, batches of 4", ("--max-num-seqs", "16", *NARROW)),
)
DEFAULT = Way("as it comes", ("--max-num-seqs", "16"))


@dataclass
class Seen:
    """What came of one kind of time: alone, or both."""

    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    batch_gaps_s: list[float] = field(default_factory=list)
    batch_tokens: int = 0
    seconds: float = 0.0


@dataclass
class Outcome:
    """A whole run."""

    idle: Seen = field(default_factory=Seen)
    batch: Seen = field(default_factory=Seen)
    both: Seen = field(default_factory=Seen)
    account: Faults = field(default_factory=Faults)


def run(way: Way, plan: Plan, model: Path) -> Outcome:
    """One cluster, from start to end."""
    prompts = prompts_of(16, plan.prompt_tokens, VOCABULARY)
    questions = load.greedy(prompts, plan.answer_tokens)
    outcome = Outcome()
    with Cluster(model, (*COMMON, *way.options)) as cluster:
        owed = asyncio.run(load.record(cluster.addresses, questions, 4))

        async def window(seen: Seen, clients: int, batch_clients: int) -> None:
            people = Load(cluster.addresses, questions, clients, pause_s=plan.pause_s)
            batch = Load(cluster.addresses, questions, batch_clients, seed=1, **dict(way.batch))
            async with batch:
                await asyncio.sleep(SETTLE_S if batch_clients else 0.0)
                async with people:
                    began = asyncio.get_running_loop().time()
                    await asyncio.sleep(plan.window_s)
                    until = asyncio.get_running_loop().time()
            note(seen, people.answers, batch.answers, began, until)
            seen.batch_tokens += batch.tokens_between(began, until)
            outcome.account += load.faults_of([*people.answers, *batch.answers], owed)

        for _ in range(plan.rounds):
            asyncio.run(window(outcome.idle, plan.clients, 0))
            asyncio.run(window(outcome.batch, 0, plan.batch_clients))
            asyncio.run(window(outcome.both, plan.clients, plan.batch_clients))
    return outcome


def note(seen: Seen, people: Sequence[Answer], batch: Sequence[Answer], since_s: float, until_s: float) -> None:
    """Add one window: of the requests that were asked in it, and of tokens that came in it."""
    for answer in people:
        if answer.arrivals_s and since_s <= answer.asked_s < until_s:
            seen.first_s.append(answer.arrivals_s[0] - answer.asked_s)
            seen.gaps_s += _gaps(answer, since_s, until_s)
    for answer in batch:
        seen.batch_gaps_s += _gaps(answer, since_s, until_s)
    seen.seconds += until_s - since_s


def _gaps(answer: Answer, since_s: float, until_s: float) -> list[float]:
    pairs = zip(answer.arrivals_s, answer.arrivals_s[1:], strict=False)
    return [end - begin for begin, end in pairs if since_s <= begin and end < until_s]


def figures_of(outcome: Outcome) -> dict[str, object]:
    """The flat figures."""
    idle, both, account = outcome.idle, outcome.both, outcome.account
    figures: dict[str, object] = {}
    for name, values, alone in (("ttft", both.first_s, idle.first_s), ("itl", both.gaps_s, idle.gaps_s)):
        for percent in (50, 99):
            figures[f"{name}_p{percent}_ms_idle"] = 1e3 * percentile(alone, percent)
            figures[f"{name}_p{percent}_ms_beside_batch"] = 1e3 * percentile(values, percent)
            figures[f"{name}_p{percent}_ratio"] = percentile(values, percent) / percentile(alone, percent)
    alone_s = outcome.batch.batch_tokens / outcome.batch.seconds
    return {
        **figures,
        "batch_tokens_s_alone": alone_s,
        "batch_throughput_retained": both.batch_tokens / both.seconds / alone_s,
        "batch_step_ms": 1e3 * percentile(outcome.batch.batch_gaps_s, 50),
        "requests": account.requests,
        "requests_failed": account.failed,
        "tokens_lost_or_doubled": account.lost_or_doubled,
        "tokens_different": account.different,
    }


COLUMNS = ("ttft_p50_ratio", "ttft_p99_ratio", "itl_p50_ratio", "itl_p99_ratio", "batch_throughput_retained",
           "batch_tokens_s_alone", "batch_step_ms", "tokens_different", "requests_failed")  # fmt: skip


def main() -> None:
    """Command line."""
    parser = report.parser(__doc__)
    parser.add_argument("--compare", action="store_true", help="measure the ways that were tried as well")
    parser.add_argument("--model", choices=["demo", "tiny"], help="the demo model, or a tiny checkpoint")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    kind = options.model or plan.model
    rows, figures = [], {}
    with tempfile.TemporaryDirectory(prefix="fm-") as folder:
        model = made(kind, Path(folder))
        for way in (*(WAYS if options.compare else ()), DEFAULT):
            outcome = run(way, plan, model)
            figures = figures_of(outcome)
            rows.append([way.name, *(figures[name] for name in COLUMNS)])
            print(report.table(way.name, COLUMNS, [rows[-1][1:]]), flush=True)
            for error in sorted(set(outcome.account.errors)):
                print(f"  error: {error}")
    print(report.table(f"Two lanes, {kind} model, float32", ("", *COLUMNS), rows))
    report.finish(figures, options.json)


if __name__ == "__main__":
    main()
