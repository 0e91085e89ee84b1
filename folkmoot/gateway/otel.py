"""Spans by OpenTelemetry's SDK, sent by OTLP. The only module that imports it, and only where traces are wanted.

All settings are OpenTelemetry's own environment variables: OTEL_EXPORTER_OTLP_*, OTEL_SERVICE_NAME,
OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_BSP_*.

The sampler is parentbased_traceidratio unless another one is asked for. With it, whether a trace is sampled is decided
here, before there is a span: one that is not costs next to nothing.
"""

import os
import random
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import DEFAULT_ON
from opentelemetry.trace import SpanKind, Status, StatusCode

from folkmoot.gateway.tracing import Attributes, Kind, Span, TraceContext

KINDS = {"server": SpanKind.SERVER, "consumer": SpanKind.CONSUMER, "producer": SpanKind.PRODUCER}
SAMPLER, RATIO = "parentbased_traceidratio", 0.05
"""Where the environment does not say: the traces that we begin are sampled at this ratio, and those of clients as they
say."""
FLUSH_S = 3.0
"""How long the end of a process waits for a collector that does not answer."""


class Recorder:
    """Makes spans. Starts a thread, which sends them."""

    def __init__(self, service: str, instance: str) -> None:
        own = {"service.name": service, "service.version": version("folkmoot")}
        if instance:
            own["service.instance.id"] = instance
        resource = Resource.create({**own, **OTELResourceDetector().detect().attributes})
        self._ratio = _ratio()
        sampler = DEFAULT_ON if self._ratio is not None else None
        self.provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(_exporter()))
        self._tracer = self.provider.get_tracer("folkmoot", version("folkmoot"))

    def span(
        self, name: str, kind: Kind, parent: TraceContext | None, attributes: Attributes, links: Sequence[TraceContext]
    ) -> Span:
        """Begin one."""
        if self._ratio is not None and not (parent.flags & 1 if parent is not None else random.random() < self._ratio):
            return Span(parent or _unsampled())
        made = self._tracer.start_span(
            name,
            _context(parent),
            KINDS[kind],
            attributes=attributes,
            links=[trace.Link(_span_context(one)) for one in links],
        )
        return MadeSpan(made)

    def share(self) -> None:
        """Be the tracer that libraries find."""
        trace.set_tracer_provider(self.provider)

    def shut_down(self) -> None:
        """Send what there is."""
        ending = threading.Thread(target=self.provider.shutdown, name="last-spans", daemon=True)
        ending.start()
        ending.join(FLUSH_S)


class MadeSpan(Span):
    """A span of OpenTelemetry's; one that is not sampled has a context, too."""

    __slots__ = ("_span",)

    def __init__(self, made: trace.Span) -> None:
        found = made.get_span_context()
        parent = f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"
        super().__init__(TraceContext(parent, found.trace_state.to_header()))
        self._span = made

    @property
    def is_made(self) -> bool:
        """Whether it is sampled."""
        return self._span.is_recording()

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        self._span.add_event(name, attributes)

    def fail(self, message: str) -> None:
        self._span.set_status(Status(StatusCode.ERROR, message))

    def end(self) -> None:
        if self._span.is_recording():
            self._span.end()


def _ratio() -> float | None:
    """Of the sampler that is decided here; None: another one is asked for, which is OpenTelemetry's own."""
    if (os.environ.get("OTEL_TRACES_SAMPLER") or SAMPLER).strip().lower() != SAMPLER:
        return None
    text = os.environ.get("OTEL_TRACES_SAMPLER_ARG") or str(RATIO)
    with suppress(ValueError):
        if 0.0 <= (ratio := float(text)) <= 1.0:
            return ratio
    raise ValueError(f"OTEL_TRACES_SAMPLER_ARG must be a number from 0 to 1, is {text!r}")


def _unsampled() -> TraceContext:
    """Of a new trace, so that everybody below knows that it is not sampled, and log lines have its id."""
    return TraceContext(f"00-{random.getrandbits(128):032x}-{random.getrandbits(64):016x}-02")


def _exporter() -> SpanExporter:
    """By the protocol that is asked for; the extra `otel` brings the one for gRPC."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((value for name in names if (value := os.environ.get(name))), "grpc")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as ByGrpc

        return ByGrpc()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as ByHttp

        return ByHttp()
    raise ValueError(f"the OTLP protocol must be grpc or http/protobuf, is {protocol!r}")


def _context(parent: TraceContext | None) -> Context:
    """Never the context that is current here: that may be somebody else's."""
    if parent is None:
        return Context()
    return trace.set_span_in_context(trace.NonRecordingSpan(_span_context(parent)), Context())


def _span_context(one: TraceContext) -> trace.SpanContext:
    return trace.SpanContext(
        int(one.trace_id, 16),
        int(one.span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(one.flags),
        trace_state=trace.TraceState.from_header([one.tracestate]),
    )
