"""What a scrape is told of the queue and of batches. All gateways say the same, since it stands in the store."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client.metrics_core import Metric as Family

from folkmoot.gateway.errors import StoreError
from folkmoot.gateway.metrics import Labels, Metric
from folkmoot.gateway.store import Store

FRESH_S = 0.5
"""However often and by how many this gateway is asked, the store is not asked more often."""
TIMEOUT_S = 2.0
MOST_BATCHES = 500
"""Open batches of which the status is looked at; more are not counted."""

LANE = ("model", "lane")
REQUESTS = Metric("folkmoot_queue_requests", "gauge", "Requests that wait, and that engines run", (*LANE, "state"))
QUEUE_TOKENS = Metric("folkmoot_queue_tokens", "gauge", "Estimated tokens of these requests", (*LANE, "state"))
LEASES = Metric("folkmoot_queue_leases", "gauge", "Requests that engines hold a lease of (delivered, not ended)", LANE)
HANDED_BACK = Metric("folkmoot_queue_handed_back", "gauge", "Requests that were given back, and are taken next", LANE)
OLDEST_SECONDS = Metric(
    "folkmoot_queue_oldest_seconds", "gauge", "Age of the oldest request that has not ended; 0: there is none", LANE
)
TENANTS = Metric("folkmoot_queue_tenants", "gauge", "Tenants that have requests in the lane", LANE)
SUBMITTED_TOKENS = Metric(
    "folkmoot_queue_submitted_tokens_total", "counter", "Estimated tokens of all requests that were taken in", LANE
)
ENDED = Metric(
    "folkmoot_queue_ended_total",
    "counter",
    "Requests that have ended: answered (by an engine, also with an error), cancelled, deadline, untaken, abandoned "
    "(by its client), given_up (after its last attempt), dropped (with its batch)",
    (*LANE, "outcome"),
)
LEASED_AGAIN = Metric(
    "folkmoot_queue_leased_again_total", "counter", "Leases of requests that had been leased before", LANE
)
LEASES_EXPIRED = Metric(
    "folkmoot_queue_leases_expired_total", "counter", "Of these, taken from engines that had fallen silent", LANE
)
DEAD_LETTERS = Metric("folkmoot_queue_dead_letters", "gauge", "Requests in the dead-letter stream", ("model",))
OUTSIDE_TOKENS = Metric(
    "folkmoot_queue_outside_tokens",
    "gauge",
    "Estimated tokens of batch lines that are not queued yet",
    ("model",),
)
ENGINES = Metric(
    "folkmoot_queue_engines", "gauge", "Engines whose heartbeat is fresh: ready to serve, or not", ("model", "state")
)
BATCHES = Metric("folkmoot_batches", "gauge", "Batches that have not ended, by status", ("status",))
BATCHES_ENDED = Metric("folkmoot_batches_ended_total", "counter", "Batches that have ended, by status", ("status",))
BATCH_LINES = Metric(
    "folkmoot_batch_lines_total", "counter", "Lines of batches that have their result: done, failed", ("outcome",)
)
METRICS = (
    *(REQUESTS, QUEUE_TOKENS, LEASES, HANDED_BACK, OLDEST_SECONDS, TENANTS, SUBMITTED_TOKENS, ENDED, LEASED_AGAIN),
    *(LEASES_EXPIRED, DEAD_LETTERS, OUTSIDE_TOKENS, ENGINES, BATCHES, BATCHES_ENDED, BATCH_LINES),
)

OUTCOMES = ("answered", "cancelled", "deadline", "untaken", "abandoned", "given_up", "dropped")
STATUSES = ("validating", "in_progress", "finalizing", "cancelling")
ENDED_STATUSES = ("completed", "failed", "expired", "cancelled")
LINES = {"done": "output", "failed": "errors"}


class QueueFigures:
    """One store's figures, read when they are asked for, and kept for FRESH_S."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read_s = -FRESH_S
        self._found: dict[str, Any] | None = None

    async def read(self) -> dict[str, Any] | None:
        """As the script gives them; None where the store does not answer in time."""
        if time.monotonic() - self._read_s >= FRESH_S:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    self._found = json.loads(await self._store.run("figures", MOST_BATCHES))
            except (StoreError, TimeoutError):
                self._found = None
            self._read_s = time.monotonic()
        return self._found


def families(found: dict[str, Any]) -> Iterator[Family]:
    """Pure: what the script found, for Prometheus. Empty tables come from Lua as lists."""
    lanes, models, counts = found["lanes"] or [], dict(found["models"] or {}), dict(found["counts"] or {})
    yield from _of_lanes(lanes)
    yield DEAD_LETTERS.family(((name,), one["dead"]) for name, one in models.items())
    yield OUTSIDE_TOKENS.family(((name,), one["outside"]) for name, one in models.items())
    states = {"ready": "ready", "not_ready": "other"}
    yield ENGINES.family(
        ((name, state), one[key]) for name, one in models.items() for state, key in states.items()
    )  # fmt: skip
    open_ = dict(found["open"] or {})
    yield BATCHES.family(((status,), open_.get(status, 0)) for status in STATUSES)
    yield BATCHES_ENDED.family(((status,), counts.get(f"batches_{status}", 0)) for status in ENDED_STATUSES)
    yield BATCH_LINES.family(((outcome,), counts.get(f"lines_{file}", 0)) for outcome, file in LINES.items())


def _of_lanes(lanes: list[dict[str, Any]]) -> Iterator[Family]:
    at: list[tuple[Labels, dict[str, Any], dict[str, Any]]] = [
        ((one["model"], one["lane"]), one, dict(one["counters"] or {})) for one in lanes
    ]
    for metric, unit in ((REQUESTS, "requests"), (QUEUE_TOKENS, "tokens")):
        yield metric.family(
            ((*labels, state), counters.get(f"{state}_{unit}", 0))
            for labels, _, counters in at
            for state in ("waiting", "running")
        )
    for metric, key in ((LEASES, "leases"), (HANDED_BACK, "handed_back"), (TENANTS, "tenants")):
        yield metric.family((labels, one[key]) for labels, one, _ in at)
    yield OLDEST_SECONDS.family((labels, one["oldest_ms"] / 1000) for labels, one, _ in at)
    yield SUBMITTED_TOKENS.family((labels, counters.get("submitted_tokens", 0)) for labels, _, counters in at)
    yield LEASED_AGAIN.family((labels, counters.get("leased_again", 0)) for labels, _, counters in at)
    yield LEASES_EXPIRED.family((labels, counters.get("leases_expired", 0)) for labels, _, counters in at)
    yield ENDED.family(
        ((*labels, outcome), counters.get(f"ended_{outcome}", 0)) for labels, _, counters in at for outcome in OUTCOMES
    )
