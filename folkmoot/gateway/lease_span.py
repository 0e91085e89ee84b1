"""The span of one lease: from an engine's taking a request to its finish, or to wherever the lease ends else.

A request that is leased again has a second one below the same call. An engine that is killed sends none; its
successor's says which attempt it was, and where it went on.
"""

from folkmoot.gateway import tracing
from folkmoot.gateway.errors import public
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import LANE_OF, Held, Lease
from folkmoot.gateway.tracing import Attributes, Span

NAME = "lease"
ENDS = {Held.DONE: "ended elsewhere: cancelled, or past its deadline", Held.LOST: "another engine has it",
        Held.GAP: "the store has lost tokens of it"}  # fmt: skip


def begin(lease: Lease, engine: str) -> Span:
    """A lease has been taken."""
    span = tracing.span(NAME, "consumer", lease.trace)
    if span.is_made:
        span.set(
            {
                **about(lease.request),
                "folkmoot.request_id": public(lease.request_id),
                "folkmoot.engine": engine,
                "folkmoot.epoch": lease.epoch,
                "folkmoot.attempt": lease.attempt,
                "folkmoot.first_token": lease.offset,
                "folkmoot.since_submitted_s": lease.waited_s,
            }
        )
    return span


def about(request: pb.GenerateRequest) -> Attributes:
    """What a request is, beside what it holds."""
    return {
        "gen_ai.request.model": request.model,
        "folkmoot.request_id": request.request_id,
        "folkmoot.tenant": request.tenant,
        "folkmoot.lane": LANE_OF[request.lane],
    }


def finished(span: Span, last: pb.GenerateResponse) -> None:
    """The engine's own finish is journalled."""
    if span.is_made:
        span.set(usage_of(last))
    if last.finish.code:
        span.fail(pb.FinishReason.Name(last.finish.reason).lower())
    span.end()


def ended(span: Span, why: Held) -> None:
    """The lease is gone."""
    span.set({"folkmoot.lease.ended": str(why)})
    if why != Held.DONE:
        span.fail(ENDS[why])
    span.end()


def released(span: Span, error: str) -> None:
    """It was given back; `error` empty: by an engine that leaves."""
    span.set({"folkmoot.lease.ended": "released"})
    if error:
        span.fail("given back after a failure")
    span.end()


def usage_of(last: pb.GenerateResponse) -> Attributes:
    """What the last piece of an answer says of it."""
    return {
        "gen_ai.usage.input_tokens": last.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": last.offset + len(last.token_ids),
        "gen_ai.response.finish_reasons": [pb.FinishReason.Name(last.finish.reason).lower()],
    }
