"""The batches that this gateway runs: it takes up those that nobody runs, also those of gateways that died."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from folkmoot.gateway import tasks
from folkmoot.gateway.batch_run import BatchRun
from folkmoot.gateway.batch_store import BatchStore
from folkmoot.gateway.errors import StoreError
from folkmoot.gateway.queue import RequestQueue

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""One batch a look, so that several gateways share them."""


@asynccontextmanager
async def running(
    queue: RequestQueue, batches: BatchStore, gateway: str, default_answer_tokens: int
) -> AsyncIterator[None]:
    """Runs batches for as long as the block does; then others may take them at once."""
    runs: set[asyncio.Task[None]] = set()

    async def look() -> None:
        while True:
            try:
                if len(runs) < batches.settings.max_running_batches and (lease := await batches.claim(gateway)):
                    log.info("running batch %s, epoch %d", lease.batch_id, lease.epoch)
                    task = asyncio.create_task(BatchRun(queue, batches, lease, default_answer_tokens).run())
                    runs.add(task)
                    task.add_done_callback(ended)
            except StoreError as e:
                log.warning("no batches are taken up: %s", e)
            await asyncio.sleep(LOOK_S)

    def ended(task: "asyncio.Task[None]") -> None:
        runs.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a batch is left to the next gateway", exc_info=error)

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        await tasks.cancel([looking])
        await tasks.cancel(runs)
