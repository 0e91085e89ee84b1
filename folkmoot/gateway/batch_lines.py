"""From a line of a batch file to a request, in OpenAI's format with vLLM's additions.

A field that changes the answer is honoured or refused by name, never dropped. Sources: OpenAI's API reference for
/v1/batches, /v1/chat/completions and /v1/completions; for the additions vLLM's OpenAI-compatible server.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from folkmoot.gateway.pb import batch_input_pb2
from folkmoot.gateway.pb import gateway_pb2 as pb

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
URLS = (CHAT, COMPLETIONS)
COMPLETION_TOKENS = 16  # max_tokens of a completion that names none, as at OpenAI and in vLLM
MAX_CUSTOM_ID = 512
KEPT_OF_LONG_LINE = 4096  # where its custom_id may be found
CUSTOM_ID = re.compile(rb'"custom_id"\s*:\s*("(?:[^"\\]|\\.){0,600}")')
LINE_FIELDS = {"custom_id", "method", "url", "body"}

Value = Callable[[str, Any], Any]


class BadLine(Exception):
    """A line that cannot be a request. With a `param` its body is at fault, which is answered as a refused request."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param
        self.custom_id: str | None = None


@dataclass(frozen=True)
class Shape:
    """How the answer has to look."""

    is_chat: bool
    logprobs: int | None = None  # likeliest tokens beside the chosen one
    echo: str | None = None  # the prompt, where it stands before the answer; "" for one of token ids
    scores_only: bool = False  # max_tokens 0: the prompt alone
    prompt_logprobs: bool = False  # vLLM's field of that name
    token_ids: bool = False  # vLLM's return_token_ids


@dataclass(frozen=True)
class Line:
    """A request, without id, lane and tenant."""

    custom_id: str
    url: str
    request: pb.GenerateRequest
    shape: Shape


def parse(line: batch_input_pb2.InputLine, endpoint: str = "") -> Line:
    """Raises BadLine, with the line's custom_id where it could be found."""
    record = read(line)
    try:
        return _line(record, endpoint)
    except BadLine as e:
        name = record.get("custom_id")
        e.custom_id = name if isinstance(name, str) and _is_text(name) else None
        raise


def read(line: batch_input_pb2.InputLine) -> dict[str, Any]:
    """The line as an object. Raises BadLine."""
    try:
        return _object(line)
    except BadLine as e:
        e.custom_id = _custom_id_in(line)
        raise


def _object(line: batch_input_pb2.InputLine) -> dict[str, Any]:
    if line.too_long:
        raise BadLine("line_too_long", f"line {line.number} has {line.too_long} bytes, over the limit of a line")
    try:
        record = json.loads(line.text.decode(), parse_constant=_no_constant)
    except RecursionError:
        raise BadLine("invalid_json_line", f"line {line.number} is nested too deep") from None
    except ValueError as e:  # also UnicodeDecodeError
        raise BadLine("invalid_json_line", f"line {line.number} is not JSON in UTF-8: {e}") from None
    if not isinstance(record, dict):
        raise BadLine("invalid_json_line", f"line {line.number} is not a JSON object")
    return record


def _custom_id_in(line: batch_input_pb2.InputLine) -> str | None:
    """What a line that is no JSON object calls itself, as far as that can be seen."""
    if found := CUSTOM_ID.search(line.text[:KEPT_OF_LONG_LINE]):
        try:
            name: str = json.loads(found[1].decode())
            name.encode()  # JSON can spell what is no Unicode text
        except ValueError:
            return None
        return name
    return None


def _line(record: Mapping[str, Any], endpoint: str) -> Line:
    if unknown := sorted(record.keys() - LINE_FIELDS):
        raise BadLine("unknown_field", f"{unknown[0]}: unknown field; a line has custom_id, method, url and body")
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID or not _is_text(custom_id):
        raise BadLine("invalid_custom_id", f"custom_id: must be a string of 1 to {MAX_CUSTOM_ID} characters")
    if record.get("method", "POST") != "POST":
        raise BadLine("invalid_method", "method: must be POST")
    url = record.get("url")
    if url not in URLS or url != (endpoint or url):
        raise BadLine("invalid_url", f"url: must be {endpoint or ' or '.join(URLS)}")
    body = record.get("body")
    if not isinstance(body, dict):
        raise BadLine("invalid_body", "body: must be an object")
    try:
        request, shape = _body(body, is_chat=url == CHAT)
    except UnicodeEncodeError:
        raise BadLine("invalid_value", "body: text with half a surrogate pair, which is no Unicode", "body") from None
    return Line(custom_id, str(url), request, shape)


def _body(body: Mapping[str, Any], *, is_chat: bool) -> tuple[pb.GenerateRequest, Shape]:
    given = {name: value for name, value in body.items() if value is not None}
    request = pb.GenerateRequest(model=_text("model", given.pop("model", "")))
    _take_prompt(request, given, is_chat=is_chat)
    shape = _take_output(request, given, is_chat=is_chat)
    for name, value in given.items():
        if name in WITHOUT_EFFECT:
            continue
        if name in ONLY:
            if value not in ONLY[name]:
                _refuse(name, f"is not supported here: must be absent or {' or '.join(map(json.dumps, ONLY[name]))}")
        elif name in SAMPLING:
            _set(request, name, SAMPLING[name](name, value))
        else:
            _refuse(name, "unknown field")
    return request, shape


# --------------------------------------------------------------------------------------------------- the prompt


def _take_prompt(request: pb.GenerateRequest, given: dict[str, Any], *, is_chat: bool) -> None:
    if not is_chat:
        prompt = given.pop("prompt", None)
        while isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]  # a list of one prompt
        if isinstance(prompt, str):
            request.text = prompt
        elif isinstance(prompt, list) and all(_is_int(one) and 0 <= one < 2**32 for one in prompt):
            request.tokens.token_ids.extend(prompt)
            request.tokens.SetInParent()
        else:
            _refuse("prompt", "must be one text or one list of token ids")
        return
    messages = given.pop("messages", None)
    if not isinstance(messages, list):
        _refuse("messages", "must be a list")
    request.chat.SetInParent()
    for i, message in enumerate(messages):
        request.chat.messages.append(_message(f"messages[{i}]", message))
    for name in ("add_generation_prompt", "continue_final_message"):
        if name in given:
            setattr(request.chat, name, _boolean(name, given.pop(name)))


def _message(where: str, message: Any) -> pb.ChatMessage:
    if not isinstance(message, dict):
        _refuse(where, "must be an object")
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, []):
            _refuse(f"{where}.{name}", "is not supported here: a message has role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role in ("tool", "function"):
        _refuse(f"{where}.role", "must be a string, and not tool or function")
    if isinstance(content, list):
        content = "".join(_part(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        _refuse(f"{where}.content", "must be a text or a list of parts of type text")
    return pb.ChatMessage(role=role, content=content)


def _part(where: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        _refuse(f"{where}.type", "only parts of type text are supported")
    return str(part["text"])


# ---------------------------------------------------------------------------------------- what is to come back


def _take_output(request: pb.GenerateRequest, given: dict[str, Any], *, is_chat: bool) -> Shape:
    """Length, log-probabilities and echo, which mean different things at the two URLs."""
    sampling = request.sampling
    prompt_logprobs = _optional(_count, "prompt_logprobs", given)
    if prompt_logprobs is not None:
        sampling.prompt_logprobs = prompt_logprobs
    max_tokens = _optional(_count, "max_tokens", given)
    token_ids = bool(_optional(_boolean, "return_token_ids", given))
    logprobs, echo = (_chat_logprobs(given), None) if is_chat else _completion_output(request, given)
    if is_chat:
        longest = _optional(_count, "max_completion_tokens", given)
        max_tokens = longest if longest is not None else max_tokens
    elif max_tokens is None:
        max_tokens = COMPLETION_TOKENS
    if logprobs is not None:
        sampling.logprobs = logprobs
    if echo is not None and logprobs is not None:
        sampling.prompt_logprobs = max(logprobs, sampling.prompt_logprobs)
    scores_only = max_tokens == 0
    if scores_only and not sampling.HasField("prompt_logprobs") and echo is None:
        _refuse("max_tokens", "must be at least 1 where the prompt is not scored (echo, or prompt_logprobs)")
    if max_tokens is not None:
        sampling.max_tokens = max_tokens or 1  # engines make one token at least, which is then left out
    return Shape(is_chat, logprobs, echo, scores_only, prompt_logprobs is not None, token_ids)


def _chat_logprobs(given: dict[str, Any]) -> int | None:
    wanted = bool(_optional(_boolean, "logprobs", given))
    top = _optional(_count, "top_logprobs", given)
    if top and not wanted:
        _refuse("top_logprobs", "needs logprobs: true")
    return (top or 0) if wanted else None


def _completion_output(request: pb.GenerateRequest, given: dict[str, Any]) -> tuple[int | None, str | None]:
    logprobs = _optional(_count, "logprobs", given)
    if not _optional(_boolean, "echo", given):
        return logprobs, None
    if not request.text and logprobs is None:
        _refuse("echo", "needs logprobs where the prompt is token ids")
    return logprobs, request.text


# ------------------------------------------------------------------------------------------------------- values


def _refuse(name: str, text: str) -> NoReturn:
    raise BadLine("invalid_value", f"{name}: {text}", name)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _optional(take: Value, name: str, given: dict[str, Any]) -> Any:
    return take(name, given.pop(name)) if name in given else None


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        _refuse(name, "must be a string")
    return value


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _refuse(name, "must be true or false")
    return value


def _integer(name: str, value: Any) -> int:
    if not _is_int(value):
        _refuse(name, "must be a whole number")
    return int(value)


def _count(name: str, value: Any) -> int:
    if not 0 <= _integer(name, value) < 2**32:
        _refuse(name, f"must be at least 0 and below 2**32, is {value}")
    return int(value)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        _refuse(name, "must be a number")
    try:
        return float(value)
    except OverflowError:
        _refuse(name, "is too large")


def _texts(name: str, value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        _refuse(name, "must be a string or a list of strings")
    return list(values)


def _counts(name: str, value: Any) -> list[int]:
    if not isinstance(value, list):
        _refuse(name, "must be a list of token ids")
    return [_count(f"{name}[{i}]", one) for i, one in enumerate(value)]


def _biases(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or not all(key.isascii() and key.isdigit() and len(key) < 10 for key in value):
        _refuse(name, "must map token ids to numbers")
    return {int(key): _number(f"{name}[{key}]", one) for key, one in value.items()}


def _set(request: pb.GenerateRequest, name: str, value: Any) -> None:
    field = getattr(request.sampling, name)
    try:
        if isinstance(value, list):
            field.extend(value)
        elif isinstance(value, dict):
            field.update(value)
        else:
            setattr(request.sampling, name, value)
    except ValueError as e:
        if isinstance(e, UnicodeEncodeError):
            raise
        _refuse(name, str(e))


SAMPLING: Mapping[str, Value] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"), _number),
    **dict.fromkeys(("repetition_penalty",), _number),
    **dict.fromkeys(("top_k", "seed"), _integer),
    **dict.fromkeys(("min_tokens",), _count),
    **dict.fromkeys(("stop", "bad_words"), _texts),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids"), _counts),
    **dict.fromkeys(("ignore_eos", "skip_special_tokens", "spaces_between_special_tokens"), _boolean),
    **dict.fromkeys(("include_stop_str_in_output",), _boolean),
    "logit_bias": _biases,
}
ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "store": (False,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "echo": (False,),
}
"""Values that ask for nothing special; any other is refused."""
WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""They say who asks, or how it is accounted or cached: the answer does not depend on them."""
