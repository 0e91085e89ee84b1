"""Steady load on a cluster, and an account of what every client was owed and what it saw.

A `Question` is a prompt with its sampling parameters; its answer without any disturbance is recorded first (`record`).
`Load` then keeps a number of clients asking, each as soon as its last answer is complete, and notes when every token
came. `faults_of` compares: tokens lost or doubled (an offset that does not follow), tokens that differ, requests that
failed. `longest_gap_s` is what a client felt.
"""

import asyncio
import contextlib
import random
import secrets
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from folkmoot.gateway.client import AsyncClient, FolkmootError

TIMEOUT_S = 180.0
"""A request that takes longer counts as failed."""


@dataclass(frozen=True)
class Question:
    """What is asked: token ids, and vLLM's sampling parameters as client options."""

    key: int
    token_ids: tuple[int, ...]
    options: Mapping[str, Any]


@dataclass
class Answer:
    """What one client saw of one request. Times are of the monotonic clock."""

    question: Question
    request_id: str
    asked_s: float
    token_ids: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    """one for each piece; a piece has one token or more"""
    finish_reason: str | None = None
    misplaced: int = 0
    """tokens that did not come at the offset that was next"""
    error: str | None = None
    cancelled: bool = False
    """by us"""

    @property
    def is_over(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.finish_reason is not None or self.error is not None or self.cancelled

    def take(self, chunk: Any) -> None:
        """One piece of the stream."""
        if chunk.token_ids:
            if chunk.offset != len(self.token_ids):
                self.misplaced += len(chunk.token_ids)
            self.token_ids += chunk.token_ids
            self.arrivals_s.append(time.monotonic())
        self.finish_reason = chunk.finish_reason


@dataclass(frozen=True)
class Faults:
    """What clients were owed and did not get."""

    requests: int = 0
    failed: int = 0
    lost_or_doubled: int = 0
    different: int = 0
    errors: tuple[str, ...] = ()

    def __add__(self, other: "Faults") -> "Faults":
        return Faults(
            self.requests + other.requests,
            self.failed + other.failed,
            self.lost_or_doubled + other.lost_or_doubled,
            self.different + other.different,
            (*self.errors, *other.errors),
        )


def greedy(prompts: Iterable[Sequence[int]], max_tokens: int) -> list[Question]:
    """One greedy question a prompt, of exactly `max_tokens` tokens."""
    options = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    return [Question(i, tuple(prompt), options) for i, prompt in enumerate(prompts)]


class Load:
    """`clients` clients that ask `questions` in a random order (of `seed`) until the context ends.

    Each pauses between two questions for `pause_s` on average (exponentially distributed).
    """

    def __init__(
        self,
        addresses: Sequence[str],
        questions: Sequence[Question],
        clients: int,
        seed: int = 0,
        *,
        pause_s: float = 0.0,
        **options: Any,
    ) -> None:
        self.answers: list[Answer] = []
        self._addresses, self._questions, self._num, self._options = list(addresses), questions, clients, options
        self._random, self._pause_s = random.Random(seed), pause_s
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._ask_on(i)) for i in range(self._num)]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Clients finish the answer they are at; one that hangs is left, and counts as failed."""
        self._stopping = True
        if not self._tasks:
            return
        done, late = await asyncio.wait(self._tasks, timeout=TIMEOUT_S + 10.0)
        for task in late:
            task.cancel()
        for task in done:
            task.result()

    def tokens_between(self, since_s: float, until_s: float) -> int:
        """Tokens that arrived at any client in a span of time (pieces counted as their share of the answer)."""
        total = 0.0
        for answer in self.answers:
            share = len(answer.token_ids) / max(1, len(answer.arrivals_s))
            total += share * sum(since_s <= t < until_s for t in answer.arrivals_s)
        return round(total)

    async def _ask_on(self, number: int) -> None:
        # Clients begin at different gateways, as they would behind a balancer.
        shift = number % len(self._addresses)
        addresses = self._addresses[shift:] + self._addresses[:shift]
        async with AsyncClient(addresses, timeout_s=TIMEOUT_S, reconnect_s=TIMEOUT_S) as client:
            while not self._stopping:
                question = self._random.choice(self._questions)
                self.answers.append(answer := Answer(question, secrets.token_hex(12), time.monotonic()))
                await ask(client, answer, **self._options)
                if self._pause_s:
                    await asyncio.sleep(self._random.expovariate(1 / self._pause_s))


async def ask(client: AsyncClient, answer: Answer, **options: Any) -> None:
    """Ask, and note what comes back; an error is noted as well."""
    question = answer.question
    try:
        async for chunk in client.generate(
            token_ids=question.token_ids, request_id=answer.request_id, **{**question.options, **options}
        ):
            answer.take(chunk)
    except FolkmootError as e:
        answer.error = f"{e.code}: {e}"


async def record(addresses: Sequence[str], questions: Sequence[Question], at_once: int) -> dict[int, list[int]]:
    """The answer to each question while nothing goes wrong. Raises RuntimeError if something does."""
    slots = asyncio.Semaphore(at_once)
    answers = [Answer(question, secrets.token_hex(12), time.monotonic()) for question in questions]

    async def one(client: AsyncClient, answer: Answer) -> None:
        async with slots:
            await ask(client, answer)

    async with AsyncClient(addresses, timeout_s=TIMEOUT_S) as client:
        await asyncio.gather(*(one(client, answer) for answer in answers))
    for answer in answers:
        if answer.error is not None or answer.misplaced:
            raise RuntimeError(f"question {answer.question.key} failed undisturbed: {answer.error}")
    return {answer.question.key: answer.token_ids for answer in answers}


def faults_of(answers: Sequence[Answer], owed: Mapping[int, Sequence[int]]) -> Faults:
    """Pure: what was owed and is missing. An answer that we cancelled owes nothing beyond what came."""
    total = Faults()
    for answer in answers:
        expected, got = owed[answer.question.key], answer.token_ids
        failed = not answer.cancelled and answer.finish_reason is None
        missing = 0 if answer.cancelled or failed else abs(len(expected) - len(got))
        different = sum(a != b for a, b in zip(expected, got, strict=False))
        error = answer.error or ("no end" if failed else None)
        total += Faults(1, int(failed), answer.misplaced + missing, different, (error,) if error else ())
    return total


def longest_gap_s(answers: Sequence[Answer], since_s: float, until_s: float) -> float:
    """The longest time between two pieces that any client saw, of those that overlap a span of time."""
    return max((end - begin for begin, end in _gaps(answers) if begin < until_s and end > since_s), default=0.0)


def usual_gap_s(answers: Sequence[Answer], since_s: float, until_s: float) -> float:
    """The median time between two pieces, of those that lie in a span of time."""
    inside = [end - begin for begin, end in _gaps(answers) if begin >= since_s and end <= until_s]
    return statistics.median(inside) if inside else 0.0


def _gaps(answers: Sequence[Answer]) -> Iterable[tuple[float, float]]:
    for answer in answers:
        yield from zip(answer.arrivals_s, answer.arrivals_s[1:], strict=False)


async def until(check: Any, timeout_s: float, every_s: float = 0.1) -> bool:
    """Poll `check`, run in a thread, until it is true; whether it was in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if await asyncio.to_thread(check):
                return True
        await asyncio.sleep(every_s)
    return False
