"""What is kept of each call beside its answer: a span, ids on its log lines, and a line where it is refused or fails.

Never a message that went to the client: those may quote what it sent. Codes, reasons and names of fields do not.
"""

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

from google.rpc import error_details_pb2, status_pb2

from folkmoot import logs
from folkmoot.gateway import tracing
from folkmoot.gateway.status import CODES, Status
from folkmoot.gateway.tenancy import caller
from folkmoot.gateway.tracing import Span

log = logging.getLogger(__name__)
log.addFilter(logs.Bounded(100))

OURS = "/folkmoot."
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
NUMBERS = {code.name: number for number, code in CODES.items()}
MAX_FIELDS = 5
OUR_FAULT = ("UNKNOWN", "INTERNAL", "DATA_LOSS", "UNAVAILABLE")


def observed(handler: Any, method: str) -> Any:
    """The handler of a method, "/package.Service/Method", watched; it must be one of malformed.refusing."""
    if not method.startswith(OURS):
        return handler
    kind = next(kind for kind in KINDS if getattr(handler, kind) is not None)
    serve = getattr(handler, kind)

    async def behaviour(request: Any, context: Any) -> Any:
        span, outcome = _begin(method, context), "OK"
        try:
            return await serve(request, context)
        except asyncio.CancelledError:
            outcome = "CANCELLED"
            raise
        except BaseException:
            outcome = context.code().name if context.code() else "UNKNOWN"  # what it was aborted with, if it was
            raise
        finally:
            _end(span, outcome, context)

    return handler._replace(**{kind: behaviour})


def refused(method: str, what: Status) -> None:
    """A call that was turned away at the door."""
    with logs.bound(method=method):
        _tell(what.code.name, why(what.trailing))


def why(trailing: Iterable[tuple[str, str | bytes]]) -> str:
    """The reason that goes with an error, or the names of the fields that are wrong; empty where neither is known."""
    for name, value in trailing:
        if name != "grpc-status-details-bin" or not isinstance(value, bytes):
            continue
        known = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        for detail in status_pb2.Status.FromString(value).details:
            for info in known:
                detail.Unpack(info)
        fields = dict.fromkeys(violation.field.partition("[")[0] for violation in known[1].field_violations)
        return known[0].reason or ", ".join(list(fields)[:MAX_FIELDS])
    return ""


def _begin(method: str, context: Any) -> Span:
    span = tracing.span(method[1:], "server", tracing.context_of(context.invocation_metadata() or ()))
    tenant = caller().tenant
    if span.is_made:
        _, service, name = method.split("/")
        span.set({"rpc.system": "grpc", "rpc.service": service, "rpc.method": name, "folkmoot.tenant": tenant})
    tracing.set_current(span)
    logs.bind(method=method, tenant=tenant, trace_id=span.trace_id)
    return span


def _end(span: Span, outcome: str, context: Any) -> None:
    if outcome not in ("OK", "CANCELLED"):
        reason = why(context.trailing_metadata() or ())
        _tell(outcome, reason)
        if outcome in OUR_FAULT:  # as the conventions for servers have it: a client's mistake is no error of ours
            span.fail(reason or outcome)
    span.set({"rpc.grpc.status_code": NUMBERS[outcome]})
    span.end()


def _tell(outcome: str, reason: str) -> None:
    level = logging.WARNING if outcome in OUR_FAULT else logging.INFO
    log.log(level, "ended with %s%s", outcome, f": {reason}" if reason else "")
