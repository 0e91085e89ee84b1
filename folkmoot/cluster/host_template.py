"""A host's template: a process that has loaded its experts already, and from which its next lives are forked.

With weights in shared memory it costs no copy of them, only some memory of its own (45 MiB for the demo model). It
loads where nobody else wants the core, since nobody waits for it. When the host dies, the next life is there within
milliseconds, and little is computed at the very moment in which the other hosts have more to do than usual.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from folkmoot.cluster.placement import Extra
from folkmoot.experts.warm import Child, WarmParent, WarmParentError

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0
PAUSE_S = 2.0
"""Before a template is made: a new life, and whoever makes up for the old one, go first."""


class Holding(NamedTuple):
    """What a host holds, and with how many threads it computes."""

    columns: tuple[int, ...]
    extras: tuple[Extra, ...]
    threads: int


class Template:
    """One template, or none; all methods on one event loop.

    `fork` starts a process that says {"event": "template"} once it takes requests as a warm parent does
    (`folkmoot.experts.host.template`).
    """

    def __init__(self, fork: Callable[[Holding], Awaitable[tuple[Child, WarmParent]]]) -> None:
        self._fork = fork
        self._holding: Holding | None = None
        self._loaded: tuple[Child, WarmParent] | None = None
        self._making: asyncio.Task[None] | None = None

    def want(self, holding: Holding) -> None:
        """From now on have one that holds this, and make another one where it dies."""
        if self._holding != holding:
            self._drop()
            self._holding = holding
            self._making = asyncio.create_task(self._make(holding))

    def parent(self, holding: Holding) -> WarmParent | None:
        """What forks lives that hold this; None where there is no such template, or it has not loaded yet."""
        if self._loaded is None or self._holding != holding or not self._loaded[0].is_alive():
            return None
        return self._loaded[1]

    async def _make(self, holding: Holding) -> None:
        await asyncio.sleep(PAUSE_S)
        try:
            child, parent = await self._fork(holding)
        except WarmParentError as e:
            log.warning("no template: %s", e)
            self._holding = None
            return
        try:
            message = await asyncio.to_thread(child.receive, LOAD_TIMEOUT_S)
        except EOFError:
            message = {"event": "error", "message": "it died while loading"}
        except asyncio.CancelledError:
            child.close()
            raise
        if message is None or message.get("event") != "template" or not child.is_alive():
            log.warning("no template: %s", message)
            child.close()
            self._holding = None
            return
        self._loaded = child, parent
        asyncio.get_running_loop().add_reader(child.pidfd, self._died, holding)

    def _died(self, holding: Holding) -> None:
        self._drop()
        self._making = asyncio.create_task(self._make(holding))

    def _drop(self) -> None:
        if self._making is not None:
            self._making.cancel()
            self._making = None
        if self._loaded is not None:
            asyncio.get_running_loop().remove_reader(self._loaded[0].pidfd)
            self._loaded[0].close()
            self._loaded = None
