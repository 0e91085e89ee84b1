"""What can go wrong in queue and journal. Nothing of redis-py's own errors gets past `store.translated`.

GatewayError
├── StoreError                 the store did not do it; nothing is known to have happened
│   ├── StoreUnavailable       retry later, it heals
│   │   ├── StoreAway          no connection, or no answer in time
│   │   ├── StoreLoading       it is reading its data from disk
│   │   ├── StoreReadOnly      a replica, or a cluster that is failing over
│   │   ├── StoreFull          out of memory (maxmemory)
│   │   └── StoreDiskFull      it cannot write to its disk
│   └── StoreRefused           wrong password, missing permission, wrong version: it does not heal by itself
├── QueueFull                  admission refused; carries a retry hint
├── LimitReached               the tenant has used what it may; carries a retry hint, where waiting helps
├── UnknownRequest             no such id, or its journal has expired
├── RequestIdTaken             the id is in use for other content
├── GatewayStopping            this gateway shuts down; the request runs on, and can be followed elsewhere
├── TooManyCalls               this gateway has as many calls under way as it takes
├── Unauthenticated            who calls is not known
│   ├── MissingApiKey          no key was sent
│   └── InvalidApiKey          unknown, wrong, revoked or expired: nobody is told which
└── PermissionDenied           who calls may not do this
    ├── MissingRole            the key has none of the roles that open this call
    └── OtherTenant            the request names a tenant that is not the key's
"""

from collections.abc import Iterable


def public(request_id: str) -> str:
    """The id that the client knows."""
    return request_id.rpartition("/")[2]


class GatewayError(Exception):
    """Base of all errors of queue and journal."""


class StoreError(GatewayError):
    """The store did not do what was asked."""


class StoreUnavailable(StoreError):
    """It heals: retry later."""


class StoreAway(StoreUnavailable):
    """No connection, or no answer in time."""


class StoreLoading(StoreUnavailable):
    """The store is up, and reads its data from disk."""


class StoreReadOnly(StoreUnavailable):
    """The store takes no writes: a replica, or a fail-over is under way."""


class StoreFull(StoreUnavailable):
    """The store is out of memory."""


class StoreDiskFull(StoreUnavailable):
    """The store cannot save: its disk is full, or fails. The message is the server's."""


class StoreRefused(StoreError):
    """Wrong password, missing permission or an unsupported server: a person must act."""


class QueueFull(GatewayError):
    """The queue takes no more; `limit` names which limit, `retry_after_ms` when to come back."""

    def __init__(self, limit: str, value: int, retry_after_ms: int) -> None:
        super().__init__(f"the queue is full ({limit} = {value}); retry in {retry_after_ms} ms")
        self.limit = limit
        self.retry_after_ms = retry_after_ms


class LimitReached(GatewayError):
    """The tenant has used what it may of `limit`; `retry_after_ms` None: it asks for more than it may have at all."""

    def __init__(self, limit: str, value: float, retry_after_ms: int | None, asked: int) -> None:
        text = f"the tenant's limit {limit} = {value:g} is reached; retry in {retry_after_ms} ms"
        if retry_after_ms is None:
            text = f"the tenant's limit {limit} = {value:g} allows no request for {asked}"
        super().__init__(text)
        self.limit = limit
        self.retry_after_ms = retry_after_ms


class UnknownRequest(GatewayError):
    """No request of this id is known (it never was, or its journal has expired)."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"unknown request {public(request_id)!r}: never submitted, or its journal has expired")
        self.request_id = request_id


class RequestIdTaken(GatewayError):
    """The request id is already in use for a request of other content."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id {public(request_id)!r} is already in use for a request of other content")
        self.request_id = request_id


class GatewayStopping(GatewayError):
    """This gateway shuts down; the request runs on."""

    def __init__(self) -> None:
        super().__init__("this gateway is shutting down; follow the request at another one")


class TooManyCalls(GatewayError):
    """This gateway has as many calls under way as it takes; another one, or a moment later, may do."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"this gateway has max_calls = {limit} calls under way; retry later, or at another one")


class Unauthenticated(GatewayError):
    """Who calls is not known."""


class MissingApiKey(Unauthenticated):
    """No key was sent."""

    def __init__(self) -> None:
        super().__init__("this gateway asks for an API key: send metadata `authorization: Bearer KEY`")


class InvalidApiKey(Unauthenticated):
    """Unknown, wrong, revoked or expired."""

    def __init__(self) -> None:
        super().__init__("the API key is not valid")


class PermissionDenied(GatewayError):
    """Who calls may not do this."""


class MissingRole(PermissionDenied):
    """The key has none of the roles that open this call."""

    def __init__(self, wanted: Iterable[str]) -> None:
        super().__init__(f"this call needs an API key with the role {' or '.join(sorted(wanted))}")


class OtherTenant(PermissionDenied):
    """The request names a tenant that is not the key's."""

    def __init__(self) -> None:
        super().__init__("tenant: must be the API key's own tenant, or left empty")
