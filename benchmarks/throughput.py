"""Throughput: an engine whose experts are on two hosts over monolithic vLLM, on the same cores, in turn.

For the 1.5 GiB model at batch 1, 8, 32 and 64 and for the demo model at batch 16; then two engines that share one pool
of experts over two monolithic engines, in tokens/s and in resident memory; then the time from nothing to the first
token over the time that monolithic vLLM takes to load. Rounds alternate between the two, so that both see the same
noise, and each figure is the median of the rounds' ratios.

A single monolith has vLLM's own OpenMP settings, under which it is quickest; two of them half of the cores each,
since with their own they take the cores from each other. Ours are those of `folkmoot up`: with one engine its OpenMP
workers run in the background (cores.py), with two they do not spin.

    python -m benchmarks.throughput --json throughput.json
"""

import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report, startup
from benchmarks.checkpoints import measure_sized, tiny
from benchmarks.engines import Bench, Engine, Pool, prompts_of
from folkmoot.cluster import demo_model
from folkmoot.experts.warm import SEVERAL_ENGINES

PROMPT_TOKENS = 16
HALF = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2))}
VOCABULARY = 500  # prompts use ids below this: every checkpoint here has as many


@dataclass
class Pair:
    """The same model both ways."""

    pool: Pool
    ours: Engine
    monolith: Engine


def load(bench: Bench, checkpoint: Path, num_hosts: int = 2) -> Pair:
    """One pool with an engine, and a monolith; one loads after the other."""
    bench.begin_parent({})
    pool = bench.pool(checkpoint, num_hosts, replicas=num_hosts)  # as `folkmoot up` does: weights are shared
    ours = bench.engine(checkpoint, pool=pool, dispatch={"background_workers": True}).wait()  # as `folkmoot up` does
    return Pair(pool, ours, bench.engine(checkpoint, openmp={}).wait())


def compare(pair: Pair, batch: int, num_tokens: int, rounds: int) -> tuple[float, float, float]:
    """(ratio, our tokens/s, the monolith's tokens/s): medians over rounds in which all take turns."""
    prompts = prompts_of(batch, PROMPT_TOKENS, VOCABULARY)
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(batch * num_tokens / pair.monolith.generate(prompts, num_tokens)["seconds"])
        ours.append(batch * num_tokens / pair.ours.generate(prompts, num_tokens)["seconds"])
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return ratio, statistics.median(ours), statistics.median(theirs)


def warm_up(pair: Pair) -> None:
    """First calls allocate and choose kernels."""
    for engine in (pair.ours, pair.monolith):
        engine.generate(prompts_of(8, PROMPT_TOKENS, VOCABULARY), 4)


def single_engine(bench: Bench, checkpoint: Path, batches: dict[str, int], num_tokens: int, rounds: int,
                  figures: dict[str, object]) -> list[list[object]]:  # fmt: skip
    """One engine and its pool against one monolith, at several batch sizes."""
    pair = load(bench, checkpoint)
    warm_up(pair)
    rows: list[list[object]] = []
    for key, batch in batches.items():
        ratio, ours, theirs = compare(pair, batch, num_tokens, rounds)
        figures[f"ratio_{key}"] = ratio
        figures[f"tokens_s_{key}"], figures[f"tokens_s_vllm_{key}"] = ours, theirs
        rows.append([checkpoint.name, batch, ours, theirs, ratio])
    close(pair)
    return rows


def shared_pool(bench: Bench, checkpoint: Path, batch: int, num_tokens: int, rounds: int,
                figures: dict[str, object]) -> list[list[object]]:  # fmt: skip
    """Two engines on one pool against two monoliths, both engines of a side at work at once."""
    pool = bench.pool(checkpoint, 2, replicas=2)
    ours = [bench.engine(checkpoint, pool=pool, openmp=SEVERAL_ENGINES).wait() for _ in range(2)]
    theirs = [bench.engine(checkpoint, openmp=HALF).wait() for _ in range(2)]
    prompts = prompts_of(batch, PROMPT_TOKENS, VOCABULARY)
    speeds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(rounds + 1):
        for name, engines in (("theirs", theirs), ("ours", ours)):
            for engine in engines:
                engine.start(prompts, num_tokens)
            seconds = max(engine.finish()["seconds"] for engine in engines)
            if i:  # the first round warms up
                speeds[name].append(2 * batch * num_tokens / seconds)
    ratio = statistics.median(a / b for a, b in zip(speeds["ours"], speeds["theirs"], strict=True))
    # Weights are the only thing of this size here: what two monoliths hold more than two engines are their experts.
    held = sum(e.memory()["private"] for e in theirs) - sum(e.memory()["private"] for e in ours)
    figures["shared_pool_speed_ratio"] = ratio
    figures["shared_pool_expert_memory_ratio"] = pool.bytes / held
    figures["shared_pool_expert_bytes"], figures["two_monoliths_expert_bytes"] = pool.bytes, held
    for engine in (*ours, *theirs):
        engine.close()
    pool.close()
    own, other = statistics.median(speeds["ours"]), statistics.median(speeds["theirs"])
    return [["two engines, " + checkpoint.name, f"2x{batch}", own, other, ratio]]


def close(pair: Pair) -> None:
    """End all processes of a pair."""
    for engine in (pair.ours, pair.monolith):
        engine.close()
    pair.pool.close()


def main() -> None:
    """Measure and report."""
    args = report.parser(__doc__).parse_args()
    figures: dict[str, object] = {}
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory(prefix="fm-ck-") as name, Bench() as bench:
        if args.quick:
            checkpoint = tiny("mixtral", Path(name) / "tiny")
            rows += single_engine(bench, checkpoint, {"bs8": 8}, 16, 2, figures)
        else:
            checkpoint = measure_sized(Path(name) / "measure-1.5GiB")
            rows += single_engine(bench, checkpoint, {f"bs{n}": n for n in (1, 8, 32, 64)}, 32, 5, figures)
            rows += single_engine(bench, demo_model.ensure(), {"demo_bs16": 16}, 32, 5, figures)
            rows += shared_pool(bench, checkpoint, 32, 32, 5, figures)
    if not args.quick:
        figures.update(startup.measure(demo_model.ensure()))
    print(report.table("Tokens/s", ["model", "batch", "folkmoot", "vllm", "ratio"], rows))
    report.finish(figures, args.json)


if __name__ == "__main__":
    main()
