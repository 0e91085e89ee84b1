"""vLLM's own spans, one a request, below the one that its `trace_headers` name."""

from typing import Any

ELSEWHERE = "the tracer of this process"


def trace_requests(llm: Any) -> None:
    """From now on an AsyncLLM, which was made with statistics, makes a span for each request that ends, by the tracer
    that is global in this process.

    Not by vLLM's own argument `otlp_traces_endpoint`: with that it connects to the collector before it forks its core,
    which inherits the connection, and of OpenTelemetry's settings it knows two.
    """
    llm.observability_config.otlp_traces_endpoint = ELSEWHERE  # else it drops trace_headers
    llm.output_processor.tracing_enabled = True
