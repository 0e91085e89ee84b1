"""One batch, run by the gateway that holds its lease: from its lines to requests, from their answers to results.

Requests are ordinary detached ones of the batch lane, with ids made of batch and line: whoever takes the batch over
submits the lines without a result again, and joins what is under way. A bounded part of the batch is in the queue at a
time: enough to keep engines full. Nothing here has to survive; all that counts is in the store.
"""

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from folkmoot import logs
from folkmoot.gateway import tasks, tracing
from folkmoot.gateway.batch_answers import joined
from folkmoot.gateway.batch_check import FileCheck
from folkmoot.gateway.batch_store import Answer, BatchLease, BatchStore, Result
from folkmoot.gateway.batch_translate import Asked, Translation
from folkmoot.gateway.demand import Demands
from folkmoot.gateway.errors import GatewayError, LimitReached, LostBatch, QueueFull, RequestIdTaken, StoreError, public
from folkmoot.gateway.lease_span import usage_of
from folkmoot.gateway.limits import NO_LIMITS
from folkmoot.gateway.pb import batch_input_pb2
from folkmoot.gateway.queue import Load, ModelRecord, QueueSettings, RequestQueue, Submission
from folkmoot.gateway.tracing import Attributes, Span, TraceContext

log = logging.getLogger(__name__)

POLL_S = 0.1
LOOK_S = 1.0  # how often requests past their deadline are ended
SUBMITS_A_CALL = 64
RESULTS_A_CALL, RESULT_BYTES_A_CALL = 256, 4 << 20
MAX_IN_QUEUE = 4096  # lines of one batch
MAX_AGAIN = 5
RATE_S = 30.0
OWE_EVERY_S = 5.0
ABORTED, DEADLINE_EXCEEDED, UNAVAILABLE = 10, 4, 14
ASK_AGAIN = (ABORTED, UNAVAILABLE)
EXPIRED = ("batch_expired", "the completion window was over before this line was answered")
CANCELLED = ("batch_cancelled", "the batch was cancelled before this line was answered")

Lines = AsyncIterator[tuple[int, batch_input_pb2.InputLine]]


@dataclass
class Pace:
    """Lines and tokens a second, over the last RATE_S seconds."""

    lines: int = 0
    tokens: int = 0
    _marks: deque[tuple[float, int, int]] = field(default_factory=lambda: deque([(time.monotonic(), 0, 0)]))

    def add(self, results: Sequence[Result]) -> None:
        """Results that have come."""
        self.lines += len(results)
        self.tokens += sum(one.prompt_tokens + one.completion_tokens for one in results)

    def now(self) -> tuple[float, float]:
        """(lines/s, tokens/s)."""
        at_s = time.monotonic()
        while len(self._marks) > 1 and self._marks[1][0] < at_s - RATE_S:
            self._marks.popleft()
        since_s, lines, tokens = self._marks[0]
        self._marks.append((at_s, self.lines, self.tokens))
        span_s = max(at_s - since_s, 1e-3)
        return (self.lines - lines) / span_s, (self.tokens - tokens) / span_s


class BatchRun:
    """`run` it once."""

    def __init__(self, queue: RequestQueue, batches: BatchStore, lease: BatchLease, default_answer_tokens: int) -> None:
        self._queue, self._batches, self._lease = queue, batches, lease
        self._default_answer_tokens = default_answer_tokens
        self._total, self._limits = 0, NO_LIMITS
        self._models: Mapping[str, ModelRecord] = {}
        self._asked: dict[str, Asked] = {}  # in the queue, by request id
        self._waiting: deque[Asked] = deque()  # to be submitted before new lines
        self._results: list[Result] = []
        self._owed_tokens = 0
        self._read_all = False
        self._status, self._ends_s = "", 0.0
        self._looked_s = 0.0
        self._demands, self._estimates, self._unread = Demands(queue.store), dict[str, int](), 0
        self._deadline_s = self._owes_again_s = 0.0
        self._pace = Pace()
        self._trace: TraceContext | None = None
        self._spans: dict[int, Span] = {}  # of lines that are under way

    async def run(self) -> None:
        """Until the batch has ended, or its lease is lost, or the store is away: then someone takes it up again."""
        beat: asyncio.Task[None] | None = None
        try:
            await self._renew()
            batch = await self._batches.get(self._lease.batch_id)
            self._deadline_s = batch.deadline_ms / 1000
            logs.bind(batch_id=public(batch.id), tenant=batch.tenant)
            self._total, self._limits = batch.total, await self._batches.limits(self._lease)
            self._trace = await self._batches.trace(self._lease)
            self._translation = Translation(batch.id, batch.endpoint, batch.tenant, self._default_answer_tokens)
            beat = asyncio.create_task(self._beat())
            if self._status == "validating":
                await self._validate()
            if self._status == "in_progress":
                await self._work()
            await self._end()
            log.info("the batch has ended: %s", self._status)
        except (LostBatch, StoreError) as e:
            log.warning("batch %s: %s", self._lease.batch_id, e)
        except asyncio.CancelledError:  # this gateway stops
            await self._leave()
            raise
        finally:
            for span in self._spans.values():
                span.end()
            if beat is not None:
                await tasks.cancel([beat])

    # ------------------------------------------------------------------------------------------- the lease

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._batches.lease_s / 3)
            try:
                await self._renew()
            except LostBatch:
                self._status = "lost"
            except StoreError as e:
                log.warning("the lease of batch %s is not renewed: %s", self._lease.batch_id, e)

    async def _renew(self) -> None:
        self._status, left_s = await self._batches.renew(self._lease, *self._pace.now())
        self._ends_s = time.monotonic() + left_s

    async def _leave(self) -> None:
        try:
            await self._batches.leave(self._lease)
        except GatewayError as e:  # then it runs out
            log.warning("batch %s is not given up: %s", self._lease.batch_id, e)

    # ------------------------------------------------------------------------------------------ the states

    async def _validate(self) -> None:
        found = FileCheck(await self._queue.models(), self._translation.endpoint, self._default_answer_tokens)
        async for block in self._batches.blocks(self._lease):
            for line in block.lines:
                found.add(line)
        move = self._batches.move
        if faults := found.faults():
            self._status = await move(self._lease, "validating", "failed", faults=json.dumps(faults))
        else:
            tokens: dict[str, str | int] = {
                "estimated": found.estimated.total(),
                "estimates": json.dumps(found.estimated),
            }
            self._status = await move(self._lease, "validating", "in_progress", **tokens)

    async def _work(self) -> None:
        """Until each line has its result, or time is up, or it is cancelled."""
        lines = self._undone()
        self._unread = self._total - await self._num_done()
        self._estimates = await self._batches.estimates(self._lease)
        while self._status == "in_progress" and time.monotonic() < self._ends_s:
            await self._fill(lines)
            await self._collect()
            await self._flush()
            if self._read_all and not self._asked and not self._waiting:
                break
            if time.monotonic() >= self._owes_again_s:
                await self._owe(self._unread)
            await asyncio.sleep(POLL_S)
        await self._owe(0)

    async def _end(self) -> None:
        if self._status == "in_progress":
            outcome = "completed" if await self._num_done() >= self._total else "expired"
            self._status = await self._batches.move(self._lease, "in_progress", "finalizing", outcome=outcome)
        if self._status == "finalizing":
            if (outcome := await self._batches.outcome(self._lease)) == "expired":
                await self._settle(*EXPIRED)
            self._status = await self._batches.move(self._lease, "finalizing", outcome)
        elif self._status == "cancelling":
            await self._settle(*CANCELLED)
            self._status = await self._batches.move(self._lease, "cancelling", "cancelled")

    async def _num_done(self) -> int:
        return sum(byte.bit_count() for byte in await self._batches.done(self._lease))

    async def _owe(self, lines: int) -> None:
        """Tell autoscalers how many lines are not in the queue yet, in tokens."""
        self._owes_again_s = time.monotonic() + OWE_EVERY_S
        for model, tokens in self._estimates.items():
            left = tokens * lines / self._total
            await self._demands.owe(model, f"batch:{self._lease.batch_id}", left, self._deadline_s)

    async def _settle(self, code: str, message: str) -> None:
        """Each line that has no result gets one: its answer where that is there already, else this error."""
        models = list(await self._queue.models())
        lines = self._undone()
        while group := [one async for one in _some(lines, RESULTS_A_CALL)]:
            unanswered = []
            for index, line in group:
                parsed = self._translation.parsed(index, line)
                if isinstance(parsed, Asked):
                    request = parsed.line.request
                    request.model = request.model or (models[0] if len(models) == 1 else "")
                    self._asked[self._translation.request_id(index)] = parsed
                    parsed = self._translation.unanswered(index, parsed.line.custom_id, code, message)
                unanswered.append(parsed)
            await self._collect()
            self._results += unanswered  # the first result of a line is its only one
            await self._flush()
            self._asked.clear()

    # -------------------------------------------------------------------------------- lines become requests

    async def _undone(self) -> Lines:
        """The lines without a result, with their indices."""
        done = await self._batches.done(self._lease)
        async for block in self._batches.blocks(self._lease):
            for index, line in enumerate(block.lines, block.first):
                if index // 8 >= len(done) or not done[index // 8] >> (7 - index % 8) & 1:
                    yield index, line

    async def _fill(self, lines: Lines) -> None:
        """Submit lines while there is room."""
        self._models = await self._queue.models()
        if not self._models:
            return  # no engine has ever been here
        room = window(await self._load(), self._batches.settings.batch_window_tokens, self._queue.settings)
        room -= self._owed_tokens
        group: list[Asked] = []
        while room > 0 and len(self._asked) + len(group) < MAX_IN_QUEUE and (one := await self._next(lines)):
            group.append(one)
            room -= one.cost
            if len(group) == SUBMITS_A_CALL:
                if not await self._submit(group):
                    return
                group = []
        await self._submit(group)

    async def _load(self) -> Load:
        """Of the models that this batch is under way with."""
        total = Load()
        for model in {one.line.request.model for one in self._asked.values()}:
            total += await self._queue.lane_load(model, "batch")
        return total

    async def _next(self, lines: Lines) -> Asked | None:
        """The next line that makes a request; those that do not have their error."""
        if self._waiting:
            return self._waiting.popleft()
        async for index, line in lines:
            self._unread -= 1
            asked = self._translation.prepared(index, line, self._models)
            if isinstance(asked, Asked):
                return asked
            self._results.append(asked)
            await self._flush_many()
        self._read_all = True
        return None

    def _span(self, index: int) -> Span:
        """A line's, from the first time on that it is submitted: a trace of its own, linked to the batch's."""
        if index not in self._spans:
            attributes: Attributes = {"folkmoot.batch.id": public(self._lease.batch_id), "folkmoot.batch.line": index}
            links = [self._trace] if self._trace is not None else []
            self._spans[index] = tracing.span("batch line", "producer", None, attributes, links)
        return self._spans[index]

    async def _submit(self, group: Sequence[Asked]) -> bool:
        """False where the queue is full, or the tenant has what it may: some wait for another time."""
        left_s = max(0.0, self._ends_s - time.monotonic())
        submissions = [
            Submission(
                request_id=self._translation.request_id(one.index),
                model=one.line.request.model,
                request=one.line.request,
                cost=one.cost,
                remaining_s=left_s,
                grace_s=0.0,
                limits=self._limits,
                trace=self._span(one.index).context,
            )
            for one in group
        ]
        answers = await asyncio.gather(*map(self._queue.submit, submissions), return_exceptions=True)
        has_room = True
        for one, answer in zip(group, answers, strict=True):
            if isinstance(answer, LimitReached) and answer.retry_after_ms is None:
                self._spans.pop(one.index).end()
                self._results.append(self._translation.over_limit(one, answer))
            elif isinstance(answer, QueueFull | LimitReached):
                self._waiting.append(one)
                has_room = False
            elif isinstance(answer, BaseException) and not isinstance(answer, RequestIdTaken):
                raise answer
            else:  # taken: another version of this program submitted it; its answer counts
                self._asked[self._translation.request_id(one.index)] = one
                self._owed_tokens += one.cost
        return has_room

    # --------------------------------------------------------------------------------- answers become results

    async def _collect(self) -> None:
        look = time.monotonic() - self._looked_s > LOOK_S
        if look:
            self._looked_s = time.monotonic()
        ids = list(self._asked)
        async for i, answer in self._batches.collect(ids, look=look):
            asked = self._asked.pop(ids[i])
            self._owed_tokens -= asked.cost
            if answer is None:  # it ended long ago, or the store lost it
                self._waiting.append(asked)
            else:
                await self._take(ids[i], asked, answer)
            await self._flush_many()

    async def _take(self, request_id: str, asked: Asked, answer: Answer) -> None:
        whole = joined(answer)
        if whole.finish.code == DEADLINE_EXCEEDED:
            return  # the batch's own: what is left without a result is settled at its end
        again = self._batches.again
        if whole.finish.code in ASK_AGAIN and await again(self._lease, asked.index, request_id) <= MAX_AGAIN:
            self._waiting.append(asked)
            return
        if (span := self._spans.pop(asked.index, None)) is not None:
            span.set(usage_of(whole))
            span.end()
        self._results.append(self._translation.result(asked, whole, int(time.time())))

    async def _flush_many(self) -> None:
        """Not too often, and never with more than fits into memory."""
        size = sum(len(one.text) for one in self._results)
        if len(self._results) >= RESULTS_A_CALL or size >= RESULT_BYTES_A_CALL:
            await self._flush()

    async def _flush(self) -> None:
        """Results into the store."""
        while self._results:
            some, self._results = self._results[:RESULTS_A_CALL], self._results[RESULTS_A_CALL:]
            await self._batches.write(self._lease, some)
            self._pace.add(some)


def window(load: Load, least: int, s: QueueSettings) -> int:
    """Pure: how many estimated tokens of a batch may be in the queue. Twice what runs, so that engines find the next
    ones waiting, however many there are; but half of the queue's places are left to others."""
    if load.waiting_requests * 2 >= s.max_waiting_requests or load.waiting_tokens * 2 >= s.max_waiting_tokens:
        return 0
    return max(least, 2 * load.running_tokens)


async def _some(lines: Lines, most: int) -> Lines:
    """The next ones, at most so many; the rest can be asked for again."""
    while most > 0 and (one := await anext(lines, None)) is not None:
        most -= 1
        yield one
