"""What an engine's dispatcher did while a request ran, as attributes of the request's span.

Not a span a layer, nor one a step: a request of 200 tokens through 60 layers would have 12,000, and each step is of all
requests in it. So the dispatcher's counts (folkmoot.experts.dispatch_counts) are looked at while a request runs whose
span is made, and it gets what they grew by from the first look to the last: of all requests that shared its steps.
Others cost nothing; each look interrupts the process that runs the model.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from folkmoot.gateway.tracing import Attributes

LOOK_EVERY_S = 0.05
GROWING = ("calls", "rows", "rows_again", "late_hosts", "dropped_hosts", "waited_s")


@dataclass(eq=False)
class Watch:
    """One request's: the counts as of the first look at which it ran, and as of the last."""

    before: Mapping[str, Any] = field(default_factory=dict)
    now: Mapping[str, Any] = field(default_factory=dict)

    def attributes(self) -> Attributes:
        """What is to be said of it; none where nobody has looked."""
        return grown(self.before, self.now)


class DispatchTrace:
    """Who watches, and what they have seen."""

    def __init__(self) -> None:
        self._watches: set[Watch] = set()
        self._begun = asyncio.Event()

    async def follow(self, look: Callable[[], Mapping[str, Any]]) -> None:
        """Look for ever, while somebody watches: at once when one begins, then every LOOK_EVERY_S. `look` may block,
        and runs in a thread."""
        while True:
            await self._begun.wait()
            self._begun.clear()
            while self._watches:
                counts = await asyncio.to_thread(look)
                for watch in self._watches:
                    watch.before, watch.now = watch.before or counts, counts
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await self._begun.wait()
                        self._begun.clear()

    @contextmanager
    def watched(self, is_wanted: bool) -> Iterator[Watch]:
        """While a request runs. Where nobody wants to know, its watch sees nothing."""
        watch = Watch()
        if is_wanted:
            self._watches.add(watch)
            self._begun.set()
        try:
            yield watch
        finally:
            self._watches.discard(watch)


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
