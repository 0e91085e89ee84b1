"""How long clients of one engine wait for tokens: of its last interactive requests."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from folkmoot.gateway.queue import Lease

KEPT_FIRST, KEPT_BETWEEN = 256, 2048


@dataclass
class Latencies:
    """In seconds: from submission to the first token, and between two pieces of an answer."""

    first: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_FIRST))
    between: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_BETWEEN))

    def of_request(self, lease: Lease, clock: Callable[[], float] = time.monotonic) -> Callable[[], None]:
        """What is to be called at each piece of a request that has just been leased."""
        if lease.is_batch:
            return lambda: None
        came_s = clock() - lease.waited_s
        last_s: float | None = None if lease.offset == 0 else math.inf  # a takeover's first piece is neither

        def tell() -> None:
            nonlocal last_s
            now_s = clock()
            if last_s is None:
                self.first.append(now_s - came_s)
            elif last_s < math.inf:
                self.between.append(now_s - last_s)
            last_s = now_s

        return tell

    def document(self) -> dict[str, float]:
        """`ttft_p50_s`, `ttft_p99_s`, `itl_p50_s`, `itl_p99_s`; without those of which nothing is known yet."""
        return {**_percentiles("ttft", self.first), **_percentiles("itl", self.between)}


def _percentiles(name: str, values: "deque[float]") -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {f"{name}_p{p}_s": round(ordered[math.ceil(p / 100 * len(ordered)) - 1], 6) for p in (50, 99)}
