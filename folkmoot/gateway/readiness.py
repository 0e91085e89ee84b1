"""Whether requests can be served now: engines say it in the store, gateways read it there. Nobody else is asked.

An engine is *ready* while it runs and its expert map has a live replica of every expert. It says so every BEAT_S, and
at once when it changes; what a killed engine said last holds for READY_S at most. Where an autoscaler may go down to no
engine at all, requests are welcome without one: if gateways were not ready then, nothing would ever be sent that an
engine could be started for.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from folkmoot.gateway.demand import Demands
from folkmoot.gateway.errors import StoreError
from folkmoot.gateway.queue import RequestQueue

log = logging.getLogger(__name__)

BEAT_S, READY_S = 1.5, 5.0
LOOK_S = 0.2
"""How often an engine looks whether it can serve, and how late it may say so."""


async def keep_saying(queue: RequestQueue, engine: str, can_serve: Callable[[], bool]) -> None:
    """An engine's side: say whether it can serve, until cancelled; then say that it cannot."""
    store, key = queue.store, queue.store.keys.ready(engine)
    said, countdown = False, 0
    try:
        while True:
            can = can_serve()
            if can != said or countdown <= 0:
                try:
                    await store.command(*(("SET", key, 1, "PX", int(READY_S * 1000)) if can else ("DEL", key)))
                    said, countdown = can, round(BEAT_S / LOOK_S)
                except StoreError as e:
                    log.warning("readiness is not said: %s", e)
            countdown -= 1
            await asyncio.sleep(LOOK_S)
    finally:
        with suppress(StoreError):
            await store.command("DEL", key)


async def ready_engines(queue: RequestQueue) -> dict[str, str]:
    """Engines that can serve now, with the model each serves. Raises StoreError."""
    engines = await queue.engines()
    if not engines:
        return {}
    said = await queue.store.command("MGET", *(queue.store.keys.ready(engine) for engine in engines))
    return {engine: model for (engine, model), ready in zip(engines.items(), said, strict=True) if ready}


async def is_ready(queue: RequestQueue) -> bool:
    """Whether a request that comes now is served, at once or by an engine that is started for it. Raises StoreError."""
    if await ready_engines(queue):
        return True
    scaling = await Demands(queue.store).scaling()
    return scaling is not None and scaling.accepts


async def watch(queue: RequestQueue, on_change: Callable[[bool], Awaitable[None]], every_s: float = 1.0) -> None:
    """A gateway's side: tell whether requests are served, first now and then at each change, until cancelled."""
    last: bool | None = None
    while True:
        try:
            now = await is_ready(queue)
        except StoreError:
            now = False
        if now != last:
            await on_change(now)
            last = now
        await asyncio.sleep(every_s)
