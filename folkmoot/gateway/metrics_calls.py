"""Counts every call of a gateway: an interceptor before all others, so that what they refuse is counted as well."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc

from folkmoot.gateway.metrics import Call, GatewayCounts, current, set_current

OTHER = "other"
"""The method label of what this gateway does not have, whatever it is called."""

Behaviour = Callable[[Any, Any], Awaitable[Any]]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class Meter(grpc.aio.ServerInterceptor):
    """`methods`: those that are labels of their own, "/package.Service/Method"."""

    def __init__(self, counts: GatewayCounts, methods: Iterable[str]) -> None:
        self._counts = counts
        self._labels = {method: method.removeprefix("/") for method in methods}
        self._counted: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Any:
        """The handler of the call, counted."""
        method = details.method
        call = Call(self._counts, self._labels.get(method, OTHER))
        set_current(call)
        handler = await continuation(details)
        if handler is None:
            call.ended(grpc.StatusCode.UNIMPLEMENTED.name)
            return None
        if method not in self._labels:
            return _counted(handler)
        known, counted = self._counted.get(method, (None, None))
        if known is not handler:  # another one for each call that is refused
            self._counted[method] = handler, (counted := _counted(handler))
        return counted


def _counted(handler: Any) -> Any:
    kinds = ("stream" if handler.request_streaming else "unary", "stream" if handler.response_streaming else "unary")
    name = "_".join(kinds)
    return handler._replace(**{name: _counting(getattr(handler, name))})


def _counting(behaviour: Behaviour) -> Behaviour:
    """The same, with its beginning and its end counted. Behaviours are coroutines here: malformed.py sees to it."""

    async def count(request: Any, context: Any) -> Any:
        call = current()
        call.begin()
        code = grpc.StatusCode.UNKNOWN.name
        try:
            answer = await behaviour(request, context)
            code = _code(context, grpc.StatusCode.OK)
            return answer
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED.name
            raise
        except BaseException:
            code = _code(context, grpc.StatusCode.UNKNOWN)
            raise
        finally:
            call.end(code)

    return count


def _code(context: Any, otherwise: grpc.StatusCode) -> str:
    """The status that the call's handler has set, by name: gRPC keeps it as its own kind of number, 0 before that."""
    code = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else otherwise.name
