"""Traces: which one a request belongs to (W3C Trace Context), and the spans of this process.

    client ── traceparent ──> gateway: a span a call ── queue entry ──> engine: a span a lease ──> vLLM's own span

The context is carried along whether spans are made here or not. They are once `start` was called and the environment
says where they go (OTEL_EXPORTER_OTLP_ENDPOINT); OpenTelemetry is imported then, and only then (otel.py). Until then a
span is an object that hands on the context that it was given, and does nothing.

A context comes from strangers: what is not exactly as the recommendation says is ignored, and what is long is dropped.
"""

import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from folkmoot.gateway.otel import Recorder

log = logging.getLogger(__name__)

TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""https://www.w3.org/TR/trace-context-2/#traceparent-header; what a later version adds at its end is cut off."""
TRACEPARENT_CHARS = 55
MAX_TRACESTATE_CHARS = 512
TRACESTATE = re.compile(r"[\x20-\x7e]*")

Kind = Literal["server", "consumer", "producer"]
Attributes = Mapping[str, str | int | float | bool | Sequence[str]]


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span of one trace, as it travels."""

    traceparent: str
    tracestate: str = ""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return self.traceparent[3:35]

    @property
    def span_id(self) -> str:
        """16 hexadecimal digits."""
        return self.traceparent[36:52]

    @property
    def flags(self) -> int:
        """1: the trace is sampled; 2: its id is random."""
        return int(self.traceparent[53:55], 16) & 3

    @property
    def headers(self) -> dict[str, str]:
        """As headers, or a call's metadata."""
        state = {"tracestate": self.tracestate} if self.tracestate else {}
        return {"traceparent": self.traceparent, **state}

    @property
    def packed(self) -> str:
        """One string."""
        return f"{self.traceparent} {self.tracestate}".rstrip()

    @staticmethod
    def unpacked(text: str) -> "TraceContext | None":
        """What `packed` made; None for anything else."""
        parent, _, state = text.partition(" ")
        return context_of([("traceparent", parent), ("tracestate", state)])


def context_of(metadata: Iterable[tuple[str, str | bytes]]) -> TraceContext | None:
    """What a call's metadata say; None where that is nothing, or is not sound."""
    parents, states = [], []
    for name, value in metadata:
        if name == "traceparent":
            parents.append(value)
        elif name == "tracestate" and value:
            states.append(value)
    if len(parents) != 1 or not isinstance(parents[0], str):
        return None
    found = TRACEPARENT.match(parents[0])
    if not found or (len(parents[0]) > TRACEPARENT_CHARS and parents[0].startswith("00")):
        return None
    return TraceContext(f"00{found[0][2:]}", _state(states))


def _state(values: Sequence[str | bytes]) -> str:
    """Several header lines count as one, in their order."""
    text = ",".join(value for value in values if isinstance(value, str))
    return text if len(text) <= MAX_TRACESTATE_CHARS and TRACESTATE.fullmatch(text) else ""


class Span:
    """What stands in for a span where none is made. `context` is for those that come below it."""

    __slots__ = ("context",)

    def __init__(self, context: TraceContext | None = None) -> None:
        self.context = context

    @property
    def is_made(self) -> bool:
        """Whether it is recorded, so that attributes are worth finding out."""
        return False

    @property
    def trace_id(self) -> str:
        """Empty where it belongs to no trace."""
        return self.context.trace_id if self.context is not None else ""

    def set(self, attributes: Attributes) -> None:
        """Attributes, by OpenTelemetry's semantic conventions where these have a name; else `folkmoot.*`."""

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Something that happened just now."""

    def fail(self, message: str) -> None:
        """It did not go well. `message` holds nothing of a prompt or an answer."""

    def end(self) -> None:
        """The last of its methods that may be called; again, it does nothing."""


NO_SPAN = Span()
_recorder: "Recorder | None" = None
_current: ContextVar[Span] = ContextVar("span")


def is_wanted() -> bool:
    """Whether the environment says where spans go to."""
    named = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    is_off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    is_off |= os.environ.get("OTEL_TRACES_EXPORTER", "otlp").lower() != "otlp"
    return not is_off and any(os.environ.get(name) for name in named)


def start(service: str, instance: str = "") -> bool:
    """Make spans from now on, where the environment wants them; whether they are. Never fails: what is wrong is logged.

    `service` is their service.name, unless OTEL_SERVICE_NAME says another one. In a process that forks: afterwards.
    """
    global _recorder
    if _recorder is None and is_wanted():
        try:
            from folkmoot.gateway.otel import Recorder

            _recorder = Recorder(service, instance)
        except ImportError as e:
            log.warning("no traces, although an OTLP endpoint is set: %s; pip install 'folkmoot[otel]'", e)
        except Exception as e:  # a setting that OpenTelemetry does not take
            log.warning("no traces: %s: %s", type(e).__name__, e)
    return _recorder is not None


def is_on() -> bool:
    """Whether this process makes spans."""
    return _recorder is not None


def share() -> None:
    """Have libraries of this process that make spans, by OpenTelemetry's global tracer, send them as we do."""
    if _recorder is not None:
        _recorder.share()


def stop() -> None:
    """Send what there is, for a few seconds at most, and make no spans any more."""
    global _recorder
    if _recorder is not None:
        _recorder.shut_down()
        _recorder = None


def span(
    name: str,
    kind: Kind,
    parent: TraceContext | None,
    attributes: Attributes | None = None,
    links: Sequence[TraceContext] = (),
) -> Span:
    """Begin a span; `parent` None: of a new trace. `links`: spans of other traces that it has to do with."""
    if _recorder is None:
        return Span(parent)
    return _recorder.span(name, kind, parent, attributes or {}, links)


def current() -> Span:
    """The span of the call that is being served."""
    return _current.get(NO_SPAN)


def set_current(one: Span) -> None:
    """For the rest of this task."""
    _current.set(one)


def of_caller() -> tuple[tuple[str, str], ...]:
    """Metadata that continue the trace of whoever calls this, where that uses OpenTelemetry and has a span open."""
    if (api := sys.modules.get("opentelemetry.trace")) is None:
        return ()
    found = api.get_current_span().get_span_context()
    if not found.is_valid:
        return ()
    parent = f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"
    return tuple(TraceContext(parent, _state([found.trace_state.to_header()])).headers.items())
