"""A collector: it takes spans by OTLP over gRPC, as any that is run for real, and keeps them."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Received


@dataclass(frozen=True)
class Seen:
    """A span that has come."""

    service: str
    instance: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: str
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    links: list[tuple[str, str]]
    failed: bool
    message: str
    begin_ns: int
    end_ns: int

    @property
    def traceparent(self) -> str:
        """What who comes below it is given."""
        return f"00-{self.trace_id}-{self.span_id}-01"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Serves while it is entered; `spans` are those that have come so far."""

    def __init__(self) -> None:
        self.spans: list[Seen] = []
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> "Collector":
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()

    @property
    def environment(self) -> dict[str, str]:
        """What a process is told that shall send all its spans here, soon."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_TRACES_SAMPLER_ARG": "1",
        }

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """The one call of the service."""
        found = [
            _seen({a.key: _plain(a.value) for a in group.resource.attributes}, one)
            for group in request.resource_spans
            for scope in group.scope_spans
            for one in scope.spans
        ]
        with self._lock:
            self.spans = self.spans + found
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait(self, wanted: Callable[[Seen], bool], count: int = 1, timeout_s: float = 20.0) -> list[Seen]:
        """Poll until so many spans are as wanted, by their beginnings; fails the test after `timeout_s`. Blocks."""
        deadline = time.monotonic() + timeout_s
        while len(found := [span for span in self.spans if wanted(span)]) < count:
            assert time.monotonic() < deadline, f"{len(found)} of {count} spans; all: {[s.name for s in self.spans]}"
            time.sleep(0.02)
        return sorted(found, key=lambda span: span.begin_ns)


def _seen(resource: dict[str, Any], one: Received) -> Seen:
    return Seen(
        service=resource["service.name"],
        instance=resource.get("service.instance.id", ""),
        name=one.name,
        trace_id=one.trace_id.hex(),
        span_id=one.span_id.hex(),
        parent_id=one.parent_span_id.hex(),
        kind=Received.SpanKind.Name(one.kind).removeprefix("SPAN_KIND_").lower(),
        attributes={a.key: _plain(a.value) for a in one.attributes},
        events=[(e.name, {a.key: _plain(a.value) for a in e.attributes}) for e in one.events],
        links=[(link.trace_id.hex(), link.span_id.hex()) for link in one.links],
        failed=one.status.code == 2,
        message=one.status.message,
        begin_ns=one.start_time_unix_nano,
        end_ns=one.end_time_unix_nano,
    )


def _plain(value: AnyValue) -> Any:
    if value.WhichOneof("value") == "array_value":
        return [_plain(one) for one in value.array_value.values]
    return getattr(value, value.WhichOneof("value") or "string_value")
