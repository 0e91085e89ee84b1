"""The client's errors, as drawn at the top of client.py, and how gRPC's become ours."""

from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2


class FolkmootError(Exception):
    """Base of the tree at the top of this module."""

    def __init__(self, message: str, code: str, request_id: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class InvalidRequest(FolkmootError):
    """The request is at fault; trying again as it is cannot help."""

    faults: tuple[tuple[str, str], ...] = ()  # field, what is wrong


class Busy(FolkmootError):
    """The queue is full."""


class Unavailable(FolkmootError):
    """No gateway answered, or its store was away, until the client gave up."""


class NotFound(FolkmootError):
    """Unknown request."""


class RequestIdInUse(FolkmootError):
    """The id belongs to a request of other content."""


class Unauthenticated(FolkmootError):
    """No API key, or none that is good."""


class PermissionDenied(FolkmootError):
    """The API key does not allow this call."""


class Cancelled(FolkmootError):
    """The request was cancelled."""


class DeadlineExceeded(FolkmootError):
    """The time was up."""


class ServerError(FolkmootError):
    """Anything else."""


ERRORS: dict[grpc.StatusCode, type[FolkmootError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Busy,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: RequestIdInUse,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def error_of(e: grpc.aio.AioRpcError, request_id: str = "") -> FolkmootError:
    """Our error for a gRPC one, with the details that the gateway sent along."""
    code: grpc.StatusCode = e.code()
    trailing: dict[str, Any] = dict(e.trailing_metadata() or ())
    retry_ms = trailing.get("retry-after-ms")
    retry_after_s = int(retry_ms) / 1000 if retry_ms is not None else None
    kind = ERRORS.get(code, ServerError)
    if kind is Busy and retry_after_s is None:  # gRPC's own: a message too large
        kind = InvalidRequest
    error = kind(e.details() or code.name, code.name, request_id, retry_after_s)
    if isinstance(error, InvalidRequest):
        error.faults = _faults(trailing.get("grpc-status-details-bin"))
    return error


def _faults(details: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(details, bytes):
        return ()
    bad = error_details_pb2.BadRequest()
    for packed in status_pb2.Status.FromString(details).details:
        if packed.Unpack(bad):
            return tuple((v.field, v.description) for v in bad.field_violations)
    return ()
