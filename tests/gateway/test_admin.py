"""Admin commands between a client, a real gateway and a real store, at whose other end this test is the router."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from folkmoot.gateway.errors import RequestIdTaken
from folkmoot.gateway.operations import (
    FAILED,
    SUCCEEDED,
    UNDER_WAY,
    Command,
    Operation,
    Operations,
    UnknownOperation,
)
from folkmoot.gateway.pb import admin_pb2 as pb
from folkmoot.gateway.pb import admin_pb2_grpc
from folkmoot.gateway.queue import RequestQueue


@pytest.fixture
async def admin(gateway: str) -> AsyncIterator[admin_pb2_grpc.AdminStub]:
    async with grpc.aio.insecure_channel(gateway) as channel:
        yield admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture
def operations(queue: RequestQueue) -> Operations:
    return Operations(queue.store)


async def taken_up(operations: Operations, **changes: object) -> Operation:
    """What a router does with the next operation."""
    async with asyncio.timeout(10.0):
        while not (found := (await operations.read("0"))[1]):
            await asyncio.sleep(0.01)
    (operation,) = found
    return await operations.update(operation, **changes)


async def test_a_call_answers_with_the_routers_word(admin: admin_pb2_grpc.AdminStub, operations: Operations) -> None:
    call = asyncio.ensure_future(admin.Scale(pb.ScaleRequest(target=pb.HOSTS, count=3, request_id="a")))
    operation = await taken_up(operations, state=UNDER_WAY, message="begun")
    assert operation.command == Command("scale", target="hosts", count=3)
    answer = await call
    assert (answer.request_id, answer.state, answer.message) == ("a", pb.UNDER_WAY, "begun")
    await operations.update(operation, state=SUCCEEDED, message="3 hosts")
    answer = await admin.GetOperation(pb.GetOperationRequest(request_id="a"))
    assert (answer.state, answer.message) == (pb.SUCCEEDED, "3 hosts")
    assert answer.updated_ms >= answer.submitted_ms > 0


async def test_without_a_router_a_command_is_taken_down_and_waits(
    admin: admin_pb2_grpc.AdminStub, operations: Operations
) -> None:
    answer = await admin.Drain(pb.DrainRequest(host="host-1"))
    assert answer.state == pb.ACCEPTED and len(answer.request_id) == 24
    (operation,) = (await operations.read("0"))[1]
    assert operation.command == Command("drain", host="host-1")


async def test_a_refusal_is_the_calls_error(admin: admin_pb2_grpc.AdminStub, operations: Operations) -> None:
    call = asyncio.ensure_future(admin.Replicate(pb.ReplicateRequest(expert=99, replicas=2)))
    await taken_up(operations, state=FAILED, code=3, message="expert: must be below 8, is 99")
    with pytest.raises(grpc.aio.AioRpcError, match="expert: must be below 8, is 99") as refused:
        await call
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert b"expert" in dict(refused.value.trailing_metadata() or ())["grpc-status-details-bin"]
    call = asyncio.ensure_future(admin.RollEngines(pb.RollEnginesRequest()))
    await taken_up(operations, state=FAILED, code=9, message="no room")
    with pytest.raises(grpc.aio.AioRpcError, match="no room") as refused:
        await call
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("call", "request_", "field"),
    [
        ("Scale", pb.ScaleRequest(count=3), "target"),
        ("Scale", pb.ScaleRequest(target=pb.HOSTS, count=0), "count: must be between 1 and 4096"),
        ("Scale", pb.ScaleRequest(target=pb.ENGINES, count=0), "count: must be between 1 and 4096, is 0"),
        (
            "Scale",
            pb.ScaleRequest(target=pb.ENGINES, count=3, most=2),
            "most: must be between count .3. and 4096, is 2",
        ),
        ("Scale", pb.ScaleRequest(target=pb.REPLICAS, count=1, most=2), "most: must be left out unless target is"),
        ("Scale", pb.ScaleRequest(target=pb.HOSTS, count=0, most=2), "count: must be at least 1 for HOSTS, is 0"),
        ("Replicate", pb.ReplicateRequest(expert=1, replicas=5000), "replicas: must be between 1 and 4096, is 5000"),
        ("Drain", pb.DrainRequest(), "host"),
        ("Scale", pb.ScaleRequest(target=pb.HOSTS, count=1, request_id="a b"), "request_id"),
    ],
)
async def test_what_is_unsound_is_refused_before_it_is_taken_down(
    admin: admin_pb2_grpc.AdminStub, operations: Operations, call: str, request_: object, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=field) as refused:
        await getattr(admin, call)(request_)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await operations.read("0"))[1] == []


async def test_an_unknown_operation_is_not_found(admin: admin_pb2_grpc.AdminStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await admin.GetOperation(pb.GetOperationRequest(request_id="never"))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_an_id_stands_for_one_command(operations: Operations) -> None:
    first = await operations.submit("x", Command("scale", target="hosts", count=3))
    assert await operations.submit("x", Command("scale", target="hosts", count=3)) == first
    with pytest.raises(RequestIdTaken):
        await operations.submit("x", Command("scale", target="hosts", count=4))
    after, found = await operations.read("0")
    assert found == [first], "named twice, carried out once"
    await operations.update(first, state=SUCCEEDED, message="")
    assert (await operations.read("0"))[1] == [], "a restarted router does not begin it again"
    assert await operations.read(after) == (after, [])
    with pytest.raises(UnknownOperation):
        await operations.get("y")
