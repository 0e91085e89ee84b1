"""From an answer to a line of the output or error file, in OpenAI's format with vLLM's additions."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from folkmoot.gateway.batch_lines import Shape
from folkmoot.gateway.pb import gateway_pb2 as pb

LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM's server writes the same
REASONS = {pb.STOP: "stop", pb.LENGTH: "length"}
HTTP_OF = {1: 499, 3: 400, 4: 408, 8: 429, 14: 503}
"""HTTP status for a gRPC one; others are 500."""


def joined(pieces: Sequence[pb.GenerateResponse]) -> pb.GenerateResponse:
    """A whole answer as one piece."""
    whole = pb.GenerateResponse()
    for piece in pieces:
        whole.MergeFrom(piece)
    whole.text = "".join(piece.text for piece in pieces)
    whole.usage.completion_tokens = len(whole.token_ids)
    return whole


def answered(result_id: str, custom_id: str, request_id: str, body: dict[str, Any]) -> bytes:
    """A line of the output file."""
    response = {"status_code": 200, "request_id": request_id, "body": body}
    return _dump({"id": result_id, "custom_id": custom_id, "response": response, "error": None})


def refused(result_id: str, custom_id: str | None, request_id: str, code: int, error: Mapping[str, Any]) -> bytes:
    """A line of the error file for a request that was refused or failed; `code` is a gRPC status."""
    status = HTTP_OF.get(code, 500)
    kind = "invalid_request_error" if status == 400 else "server_error"
    body = {"error": {"message": "", "type": kind, "param": None, "code": None, **error}}
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _dump({"id": result_id, "custom_id": custom_id, "response": response, "error": None})


def not_run(result_id: str, custom_id: str | None, code: str, message: str) -> bytes:
    """A line of the error file for one that never became a request, or whose request was not waited for."""
    error = {"code": code, "message": message}
    return _dump({"id": result_id, "custom_id": custom_id, "response": None, "error": error})


def body(whole: pb.GenerateResponse, shape: Shape, request_id: str, model: str, created_s: int) -> dict[str, Any]:
    """The response body of an answer."""
    if shape.scores_only:
        for name in ("token_ids", "text", "logprobs"):
            whole.ClearField(name)
        whole.usage.completion_tokens = 0
        whole.finish.reason = pb.LENGTH
    choice: dict[str, Any] = {"index": 0, **(_chat(whole, shape) if shape.is_chat else _completion(whole, shape))}
    choice["finish_reason"] = REASONS.get(whole.finish.reason, "stop")
    stop = whole.finish.WhichOneof("stop_reason")
    choice["stop_reason"] = getattr(whole.finish, stop) if stop else None
    if shape.token_ids:
        choice["token_ids"] = list(whole.token_ids)
    if shape.prompt_logprobs:
        choice["prompt_logprobs"] = [_by_id(token) for token in whole.prompt_logprobs]
    usage = whole.usage
    return {
        "id": f"{'chatcmpl' if shape.is_chat else 'cmpl'}-{request_id}",
        "object": "chat.completion" if shape.is_chat else "text_completion",
        "created": created_s,
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
        "system_fingerprint": None,
    }


def _chat(whole: pb.GenerateResponse, shape: Shape) -> dict[str, Any]:
    logprobs = None
    if shape.logprobs is not None:
        content = [
            {**_entry(token.entries[0]), "top_logprobs": [_entry(e) for e in _top(token, shape.logprobs)]}
            for token in whole.logprobs
        ]
        logprobs = {"content": content, "refusal": None}
    return {"message": {"role": "assistant", "content": whole.text, "refusal": None}, "logprobs": logprobs}


def _completion(whole: pb.GenerateResponse, shape: Shape) -> dict[str, Any]:
    text = whole.text if shape.echo is None else shape.echo + whole.text
    if shape.logprobs is None:
        return {"text": text, "logprobs": None}
    tokens = list(whole.logprobs)
    if shape.echo is None:
        return {"text": text, "logprobs": _columns(tokens, shape.logprobs)}
    prompt = list(whole.prompt_logprobs)
    logprobs = _columns([*prompt, *tokens], shape.logprobs)
    if prompt:
        rest = "".join(logprobs["tokens"][1 : len(prompt)])
        if not shape.echo:  # token ids: their text is known from the engine only
            text = rest + whole.text
        elif shape.echo.endswith(rest):  # nobody says what the first token spells, but this does
            logprobs["tokens"][0] = shape.echo[: len(shape.echo) - len(rest)]
            logprobs["text_offset"] = _offsets(logprobs["tokens"])
    return {"text": text, "logprobs": logprobs}


def _columns(tokens: Sequence[pb.TokenLogprobs], num_top: int) -> dict[str, Any]:
    """The old form, one list a column. The first token of a prompt has no log-probability."""
    names = [token.entries[0].token if token.entries else "" for token in tokens]
    return {
        "tokens": names,
        "token_logprobs": [_logprob(token.entries[0]) if token.entries else None for token in tokens],
        "top_logprobs": [
            {entry.token: _logprob(entry) for entry in _top(token, num_top)} if token.entries else None
            for token in tokens
        ],
        "text_offset": _offsets(names),
    }


def _offsets(names: Sequence[str]) -> list[int]:
    offsets, at = [], 0
    for name in names:
        offsets.append(at)
        at += len(name)
    return offsets


def _top(token: pb.TokenLogprobs, num_top: int) -> list[pb.Logprob]:
    """The likeliest ones, without the chosen one where it is not among them."""
    return sorted((e for e in token.entries if 0 < e.rank <= num_top), key=lambda e: e.rank)


def _entry(entry: pb.Logprob) -> dict[str, Any]:
    return {"token": entry.token, "logprob": _logprob(entry), "bytes": list(entry.token.encode())}


def _by_id(token: pb.TokenLogprobs) -> dict[str, Any] | None:
    """As vLLM writes them: {token id: ...}; null for the first token."""
    if not token.entries:
        return None
    return {str(e.token_id): {"logprob": _logprob(e), "rank": e.rank, "decoded_token": e.token} for e in token.entries}


def _logprob(entry: pb.Logprob) -> float:
    return entry.logprob if entry.logprob >= LEAST_LOGPROB else LEAST_LOGPROB


def _dump(record: dict[str, Any]) -> bytes:
    """In ASCII, so that whatever a reader takes for the end of a line, there is none inside."""
    return json.dumps(record, separators=(",", ":")).encode()
