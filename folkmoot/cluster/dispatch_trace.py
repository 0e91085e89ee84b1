"""What an engine's dispatcher did while a request ran, as attributes of the request's span.

Not a span a layer, nor one a step: a request of 200 tokens through 60 layers would have 12,000, and each step is of all
requests in it. So the dispatcher's counts (folkmoot.experts.dispatch_counts) are looked at while requests run and spans
are made, and a span gets what they grew by: of all requests that shared its steps, up to the last look.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from folkmoot.gateway.tracing import Attributes

LOOK_EVERY_S = 0.05
GROWING = ("calls", "rows", "rows_again", "dropped_hosts", "waited_s")


class DispatchTrace:
    """The counts as of the last look; empty before the first, and where nobody looks."""

    def __init__(self) -> None:
        self._counts: Mapping[str, Any] = {}

    async def follow(self, look: Callable[[], Mapping[str, Any]], is_busy: Callable[[], bool]) -> None:
        """Look for ever, while there is something to see. `look` may block, and runs in a thread."""
        changed = True
        while True:
            if changed or is_busy():
                before, self._counts = self._counts, await asyncio.to_thread(look)
                changed = self._counts != before
            await asyncio.sleep(LOOK_EVERY_S)

    def of_request(self) -> Callable[[], Attributes]:
        """For a request that begins now: what is to be said of it at its end."""
        before = self._counts
        return lambda: grown(before, self._counts)


def grown(before: Mapping[str, Any], now: Mapping[str, Any]) -> Attributes:
    """The growth of counts as attributes `folkmoot.dispatch.*`; none where there are no counts."""
    if not now:
        return {}
    found = {f"folkmoot.dispatch.{name}": now[name] - before.get(name, 0) for name in GROWING}
    seconds = _growth(before.get("host_s", {}), now["host_s"])
    found["folkmoot.dispatch.hosts"] = len(seconds)
    if not seconds:
        return found
    slowest = max(seconds, key=lambda host: seconds[host])
    return {
        **found,
        "folkmoot.dispatch.slowest_host": slowest,
        "folkmoot.dispatch.slowest_host_s": round(seconds[slowest], 6),
    }


def _growth(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Of those that grew."""
    return {name: value - before.get(name, 0.0) for name, value in now.items() if value > before.get(name, 0.0)}
