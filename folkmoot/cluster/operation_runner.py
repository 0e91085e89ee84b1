"""The expert router's side of operations: reads them from the store, turns them into wishes, says how far they are."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from folkmoot.cluster.operations import Refused, decide, progress
from folkmoot.cluster.router_state import RouterState
from folkmoot.cluster.spec import ClusterSpec
from folkmoot.cluster.wish import Wish
from folkmoot.cluster.wish_store import WishStore
from folkmoot.gateway.errors import StoreError
from folkmoot.gateway.operations import ACCEPTED, FAILED, SUCCEEDED, UNDER_WAY, Operation, Operations

log = logging.getLogger(__name__)

RETRY_S = 0.5
LOOK_S = 0.25


class OperationRunner:
    """Carries out operations one after the other; several may be under way at once."""

    def __init__(
        self,
        spec: ClusterSpec,
        operations: Operations,
        wishes: WishStore,
        state: Callable[[], RouterState],
        wish: Callable[[Wish], Awaitable[None]],
        is_in_charge: Callable[[], bool] = lambda: True,
    ) -> None:
        self._spec, self._operations, self._wishes = spec, operations, wishes
        self._state, self._wish, self._is_in_charge = state, wish, is_in_charge
        self._under_way: dict[str, Operation] = {}

    async def run(self) -> None:
        """For ever: take up what is asked for. From the first operation on, so that a restarted router misses none."""
        after = "0"
        while True:
            try:
                following, asked = await self._operations.read(after)
                if not self._is_in_charge():  # another cluster's router takes them up
                    await asyncio.sleep(LOOK_S)
                    continue
                for operation in asked:
                    if operation.request_id not in self._under_way:
                        await self._take_up(operation)
                after = following
            except StoreError as e:
                log.warning("operations cannot be read: %s", e)
                await asyncio.sleep(RETRY_S)

    async def watch(self) -> None:
        """For ever: write down how far operations are."""
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._is_in_charge():
                continue
            try:
                for operation in list(self._under_way.values()):
                    await self._look_at(operation)
            except StoreError as e:
                log.warning("progress cannot be written: %s", e)
                await asyncio.sleep(RETRY_S)

    async def _take_up(self, operation: Operation) -> None:
        """What a former router took up already is only watched: its wish was saved before its state was."""
        log.info("operation %s: %s", operation.request_id, operation.command)
        if operation.state == ACCEPTED:
            try:
                wish = decide(operation.command, self._state(), self._spec.max_experts_per_host)
            except Refused as e:
                await self._operations.update(operation, state=FAILED, code=e.code, message=str(e))
                return
            await self._wishes.save(wish)
            await self._wish(wish)
            operation = await self._operations.update(operation, state=UNDER_WAY, message="begun")
        self._under_way[operation.request_id] = operation

    async def _look_at(self, operation: Operation) -> None:
        try:
            now = progress(operation.command, self._state())
            state, code, message = SUCCEEDED if now.done else UNDER_WAY, 0, now.message
        except Refused as e:
            state, code, message = FAILED, e.code, str(e)
        if (state, message) == (operation.state, operation.message):
            return
        updated = await self._operations.update(operation, state=state, code=code, message=message)
        if updated.has_ended:
            del self._under_way[operation.request_id]
        else:
            self._under_way[operation.request_id] = updated
