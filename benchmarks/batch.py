"""A batch through two engines while processes of every role are killed: each line has one result, and the right one.

First the lines are fed to monolithic vLLM directly, then a batch of them runs undisturbed, which says what every answer
is, how quick it is against vLLM, and whether memory grows with the batch. Then a second batch of the same lines runs
while random processes are killed or stopped; among its lines are some that are no requests, and some poisonous ones,
whose engine is killed whenever it runs one.

    results      lines of both result files, of the second batch
    missing      lines without a result
    doubled      results beyond the first of a line
    different    answers that are not those of the undisturbed run, token by token, and errors where an answer is owed;
                 bad or poisonous lines whose result is not the error that is due

The quick preset has no poisonous lines, since an engine has to come back between two deaths.

    python -m benchmarks.batch --json batch.json
    python -m benchmarks.batch --model demo --lines 1000
"""

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import chaos, clusters, faults, report
from benchmarks.clusters import Cluster, Role
from benchmarks.engines import Bench, prompts_of
from benchmarks.failover import made
from benchmarks.faults import DidNotHappen
from folkmoot.gateway.batch_client import AsyncBatches
from folkmoot.gateway.client import AsyncClient, FolkmootError
from folkmoot.gateway.pb import batches_pb2, gateway_pb2

OPTIONS = ("--dtype", "float32", "--max-model-len", "512", "--engines", "2", "--hosts", "3", "--replicas", "2")
PROMPT_TOKENS, MAX_TOKENS, POISON_TOKENS = 16, 16, 480
FAULT_EVERY_S, FAULT_EVERY_QUICK_S = 2.5, 1.0
LONGER = 1.1
"""Engines take seconds to come back: each pause between two faults is so much longer than the one before."""
SAMPLE_S = 0.5
TIMEOUT_S = 3600.0
BAD: Sequence[bytes] = (
    b'{"custom_id": "bad-%d", ',
    b'{"custom_id": "bad-%d", "method": "POST", "url": "/v1/none", "body": {}}',
)

Answers = Mapping[str, Sequence[int]]


@dataclass
class Ran:
    """A batch that has ended, and what came of it."""

    batch: batches_pb2.Batch
    rows: list[dict[str, Any]]
    errors: list[dict[str, Any]]
    resident: dict[Role, list[int]] = field(default_factory=lambda: {Role.GATEWAY: [], Role.ENGINE: []})
    """bytes of the largest process of a role, over time"""

    @property
    def tokens_s(self) -> float:
        """Completion tokens a second, from the call that created it to its end."""
        return 1e3 * self.batch.completion_tokens / max(1, self.batch.ended_ms - self.batch.created_ms)


def line(name: str, prompt: Sequence[int], max_tokens: int) -> bytes:
    """A greedy completion of exactly so many tokens."""
    body = {"prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}).encode()


def disturbed_file(good: Sequence[bytes], num_bad: int, num_poison: int, rng: random.Random) -> list[bytes]:
    """The good lines, and bad and poisonous ones among them."""
    bad = [BAD[i % len(BAD)] % i for i in range(num_bad)]
    poison = [line(f"poison-{i}", [100 + i] * PROMPT_TOKENS, POISON_TOKENS) for i in range(num_poison)]
    lines = [*good]
    for one in (*bad, *poison):
        lines.insert(rng.randrange(len(lines)), one)
    return lines


def direct(model: Path, prompts: Sequence[Sequence[int]], rounds: int) -> tuple[float, Answers]:
    """Monolithic vLLM fed the same: its completion tokens/s (median), and its answers."""
    with Bench() as bench:
        engine = bench.engine(model, openmp={}, dtype="float32").wait()
        engine.generate(prompts[:64], 4)  # warms up
        ran = [engine.generate(prompts, MAX_TOKENS) for _ in range(rounds)]
    speed = statistics.median(len(prompts) * MAX_TOKENS / one["seconds"] for one in ran)
    return speed, {f"line-{i}": tokens for i, tokens in enumerate(ran[0]["tokens"])}


async def run_batch(cluster: Cluster, batch_id: str, lines: Sequence[bytes], *, sample: bool = False) -> Ran:
    """Create, wait, and read both files."""
    async with AsyncClient(cluster.addresses, reconnect_s=TIMEOUT_S) as client:
        batches = AsyncBatches(client)
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
            file.write(b"\n".join(lines))
            file.flush()
            await batches.create(Path(file.name), batch_id=batch_id)
        ran = Ran(batches_pb2.Batch(), [], [])
        sampling = asyncio.create_task(_sample(cluster, ran.resident)) if sample else None
        ran.batch = await batches.wait(batch_id, TIMEOUT_S)
        if sampling is not None:
            sampling.cancel()
        ran.rows = [json.loads(text) async for text in batches.results(batch_id)]
        ran.errors = [json.loads(text) async for text in batches.results(batch_id, errors=True)]
    return ran


async def _sample(cluster: Cluster, resident: dict[Role, list[int]]) -> None:
    pids = {role: cluster.pids(role) for role in resident}
    while True:
        for role, found in resident.items():
            with suppress(OSError):
                found.append(max(_resident(pid) for pid in pids[role]))
        await asyncio.sleep(SAMPLE_S)


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@dataclass
class Broken:
    """What was done to the cluster meanwhile."""

    injected: list[str] = field(default_factory=list)
    poisoned: Counter[str] = field(default_factory=Counter)
    """engines killed a poisonous line"""


async def break_things(cluster: Cluster, broken: Broken, rng: random.Random, every_s: float) -> None:
    """Every kind of fault once in random order, then any, ever more seldom, so that it ends; until cancelled."""
    kinds = rng.sample(list(chaos.KINDS), len(chaos.KINDS))
    while True:
        await asyncio.sleep(rng.uniform(0.5, 1.5) * every_s)
        every_s *= LONGER
        fault = kinds.pop() if kinds else rng.choices(list(chaos.KINDS), list(chaos.KINDS.values()))[0]
        try:
            await faults.inject_soon(cluster, fault, rng)
            broken.injected.append(fault.name)
            print(f"  {fault.name}", flush=True)
        except DidNotHappen:
            kinds.insert(0, fault)
        await asyncio.to_thread(cluster.tend)


async def poison(cluster: Cluster, batch_id: str, indices: Mapping[int, str], broken: Broken) -> None:
    """Kill the engine of each poisonous line that runs, until cancelled."""
    seen: set[tuple[str, int]] = set()
    async with AsyncClient(cluster.addresses, reconnect_s=TIMEOUT_S) as client:
        while True:
            for index, name in indices.items():
                with suppress(FolkmootError):
                    found = await client.request(f"batch:{batch_id}:{index}")
                    attempt = (name, found.attempts)
                    if found.state != gateway_pb2.RUNNING or attempt in seen:
                        continue
                    if await asyncio.to_thread(_kill_engine, cluster, found.engine):
                        seen.add(attempt)
                        broken.poisoned[name] += 1
            await asyncio.sleep(0.05)


def _kill_engine(cluster: Cluster, engine: str) -> bool:
    """Whether the engine of this name was there, and is dead now."""
    with suppress(Exception):
        pids = {one["engine"]: one["pid"] for one in cluster.status()["engines"]}
        clusters.kill(pids[engine])
        return True
    return False


async def run_disturbed(
    cluster: Cluster, lines: Sequence[bytes], broken: Broken, rng: random.Random, every_s: float
) -> Ran:
    """The batch among faults."""
    poisonous = {i: f"poison-{i}" for i, one in enumerate(lines) if b'"poison-' in one}
    tasks = [asyncio.create_task(break_things(cluster, broken, rng, every_s)),
             asyncio.create_task(poison(cluster, "disturbed", poisonous, broken))]  # fmt: skip
    try:
        return await run_batch(cluster, "disturbed", lines)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(cluster.tend)


def answers_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Token ids by custom_id."""
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["token_ids"] for row in rows}


def account(lines: Sequence[bytes], ran: Ran, owed: Answers) -> dict[str, int]:
    """Pure: results against what each line is owed. Names of lines begin with line-, bad- or poison-."""
    names = [one.split(b'"', 4)[3].decode() for one in lines]
    found = Counter(row["custom_id"] for row in (*ran.rows, *ran.errors))
    answers, failed = answers_of(ran.rows), {row["custom_id"]: row for row in ran.errors}
    different = sum(answers.get(name) != list(owed[name]) for name in names if name.startswith("line-"))
    bad = [failed.get(name, {}) for name in names if name.startswith("bad-")]
    poisoned = [failed.get(name, {}) for name in names if name.startswith("poison-")]
    unaccounted_bad = sum(not row.get("error") for row in bad)
    unaccounted_poison = sum("given up after" not in json.dumps(row) for row in poisoned)
    return {
        "results": len(ran.rows) + len(ran.errors),
        "missing": len(set(names) - set(found)),
        "doubled": sum(found.values()) - len(found),
        "different": different + unaccounted_bad + unaccounted_poison,
        "bad_lines": len(bad),
        "bad_lines_unaccounted": unaccounted_bad,
        "poisonous_lines": len(poisoned),
        "poisonous_lines_unaccounted": unaccounted_poison,
    }


def failures(ran: Ran) -> list[list[object]]:
    """Name and error of each line that has one, other than the bad ones."""
    failed = [row for row in ran.errors if not row["custom_id"].startswith("bad-")]
    return [[row["custom_id"], row["error"] or row["response"]["body"]] for row in failed]


def growth(samples: Sequence[int]) -> float:
    """MiB from the second quarter of a run, when all is warm, to the last."""
    quarter = max(1, len(samples) // 4)
    return (statistics.mean(samples[-quarter:]) - statistics.mean(samples[quarter : 2 * quarter] or samples)) / 2**20


def main() -> None:
    """Run, report, and exit with 1 where a result is missing, doubled or wrong."""
    parser = report.parser(__doc__)
    parser.add_argument("--lines", type=int, help="good lines  [default: 10,000; quick: 300]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", choices=["demo", "tiny"], default="tiny", help="the demo model, or a tiny checkpoint"
    )
    args = parser.parse_args()
    num = args.lines or (300 if args.quick else 10_000)
    num_bad, num_poison, every_s = (4, 0, FAULT_EVERY_QUICK_S) if args.quick else (100, 3, FAULT_EVERY_S)
    rng, prompts = random.Random(args.seed), prompts_of(num, PROMPT_TOKENS, 500, args.seed)
    good = [line(f"line-{i}", prompt, MAX_TOKENS) for i, prompt in enumerate(prompts)]
    lines, broken = disturbed_file(good, num_bad, num_poison, rng), Broken()
    with tempfile.TemporaryDirectory(prefix="fm-ck-") as name:
        model = made(args.model, Path(name))
        vllm_tokens_s, vllm_answers = direct(model, prompts, 1 if args.quick else 3)
        with Cluster(model, OPTIONS, gateways=2) as cluster:
            asyncio.run(run_batch(cluster, "warm", good[:128]))
            calm = asyncio.run(run_batch(cluster, "calm", good, sample=True))
            began = time.monotonic()
            ran = asyncio.run(run_disturbed(cluster, lines, broken, rng, every_s))
            disturbed_s = time.monotonic() - began
            letters = asyncio.run(_letters(cluster))
        owed = answers_of(calm.rows)
    figures: dict[str, object] = {
        **account(lines, ran, owed),
        "lines": len(lines),
        "faults": len(broken.injected) + sum(broken.poisoned.values()),
        "kinds_of_faults": len(set(broken.injected)) + bool(broken.poisoned),
        "engines_killed_by_poison": sum(broken.poisoned.values()),
        "dead_letters": letters,
        "undisturbed_results": len(calm.rows),
        "undisturbed_unlike_vllm": sum(list(owed.get(n, ())) != list(t) for n, t in vllm_answers.items()),
        "tokens_s": calm.tokens_s,
        "tokens_s_vllm": vllm_tokens_s,
        "ratio_to_vllm": calm.tokens_s / vllm_tokens_s,
        "ratio_disturbed": ran.tokens_s / calm.tokens_s,
        "disturbed_s": disturbed_s,
        "gateway_growth_mib": growth(calm.resident[Role.GATEWAY]),
        "engine_growth_mib": growth(calm.resident[Role.ENGINE]),
        "gateway_resident_mib": max(calm.resident[Role.GATEWAY]) / 2**20,
        "engine_resident_mib": max(calm.resident[Role.ENGINE]) / 2**20,
    }
    rows = [[kind, number] for kind, number in Counter(broken.injected).items()]
    print(report.table("Faults", ["fault", "times"], [*rows, ["kill the engine of a poisonous line",
                                                             sum(broken.poisoned.values())]]))  # fmt: skip
    print(report.table("Lines that ended with an error", ["line", "error"], failures(ran)))
    report.finish(figures, args.json)
    sys.exit(bool(figures["missing"] or figures["doubled"] or figures["different"]))


async def _letters(cluster: Cluster) -> int:
    async with AsyncClient(cluster.addresses) as client:
        return len(await AsyncBatches(client).dead_letters(most=1000))


if __name__ == "__main__":
    main()
