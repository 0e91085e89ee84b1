"""At the door: who may make which call. An interceptor before every service, so that a new one is closed by default.

    no key, or none that is good    UNAUTHENTICATED, in the same words whatever is wrong with it
    a role is missing               PERMISSION_DENIED
    not a message of its type       INVALID_ARGUMENT (malformed.py)
    too many calls are under way    RESOURCE_EXHAUSTED, with a retry hint
    the store is away               UNAVAILABLE, as everywhere

Where keys are not asked for, everybody is let in with all roles: the gateway then listens on loopback (settings.py).
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from folkmoot.gateway import calls, malformed, status, tenancy
from folkmoot.gateway.api_keys import ROLES, KeyRing
from folkmoot.gateway.errors import GatewayError, MissingApiKey, MissingRole, TooManyCalls
from folkmoot.gateway.tenancy import Caller

ANYONE = Caller(roles=frozenset(ROLES))
OPEN: frozenset[str] = frozenset()
EVERY_ROLE = frozenset(ROLES)

WHO_MAY: dict[str, frozenset[str]] = {
    "/grpc.health.v1.Health/": OPEN,
    "/folkmoot.v1.Folkmoot/Generate": frozenset({"generate"}),
    "/folkmoot.v1.Folkmoot/GetClusterStatus": frozenset({"status", "admin"}),
    "/folkmoot.v1.Folkmoot/ListModels": EVERY_ROLE,
    "/folkmoot.v1.Folkmoot/": frozenset({"generate", "batch"}),
    "/folkmoot.v1.Batches/ListDeadLetters": frozenset({"admin"}),  # of all tenants
    "/folkmoot.v1.Batches/ReplayDeadLetter": frozenset({"admin"}),
    "/folkmoot.v1.Batches/": frozenset({"batch"}),
}
"""Any one of these roles, for the method or else for its service. What is not here needs `admin`: folkmoot.v1.Admin,
reflection, and whatever is added and forgotten here."""

MAX_OPEN_CALLS = 256
"""Health checks under way at once where keys are asked for: watching is a stream, and anybody may. A tenant has at most
half of all calls, so that no one holds them all."""

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


def roles_for(method: str) -> frozenset[str]:
    """Which roles open a method, "/package.Service/Method"; empty: open to all."""
    service = method[: method.rfind("/") + 1]
    return WHO_MAY.get(method, WHO_MAY.get(service, frozenset({"admin"})))


class Door(grpc.aio.ServerInterceptor):
    """Lets calls in, or not. `keys` None: no keys are asked for."""

    def __init__(self, keys: KeyRing | None, max_calls: int) -> None:
        self._keys = keys
        self._max_calls = max_calls
        self._calls: Counter[str] = Counter()
        self._handlers: dict[str, Any] = {}

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Any:
        """The handler of the call, or one that refuses it."""
        try:
            self._count("all", self._max_calls)
            who = await self._let_in(details)
            if not who.roles:
                self._count("without a key", MAX_OPEN_CALLS)
            elif who.tenant:
                self._count(f"tenant {who.tenant}", max(1, self._max_calls // 2))
            tenancy.set_caller(who)
        except GatewayError as e:
            calls.refused(details.method, what := status.of(e))
            return _refusing(what)
        if details.method not in self._handlers:
            handler = await continuation(details)
            if handler is None:
                return None  # gRPC then says UNIMPLEMENTED
            self._handlers[details.method] = calls.observed(malformed.refusing(handler), details.method)
        return self._handlers[details.method]

    def _count(self, kind: str, limit: int) -> None:
        """One more call under way. Each has a task of its own, which is this one, and ends when the call has."""
        if self._calls[kind] >= limit:
            raise TooManyCalls(limit)
        task = asyncio.current_task()
        assert task is not None
        self._calls[kind] += 1
        task.add_done_callback(lambda _: self._ended(kind))

    def _ended(self, kind: str) -> None:
        self._calls[kind] -= 1
        if not self._calls[kind]:
            del self._calls[kind]

    async def _let_in(self, details: grpc.HandlerCallDetails) -> Caller:
        """Who calls. Raises MissingApiKey, InvalidApiKey, MissingRole, StoreError."""
        wanted = roles_for(details.method)
        if self._keys is None:
            return ANYONE
        if not wanted:
            return Caller()
        key = await self._keys.check(_presented(details))
        if wanted.isdisjoint(key.roles):
            raise MissingRole(wanted)
        return Caller(key.tenant, frozenset(key.roles), key.limits, key.id)


def _presented(details: grpc.HandlerCallDetails) -> str:
    """The key in the call's metadata. Raises MissingApiKey."""
    for name, value in details.invocation_metadata or ():
        if name == "authorization" and isinstance(value, str):
            scheme, _, key = value.partition(" ")
            if scheme.lower() == "bearer" and key:
                return key.strip()
    raise MissingApiKey


def _refusing(what: status.Status) -> "grpc.RpcMethodHandler[Any, Any]":
    """A handler that refuses before it has read anything, whatever kind of call it is."""

    async def refuse(requests: Any, context: Any) -> None:
        await status.abort(context, what)

    return grpc.stream_stream_rpc_method_handler(refuse)
