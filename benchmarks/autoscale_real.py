"""A cluster whose engines come and go with the work: real engines, real requests, and what becomes of leased ones.

A flood of interactive requests makes it start engines. When the flood is over, batch requests that a single engine can
do are kept going, so that an engine is taken away while it holds some. Then nothing is asked, until no engine is left,
and one more request starts one. Every answer must be the one of a quiet cluster, given in one attempt.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.load import Answer, Faults, Load, Question, ask, faults_of, greedy, record
from folkmoot.gateway.client import AsyncClient

TIMEOUT_S = 120.0
FLOOD_CLIENTS = 96
STEADY_CLIENTS = 6
PROMPTS = [[3 + n, 40 + 2 * n, 7, 90 + n] for n in range(6)]


@dataclass
class Watch:
    """What the status document said, again and again."""

    addresses: Sequence[str]
    phases: dict[str, str] = field(default_factory=dict)
    taken_with_work: set[str] = field(default_factory=set)
    """engines that were told to go while they held requests"""
    most: int = 0
    engine_s: float = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        last_s = time.monotonic()
        async with AsyncClient(list(self.addresses)) as client:
            while True:
                await asyncio.sleep(0.2)
                engines = await _engines(client)
                now_s = time.monotonic()
                self.engine_s += len(engines) * (now_s - last_s)
                last_s = now_s
                self.phases = {e["engine"]: e["phase"] for e in engines}
                self.most = max(self.most, self.num("ready"))
                self.taken_with_work |= {e["engine"] for e in engines if e["phase"] == "stopping" and e.get("running")}

    def num(self, phase: str) -> int:
        """Engines in a phase."""
        return list(self.phases.values()).count(phase)

    async def until_ready(self, count: int) -> float:
        """Seconds until exactly so many engines serve, and no other is there. Raises TimeoutError."""
        began_s = time.monotonic()
        while self.num("ready") != count or len(self.phases) != count:
            if time.monotonic() - began_s > TIMEOUT_S:
                raise TimeoutError(f"not {count} engines within {TIMEOUT_S:.0f} s: {self.phases}")
            await asyncio.sleep(0.1)
        return time.monotonic() - began_s


@dataclass(frozen=True)
class Run:
    """What came of it."""

    up_s: float
    """from the flood to the last engine that it made the cluster start"""
    down_s: float
    """from its end to one engine less, beside batch work"""
    zero_s: float
    """from the last request to no engine"""
    from_zero_s: float
    """time to the first token where no engine was up"""
    engine_s: float
    most: int
    taken_with_work: int
    faults: Faults
    attempts: int
    """of all requests, beyond the first"""


async def come_and_go(addresses: Sequence[str], engines: int) -> Run:
    """The whole story, on a cluster that may have from none to so many engines. Raises TimeoutError."""
    short, long = greedy(PROMPTS, 128), greedy(PROMPTS, 200)
    long = [Question(len(short) + q.key, q.token_ids, q.options) for q in long]
    expected = await record(addresses, [*short, *long], 4)
    watch = Watch(addresses)
    watching = asyncio.create_task(watch.run())
    try:
        async with Load(addresses, long, STEADY_CLIENTS, lane="batch") as steady:
            async with Load(addresses, short, FLOOD_CLIENTS) as flood:
                up_s = await watch.until_ready(engines)
            down_s = await watch.until_ready(1)
        zero_s = await watch.until_ready(0)
        from_zero_s, last = await _first_token(addresses, short[0])
        answers = [*flood.answers, *steady.answers, last]
        attempts = await _attempts(addresses, answers)
    finally:
        watching.cancel()
    return Run(
        up_s, down_s, zero_s, from_zero_s, watch.engine_s, watch.most, len(watch.taken_with_work),
        faults_of(answers, expected), attempts,
    )  # fmt: skip


async def _first_token(addresses: Sequence[str], question: Question) -> tuple[float, Answer]:
    answer = Answer(question, secrets.token_hex(12), time.monotonic())
    async with AsyncClient(list(addresses)) as client:
        await ask(client, answer)
    return (answer.arrivals_s[0] - answer.asked_s if answer.arrivals_s else TIMEOUT_S), answer


async def _attempts(addresses: Sequence[str], answers: Sequence[Answer]) -> int:
    """Leases beyond each request's first that count: those of an engine that was lost."""
    async with AsyncClient(list(addresses)) as client:
        return sum([max(0, (await client.request(a.request_id)).attempts - 1) for a in answers])


async def _engines(client: AsyncClient) -> list[dict[str, Any]]:
    document = json.loads((await client.status()).json or "{}")
    return [e for e in document.get("engines", []) if e["phase"] != "dead"]
