"""An engine's side of the queue: leases kept alive, tokens journalled in batches, cancellations heard.

The engine's own loop stays small:

    async with LeaseHolder(queue, "engine-1", record, on_ended=abort) as holder:
        for lease in await holder.lease(max_requests=room):      # waits until there is work
            ...
            holder.write(lease, pb.GenerateResponse(token_ids=[7], text=" seven"))      # returns at once
            holder.write(lease, pb.GenerateResponse(token_ids=[8], finish=finish, usage=usage))
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType

from folkmoot import logs
from folkmoot.gateway import lease_span, tasks
from folkmoot.gateway.errors import StoreError, public
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import UNLIMITED, Append, Held, Lease, ModelRecord, RequestQueue, Room
from folkmoot.gateway.tracing import Span

log = logging.getLogger(__name__)

BEAT_S = 10.0  # an engine that does not register again for so long counts as gone
LEAVE_S = 5.0  # how long leaving may wait for the store
POLL_S = 1.0  # how long a lost wake-up can delay a lease, at most; an expired lease is seen after lease_s / 4
RETRY_FIRST_S, RETRY_MAX_S = 0.05, 1.0  # pause between two tries while the store is away
APPENDS_A_CALL = 512


@dataclass
class HolderCounts:
    """Since the start: leases, of them of requests that had been leased before, tokens that are journalled, and appends
    that the store did not take, by its answer."""

    leases: int = 0
    leases_again: int = 0
    journalled_tokens: int = 0
    refused: Counter[Held] = field(default_factory=Counter)


class LeaseHolder:
    """Holds the leases of one engine. Belongs to one event loop; `write` is called from that loop.

    `on_ended(lease, why)` is called once for each lease that ends other than by the engine's own finish or
    release: the engine must then drop the request (DONE: cancelled or past its deadline; LOST: another engine
    has it; GAP: the store forgot tokens, the request has been given back).

    While the store is away written tokens wait in memory and are journalled when it is back.
    """

    def __init__(
        self,
        queue: RequestQueue,
        engine: str,
        record: ModelRecord,
        on_ended: Callable[[Lease, Held], None] = lambda lease, why: None,
    ) -> None:
        self._queue = queue
        self._engine = engine
        self.counts = HolderCounts()
        self._record = record
        self._on_ended = on_ended
        self._held: dict[tuple[str, int], Lease] = {}
        self._next: dict[tuple[str, int], int] = {}  # offset of the next token to write
        self._spans: dict[tuple[str, int], Span] = {}
        self._unwritten: list[Append] = []
        self._written = asyncio.Event()  # set while nothing waits to be journalled
        self._written.set()
        self._to_write = asyncio.Event()
        self._work = asyncio.Event()
        self._no_more = self._ask_again = False
        self._renewed_s = time.monotonic()
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "LeaseHolder":
        keys = self._queue.store.keys
        channels = (keys.work(self._record.name), keys.control(self._engine))
        await self._queue.register(self._engine, self._record, BEAT_S)
        await self._stack.enter_async_context(
            self._queue.store.subscribed(channels, self._heard, self._subscription_stands)
        )
        self._tasks = [asyncio.create_task(loop()) for loop in (self._write_loop, self._renew_loop, self._beat_loop)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves: written tokens are journalled (for a few seconds), leases still held are given back.

        Left by an error, the attempts count, and the error is the reason.
        """
        reason = f"the engine failed: {error or kind}" if isinstance(error, Exception) else ""
        self.stop_leasing()
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await self.release(list(self._held.values()), reason)
                await self._queue.unregister(self._engine)
        await tasks.cancel(self._tasks)
        await self._stack.aclose()

    @property
    def num_held(self) -> int:
        """Leases held now."""
        return len(self._held)

    def holds(self, lease: Lease) -> bool:
        """False once the lease has ended, in whatever way."""
        return (lease.request_id, lease.epoch) in self._held

    def span(self, lease: Lease) -> Span:
        """The lease's, for what else is to be said of it; one that does nothing once it has ended."""
        return self._spans.get((lease.request_id, lease.epoch)) or Span(lease.trace)

    async def lease(
        self, max_requests: int, max_tokens: int = UNLIMITED, wait_s: float = 1.0, *, batch: Room | None = None
    ) -> list[Lease]:
        """New leases, as RequestQueue.lease; waits up to `wait_s` for the first, or until `ask_again`.

        Raises StoreError.
        """
        self._ask_again = False
        until = time.monotonic() + wait_s
        while True:
            self._work.clear()
            if self._no_more:
                return []
            if time.monotonic() - self._renewed_s > self._queue.settings.lease_s / 2:
                await self._renew()  # this loop was held up: do not take over from ourselves
            leases = await self._queue.lease(self._record.name, self._engine, max_requests, max_tokens, batch=batch)
            for lease in leases:
                self._take(lease)
            self.counts.leases += len(leases)
            self.counts.leases_again += sum(lease.epoch > 1 for lease in leases)
            left_s = until - time.monotonic()
            if leases or left_s <= 0 or self._ask_again:
                return leases
            # Not wait_for: before Python 3.12 it may swallow a cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, POLL_S, self._queue.settings.lease_s / 4)):
                    await self._work.wait()

    def ask_again(self) -> None:
        """A `lease` that waits returns: its caller has more room now than it said."""
        self._ask_again = True
        self._work.set()

    def stop_leasing(self) -> None:
        """`lease` returns nothing from now on, also where it waits just now."""
        self._no_more = True
        self._work.set()

    def write(self, lease: Lease, response: pb.GenerateResponse) -> bool:
        """Journal tokens soon, with all others of this step; sets `response.offset`. A `finish` ends the lease.

        The response is not to be changed afterwards. False where the lease has ended: stop generating.
        Raises ValueError for a response with neither tokens nor a finish.
        """
        key = (lease.request_id, lease.epoch)
        offset = self._next.get(key)
        if offset is None or key not in self._held:
            return False
        if not response.token_ids and not response.HasField("finish"):
            raise ValueError("a response needs tokens or a finish")
        response.offset = offset
        if response.HasField("finish"):
            del self._next[key]
        else:
            self._next[key] = offset + len(response.token_ids)
        self._unwritten.append(Append(*key, response))
        self._written.clear()
        self._to_write.set()
        return True

    def fail(self, lease: Lease, message: str, code: int = 13) -> bool:
        """End the request with an error that no other engine would avoid; `code` is a gRPC status (13 INTERNAL,
        3 INVALID_ARGUMENT for what only the tokenizer can see, such as a prompt that is too long)."""
        finish = pb.Finish(reason=pb.ERROR, code=code, message=message)
        return self.write(lease, pb.GenerateResponse(finish=finish))

    async def release(self, leases: Sequence[Lease], error: str = "") -> None:
        """Give leases back after what was written is journalled; see RequestQueue.release for `error`."""
        await self.flush()
        kept = [
            lease
            for lease in leases
            if self._forget(lease.request_id, lease.epoch, lambda span: lease_span.released(span, error))
        ]
        for lease, answer in zip(kept, await self._queue.release(kept, error), strict=True):
            with logs.bound(**ids_of(lease)):
                log.log(logging.WARNING if error else logging.INFO, "given back (%s)", answer)

    async def flush(self) -> None:
        """Wait until all that was written is in the journals."""
        await self._written.wait()

    # ----------------------------------------------------------------------------------------- behind it

    def _heard(self, channel: str, payload: bytes) -> None:
        if channel == self._queue.store.keys.work(self._record.name):
            self._work.set()
            return
        request_id = payload.decode()
        for held_id, epoch in list(self._held):
            if held_id == request_id:
                self._ended(held_id, epoch, Held.DONE)

    async def _subscription_stands(self) -> None:
        self._work.set()
        await self._renew()  # a cancellation may have been said while nobody listened

    def _take(self, lease: Lease) -> None:
        key = (lease.request_id, lease.epoch)
        self._held[key], self._next[key] = lease, lease.offset
        self._spans[key] = lease_span.begin(lease, self._engine)
        if lease.epoch > 1:
            with logs.bound(**ids_of(lease)):
                log.warning("taken over from another engine, after %d tokens", lease.offset)

    def _forget(self, request_id: str, epoch: int, end: Callable[[Span], None]) -> Lease | None:
        self._next.pop((request_id, epoch), None)
        if (span := self._spans.pop((request_id, epoch), None)) is not None:
            end(span)
        return self._held.pop((request_id, epoch), None)

    def _ended(self, request_id: str, epoch: int, why: Held) -> None:
        lease = self._forget(request_id, epoch, lambda span: lease_span.ended(span, why))
        if lease is not None:
            self._on_ended(lease, why)

    async def _write_loop(self) -> None:
        while True:
            await self._to_write.wait()
            batch = self._unwritten[:APPENDS_A_CALL]
            answers = await self._append(batch)
            del self._unwritten[: len(batch)]
            for one, answer in zip(batch, answers, strict=True):
                await self._settle(one, answer)
            if not self._unwritten:
                self._to_write.clear()
                self._written.set()

    async def _append(self, batch: Sequence[Append]) -> list[Held]:
        pause_s = RETRY_FIRST_S
        while True:
            try:
                return await self._queue.append_many(batch)
            except StoreError as e:
                log.warning("%d journal entries wait for the store: %s", len(self._unwritten), e)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def _settle(self, one: Append, answer: Held) -> None:
        if answer == Held.OK:
            self.counts.journalled_tokens += len(one.response.token_ids)
            if one.response.HasField("finish"):
                self._forget(one.request_id, one.epoch, lambda span: lease_span.finished(span, one.response))
            return
        self.counts.refused[answer] += 1
        lease = self._held.get((one.request_id, one.epoch))
        self._ended(one.request_id, one.epoch, answer)
        if answer == Held.GAP and lease is not None:
            with suppress(StoreError):  # then it expires
                await self._queue.release([lease])

    async def _renew_loop(self) -> None:
        period_s = self._queue.settings.lease_s / 3
        while True:
            await asyncio.sleep(period_s)
            with suppress(StoreError):
                await self._renew()

    async def _renew(self) -> None:
        leases = list(self._held.values())
        self._renewed_s = time.monotonic()
        for lease, answer in zip(leases, await self._queue.renew(leases), strict=True):
            # A finish that is under way may have closed it: then the append's own answer decides.
            if answer != Held.HELD and (lease.request_id, lease.epoch) in self._next:
                self._ended(lease.request_id, lease.epoch, answer)

    async def _beat_loop(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S / 3)
            try:
                await self._queue.register(self._engine, self._record, BEAT_S)
            except StoreError as e:
                log.warning("no heartbeat: %s", e)


def ids_of(lease: Lease) -> dict[str, str | int]:
    """What log lines about a lease carry."""
    trace_id = lease.trace.trace_id if lease.trace is not None else ""
    tenant = lease.request.tenant
    return {"request_id": public(lease.request_id), "tenant": tenant, "attempt": lease.attempt, "trace_id": trace_id}
