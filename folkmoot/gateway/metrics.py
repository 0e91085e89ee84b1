"""Metrics: what one is called and looks like to Prometheus, and what those of a gateway are counted in.

Nothing here locks: each number has one thread that changes it. It is read, and made into Prometheus' text, when
somebody asks (metrics_server.py). Labels are bounded: methods are those that this gateway has, lanes two, codes gRPC's,
models those that engines serve. No label comes from what a client wrote.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

CALL_BOUNDS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 3600.0)
GAP_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0, 2.0, 5.0, 30.0)
STORE_BOUNDS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)

Labels = tuple[str, ...]


class Histogram:
    """Observations by bucket: of each the upper bound belongs to it."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """One more."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, how many up to it), the last one "+Inf"."""
        names = (*map(str, self.bounds), "+Inf")
        return [(name, float(number)) for name, number in zip(names, accumulate(self.counts), strict=True)]


Value = float | Histogram


@dataclass(frozen=True)
class Metric:
    """What a metric is called, and what it means. The name of a counter, and no other, ends in `_total`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Labels = ()

    def family(self, samples: Iterable[tuple[Labels, Value]]) -> Family:
        """Its samples, each the labels' values and a number, as prometheus_client has them."""
        if self.kind == "histogram":
            histogram = HistogramMetricFamily(self.name, self.help, labels=self.labels)
            for labels, value in samples:
                assert isinstance(value, Histogram)
                histogram.add_metric(labels, value.cumulative(), value.total)
            return histogram
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = kind(self.name, self.help, labels=self.labels)
        for labels, value in samples:
            assert not isinstance(value, Histogram)
            family.add_metric(labels, value)
        return family

    def of(self, value: Value, *labels: str) -> Family:
        """With one sample."""
        return self.family([(labels, value)])


def exposition(families: Iterable[Family]) -> bytes:
    """Prometheus' text format, version 0.0.4; families without a sample are left out."""
    return generate_latest(_Collected([family for family in families if family.samples]))


@dataclass(frozen=True)
class _Collected:
    families: list[Family]

    def collect(self) -> Iterable[Family]:
        return self.families


# ------------------------------------------------------------------------------------------------ of a gateway

CALLS = Metric(
    "folkmoot_gateway_calls_total",
    "counter",
    "Calls that have ended, by method, lane (of Generate only) and gRPC status",
    ("method", "lane", "code"),
)
CALLS_IN_PROGRESS = Metric("folkmoot_gateway_calls_in_progress", "gauge", "Calls under way", ("method",))
CALL_SECONDS = Metric(
    "folkmoot_gateway_call_seconds", "histogram", "From a call's arrival to its end", ("method", "lane")
)
FIRST_TOKEN_SECONDS = Metric(
    "folkmoot_gateway_first_token_seconds", "histogram", "From the arrival of a Generate to its first token", ("lane",)
)
INTER_TOKEN_SECONDS = Metric(
    "folkmoot_gateway_inter_token_seconds",
    "histogram",
    "Between two pieces of a Generate's answer, over the tokens of the second",
    ("lane",),
)
TOKENS = Metric("folkmoot_gateway_tokens_total", "counter", "Tokens sent to clients", ("method", "lane"))
REFUSALS = Metric(
    "folkmoot_gateway_refusals_total", "counter", "Calls refused with a reason (ErrorInfo.reason)", ("reason",)
)
STORE_SECONDS = Metric(
    "folkmoot_gateway_store_seconds", "histogram", "Round trips to the request store, by script", ("script",)
)
STORE_ERRORS = Metric(
    "folkmoot_gateway_store_errors_total", "counter", "Round trips that failed, by what is wrong", ("reason",)
)
STORE_UP = Metric("folkmoot_gateway_store_up", "gauge", "Whether the request store answered this scrape")
CERTIFICATES = Metric(
    "folkmoot_gateway_certificates_read_total",
    "counter",
    "Times that changed certificate files were read, by whether they were sound",
    ("outcome",),
)
METRICS = (
    *(CALLS, CALLS_IN_PROGRESS, CALL_SECONDS, FIRST_TOKEN_SECONDS, INTER_TOKEN_SECONDS, TOKENS),
    *(REFUSALS, STORE_SECONDS, STORE_ERRORS, STORE_UP, CERTIFICATES),
)


@dataclass
class GatewayCounts:
    """What a gateway has done since its start; `calls` by method, lane and code."""

    calls: Counter[Labels] = field(default_factory=Counter)
    in_progress: Counter[str] = field(default_factory=Counter)
    call_s: dict[Labels, Histogram] = field(default_factory=dict)
    first_token_s: dict[str, Histogram] = field(default_factory=dict)
    inter_token_s: dict[str, Histogram] = field(default_factory=dict)
    tokens: Counter[Labels] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)

    def families(self) -> list[Family]:
        """For `exposition`."""
        return [
            CALLS.family(self.calls.items()),
            CALLS_IN_PROGRESS.family(_alone(self.in_progress)),
            CALL_SECONDS.family(self.call_s.items()),
            FIRST_TOKEN_SECONDS.family(_alone(self.first_token_s)),
            INTER_TOKEN_SECONDS.family(_alone(self.inter_token_s)),
            TOKENS.family(self.tokens.items()),
        ]


def _alone(values: "dict[str, Histogram] | Counter[str]") -> list[tuple[Labels, Value]]:
    return [((label,), value) for label, value in values.items()]


class Call:
    """One call under way, from its arrival on. What serves it finds it by `current`."""

    __slots__ = ("_counts", "_gaps", "_last_s", "began_s", "lane", "method")

    def __init__(self, counts: GatewayCounts, method: str) -> None:
        self._counts = counts
        self.method = method
        self.lane = ""
        self.began_s = self._last_s = time.perf_counter()
        self._gaps: Histogram | None = None

    def wrote(self, num_tokens: int) -> None:
        """A piece of an answer has gone out."""
        if not num_tokens:
            return
        self._counts.tokens[self.method, self.lane] += num_tokens
        if not self.lane:  # not a Generate: its client came later than its tokens
            return
        now_s = time.perf_counter()
        if self._gaps is None:
            self._gaps = _histogram(self._counts.inter_token_s, self.lane, GAP_BOUNDS_S)
            _histogram(self._counts.first_token_s, self.lane, CALL_BOUNDS_S).observe(now_s - self.began_s)
        else:
            self._gaps.observe((now_s - self._last_s) / num_tokens)
        self._last_s = now_s

    def refused(self, reason: str) -> None:
        """It ends with an error that has this reason; empty: none that is counted."""
        if reason:
            self._counts.refusals[reason] += 1

    def begin(self) -> None:
        """It is being served."""
        self._counts.in_progress[self.method] += 1

    def end(self, code: str) -> None:
        """It has ended, with this gRPC status."""
        self._counts.in_progress[self.method] -= 1
        self.ended(code)

    def ended(self, code: str) -> None:
        """The same of a call that nobody served."""
        self._counts.calls[self.method, self.lane, code] += 1
        key = (self.method, self.lane)
        if (found := self._counts.call_s.get(key)) is None:
            found = self._counts.call_s[key] = Histogram(CALL_BOUNDS_S)
        found.observe(time.perf_counter() - self.began_s)


def _histogram(found: dict[str, Histogram], label: str, bounds: Sequence[float]) -> Histogram:
    if (histogram := found.get(label)) is None:
        histogram = found[label] = Histogram(bounds)
    return histogram


_current: ContextVar[Call] = ContextVar("call")
_uncounted = Call(GatewayCounts(), "")


def current() -> Call:
    """The call that is being served; outside of one, or where nothing is measured, one that counts for nobody."""
    return _current.get(_uncounted)


def set_current(call: Call) -> None:
    """For the rest of the task that serves a call."""
    _current.set(call)
