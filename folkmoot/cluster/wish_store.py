"""Where the expert router's wish outlives it: one string in the request store."""

import asyncio
import json
import logging

from folkmoot.cluster.spec import ClusterSpec
from folkmoot.cluster.wish import Wish
from folkmoot.gateway.errors import StoreError
from folkmoot.gateway.store import Store

log = logging.getLogger(__name__)

RETRY_S = 0.5


class WishStore:
    """Keeps the wish of one run of a cluster: what an earlier `folkmoot up` was asked for counts no more."""

    def __init__(self, store: Store, spec: ClusterSpec) -> None:
        self._store, self._run = store, spec.run_dir

    async def load(self) -> Wish | None:
        """The wish that was saved last; waits for the store for as long as it is away."""
        while True:
            try:
                text = await self._store.command("GET", self._store.keys.wish)
                break
            except StoreError as e:
                log.warning("the wish cannot be read yet: %s", e)
                await asyncio.sleep(RETRY_S)
        saved = json.loads(text) if text else {}
        return Wish.from_json(saved["wish"]) if saved.get("run") == self._run else None

    async def save(self, wish: Wish) -> None:
        """Raises StoreError: then it is not saved."""
        text = json.dumps({"run": self._run, "wish": wish.to_json()})
        await self._store.command("SET", self._store.keys.wish, text)
