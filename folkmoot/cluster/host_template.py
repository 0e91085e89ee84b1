"""What an expert actor has ready for its host's next lives: a template, and one life in reserve.

A *template* is a process that has loaded the host's experts already, and from which its lives are forked. With weights
in shared memory it costs no copy of them, only some memory of its own (45 MiB for the demo model). It loads where
nobody else wants the core, since nobody waits for it.

A *reserve* is a life that has been forked from it and only waits to be told who it is. It has used
its experts once, so that their pages are mapped: when the host dies its next life has nothing to do but to listen, at
the very moment in which the other hosts have more to do than usual.
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
"""Before one of them is made: a new life, and whoever makes up for the old one, go first."""


class Holding(NamedTuple):
    """What a host holds, and with how many threads it computes."""

    columns: tuple[int, ...]
    extras: tuple[Extra, ...]
    threads: int


ForkTemplate = Callable[[Holding], Awaitable[tuple[Child, WarmParent]]]
ForkReserve = Callable[[Holding, WarmParent], Awaitable[Child]]


class Template:
    """One template and one reserve, or none; all methods on one event loop.

    `fork` starts a process that says {"event": "template"} once it takes requests as a warm parent does
    (`folkmoot.experts.host.template`), `fork_reserve` one that says {"event": "reserve"} once it can be told who it is
    (`folkmoot.experts.host.reserve`).
    """

    def __init__(self, fork: ForkTemplate, fork_reserve: ForkReserve) -> None:
        self._fork, self._fork_reserve = fork, fork_reserve
        self._holding: Holding | None = None
        self._loaded: tuple[Child, WarmParent] | None = None
        self._reserve: Child | None = None
        self._making: asyncio.Task[None] | None = None
        self._making_reserve: asyncio.Task[None] | None = None

    def want(self, holding: Holding) -> None:
        """From now on have both, of what holds this, and make another one where it dies or is taken."""
        if self._holding != holding:
            self._drop()
            self._drop_reserve()
            self._holding = holding
            self._making = asyncio.create_task(self._make(holding))

    def parent(self, holding: Holding) -> WarmParent | None:
        """What forks lives that hold this; None where there is no such template, or it has not loaded yet."""
        if self._loaded is None or self._holding != holding or not self._loaded[0].is_alive():
            return None
        return self._loaded[1]

    def take_reserve(self, holding: Holding) -> Child | None:
        """A life that holds this and waits to be told who it is. None where there is none."""
        if self._holding != holding or (reserve := self._reserve) is None or not reserve.is_alive():
            return None
        asyncio.get_running_loop().remove_reader(reserve.pidfd)
        self._reserve = None
        self._make_reserve_later()
        return reserve

    async def _make(self, holding: Holding) -> None:
        await asyncio.sleep(PAUSE_S)
        try:
            child, parent = await self._fork(holding)
            await _first_word(child, "template")
        except WarmParentError as e:
            log.warning("no template: %s", e)
            self._holding = None
            self._drop_reserve()
            return
        self._loaded = child, parent
        asyncio.get_running_loop().add_reader(child.pidfd, self._died, holding)
        if self._reserve is None:
            self._make_reserve_later()

    def _make_reserve_later(self) -> None:
        if self._making_reserve is None or self._making_reserve.done():
            self._making_reserve = asyncio.create_task(self._make_reserve())

    async def _make_reserve(self) -> None:
        """Nothing where the template is gone: the next one has a reserve made."""
        await asyncio.sleep(PAUSE_S)
        if (holding := self._holding) is None or (parent := self.parent(holding)) is None:
            return
        try:
            child = await self._fork_reserve(holding, parent)
            await _first_word(child, "reserve")
        except WarmParentError as e:
            log.warning("no life in reserve: %s", e)
            return
        self._reserve = child
        asyncio.get_running_loop().add_reader(child.pidfd, self._reserve_died)

    def _died(self, holding: Holding) -> None:
        self._drop()
        self._making = asyncio.create_task(self._make(holding))

    def _reserve_died(self) -> None:
        self._drop_reserve()
        self._make_reserve_later()

    def _drop(self) -> None:
        if self._making is not None:
            self._making.cancel()
            self._making = None
        if self._loaded is not None:
            asyncio.get_running_loop().remove_reader(self._loaded[0].pidfd)
            self._loaded[0].close()
            self._loaded = None

    def _drop_reserve(self) -> None:
        if self._making_reserve is not None:
            self._making_reserve.cancel()
            self._making_reserve = None
        if self._reserve is not None:
            asyncio.get_running_loop().remove_reader(self._reserve.pidfd)
            self._reserve.close()
            self._reserve = None


async def _first_word(child: Child, expected: str) -> None:
    """Wait until a process says that it is what it ought to be. Where it does not: close it, raise WarmParentError."""
    try:
        message = await asyncio.to_thread(child.receive, LOAD_TIMEOUT_S)
        if message is None or message.get("event") != expected or not child.is_alive():
            raise WarmParentError(str(message))
    except EOFError as e:
        child.close()
        raise WarmParentError("it died before it was ready") from e
    except BaseException:
        child.close()
        raise
