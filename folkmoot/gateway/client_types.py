"""What goes into the client and what comes out of it, and their protobuf forms."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from folkmoot.gateway.client_errors import InvalidRequest
from folkmoot.gateway.pb import gateway_pb2 as pb


@dataclass(frozen=True)
class TokenLogprob:
    """One candidate at one position."""

    token_id: int
    logprob: float
    rank: int
    token: str


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. The last one has `finish_reason` ("stop" or "length") and the token counts."""

    offset: int  # index of token_ids[0] in the answer
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()  # one entry a token, the chosen one first
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that ended it
    prompt_tokens: int = 0
    completion_tokens: int = 0


def build_request(
    prompt: str | None,
    messages: Sequence[Mapping[str, str]] | None,
    token_ids: Sequence[int] | None,
    timeout_s: float,
    options: Mapping[str, Any],
) -> pb.GenerateRequest:
    """The protobuf request. Raises TypeError for unknown options, ValueError where not exactly one prompt is given,
    InvalidRequest for a value that protobuf cannot carry."""
    if (prompt is not None) + (messages is not None) + (token_ids is not None) != 1:
        raise ValueError("give exactly one of prompt, messages and token_ids")
    rest = dict(options)
    detach = rest.pop("detach", False)
    request = pb.GenerateRequest(
        model=rest.pop("model", ""),
        request_id=rest.pop("request_id", None) or secrets.token_hex(12),
        tenant=rest.pop("tenant", ""),
        lane={"interactive": pb.INTERACTIVE, "batch": pb.BATCH}[rest.pop("lane", "interactive")],
        timeout_s=rest.pop("timeout_s", timeout_s),
        on_disconnect=pb.DETACH if detach else pb.GRACE,
    )
    unknown = rest.keys() - pb.SamplingParameters.DESCRIPTOR.fields_by_name.keys()
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    if isinstance(rest.get("stop"), str):
        rest["stop"] = [rest["stop"]]
    try:
        if prompt is not None:
            request.text = prompt
        elif messages is not None:
            request.chat.messages.extend(pb.ChatMessage(role=m["role"], content=m["content"]) for m in messages)
        else:
            request.tokens.token_ids.extend(token_ids or ())
        request.sampling.CopyFrom(pb.SamplingParameters(**rest))
    except (ValueError, TypeError) as e:
        raise InvalidRequest(str(e), "INVALID_ARGUMENT", request.request_id) from e
    # `oneof`: an empty text or list still says which kind it is, so that the gateway can name the field.
    if token_ids is not None:
        request.tokens.SetInParent()
    elif messages is not None:
        request.chat.SetInParent()
    return request


def chunk_of(piece: pb.GenerateResponse) -> Chunk:
    stop = piece.finish.WhichOneof("stop_reason")
    return Chunk(
        offset=piece.offset,
        token_ids=tuple(piece.token_ids),
        text=piece.text,
        logprobs=_logprobs(piece.logprobs),
        prompt_logprobs=_logprobs(piece.prompt_logprobs),
        finish_reason=pb.FinishReason.Name(piece.finish.reason).lower() if piece.HasField("finish") else None,
        stop_reason=getattr(piece.finish, stop) if stop else None,
        prompt_tokens=piece.usage.prompt_tokens,
        completion_tokens=piece.usage.completion_tokens,
    )


def _logprobs(entries: Sequence[pb.TokenLogprobs]) -> tuple[tuple[TokenLogprob, ...], ...]:
    return tuple(
        tuple(TokenLogprob(one.token_id, one.logprob, one.rank, one.token) for one in token.entries)
        for token in entries
    )
