"""How each error looks to a client: gRPC status, message, and google.rpc details. The one place that decides it.

InvalidRequest    INVALID_ARGUMENT    BadRequest: every field with its limit
QueueFull         RESOURCE_EXHAUSTED  RetryInfo, and trailing metadata `retry-after-ms`
StoreUnavailable  UNAVAILABLE         RetryInfo, and trailing metadata `retry-after-ms`; ErrorInfo.reason says which
StoreRefused      INTERNAL            ErrorInfo
UnknownRequest    NOT_FOUND           UnknownBatch and UnknownLetter too
RequestIdTaken    ALREADY_EXISTS      BatchIdTaken too
GatewayStopping   UNAVAILABLE         RetryInfo, and trailing metadata `retry-after-ms`
TooManyCalls      RESOURCE_EXHAUSTED  the same
LimitReached      RESOURCE_EXHAUSTED  the same where waiting helps; ErrorInfo.reason
Unauthenticated   UNAUTHENTICATED
PermissionDenied  PERMISSION_DENIED
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from folkmoot.gateway import errors, metrics
from folkmoot.gateway.validate import InvalidRequest

DOMAIN = "folkmoot"
STORE_RETRY_MS = 1000
STOPPING_RETRY_MS = 100
CALLS_RETRY_MS = 1000

CODES = {code.value[0]: code for code in grpc.StatusCode}
REASONS: dict[type[errors.StoreError], str] = {
    errors.StoreAway: "STORE_AWAY",
    errors.StoreLoading: "STORE_LOADING",
    errors.StoreReadOnly: "STORE_READ_ONLY",
    errors.StoreFull: "STORE_OUT_OF_MEMORY",
    errors.StoreDiskFull: "STORE_DISK_FULL",
    errors.StoreRefused: "STORE_REFUSED",
}
ALL_REASONS = ("QUEUE_FULL", "TENANT_LIMIT", "TOO_MANY_CALLS", "GATEWAY_STOPPING", *REASONS.values())
"""What ErrorInfo.reason may say."""


@dataclass(frozen=True)
class Status:
    """What `context.abort` takes."""

    code: grpc.StatusCode
    message: str
    trailing: tuple[tuple[str, str | bytes], ...] = ()
    reason: str = ""  # ErrorInfo.reason


async def abort(context: Any, what: Status) -> NoReturn:
    """End the call that is being served with this."""
    metrics.current().refused(what.reason)
    await context.abort(what.code, what.message, what.trailing)
    raise AssertionError("abort returned")


def of(error: errors.GatewayError | InvalidRequest) -> Status:
    """The status for an error of this package."""
    text = str(error)
    match error:
        case InvalidRequest():
            violations = [
                error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
                for field, description in error.faults
            ]
            details = error_details_pb2.BadRequest(field_violations=violations)
            return _status(grpc.StatusCode.INVALID_ARGUMENT, text, details)
        case errors.QueueFull():
            return _retry(grpc.StatusCode.RESOURCE_EXHAUSTED, text, error.retry_after_ms, "QUEUE_FULL")
        case errors.StoreUnavailable():
            return _retry(grpc.StatusCode.UNAVAILABLE, text, STORE_RETRY_MS, REASONS[type(error)])
        case errors.GatewayStopping():
            return _retry(grpc.StatusCode.UNAVAILABLE, text, STOPPING_RETRY_MS, "GATEWAY_STOPPING")
        case errors.LimitReached(retry_after_ms=None):
            return _status(grpc.StatusCode.RESOURCE_EXHAUSTED, text, _info("TENANT_LIMIT"))
        case errors.LimitReached():
            return _retry(grpc.StatusCode.RESOURCE_EXHAUSTED, text, error.retry_after_ms or 0, "TENANT_LIMIT")
        case errors.TooManyCalls():
            return _retry(grpc.StatusCode.RESOURCE_EXHAUSTED, text, CALLS_RETRY_MS, "TOO_MANY_CALLS")
        case errors.Unauthenticated():
            return _status(grpc.StatusCode.UNAUTHENTICATED, text)
        case errors.PermissionDenied():
            return _status(grpc.StatusCode.PERMISSION_DENIED, text)
        case errors.UnknownRequest() | errors.UnknownBatch() | errors.UnknownLetter():
            return _status(grpc.StatusCode.NOT_FOUND, text)
        case errors.RequestIdTaken() | errors.BatchIdTaken():
            return _status(grpc.StatusCode.ALREADY_EXISTS, text)
        case errors.StoreError():
            return _status(grpc.StatusCode.INTERNAL, text, _info(REASONS[type(error)]))
    return _status(grpc.StatusCode.INTERNAL, text)


def _retry(code: grpc.StatusCode, message: str, after_ms: int, reason: str) -> Status:
    delay = Duration(seconds=after_ms // 1000, nanos=after_ms % 1000 * 1_000_000)
    status = _status(code, message, error_details_pb2.RetryInfo(retry_delay=delay), _info(reason))
    return Status(code, message, (*status.trailing, ("retry-after-ms", str(after_ms))), reason)


def _info(reason: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)


def _status(code: grpc.StatusCode, message: str, *details: Message) -> Status:
    if not details:
        return Status(code, message)
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    reason = next((d.reason for d in details if isinstance(d, error_details_pb2.ErrorInfo)), "")
    return Status(code, message, (("grpc-status-details-bin", status.SerializeToString()),), reason)
