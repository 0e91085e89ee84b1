"""Chaos: random faults of every kind under mixed load, with a checker that knows what every client was owed.

A seeded schedule kills or stops processes of every role while clients of several kinds ask: greedy, seeded sampling,
penalties, stop strings, both lanes; some cancel in the middle, some leave and follow later from where they were. In
float32 every answer is known beforehand, token by token. At the end everything must be as before: processes, file
descriptors, shared memory, keys in the store, memory.

    violations   requests that failed or hung, tokens lost, doubled or different, faults that could not be injected
    leaks        kinds of things of which there are more than before

A run whose faults did not all happen has failed, and exits with 1, as does one with violations or leaks.

    python -m benchmarks.chaos --seconds 900 --seed 1 --json chaos.json
"""

import asyncio
import os
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import faults, load, report, snapshot
from benchmarks.checkpoints import tiny
from benchmarks.clusters import Cluster
from benchmarks.engines import prompts_of
from benchmarks.faults import DidNotHappen, Fault
from benchmarks.load import TIMEOUT_S, Answer, Faults, Question
from folkmoot.experts import warm
from folkmoot.gateway.client import AsyncClient, FolkmootError

OPTIONS = (
    *("--dtype", "float32", "--max-model-len", "512", "--engines", "2", "--hosts", "3", "--replicas", "2"),
    *("--micro-batch-from", "3"),
)
FAULT_EVERY_S = 4.0
RETRY_FAULT_S = 60.0
"""How long to wait for a process to break, where all of a role are just being brought back."""
SETTLE_TIMEOUT_S = 180.0
LEAKS_TIMEOUT_S = 30.0
CANCEL, LEAVE = 0.05, 0.10
"""Shares of clients that cancel, or leave and follow later."""

KINDS: Mapping[Fault, int] = {
    faults.KILL_HOST: 6,
    faults.STALL_HOST: 2,
    faults.KILL_ACTOR: 3,
    faults.KILL_ENGINE: 2,
    faults.KILL_CORE: 2,
    faults.KILL_REPLICA: 1,
    faults.STALL_ENGINE: 1,
    faults.KILL_ROUTER: 2,
    faults.STALL_ROUTER: 1,
    faults.KILL_GATEWAY: 4,
    faults.KILL_STORE: 2,
    faults.STALL_STORE: 1,
    faults.KILL_WARM: 1,
    faults.KILL_TEMPLATE: 1,
    faults.KILL_RESERVE: 1,
}
"""Each kind of fault, and how often it comes, relative to the others."""


@dataclass
class Run:
    """What has happened so far."""

    answers: list[Answer] = field(default_factory=list)
    injected: list[faults.Injected] = field(default_factory=list)
    not_injected: list[str] = field(default_factory=list)
    stopping: bool = False


def schedule(seconds: float, seed: int) -> list[tuple[float, Fault]]:
    """Pure: (seconds from the start, fault) pairs. Every kind comes at least once where there is time for all."""
    rng = random.Random(seed)
    num = max(1, int(seconds / FAULT_EVERY_S))
    kinds = rng.sample(list(KINDS), min(num, len(KINDS)))
    kinds += rng.choices(list(KINDS), list(KINDS.values()), k=num - len(kinds))
    rng.shuffle(kinds)
    times = sorted(rng.uniform(0, seconds) for _ in kinds)
    return list(zip(times, kinds, strict=True))


def questions() -> list[Question]:
    """Questions of every kind that a client can ask and that has one right answer."""
    prompts = prompts_of(24, 16, 500)
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "lane": "batch"},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.0, "frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"temperature": 0.8, "top_p": 0.9, "seed": 11, "stop": ["moot"]},
        {"temperature": 0.0, "logprobs": 2},
    ]
    return [
        Question(i, tuple(prompt), {"max_tokens": 16 + 8 * (i % 5), "ignore_eos": True, **kinds[i % len(kinds)]})
        for i, prompt in enumerate(prompts)
    ]


async def client(cluster: Cluster, asked: Sequence[Question], run: Run, number: int, rng: random.Random) -> None:
    """One client that asks until the run stops."""
    addresses = cluster.addresses[number % 2 :] + cluster.addresses[: number % 2]
    async with AsyncClient(addresses, timeout_s=TIMEOUT_S, reconnect_s=TIMEOUT_S) as connected:
        while not run.stopping:
            answer = Answer(rng.choice(asked), secrets.token_hex(12), time.monotonic())
            run.answers.append(answer)
            mood = rng.random()
            if mood < CANCEL:
                await _ask_and_cancel(connected, answer)
            elif mood < CANCEL + LEAVE:
                await _ask_and_return(connected, answer, rng)
            else:
                await load.ask(connected, answer)


async def _ask_and_cancel(connected: AsyncClient, answer: Answer) -> None:
    question = answer.question
    try:
        stream = connected.generate(token_ids=question.token_ids, request_id=answer.request_id, **question.options)
        async for chunk in stream:
            answer.take(chunk)
            if len(answer.token_ids) >= 4 and answer.finish_reason is None:
                answer.cancelled = True
                await connected.cancel(answer.request_id)
                break
    except FolkmootError as e:
        answer.error = f"{e.code}: {e}"


async def _ask_and_return(connected: AsyncClient, answer: Answer, rng: random.Random) -> None:
    """Leave after some tokens, and come back for the rest."""
    question, leave_at = answer.question, rng.randrange(1, 16)
    try:
        stream = connected.generate(
            token_ids=question.token_ids, request_id=answer.request_id, detach=True, **question.options
        )
        async for chunk in stream:
            answer.take(chunk)
            if len(answer.token_ids) >= leave_at and answer.finish_reason is None:
                break
        await asyncio.sleep(rng.uniform(0, 1.0))
        if answer.finish_reason is None:
            async for chunk in connected.follow(answer.request_id, len(answer.token_ids)):
                answer.take(chunk)
    except FolkmootError as e:
        answer.error = f"{e.code}: {e}"


async def break_things(cluster: Cluster, plan: Sequence[tuple[float, Fault]], run: Run, rng: random.Random) -> None:
    """Carry out the schedule. A fault that finds no process waits for one, and all later ones are put off with it: else
    they would come all at once, and kill whatever has just come back."""
    began = time.monotonic()
    late_s = 0.0
    for at_s, fault in plan:
        await asyncio.sleep(max(0.0, began + at_s + late_s - time.monotonic()))
        until = time.monotonic() + RETRY_FAULT_S
        while True:
            try:
                run.injected.append(injected := await faults.inject_soon(cluster, fault, rng))
                print(f"{time.monotonic() - began:6.1f} s  {fault.name} ({injected.pid})", flush=True)
                break
            except DidNotHappen as e:
                if time.monotonic() > until:
                    run.not_injected.append(str(e))
                    break
                await asyncio.sleep(0.5)
        await asyncio.to_thread(cluster.tend)
        late_s = max(late_s, time.monotonic() - began - at_s)


async def play(cluster: Cluster, plan: Sequence[tuple[float, Fault]], clients: int, seed: int) -> tuple[Run, Faults]:
    """Learn the answers, load, break, wait for the last answers, and compare."""
    asked, run = questions(), Run()
    owed = await load.record(cluster.addresses, asked, clients)
    asking = [
        asyncio.create_task(client(cluster, asked, run, i, random.Random(seed * 1000 + i))) for i in range(clients)
    ]
    await break_things(cluster, plan, run, random.Random(seed))
    run.stopping = True
    _, hung = await asyncio.wait(asking, timeout=TIMEOUT_S + 20.0)
    for task in hung:
        task.cancel()
    for task in set(asking) - hung:
        task.result()
    return run, load.faults_of(run.answers, owed)


def main() -> None:
    """Run, report, and exit with 1 where something is not as it must be."""
    parser = report.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=900.0, help="how long to break things")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=8)
    args = parser.parse_args()
    seconds = 40.0 if args.quick else args.seconds
    plan = schedule(seconds, args.seed)
    os.environ.pop(warm.SEEDS, None)  # the death of a warm parent shall cost an import
    with tempfile.TemporaryDirectory(prefix="fm-ck-") as name:
        model = tiny("mixtral", Path(name) / "tiny", dtype="float32")
        with Cluster(model, OPTIONS, gateways=2) as cluster:
            asyncio.run(load.record(cluster.addresses, questions(), args.clients))  # first calls allocate
            before = snapshot.take(cluster)
            run, account = asyncio.run(play(cluster, plan, args.clients, args.seed))
            ended_s = time.time()
            whole = asyncio.run(load.until(lambda: cluster.is_whole(ended_s), SETTLE_TIMEOUT_S))
            leaks = snapshot.settled_leaks(cluster, before, LEAKS_TIMEOUT_S)
    figures = _report(plan, run, account, leaks, whole)
    report.finish(figures, args.json)
    sys.exit(bool(figures["violations"] or figures["leaks"] or figures["faults"] != len(plan)))


def _report(
    plan: Sequence[tuple[float, Fault]], run: Run, account: Faults, leaks: Sequence[str], whole: bool
) -> dict[str, object]:
    happened = Counter(i.fault.name for i in run.injected)
    print(report.table("Faults", ["fault", "planned", "happened"], [
        [kind.name, sum(f is kind for _, f in plan), happened[kind.name]] for kind in KINDS
    ]))  # fmt: skip
    for what in (*sorted(set(account.errors)), *run.not_injected, *leaks, *(() if whole else ("not whole again",))):
        print(f"violation or leak: {what}")
    violations = account.failed + account.lost_or_doubled + account.different + len(run.not_injected) + (not whole)
    return {
        "faults": len(run.injected),
        "faults_planned": len(plan),
        "requests": account.requests,
        "requests_failed": account.failed,
        "tokens_lost_or_doubled": account.lost_or_doubled,
        "tokens_different": account.different,
        "violations": int(violations),
        "leaks": len(leaks),
    }


if __name__ == "__main__":
    main()
