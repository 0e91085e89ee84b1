"""An engine's metrics: its leases and journals, what its dispatcher saw, and vLLM's own (vllm:*) as they are."""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric as Family

from folkmoot.gateway.holder import LeaseHolder
from folkmoot.gateway.metrics import Metric, exposition
from folkmoot.gateway.queue import Held

ENGINE = ("engine",)
LEASES_HELD = Metric("folkmoot_engine_leases_held", "gauge", "Leases that the engine holds", ENGINE)
LEASES = Metric("folkmoot_engine_leases_total", "counter", "Leases that it has had", ENGINE)
LEASES_AGAIN = Metric(
    "folkmoot_engine_leases_again_total", "counter", "Of these, of requests that had been leased before", ENGINE
)
JOURNALLED = Metric("folkmoot_engine_journalled_tokens_total", "counter", "Tokens that are in the journals", ENGINE)
REFUSED = Metric(
    "folkmoot_engine_refused_appends_total",
    "counter",
    "Journal entries that the store did not take: lost (another epoch has the request), done, gap",
    (*ENGINE, "answer"),
)
RUNNING = Metric("folkmoot_engine_running", "gauge", "Requests that it runs", ENGINE)
REQUESTS = Metric("folkmoot_engine_requests_total", "counter", "Requests that it has begun", ENGINE)
FAILED = Metric("folkmoot_engine_failed_total", "counter", "Requests that the engine failed at", ENGINE)
PROMPT_TOKENS = Metric("folkmoot_engine_prompt_tokens_total", "counter", "Tokens of prompts", ENGINE)
GENERATED_TOKENS = Metric("folkmoot_engine_generated_tokens_total", "counter", "Tokens that it has made", ENGINE)
METRICS = (
    *(LEASES_HELD, LEASES, LEASES_AGAIN, JOURNALLED, REFUSED),
    *(RUNNING, REQUESTS, FAILED, PROMPT_TOKENS, GENERATED_TOKENS),
)

OF_GENERATOR = {
    RUNNING: "running",
    REQUESTS: "requests",
    FAILED: "failed",
    PROMPT_TOKENS: "prompt_tokens",
    GENERATED_TOKENS: "generated_tokens",
}
REFUSALS = (Held.LOST, Held.DONE, Held.GAP)


def families(engine: str, holder: LeaseHolder, generator: Mapping[str, Any]) -> Iterator[Family]:
    """For Prometheus. `generator`: its counters by name."""
    counts = holder.counts
    yield LEASES_HELD.of(holder.num_held, engine)
    yield LEASES.of(counts.leases, engine)
    yield LEASES_AGAIN.of(counts.leases_again, engine)
    yield JOURNALLED.of(counts.journalled_tokens, engine)
    yield REFUSED.family(((engine, str(answer)), counts.refused[answer]) for answer in REFUSALS)
    for metric, name in OF_GENERATOR.items():
        yield metric.of(generator[name], engine)


def text(engine: str, holder: LeaseHolder, generator: Mapping[str, Any]) -> bytes:
    """The engine's own metrics, then all that vLLM and the process have in prometheus_client's registry."""
    return exposition(families(engine, holder, generator)) + generate_latest()
