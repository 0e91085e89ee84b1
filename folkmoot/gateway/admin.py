"""The calls that change a running cluster. Each is: validate, take down, wait a moment for the router's word."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc

from folkmoot.gateway import operations, status
from folkmoot.gateway.errors import GatewayError
from folkmoot.gateway.operations import Command, Operation, Operations, UnknownOperation
from folkmoot.gateway.pb import admin_pb2 as pb
from folkmoot.gateway.pb import admin_pb2_grpc
from folkmoot.gateway.validate import REQUEST_ID, Fault, InvalidRequest

ANSWER_WITHIN_S = 2.0
"""How long a call waits for the expert router to take up or refuse a command; then its state is ACCEPTED."""
POLL_S = 0.05
MAX_COUNT = 4096

TARGETS: dict[int, str] = {pb.HOSTS: "hosts", pb.ENGINES: "engines", pb.REPLICAS: "replicas"}
STATES: dict[str, "pb.OperationState"] = {
    operations.ACCEPTED: pb.ACCEPTED,
    operations.UNDER_WAY: pb.UNDER_WAY,
    operations.SUCCEEDED: pb.SUCCEEDED,
    operations.FAILED: pb.FAILED,
}

Context = grpc.aio.ServicerContext[Any, Any]


class AdminService(admin_pb2_grpc.AdminServicer):
    """`folkmoot.v1.Admin` on one store. See admin.proto for what each call promises."""

    def __init__(self, known: Operations) -> None:
        self._operations = known

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> pb.Operation:
        """Hosts, engines or replicas."""
        target = TARGETS.get(request.target, "")
        command = Command("scale", target=target, count=request.count, most=request.most)
        return await self._submit(request.request_id, command, context)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.Operation:
        """One host leaves."""
        return await self._submit(request.request_id, Command("drain", host=request.host, force=request.force), context)

    async def Replicate(self, request: pb.ReplicateRequest, context: Context) -> pb.Operation:
        """Replicas of one expert."""
        command = Command("replicate", expert=request.expert, count=request.replicas)
        return await self._submit(request.request_id, command, context)

    async def RollEngines(self, request: pb.RollEnginesRequest, context: Context) -> pb.Operation:
        """All engines anew, one by one."""
        return await self._submit(request.request_id, Command("roll"), context)

    async def GetOperation(self, request: pb.GetOperationRequest, context: Context) -> pb.Operation:
        """One look."""
        return _message(await _or_abort(context, lambda: self._operations.get(request.request_id)))

    async def _submit(self, request_id: str, command: Command, context: Context) -> pb.Operation:
        async def submitted() -> Operation:
            if faults := list(_faults(request_id, command)):
                raise InvalidRequest(faults)
            return await self._taken_up(await self._operations.submit(request_id or secrets.token_hex(12), command))

        operation = await _or_abort(context, submitted)
        if operation.state == operations.FAILED:
            await status.abort(context, _refusal(operation))
        return _message(operation)

    async def _taken_up(self, operation: Operation) -> Operation:
        """The operation once the router has had a look at it, or after a while."""
        ends_s = time.monotonic() + ANSWER_WITHIN_S
        while operation.state == operations.ACCEPTED and time.monotonic() < ends_s:
            await asyncio.sleep(POLL_S)
            operation = await self._operations.get(operation.request_id)
        return operation


def _faults(request_id: str, command: Command) -> Iterator[Fault]:
    """What can be seen without the cluster."""
    if request_id and not REQUEST_ID.fullmatch(request_id):
        yield "request_id", "must be 1 to 128 characters of A-Z a-z 0-9 . _ : -"
    if command.kind == "scale" and not command.target:
        yield "target", "must be HOSTS, ENGINES or REPLICAS"
    if command.kind == "drain" and not 1 <= len(command.host) <= 128:
        yield "host", "must be the name of an expert host"
    if command.most and command.target not in ("engines", "hosts"):
        yield "most", f"must be left out unless target is ENGINES or HOSTS, is {command.most}"
    elif command.most and command.target == "hosts" and command.count < 1:
        yield "count", f"must be at least 1 for HOSTS, is {command.count}"
    elif command.most and not command.count <= command.most <= MAX_COUNT:
        yield "most", f"must be between count ({command.count}) and {MAX_COUNT}, is {command.most}"
    elif command.kind in ("scale", "replicate") and not command.most and not 1 <= command.count <= MAX_COUNT:
        name = "count" if command.kind == "scale" else "replicas"
        yield name, f"must be between 1 and {MAX_COUNT}, is {command.count}"


async def _or_abort(context: Context, work: Callable[[], Awaitable[Operation]]) -> Operation:
    try:
        return await work()
    except UnknownOperation as e:
        await context.abort(grpc.StatusCode.NOT_FOUND, str(e))
    except (GatewayError, InvalidRequest) as e:
        await status.abort(context, status.of(e))
    raise AssertionError("abort returned")


def _refusal(operation: Operation) -> status.Status:
    """What the expert router said of a command that it did not take up."""
    code = status.CODES[operation.code]
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        field, _, text = operation.message.partition(": ")
        return status.of(InvalidRequest([(field, text)]))
    return status.Status(code, operation.message)


def _message(operation: Operation) -> pb.Operation:
    return pb.Operation(
        request_id=operation.request_id,
        state=STATES[operation.state],
        message=operation.message,
        code=operation.code,
        submitted_ms=operation.submitted_ms,
        updated_ms=operation.updated_ms,
    )
