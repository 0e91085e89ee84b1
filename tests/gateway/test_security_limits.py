"""Limits of tenants hold across gateways, are told with a hint, and leave nothing behind in the store."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from folkmoot.gateway.api_keys import KeyStore
from folkmoot.gateway.client import AsyncClient, Busy, InvalidRequest
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.errors import LimitReached
from folkmoot.gateway.limits import Limits
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import gateway_pb2_grpc
from folkmoot.gateway.queue import Append, RequestQueue, Submission
from tests.gateway.conftest import QUICK, start_gateway, token_request, until
from tests.gateway.echo import MODEL, EchoEngine


@pytest.fixture
async def model(queue: RequestQueue) -> None:
    """Known, but nobody runs it: what is submitted waits."""
    await queue.register("engine-1", MODEL, 60.0)


def submission(request_id: str, tenant: str = "alice", cost: int = 8, lane: "pb.Lane" = pb.INTERACTIVE, **limits: Any):
    request = token_request(1, request_id=request_id, tenant=tenant, lane=lane)
    return Submission(f"{tenant}/{request_id}", "echo", request, cost, 60.0, 0.0, limits=Limits(**limits))


async def refusal(queue: RequestQueue, one: Submission) -> LimitReached:
    with pytest.raises(LimitReached) as refused:
        await queue.submit(one)
    return refused.value


async def use_of(queue: RequestQueue, tenant: str, what: str) -> float:
    """How many ms of the tenant's minute are used."""
    seconds, micros = await queue.store.command("TIME")
    value = await queue.store.command("HGET", queue.store.keys.use(tenant), what)
    return float(value or 0) - int(seconds) * 1000 - int(micros) / 1000 if value else 0.0


async def shift(queue: RequestQueue, tenant: str, what: str, ms: float) -> None:
    """Let time pass for a tenant."""
    await queue.store.command("HINCRBYFLOAT", queue.store.keys.use(tenant), what, str(-ms))


async def test_requests_a_minute(queue: RequestQueue, model: None) -> None:
    """A minute's worth at once, then one at a time as the minute goes by; other tenants do not notice."""
    for i in range(3):
        assert await queue.submit(submission(f"r{i}", requests_per_minute=3))
    refused = await refusal(queue, submission("r3", requests_per_minute=3))
    assert refused.limit == "requests_per_minute"
    assert refused.retry_after_ms is not None and 15_000 < refused.retry_after_ms <= 20_000
    assert "requests_per_minute = 3" in str(refused)
    assert not await queue.submit(submission("r1", requests_per_minute=3)), "the same again joins, and costs nothing"
    assert await queue.submit(submission("r3", tenant="bob", requests_per_minute=3))
    await shift(queue, "alice", "requests", 20_000)
    assert await queue.submit(submission("r3", requests_per_minute=3))
    await refusal(queue, submission("r4", requests_per_minute=3))


async def test_tokens_a_minute_are_estimated_then_put_right(queue: RequestQueue, model: None) -> None:
    """60 a minute: one token is a second. 40 are estimated; the answer ends early, and what it did not take is back."""
    assert await queue.submit(submission("r0", cost=40, tokens_per_minute=60))
    assert 39_000 < await use_of(queue, "alice", "tokens") <= 40_000
    refused = await refusal(queue, submission("r1", cost=40, tokens_per_minute=60))
    assert refused.limit == "tokens_per_minute"
    assert refused.retry_after_ms is not None and 18_000 < refused.retry_after_ms <= 20_000
    (lease,) = await queue.lease("echo", "engine-1", 1)
    last = pb.GenerateResponse(token_ids=[1, 2], finish=pb.Finish(reason=pb.STOP), usage=pb.Usage(prompt_tokens=3))
    await queue.append_many([Append(lease.request_id, lease.epoch, last)])
    assert 3_000 < await use_of(queue, "alice", "tokens") <= 5_000, "3 of the prompt, 2 of the answer"
    assert await queue.submit(submission("r1", cost=40, tokens_per_minute=60))
    await queue.cancel("alice/r1")
    assert await use_of(queue, "alice", "tokens") <= 5_000, "one that never ran took nothing"


async def test_more_than_a_minutes_tokens_are_never_allowed(queue: RequestQueue, model: None) -> None:
    refused = await refusal(queue, submission("r0", cost=61, tokens_per_minute=60))
    assert refused.retry_after_ms is None
    assert "allows no request for 61" in str(refused)


async def test_concurrent_requests(queue: RequestQueue, model: None) -> None:
    """Waiting and running, in each lane; whatever ends one makes room."""
    for i in range(2):
        assert await queue.submit(submission(f"r{i}", concurrent_requests=2))
    await queue.lease("echo", "engine-1", 1)
    assert (await refusal(queue, submission("r2", concurrent_requests=2))).limit == "concurrent_requests"
    assert await queue.submit(submission("b", lane=pb.BATCH, concurrent_requests=2))
    await queue.cancel("alice/r0")
    assert await queue.submit(submission("r2", concurrent_requests=2))


async def test_queue_share(queue: RequestQueue, model: None) -> None:
    """A fraction of the lane's places; at least one. Running requests do not wait, and so do not count."""
    places = queue.settings.max_waiting_requests
    share = 2 / places
    for i in range(2):
        assert await queue.submit(submission(f"r{i}", queue_share=share))
    assert (await refusal(queue, submission("r2", queue_share=share))).limit == "queue_share"
    await queue.lease("echo", "engine-1", 1)
    assert await queue.submit(submission("r2", queue_share=share))
    assert await queue.submit(submission("r0", tenant="bob", queue_share=0.1 / places))
    assert (await refusal(queue, submission("r1", tenant="bob", queue_share=0.1 / places))).limit == "queue_share"


def test_batch_lines() -> None:
    Limits(batch_lines=10).check_batch(10)
    Limits().check_batch(10**9)
    with pytest.raises(LimitReached, match="batch_lines = 10 allows no request for 11"):
        Limits(batch_lines=10).check_batch(11)


@pytest.mark.parametrize(
    "limits",
    [
        {"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"queue_share": 0.0}, {"queue_share": 1.5},
        {"concurrent_requests": 1.5}, {"batch_lines": 2**60}, {"queue_share": float("nan")},
    ],
)  # fmt: skip
def test_limits_that_cannot_be(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        Limits(**limits)


async def test_what_was_used_is_forgotten_when_it_is_paid_off(queue: RequestQueue, model: None) -> None:
    for i in range(20):
        await queue.submit(submission("r", tenant=f"tenant-{i}", requests_per_minute=60_000, tokens_per_minute=1200))
    assert await queue.store.command("EXISTS", queue.store.keys.use("tenant-19")) == 1

    async def is_forgotten() -> bool:
        names = [queue.store.keys.use(f"tenant-{i}") for i in range(20)]
        return await queue.store.command("EXISTS", *names) == 0

    await until(is_forgotten)
    await queue.cancel("tenant-0/r")  # a refund does not bring it back
    assert await is_forgotten()


# Through real gateways.


async def test_limits_hold_across_gateways(
    store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack, queue: RequestQueue, model: None
) -> None:
    """Two gateways at once, forty requests, ten allowed: exactly ten run, the others hear why and for how long."""
    addresses = [
        await start_gateway(stack, store_server.url, namespace, queue=QUICK, shutdown_s=0.0, require_keys=True)
        for _ in range(2)
    ]
    _, key = await KeyStore(queue.store).create("alice", ["generate"], Limits(concurrent_requests=10))
    metadata = (("authorization", f"Bearer {key}"),)
    channels = [await stack.enter_async_context(grpc.aio.insecure_channel(address)) for address in addresses]
    calls = [
        gateway_pb2_grpc.FolkmootStub(channels[i % 2]).Generate(
            token_request(i, request_id=f"r{i}", on_disconnect=pb.CANCEL), metadata=metadata
        )
        for i in range(40)
    ]

    async def outcome(call: Any) -> str:
        try:
            await call.read()
        except grpc.aio.AioRpcError as e:
            refused.append(e)
            return str(e.code().name)
        return "runs"

    refused: list[grpc.aio.AioRpcError] = []
    assert Counter(await asyncio.gather(*map(outcome, calls))) == {"runs": 10, "RESOURCE_EXHAUSTED": 30}
    for error in refused:
        assert "concurrent_requests = 10" in (error.details() or "")
        trailing = dict(error.trailing_metadata() or ())
        assert trailing["retry-after-ms"] == str(QUICK.retry_after_ms)
        info = error_details_pb2.ErrorInfo()
        assert any(d.Unpack(info) for d in status_pb2.Status.FromString(trailing["grpc-status-details-bin"]).details)
        assert info.reason == "TENANT_LIMIT"
    load = await queue.load("echo")
    assert load.waiting_requests == 10
    for call in calls:
        call.cancel()
    await until(lambda: _is_empty(queue))


async def _is_empty(queue: RequestQueue) -> bool:
    return (await queue.load("echo")).waiting_requests == 0


async def test_what_a_client_hears(
    store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack, queue: RequestQueue, engine: EchoEngine
) -> None:
    settings = {"queue": QUICK, "shutdown_s": 0.0, "require_keys": True}
    address = await start_gateway(stack, store_server.url, namespace, **settings)
    _, key = await KeyStore(queue.store).create("alice", ["generate"], Limits(tokens_per_minute=60))
    async with AsyncClient(address, api_key=key) as client:
        assert await client.generate_text(token_ids=[1], max_tokens=40)
        with pytest.raises(Busy, match="tokens_per_minute = 60") as busy:
            await client.generate_text(token_ids=[1], max_tokens=40)
        assert busy.value.retry_after_s is not None and 15 < busy.value.retry_after_s <= 25
        with pytest.raises(InvalidRequest, match="allows no request for 101"):
            await client.generate_text(token_ids=[1], max_tokens=100)
