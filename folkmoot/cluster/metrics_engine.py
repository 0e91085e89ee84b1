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
CALLS = Metric("folkmoot_dispatch_calls_total", "counter", "Layer calls of the dispatcher", ENGINE)
ROWS = Metric("folkmoot_dispatch_rows_total", "counter", "(token, expert) rows of these calls", ENGINE)
ROWS_AGAIN = Metric(
    "folkmoot_dispatch_rows_again_total",
    "counter",
    "Rows that were asked for once more: their host was late or dropped, or the row was not finite",
    ENGINE,
)
LATE = Metric(
    "folkmoot_dispatch_late_hosts_total", "counter", "Times that a late host's rows were asked of others", ENGINE
)
DROPPED = Metric("folkmoot_dispatch_dropped_hosts_total", "counter", "Hosts that the dispatcher has dropped", ENGINE)
WAITS = Metric(
    "folkmoot_dispatch_waits_total",
    "counter",
    "Times that a layer waited for an expert without a replica",
    ENGINE,
)
WAITED = Metric("folkmoot_dispatch_waited_seconds_total", "counter", "Seconds that layers waited so", ENGINE)
GIVEN_UP = Metric("folkmoot_dispatch_given_up_total", "counter", "Times that they waited in vain", ENGINE)
NOT_FINITE = Metric(
    "folkmoot_dispatch_not_finite_rows_total",
    "counter",
    "Rows that were not finite: confirmed by another replica, refuted, or alone, without another",
    (*ENGINE, "verdict"),
)
HOST_ROWS = Metric("folkmoot_dispatch_host_rows_total", "counter", "Rows that came from each host", (*ENGINE, "host"))
HOST_SECONDS = Metric(
    "folkmoot_dispatch_host_seconds_total", "counter", "Seconds from posting to the whole reply", (*ENGINE, "host")
)
METRICS = (
    *(LEASES_HELD, LEASES, LEASES_AGAIN, JOURNALLED, REFUSED),
    *(RUNNING, REQUESTS, FAILED, PROMPT_TOKENS, GENERATED_TOKENS),
    *(CALLS, ROWS, ROWS_AGAIN, LATE, DROPPED, WAITS, WAITED, GIVEN_UP, NOT_FINITE, HOST_ROWS, HOST_SECONDS),
)

OF_GENERATOR = {
    RUNNING: "running",
    REQUESTS: "requests",
    FAILED: "failed",
    PROMPT_TOKENS: "prompt_tokens",
    GENERATED_TOKENS: "generated_tokens",
}
OF_DISPATCHER = {
    CALLS: "calls",
    ROWS: "rows",
    ROWS_AGAIN: "rows_again",
    LATE: "late_hosts",
    DROPPED: "dropped_hosts",
    WAITS: "waits",
    WAITED: "waited_s",
    GIVEN_UP: "given_up",
}
BY_LABEL = {NOT_FINITE: "not_finite", HOST_ROWS: "host_rows", HOST_SECONDS: "host_s"}
REFUSALS = (Held.LOST, Held.DONE, Held.GAP)


def families(
    engine: str, holder: LeaseHolder, generator: Mapping[str, Any], dispatch: Mapping[str, Any]
) -> Iterator[Family]:
    """For Prometheus. `generator`: its counters by name; `dispatch`: the dispatcher's, empty where there is none."""
    counts = holder.counts
    yield LEASES_HELD.of(holder.num_held, engine)
    yield LEASES.of(counts.leases, engine)
    yield LEASES_AGAIN.of(counts.leases_again, engine)
    yield JOURNALLED.of(counts.journalled_tokens, engine)
    yield REFUSED.family(((engine, str(answer)), counts.refused[answer]) for answer in REFUSALS)
    for metric, name in OF_GENERATOR.items():
        yield metric.of(generator[name], engine)
    for metric, name in OF_DISPATCHER.items() if dispatch else ():
        yield metric.of(dispatch[name], engine)
    for metric, name in BY_LABEL.items() if dispatch else ():
        yield metric.family(((engine, label), value) for label, value in dispatch[name].items())


def text(engine: str, holder: LeaseHolder, generator: Mapping[str, Any], dispatch: Mapping[str, Any]) -> bytes:
    """The engine's own metrics, then all that vLLM and the process have in prometheus_client's registry."""
    return exposition(families(engine, holder, generator, dispatch)) + generate_latest()
