"""Joins concurrent calls into one: while one batch is under way, what arrives becomes the next.

A call that comes alone is not delayed; only where batches have had more than one item do they linger.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

LINGER_S = 0.001  # under load, a batch waits so long for company: fewer and larger ones cost everyone less

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """`run` takes a list of items and answers one result an item, in order; an exception reaches every caller."""

    def __init__(self, run: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]], limit: int = 256) -> None:
        self._run = run
        self._limit = limit
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._task: asyncio.Task[None] | None = None
        self._crowded = False

    async def __call__(self, item: Item) -> Result:
        """The result for `item`. Raises what `run` raises. A caller that is cancelled does not stop the batch."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None:
            self._task = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        try:
            while self._waiting:
                if self._crowded:
                    await asyncio.sleep(LINGER_S)
                batch, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
                self._crowded = len(batch) > 1
                await self._flush(batch)
        finally:
            self._task = None

    async def _flush(self, batch: Sequence[tuple[Item, "asyncio.Future[Result]"]]) -> None:
        try:
            results = await self._run([item for item, _ in batch])
        except Exception as e:
            for _, future in batch:
                if not future.done():
                    future.set_exception(e)
        else:
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
