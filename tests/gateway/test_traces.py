"""Traces: the tree of spans that a request makes, as a collector sees it, whatever dies; and contexts that are none.

The gateway is a process of its own, engines are in this one: so spans come from both, as they do in a cluster.
"""

import asyncio
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from folkmoot.gateway import tracing
from folkmoot.gateway.batch_client import AsyncBatches
from folkmoot.gateway.client import AsyncClient, Client, InvalidRequest
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.pb import gateway_pb2_grpc
from folkmoot.gateway.queue import RequestQueue
from folkmoot.gateway.store import Store
from folkmoot.gateway.tracing import MAX_TRACESTATE_CHARS, TraceContext, context_of
from tests.gateway.batches import ended, line
from tests.gateway.conftest import QUICK, GatewayProcess, start_gateway, token_request
from tests.gateway.echo import MODEL, EchoEngine
from tests.gateway.test_resume import taken_over
from tests.otlp import Collector, Seen

GENERATE = "folkmoot.v1.Folkmoot/Generate"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
StartProcess = Callable[..., GatewayProcess]


@pytest.fixture(scope="session")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """One kind of server is enough here."""
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture(scope="module")
def namespace() -> str:
    """All tests here share one."""
    return f"t{secrets.token_hex(4)}"


@pytest.fixture(scope="module")
def receiving() -> Iterator[Collector]:
    with Collector() as one:
        yield one


@pytest.fixture(scope="module")
def gateway(receiving: Collector, store_server: EmbeddedStore, namespace: str) -> Iterator[str]:
    """The address of a gateway process that sends its spans to the collector."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in receiving.environment.items():
            patch.setenv(name, value)
        one = GatewayProcess(store_server.tcp_url, namespace)
    yield one.address
    one.kill()


@pytest.fixture
def collector(receiving: Collector, gateway: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """It has the spans of this test only; engines of this process send theirs, too."""
    for name, value in receiving.environment.items():
        monkeypatch.setenv(name, value)
    assert tracing.start("folkmoot-engine", "here")
    receiving.spans = []
    yield receiving
    tracing.stop()


def named(name: str) -> Callable[[Seen], bool]:
    return lambda span: span.name == name


async def seen(collector: Collector, name: str, count: int = 1) -> list[Seen]:
    return await asyncio.to_thread(collector.wait, named(name), count)


async def test_a_request_is_one_tree(collector: Collector, queue: RequestQueue, gateway: str) -> None:
    """The caller's own span, the call, the lease; with what is known of the request, and nothing that it holds."""
    provider = TracerProvider(ALWAYS_ON)
    async with EchoEngine(queue), AsyncClient(gateway) as client:
        with trace.use_span(provider.get_tracer("caller").start_span("question")) as question:
            text = await client.generate_text("a secret prompt", request_id="r1", tenant="alice")
        (call,), (lease,) = await seen(collector, GENERATE), await seen(collector, "lease")
    above = question.get_span_context()
    assert (call.trace_id, call.parent_id) == (f"{above.trace_id:032x}", f"{above.span_id:016x}")
    assert (lease.trace_id, lease.parent_id) == (call.trace_id, call.span_id)
    assert (call.service, call.kind, lease.service, lease.instance, lease.kind) == (
        "folkmoot-gateway", "server", "folkmoot-engine", "here", "consumer",
    )  # fmt: skip
    assert call.begin_ns < lease.begin_ns < lease.end_ns and lease.begin_ns < call.end_ns
    expected = {
        "gen_ai.request.model": "echo", "folkmoot.request_id": "r1", "folkmoot.tenant": "alice",
        "folkmoot.lane": "interactive", "gen_ai.usage.input_tokens": 15, "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ["length"],
    }  # fmt: skip
    assert expected.items() <= call.attributes.items() and expected.items() <= lease.attributes.items()
    assert call.attributes["rpc.grpc.status_code"] == 0 and [name for name, _ in call.events] == ["first piece"]
    assert {
        "folkmoot.engine": "engine-1",
        "folkmoot.epoch": 1,
        "folkmoot.attempt": 1,
    }.items() <= lease.attributes.items()
    assert not (call.failed or lease.failed)
    everything = repr(collector.spans)
    assert "secret prompt" not in everything and text.strip() not in everything


async def test_a_request_of_a_dead_engine_has_a_second_lease(
    collector: Collector, queue: RequestQueue, gateway: str
) -> None:
    """The first engine vanishes, and its span with it; the second one's stands below the same call."""
    async with AsyncExitStack() as engines, AsyncClient(gateway) as client:
        second = await taken_over(engines, queue, client)
        (call,), (lease,) = await seen(collector, GENERATE), await seen(collector, "lease")
    assert (lease.trace_id, lease.parent_id) == (call.trace_id, call.span_id)
    assert call.parent_id == "", "the call began the trace"
    found = {name: lease.attributes[f"folkmoot.{name}"] for name in ("engine", "epoch", "attempt", "first_token")}
    assert found == {"engine": "engine-2", "epoch": 2, "attempt": 2, "first_token": second.leases[0].offset}
    assert lease.attributes["gen_ai.usage.output_tokens"] == 60


async def test_an_engine_that_hands_over_and_one_that_finishes(
    collector: Collector, queue: RequestQueue, gateway: str
) -> None:
    async with AsyncClient(gateway) as client:
        first = await EchoEngine(queue, "engine-1", step_s=0.01).__aenter__()
        answering = asyncio.create_task(client.generate_text(token_ids=[9], max_tokens=40))
        while not first.leases:
            await asyncio.sleep(0.01)
        await first.__aexit__(None, None, None)
        async with EchoEngine(queue, "engine-2"):
            await answering
        (call,), leases = await seen(collector, GENERATE), await seen(collector, "lease", 2)
    assert [one.parent_id for one in leases] == [call.span_id] * 2
    assert [one.attributes["folkmoot.epoch"] for one in leases] == [1, 2]
    assert leases[0].attributes["folkmoot.lease.ended"] == "released"
    assert not leases[0].failed and leases[0].end_ns <= leases[1].begin_ns


async def test_calls_that_fail_say_so(collector: Collector, queue: RequestQueue, gateway: str) -> None:
    async with EchoEngine(queue), AsyncClient(gateway) as client:
        with pytest.raises(InvalidRequest):
            await client.generate_text("x", temperature=-1.0)
        with pytest.raises(InvalidRequest):
            await client.generate_text("x", temperature=1.0, top_p=7.0)
        calls = await seen(collector, GENERATE, 2)
    assert [call.attributes["rpc.grpc.status_code"] for call in calls] == [3, 3]
    assert not any(call.failed for call in calls), "the client's mistake is no error of a server"


async def test_lines_of_a_batch_are_traces_of_their_own(
    collector: Collector, queue: RequestQueue, gateway: str
) -> None:
    async with EchoEngine(queue), AsyncClient(gateway) as client:
        batches = AsyncBatches(client)
        batch = await batches.create([line(i) for i in range(3)])
        assert (await ended(batches, batch.id)).completed == 3
        (create,) = await seen(collector, "folkmoot.v1.Batches/Create")
        lines, leases = await seen(collector, "batch line", 3), await seen(collector, "lease", 3)
    assert len({create.trace_id, *(one.trace_id for one in lines)}) == 4
    assert all(one.links == [(create.trace_id, create.span_id)] and one.parent_id == "" for one in lines)
    assert {(one.trace_id, one.parent_id) for one in leases} == {(one.trace_id, one.span_id) for one in lines}
    assert sorted(one.attributes["folkmoot.batch.line"] for one in lines) == [0, 1, 2]
    assert {one.attributes["folkmoot.batch.id"] for one in lines} == {batch.id}


@pytest.mark.parametrize(
    "sampler", [{"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, {"OTEL_TRACES_SAMPLER_ARG": "0"}]
)
async def test_the_sampler_of_the_environment_decides(
    sampler: dict[str, str],
    receiving: Collector,
    store_server: EmbeddedStore,
    queue: RequestQueue,
    namespace: str,
    stack: AsyncExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing of a trace that is not sampled is sent, also not by engines, which hear of it."""
    receiving.spans, (unsampled, sampled) = [], (f"{kind}-{next(iter(sampler))}" for kind in ("unsampled", "sampled"))
    for name, value in {**receiving.environment, **sampler}.items():
        monkeypatch.setenv(name, value)
    assert tracing.start("folkmoot")
    address = await start_gateway(stack, store_server.url, namespace, queue=QUICK, shutdown_s=0.0)
    async with EchoEngine(queue) as engine, AsyncClient(address) as client:
        await client.generate_text("x", request_id=unsampled)
        (lease,) = engine.leases
        assert lease.trace is not None and lease.trace.flags & 1 == 0
        provider = TracerProvider(ALWAYS_ON)
        with trace.use_span(provider.get_tracer("caller").start_span("x")):
            await client.generate_text("x", request_id=sampled)
        (call,), (lease_span,) = await seen(receiving, GENERATE), await seen(receiving, "lease")
    tracing.stop()
    assert call.attributes["folkmoot.request_id"] == lease_span.attributes["folkmoot.request_id"] == sampled


@pytest.mark.parametrize(("argument", "ratio"), [("", 0.05), ("0.5", 0.5), ("1", 1.0)])
def test_of_the_traces_that_begin_here_some_are_sampled_and_of_clients_all(
    argument: str, ratio: float, receiving: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**receiving.environment, "OTEL_TRACES_SAMPLER_ARG": argument}.items():
        monkeypatch.setenv(name, value)
    assert tracing.start("folkmoot")
    try:
        begun = [tracing.span("x", "server", None) for _ in range(4000)]
        assert sum(span.is_made for span in begun) / len(begun) == pytest.approx(ratio, abs=0.04)
        for span in begun:
            below = tracing.span("x", "consumer", span.context)
            assert (below.is_made, below.trace_id) == (span.is_made, span.trace_id)
        assert len({span.trace_id for span in begun}) == len(begun)
        assert all(tracing.span("x", "server", TraceContext(PARENT)).is_made for _ in range(100))
    finally:
        tracing.stop()


def test_a_client_without_asyncio_is_in_its_callers_trace(
    collector: Collector, gateway: str, store_server: EmbeddedStore, namespace: str
) -> None:
    async def register() -> None:
        queue = RequestQueue(Store(store_server.url, namespace))
        await queue.register("engine-1", MODEL, 60.0)
        await queue.store.close()

    asyncio.run(register())
    provider = TracerProvider(ALWAYS_ON)
    with Client(gateway) as client:
        with trace.use_span(provider.get_tracer("caller").start_span("look")) as look:
            assert client.models()
        (call,) = collector.wait(named("folkmoot.v1.Folkmoot/ListModels"))
    assert call.parent_id == f"{look.get_span_context().span_id:016x}"


HOSTILE = [
    ("traceparent", PARENT.upper()), ("traceparent", PARENT + "-00"), ("traceparent", "ff" + PARENT[2:]),
    ("traceparent", "00-" + "0" * 32 + PARENT[35:]), ("traceparent", PARENT[:36] + "0" * 16 + "-01"),
    ("traceparent", PARENT[:-1]), ("traceparent", ""), ("traceparent", "9" * 5000), 
]  # fmt: skip


async def test_hostile_contexts_are_no_errors(queue: RequestQueue, gateway: str, collector: Collector) -> None:
    """What is no context begins a trace of its own; what is one and too long loses its tracestate."""
    async with EchoEngine(queue) as engine, grpc.aio.insecure_channel(gateway) as channel:
        stub = gateway_pb2_grpc.FolkmootStub(channel)
        long = [("traceparent", PARENT), *(("tracestate", f"k{i}={'x' * 200}") for i in range(4))]
        good = [("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")]
        for metadata in (*([one] for one in HOSTILE), long, good):
            pieces = [piece async for piece in stub.Generate(token_request(7), metadata=metadata)]
            assert pieces[-1].HasField("finish")
        traces = [lease.trace for lease in engine.leases]
    *hostile, long_one, good_one = traces
    assert all(one is not None and one.trace_id != PARENT[3:35] and not one.tracestate for one in hostile)
    assert long_one is not None and (long_one.trace_id, long_one.tracestate) == (PARENT[3:35], "")
    assert good_one is not None and (good_one.trace_id, good_one.tracestate) == (PARENT[3:35], "a=1,b=2")


async def test_without_an_endpoint_the_context_goes_through(
    store_server: EmbeddedStore, queue: RequestQueue, namespace: str, stack: AsyncExitStack
) -> None:
    assert not tracing.start("folkmoot")
    address = await start_gateway(stack, store_server.url, namespace, queue=QUICK, shutdown_s=0.0)
    async with EchoEngine(queue) as engine, grpc.aio.insecure_channel(address) as channel:
        stub = gateway_pb2_grpc.FolkmootStub(channel)
        metadata = (("traceparent", PARENT), ("tracestate", "a=1"))
        assert [piece async for piece in stub.Generate(token_request(7), metadata=metadata)]
        assert [piece async for piece in stub.Generate(token_request(8))]
    assert [lease.trace for lease in engine.leases] == [TraceContext(PARENT, "a=1"), None]


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delitem(sys.modules, "folkmoot.gateway.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert not tracing.start("folkmoot")
    assert "pip install 'folkmoot[otel]'" in caplog.text


async def test_a_collector_that_is_away_is_nobodys_trouble(
    queue: RequestQueue, gateway_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    process = gateway_process()
    async with EchoEngine(queue), AsyncClient(process.address) as client:
        assert await client.generate_text("x")
    process.process.terminate()
    assert await asyncio.to_thread(process.process.wait, 20) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_SDK_DISABLED", "true"),
        ("OTEL_TRACES_EXPORTER", "none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "pigeon"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.01"),
        ("OTEL_TRACES_SAMPLER_ARG", "nan"),
        ("OTEL_TRACES_SAMPLER_ARG", "some"),
    ],
)
def test_what_turns_traces_off(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(name, value)
    assert not tracing.start("folkmoot-engine")
    assert tracing.span("x", "server", None).context is None


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["traceparent", "tracestate"]), st.text() | st.binary())))
def test_any_metadata_make_a_sound_context_or_none(metadata: list[tuple[str, str | bytes]]) -> None:
    found = context_of([*metadata, ("traceparent", PARENT)])
    if any(name == "traceparent" for name, _ in metadata):
        assert found is None
    else:
        assert found is not None and len(found.packed) <= 56 + MAX_TRACESTATE_CHARS
        assert TraceContext.unpacked(found.packed) == found
