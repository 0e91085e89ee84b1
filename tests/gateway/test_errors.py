"""Every error status a client can meet, with its details, through a real gateway."""

import math
import time
from contextlib import AsyncExitStack

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import gateway_pb2_grpc
from folkmoot.gateway.queue import QueueSettings, RequestQueue
from tests.gateway.conftest import start_gateway, token_request, until
from tests.gateway.echo import MODEL, EchoEngine

Stub = gateway_pb2_grpc.FolkmootStub


async def failure(call: "grpc.aio.UnaryStreamCall[object, object]") -> grpc.aio.AioRpcError:
    """The error a stream ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


def details(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    packed = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    return status_pb2.Status.FromString(packed)


def bad_fields(error: grpc.aio.AioRpcError) -> dict[str, str]:
    bad = error_details_pb2.BadRequest()
    assert details(error).details[0].Unpack(bad)
    return {v.field: v.description for v in bad.field_violations}


def assert_retry_hint(error: grpc.aio.AioRpcError) -> None:
    retry = error_details_pb2.RetryInfo()
    assert details(error).details[0].Unpack(retry)
    hint_ms = int(dict(error.trailing_metadata() or ())["retry-after-ms"])
    assert hint_ms == retry.retry_delay.ToMilliseconds() > 0


def reason(error: grpc.aio.AioRpcError) -> str:
    """google.rpc's ErrorInfo says in one word what is wrong."""
    info = error_details_pb2.ErrorInfo()
    for packed in details(error).details:
        if packed.Unpack(info):
            assert info.domain == "folkmoot"
            return info.reason
    raise AssertionError("no ErrorInfo")


SAMPLING_FAULTS: list[tuple[dict[str, object], str, str]] = [
    ({"max_tokens": 0}, "sampling.max_tokens", "at least 1"),
    ({"max_tokens": 5000}, "sampling.max_tokens", "4096"),
    ({"max_tokens": 4, "min_tokens": 5}, "sampling.min_tokens", "at most max_tokens (4)"),
    ({"temperature": -0.1}, "sampling.temperature", "[0, 100]"),
    ({"temperature": math.nan}, "sampling.temperature", "nan"),
    ({"temperature": math.inf}, "sampling.temperature", "inf"),
    ({"top_p": 0.0}, "sampling.top_p", "(0, 1]"),
    ({"top_p": 1.1}, "sampling.top_p", "(0, 1]"),
    ({"top_k": -2}, "sampling.top_k", "-1"),
    ({"min_p": 1.5}, "sampling.min_p", "[0, 1]"),
    ({"presence_penalty": 2.5}, "sampling.presence_penalty", "[-2, 2]"),
    ({"frequency_penalty": -2.5}, "sampling.frequency_penalty", "[-2, 2]"),
    ({"repetition_penalty": 0.0}, "sampling.repetition_penalty", "(0, 100]"),
    ({"logprobs": 6}, "sampling.logprobs", "at most 5"),
    ({"prompt_logprobs": 6}, "sampling.prompt_logprobs", "at most 5"),
    ({"n": 2}, "sampling.n", "must be 1"),
    ({"stop": [""]}, "sampling.stop[0]", "1 to 1024"),
    ({"stop": ["x"] * 65}, "sampling.stop", "at most 64"),
    ({"stop_token_ids": [1000]}, "sampling.stop_token_ids", "outside the vocabulary"),
    ({"allowed_token_ids": [1000]}, "sampling.allowed_token_ids", "outside the vocabulary"),
    ({"logit_bias": {1000: 1.0}}, "sampling.logit_bias", "outside the vocabulary"),
    ({"logit_bias": {1: 101.0}}, "sampling.logit_bias[1]", "[-100, 100]"),
]


@pytest.mark.parametrize(("sampling", "field", "limit"), SAMPLING_FAULTS)
async def test_sampling_out_of_range(
    stub: Stub, engine: EchoEngine, sampling: dict[str, object], field: str, limit: str
) -> None:
    request = pb.GenerateRequest(text="hello", sampling=pb.SamplingParameters(**sampling))  # type: ignore[arg-type]
    error = await failure(stub.Generate(request))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert limit in bad_fields(error)[field]
    assert field in str(error.details())


PROMPT_FAULTS = [
    (pb.GenerateRequest(), "prompt", "must be given"),
    (pb.GenerateRequest(text=""), "text", "empty"),
    (pb.GenerateRequest(tokens=pb.TokenPrompt()), "tokens.token_ids", "empty"),
    (pb.GenerateRequest(chat=pb.ChatPrompt()), "chat.messages", "empty"),
    (pb.GenerateRequest(chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user")])), "chat.messages", "empty"),
    (pb.GenerateRequest(chat=pb.ChatPrompt(messages=[pb.ChatMessage(content="x")])), "chat.messages[0].role", "empty"),
    (pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=[1] * 4096)), "tokens.token_ids", "at most 4095"),
    (token_request(*[1] * 4000, max_tokens=100), "sampling.max_tokens", "4096"),
    (pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=[1, 1000])), "tokens.token_ids", "0 to 999"),
    (pb.GenerateRequest(text="x", request_id="no spaces"), "request_id", "1 to 128"),
    (pb.GenerateRequest(text="x", tenant="t" * 129), "tenant", "at most 128"),
    (pb.GenerateRequest(text="x", timeout_s=math.nan), "timeout_s", "finite"),
    (pb.GenerateRequest(text="x", timeout_s=0.0), "timeout_s", "> 0"),
    (pb.GenerateRequest(text="x", model="gpt-9"), "model", "known: echo"),
]


@pytest.mark.parametrize(("request_", "field", "limit"), PROMPT_FAULTS)
async def test_bad_prompt(stub: Stub, engine: EchoEngine, request_: pb.GenerateRequest, field: str, limit: str) -> None:
    error = await failure(stub.Generate(request_))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert limit in bad_fields(error)[field]


async def test_all_faults_are_named_at_once(stub: Stub, engine: EchoEngine) -> None:
    sampling = pb.SamplingParameters(temperature=-1, top_p=2)
    error = await failure(stub.Generate(pb.GenerateRequest(text="", sampling=sampling)))
    assert set(bad_fields(error)) == {"text", "sampling.temperature", "sampling.top_p"}


async def test_oversize_message(stub: Stub, engine: EchoEngine) -> None:
    error = await failure(stub.Generate(pb.GenerateRequest(text="x" * (9 << 20))))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_unknown_ids(stub: Stub) -> None:
    for call in (stub.GetRequest(pb.GetRequestRequest(request_id="x")), stub.Cancel(pb.CancelRequest(request_id="x"))):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    error = await failure(stub.Follow(pb.FollowRequest(request_id="x")))
    assert error.code() == grpc.StatusCode.NOT_FOUND


async def test_request_id_with_other_content(stub: Stub, engine: EchoEngine) -> None:
    async for _ in stub.Generate(token_request(1, request_id="mine")):
        pass
    error = await failure(stub.Generate(token_request(2, request_id="mine")))
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS


@pytest.mark.parametrize("limits", [{"max_waiting_requests": 2}, {"max_waiting_tokens": 20}])
async def test_full_queue(
    store_server: EmbeddedStore, queue: RequestQueue, namespace: str, stack: AsyncExitStack, limits: dict[str, int]
) -> None:
    await queue.register("engine-0", MODEL, 60.0)  # the model is known, and nobody leases
    settings = QueueSettings(lease_s=0.6, **limits)
    address = await start_gateway(stack, store_server.url, namespace, queue=settings, shutdown_s=0.0)
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
    stub = gateway_pb2_grpc.FolkmootStub(channel)
    waiting = [stub.Generate(token_request(1, 2, 3)) for _ in range(2)]  # 8 tokens each

    async def both_wait() -> bool:
        return (await queue.load(MODEL.name)).waiting_requests == 2

    await until(both_wait)
    error = await failure(stub.Generate(token_request(1, 2, 3)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_retry_hint(error)
    assert next(iter(limits)) in str(error.details())
    for call in waiting:
        call.cancel()

    async def empty() -> bool:
        return (await queue.load(MODEL.name)).waiting_requests == 0

    await until(empty)


async def test_engine_error_reaches_the_client(stub: Stub, queue: RequestQueue, stack: AsyncExitStack) -> None:
    async with EchoEngine(queue, step_s=60.0) as engine:
        call = stub.Generate(token_request(1))

        async def leased() -> bool:
            return bool(engine.leases)

        await until(leased)
        engine.holder.fail(engine.leases[0], "text: 9000 tokens, at most 4095", code=3)
        error = await failure(call)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "text: 9000 tokens, at most 4095"


async def test_no_engine_takes_it(
    store_server: EmbeddedStore, queue: RequestQueue, namespace: str, stack: AsyncExitStack
) -> None:
    await queue.register("engine-0", MODEL, 60.0)
    settings = QueueSettings(lease_s=0.6, queue_timeout_s=0.2)
    address = await start_gateway(stack, store_server.url, namespace, queue=settings, shutdown_s=0.0)
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
    error = await failure(gateway_pb2_grpc.FolkmootStub(channel).Generate(token_request(1)))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert "no engine took the request" in str(error.details())


async def test_timeout_while_waiting(stub: Stub, queue: RequestQueue) -> None:
    await queue.register("engine-0", MODEL, 60.0)
    started_s = time.monotonic()
    error = await failure(stub.Generate(token_request(1, timeout_s=0.3, request_id="late")))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0.25 < time.monotonic() - started_s < 2.0

    async def closed() -> bool:
        status = await stub.GetRequest(pb.GetRequestRequest(request_id="late"))
        return bool(status.finish.reason == pb.DEADLINE)

    await until(closed)
    assert (await queue.load(MODEL.name)).waiting_requests == 0


async def test_model_unknown_before_any_engine(stub: Stub) -> None:
    error = await failure(stub.Generate(pb.GenerateRequest(text="x", model="echo")))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "none yet" in str(error.details())


@pytest.mark.parametrize("deadline", [True, False])
async def test_deadline_and_cancellation_reach_the_engine(stub: Stub, queue: RequestQueue, deadline: bool) -> None:
    async with EchoEngine(queue, step_s=0.05) as engine:
        call = stub.Generate(token_request(1, max_tokens=1000, request_id="x"), timeout=0.5 if deadline else None)
        await anext(aiter(call))
        if deadline:
            error = await failure(call)
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        else:
            call.cancel()

        async def stopped() -> bool:
            return engine.holder.num_held == 0

        await until(stopped, 3.0)
        finish = (await queue.status("x")).finish
        assert finish.reason == (pb.DEADLINE if deadline else pb.CANCELLED)
        assert (await queue.load(MODEL.name)).running_requests == 0
