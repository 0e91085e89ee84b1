"""What is no message of its type is the caller's fault: INVALID_ARGUMENT, where gRPC itself says UNKNOWN and logs a
traceback for each."""

import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

Behaviour = Callable[[Any, Any], Any]

MALFORMED = object()
WORDS = "the request is not a message of its type"


def refusing(handler: Any) -> Any:
    """The handler of a method, with such messages refused."""
    kinds = ("stream" if handler.request_streaming else "unary", "stream" if handler.response_streaming else "unary")
    name = "_".join(kinds)
    checked = _each(getattr(handler, name)) if handler.request_streaming else _one(getattr(handler, name))
    parsed = _parsing(handler.request_deserializer)
    return handler._replace(request_deserializer=parsed, **{name: checked})


def _parsing(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse_or_mark(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return MALFORMED

    return parse_or_mark


def _one(behaviour: Behaviour) -> Behaviour:
    async def checked(request: Any, context: Any) -> Any:
        if request is MALFORMED:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, WORDS)
        return await _run(behaviour(request, context), context)

    return checked


def _each(behaviour: Behaviour) -> Behaviour:
    async def checked(requests: Any, context: Any) -> Any:
        async def sound() -> AsyncIterator[Any]:
            async for request in requests:
                if request is MALFORMED:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, WORDS)
                yield request

        return await _run(behaviour(sound(), context), context)

    return checked


async def _run(answer: Any, context: Any) -> Any:
    """A coroutine's answer, or all that an asynchronous generator yields."""
    if not inspect.isasyncgen(answer):
        return await answer
    async for message in answer:
        await context.write(message)
    return None
