"""A gateway's metrics tell the truth: calls of known size on a real store with engines that echo, then a scrape."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from folkmoot.gateway import metrics, metrics_queue
from folkmoot.gateway.batch_client import AsyncBatches
from folkmoot.gateway.client import AsyncClient
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.metrics import CALL_BOUNDS_S, Call, GatewayCounts, Histogram
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import gateway_pb2_grpc
from folkmoot.gateway.queue import QueueSettings, RequestQueue
from folkmoot.gateway.server import METHODS, serve
from folkmoot.gateway.settings import GatewaySettings
from folkmoot.gateway.store import Store
from tests.gateway.conftest import QUICK, token_request, until
from tests.gateway.echo import MODEL, EchoEngine
from tests.gateway.scrapes import Scrape, scrape

GENERATE = "folkmoot.v1.Folkmoot/Generate"
ECHO = {"model": MODEL.name, "lane": "interactive"}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each scrape asks the store."""
    monkeypatch.setattr(metrics_queue, "FRESH_S", 0.0)


@dataclass
class Measured:
    """A gateway and its metrics."""

    address: str
    url: str

    async def scrape(self) -> Scrape:
        return await scrape(self.url)


async def start(stack: AsyncExitStack, redis: str, namespace: str, **changes: Any) -> Measured:
    changes = {"queue": QUICK, "shutdown_s": 0.0, **changes}
    settings = GatewaySettings(listen="127.0.0.1:0", redis=redis, namespace=namespace, **changes)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    address, url = loop.create_future(), loop.create_future()
    task = asyncio.create_task(serve(settings, stop, address.set_result, url.set_result))

    async def end() -> None:
        stop.set()
        await task

    stack.push_async_callback(end)
    await asyncio.wait({task, url}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    return Measured(address.result(), url.result())


@pytest.fixture
async def measured(store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack) -> Measured:
    return await start(stack, store_server.url, namespace)


@pytest.fixture
async def folkmoot(measured: Measured, stack: AsyncExitStack) -> gateway_pb2_grpc.FolkmootStub:
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(measured.address))
    return gateway_pb2_grpc.FolkmootStub(channel)


async def tokens(call: Any) -> int:
    return sum([len(piece.token_ids) async for piece in call])


async def read_on(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def code_of(call: Any) -> grpc.StatusCode:
    """How a call that must fail fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await tokens(call) if hasattr(call, "__aiter__") else await call
    return caught.value.code()


async def test_calls_tokens_and_times_are_what_they_were(
    measured: Measured, folkmoot: gateway_pb2_grpc.FolkmootStub, engine: EchoEngine
) -> None:
    """Three interactive answers of 5 tokens in as many pieces, one of 7 in the batch lane, one status."""
    for _ in range(3):
        assert await tokens(folkmoot.Generate(token_request())) == 5
    assert await tokens(folkmoot.Generate(token_request(max_tokens=7, lane=pb.BATCH, request_id="r"))) == 7
    await folkmoot.GetRequest(pb.GetRequestRequest(request_id="r"))
    now = await measured.scrape()
    assert now("folkmoot_gateway_calls_total", method=GENERATE, code="OK", lane="interactive") == 3
    assert now("folkmoot_gateway_calls_total", method=GENERATE, code="OK", lane="batch") == 1
    assert now("folkmoot_gateway_calls_total", method="folkmoot.v1.Folkmoot/GetRequest", code="OK", lane="") == 1
    assert now("folkmoot_gateway_calls_total") == 5
    assert now("folkmoot_gateway_calls_in_progress") == 0
    for lane, answers, size in (("interactive", 3, 5), ("batch", 1, 7)):
        assert now("folkmoot_gateway_tokens_total", lane=lane) == answers * size
        assert now("folkmoot_gateway_first_token_seconds_count", lane=lane) == answers
        assert now("folkmoot_gateway_inter_token_seconds_count", lane=lane) == answers * (size - 1)
        assert now("folkmoot_gateway_call_seconds_count", lane=lane) == answers
        first, whole = (now(f"folkmoot_gateway_{what}_seconds_sum", lane=lane) for what in ("first_token", "call"))
        assert 0 < first < whole
    assert now("folkmoot_queue_ended_total", outcome="answered", **ECHO) == 3
    assert now("folkmoot_queue_ended_total") == 4
    assert now("folkmoot_gateway_store_seconds_count", script="submit") >= 1
    assert now("folkmoot_gateway_store_up") == 1
    assert now.has("process_cpu_seconds_total") and now.has("process_open_fds")


async def test_a_stream_under_way_and_one_that_was_left(
    measured: Measured, folkmoot: gateway_pb2_grpc.FolkmootStub, queue: RequestQueue, stack: AsyncExitStack
) -> None:
    await stack.enter_async_context(EchoEngine(queue, step_s=0.02))
    call = folkmoot.Generate(token_request(max_tokens=500))
    assert (await call.read()) is not grpc.aio.EOF
    now = await measured.scrape()
    assert now("folkmoot_gateway_calls_in_progress", method=GENERATE) == 1
    assert now("folkmoot_queue_leases", **ECHO) == now("folkmoot_queue_requests", state="running", **ECHO) == 1
    assert now("folkmoot_queue_tokens", state="running", **ECHO) == 503
    call.cancel()

    async def is_over() -> bool:
        now = await measured.scrape()
        return now("folkmoot_queue_ended_total", outcome="cancelled", **ECHO) == 1

    await until(is_over, 60.0)
    now = await measured.scrape()
    assert now("folkmoot_gateway_calls_total", method=GENERATE, code="CANCELLED") == 1
    assert now("folkmoot_gateway_calls_in_progress") == 0


async def test_nothing_that_a_client_writes_becomes_a_series(
    measured: Measured, folkmoot: gateway_pb2_grpc.FolkmootStub, engine: EchoEngine, stack: AsyncExitStack
) -> None:
    """Methods, services, models, tenants, lanes and ids of a client's own making."""
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(measured.address))
    for i in range(20):
        made_up = channel.unary_unary(f"/evil.v{i}.Evil/Method{i}", lambda x: x, lambda x: x)
        assert await code_of(made_up(b"")) == grpc.StatusCode.UNIMPLEMENTED
        method = channel.unary_unary(f"/folkmoot.v1.Folkmoot/Evil{i}", lambda x: x, lambda x: x)
        assert await code_of(method(b"")) == grpc.StatusCode.UNIMPLEMENTED
        wrong = token_request()
        wrong.model = f"evil-{i}"
        assert await code_of(folkmoot.Generate(wrong)) == grpc.StatusCode.INVALID_ARGUMENT
        assert await tokens(folkmoot.Generate(token_request(tenant=f"evil-{i}", request_id=f"evil-{i}"))) == 5
        odd = token_request()
        odd.lane = 100 + i  # type: ignore[assignment]
        assert await code_of(folkmoot.Generate(odd)) == grpc.StatusCode.INVALID_ARGUMENT
    now = await measured.scrape()
    assert now("folkmoot_gateway_calls_total", method="other", code="UNIMPLEMENTED") == 40
    assert now("folkmoot_gateway_calls_total", method=GENERATE, code="INVALID_ARGUMENT") == 40
    assert now.labels("method") <= {"other", *(method.removeprefix("/") for method in METHODS)}
    assert now.labels("lane") == {"", "interactive", "batch"}
    assert now.labels("model") == {MODEL.name}
    assert not any("evil" in value.lower() for name in ("script", "reason", "state") for value in now.labels(name))


async def test_refusals_by_their_reason(store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack) -> None:
    """A lane of one place, which a request without an engine has taken; and a call too many."""
    tight = QueueSettings(lease_s=0.6, max_waiting_requests=1)
    measured = await start(stack, store_server.url, namespace, queue=tight, max_calls=2)
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(measured.address))
    folkmoot = gateway_pb2_grpc.FolkmootStub(channel)
    queue = RequestQueue(Store(store_server.url, namespace), tight)
    await queue.register("engine-0", MODEL, 60.0)
    first = folkmoot.Generate(token_request(request_id="first"))
    assert (await first.read()).request_id == "first"
    assert await code_of(folkmoot.Generate(token_request())) == grpc.StatusCode.RESOURCE_EXHAUSTED
    now = await measured.scrape()
    assert now("folkmoot_gateway_refusals_total", reason="QUEUE_FULL") == now("folkmoot_gateway_refusals_total") == 1
    assert now("folkmoot_queue_requests", state="waiting", **ECHO) == 1
    assert 0 <= now("folkmoot_queue_oldest_seconds", **ECHO) < 60
    assert now("folkmoot_queue_tenants", **ECHO) == 1
    assert now("folkmoot_queue_engines", state="not_ready", model=MODEL.name) == now("folkmoot_queue_engines") == 1
    second = folkmoot.Generate(token_request(request_id="first"))  # joins
    assert (await second.read()).request_id == "first"
    assert await code_of(folkmoot.Generate(token_request())) == grpc.StatusCode.RESOURCE_EXHAUSTED
    now = await measured.scrape()
    assert now("folkmoot_gateway_refusals_total", reason="TOO_MANY_CALLS") == 1
    assert now("folkmoot_gateway_calls_total", code="RESOURCE_EXHAUSTED", method=GENERATE) == 2
    first.cancel()
    second.cancel()
    await queue.store.close()


async def test_who_has_no_key_is_counted_and_tells_nothing(
    store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack
) -> None:
    measured = await start(stack, store_server.url, namespace, require_keys=True)
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(measured.address))
    folkmoot = gateway_pb2_grpc.FolkmootStub(channel)
    assert await code_of(folkmoot.Generate(token_request())) == grpc.StatusCode.UNAUTHENTICATED
    assert await code_of(folkmoot.ListModels(pb.ListModelsRequest())) == grpc.StatusCode.UNAUTHENTICATED
    evil = channel.unary_unary("/evil.v1.Evil/Method", lambda x: x, lambda x: x)
    assert await code_of(evil(b"")) == grpc.StatusCode.UNAUTHENTICATED
    now = await measured.scrape()
    assert now("folkmoot_gateway_calls_total", code="UNAUTHENTICATED") == 3
    assert (
        now("folkmoot_gateway_calls_total", method=GENERATE) == now("folkmoot_gateway_calls_total", method="other") == 1
    )


async def test_engines_that_fall_silent_and_requests_that_are_given_up(
    measured: Measured, folkmoot: gateway_pb2_grpc.FolkmootStub, queue: RequestQueue
) -> None:
    """Each engine leases the request and is never heard of again, until its attempts are over."""
    await queue.register("engine-0", MODEL, 60.0)
    call = folkmoot.Generate(token_request(request_id="r"))
    assert (await call.read()).request_id == "r"
    attempts = queue.settings.max_attempts
    for i in range(attempts):

        async def leased(i: int = i) -> bool:
            return bool(await queue.lease(MODEL.name, f"engine-{i}", 1))

        await until(leased, 60.0)
    now = await measured.scrape()
    assert now("folkmoot_queue_leased_again_total", **ECHO) == attempts - 1
    assert now("folkmoot_queue_leases_expired_total", **ECHO) == attempts - 1
    assert now("folkmoot_queue_dead_letters") == 0

    async def is_given_up() -> bool:
        await queue.lease(MODEL.name, "engine-9", 1)
        return (await measured.scrape())("folkmoot_queue_dead_letters", model=MODEL.name) == 1

    await until(is_given_up, 60.0)
    with pytest.raises(grpc.aio.AioRpcError, match="given up"):
        await read_on(call)
    now = await measured.scrape()
    assert now("folkmoot_queue_ended_total", outcome="given_up", **ECHO) == now("folkmoot_queue_ended_total") == 1
    assert now("folkmoot_gateway_calls_total", code="INTERNAL", method=GENERATE) == 1


async def test_a_request_that_is_handed_back_is_no_expired_lease(
    measured: Measured, queue: RequestQueue, folkmoot: gateway_pb2_grpc.FolkmootStub
) -> None:
    await queue.register("engine-0", MODEL, 60.0)
    call = folkmoot.Generate(token_request())
    assert (await call.read()).request_id
    await queue.release(await queue.lease(MODEL.name, "engine-0", 1))

    async def is_back() -> bool:
        return (await measured.scrape())("folkmoot_queue_handed_back", **ECHO) == 1

    await until(is_back, 60.0)
    assert len(await queue.lease(MODEL.name, "engine-1", 1)) == 1

    async def is_leased() -> bool:
        return (await measured.scrape())("folkmoot_queue_leased_again_total", **ECHO) == 1

    await until(is_leased, 60.0)
    now = await measured.scrape()
    assert now("folkmoot_queue_leases_expired_total") == now("folkmoot_queue_handed_back") == 0
    call.cancel()


async def test_batches_and_their_lines(measured: Measured, engine: EchoEngine) -> None:
    lines: list[dict[str, Any]] = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"prompt": [i], "max_tokens": 2}}
        for i in range(3)
    ]
    lines[2]["body"]["max_tokens"] = -1
    async with AsyncClient(measured.address) as client:
        batches = AsyncBatches(client)
        done = await batches.wait((await batches.create(lines)).id, 20.0)
    assert (done.completed, done.failed) == (2, 1)

    async def is_told() -> bool:
        return (await measured.scrape())("folkmoot_batches_ended_total", status="completed") == 1

    await until(is_told, 60.0)
    now = await measured.scrape()
    assert now("folkmoot_batch_lines_total", outcome="done") == 2
    assert now("folkmoot_batch_lines_total", outcome="failed") == 1
    assert now("folkmoot_batches_ended_total") == 1 and now("folkmoot_batches") == 0
    assert now("folkmoot_queue_ended_total", outcome="answered", lane="batch", model=MODEL.name) == 2
    assert now("folkmoot_gateway_calls_total", method="folkmoot.v1.Batches/Create", code="OK") == 1


async def test_while_the_store_is_away_the_gateway_still_says_so(
    mortal_server: EmbeddedStore, namespace: str, stack: AsyncExitStack
) -> None:
    measured = await start(stack, mortal_server.url, namespace)
    queue = RequestQueue(Store(mortal_server.url, namespace))
    await queue.register("engine-0", MODEL, 60.0)
    await until(lambda: _says(measured, "folkmoot_queue_requests"))
    mortal_server.stop()
    now = await measured.scrape()
    assert now("folkmoot_gateway_store_up") == 0 and now.has("folkmoot_gateway_store_up")
    assert now("folkmoot_gateway_store_errors_total", reason="STORE_AWAY") >= 1
    assert not any(name.startswith("folkmoot_queue") for name in now.names)
    await queue.store.close()


async def _says(measured: Measured, name: str) -> bool:
    return (await measured.scrape()).has(name)


async def test_off_means_nothing_is_offered(store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack) -> None:
    settings = GatewaySettings(listen="127.0.0.1:0", redis=store_server.url, namespace=namespace, metrics="off")
    stop, said = asyncio.Event(), list[str]()
    address = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(settings, stop, address.set_result, said.append))
    async with AsyncClient(await address) as client:
        assert list(await client.models()) == []
    stop.set()
    await task
    assert said == []


def test_buckets_hold_what_is_up_to_their_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 7.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]
    assert histogram.total == 12.0
    assert CALL_BOUNDS_S[0] < 0.02 and CALL_BOUNDS_S[-1] > 600


def test_the_time_between_tokens_counts_each_piece_by_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 2, 4 and no tokens, at 1.0, 3.0 and 9.0 s after a call that came at 0.5 s."""
    times = iter((0.5, 1.0, 3.0, 10.0))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    counts = GatewayCounts()
    call = Call(counts, GENERATE)
    call.lane = "interactive"
    call.begin()
    for size in (2, 4, 0):
        call.wrote(size)
    call.end("OK")
    assert counts.first_token_s["interactive"].total == 0.5
    assert counts.inter_token_s["interactive"].total == (3.0 - 1.0) / 4
    assert sum(counts.inter_token_s["interactive"].counts) == 1
    assert counts.call_s[GENERATE, "interactive"].total == 9.5
    assert counts.tokens[GENERATE, "interactive"] == 6
