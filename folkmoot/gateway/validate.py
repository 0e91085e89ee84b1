"""Is this request sound? Plain checks, no framework: they stand in every request's way.

All faults are found, not only the first; each names the field and the limit.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import ModelRecord

Fault = tuple[str, str]  # field, what is wrong with it

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
ID_RULE = "must be 1 to 128 characters of A-Z a-z 0-9 . _ : -"
LANES = frozenset(pb.Lane.values())
ON_DISCONNECTS = frozenset(pb.OnDisconnect.values())
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_IDS = 4096  # stop tokens, biased tokens
MAX_MESSAGES = 4096
MAX_NAME_CHARS = 128  # a tenant, a role
MAX_MODEL_CHARS = 256
MAX_TOKEN_CHARS = 1024  # a text with more characters than this a token of the model's length cannot fit
MAX_FAULTS = 16  # named in an answer, which has to fit into metadata

# name: (smallest, smallest excluded, largest)
RANGES: dict[str, tuple[float, bool, float]] = {
    "max_tokens": (1, False, math.inf),
    "temperature": (0, False, 100),
    "top_p": (0, True, 1),
    "top_k": (-1, False, 2**31 - 1),
    "min_p": (0, False, 1),
    "presence_penalty": (-2, False, 2),
    "frequency_penalty": (-2, False, 2),
    "repetition_penalty": (0, True, 100),
    "n": (1, False, 1),
}


class InvalidRequest(ValueError):
    """The request's faults, each a field and a sentence."""

    def __init__(self, faults: list[Fault]) -> None:
        more = len(faults) - MAX_FAULTS
        self.faults = faults if more <= 0 else [*faults[:MAX_FAULTS], ("more", f"{more} faults like these")]
        super().__init__("; ".join(f"{name}: {text}" for name, text in self.faults))


def choose_model(request: pb.GenerateRequest, models: Mapping[str, ModelRecord]) -> ModelRecord:
    """The model asked for, or the only one. Raises InvalidRequest that lists the known ones."""
    if not request.model and len(models) == 1:
        return next(iter(models.values()))
    if request.model in models:
        return models[request.model]
    if len(request.model) > MAX_MODEL_CHARS:
        raise InvalidRequest([("model", f"must have at most {MAX_MODEL_CHARS} characters, has {len(request.model)}")])
    known = ", ".join(sorted(models)) or "none yet"
    what = f"unknown model {request.model!r}" if request.model else "must be given unless exactly one model is served"
    raise InvalidRequest([("model", f"{what}; known: {known}")])


def check(request: pb.GenerateRequest, model: ModelRecord) -> None:
    """Raises InvalidRequest with all faults of the request that can be seen without a tokenizer."""
    faults = [*_identity(request), *_prompt(request, model), *_sampling(request.sampling, model)]
    if faults:
        raise InvalidRequest(faults)


def check_id(request_id: str) -> None:
    """Raises InvalidRequest for what cannot be the id of a request."""
    if not REQUEST_ID.fullmatch(request_id):
        raise InvalidRequest([("request_id", ID_RULE)])


def estimate_tokens(request: pb.GenerateRequest, model: ModelRecord, default_answer_tokens: int) -> int:
    """Tokens that the request may cost, prompt and answer: exact for token ids, four bytes a token for text."""
    kind = request.WhichOneof("prompt")
    if kind == "tokens":
        prompt = len(request.tokens.token_ids)
    elif kind == "chat":
        prompt = sum(len(m.content) // 4 + 8 for m in request.chat.messages)
    else:
        prompt = len(request.text) // 4 + 1
    answer = request.sampling.max_tokens if request.sampling.HasField("max_tokens") else default_answer_tokens
    return min(prompt + answer, model.max_model_len)


def _identity(request: pb.GenerateRequest) -> Iterator[Fault]:
    if request.request_id and not REQUEST_ID.fullmatch(request.request_id):
        yield "request_id", ID_RULE
    if len(request.tenant) > MAX_NAME_CHARS:
        yield "tenant", f"must have at most {MAX_NAME_CHARS} characters, has {len(request.tenant)}"
    if request.lane not in LANES:
        yield "lane", f"unknown lane {request.lane}"
    if request.on_disconnect not in ON_DISCONNECTS:
        yield "on_disconnect", f"unknown value {request.on_disconnect}"
    if request.HasField("timeout_s") and not 0 < request.timeout_s < math.inf:
        yield "timeout_s", f"must be a finite number > 0, is {request.timeout_s}"


def _prompt(request: pb.GenerateRequest, model: ModelRecord) -> Iterator[Fault]:
    kind = request.WhichOneof("prompt")
    if kind is None:
        yield "prompt", "must be given: text, chat or tokens"
    elif kind == "text":
        yield from _text("text", len(request.text), model)
    elif kind == "chat":
        yield from _chat(request.chat, model)
    elif kind == "tokens":
        yield from _tokens(request, model)


def _chat(chat: pb.ChatPrompt, model: ModelRecord) -> Iterator[Fault]:
    if not model.has_chat_template:
        yield "chat", f"model {model.name!r} has no chat template; send text or tokens"
    if not chat.messages:
        yield "chat.messages", "must not be empty"
    if len(chat.messages) > MAX_MESSAGES:
        yield "chat.messages", f"must have at most {MAX_MESSAGES} entries, has {len(chat.messages)}"
        return
    for i, message in enumerate(chat.messages):
        if not message.role:
            yield f"chat.messages[{i}].role", "must not be empty"
        elif len(message.role) > MAX_NAME_CHARS:
            yield f"chat.messages[{i}].role", f"must have at most {MAX_NAME_CHARS} characters, has {len(message.role)}"
    size = sum(len(message.content) for message in chat.messages)
    if size:
        yield from _text("chat.messages", size, model)
    if chat.messages and not any(message.content for message in chat.messages):
        yield "chat.messages", "must not all be empty"


def _text(name: str, size: int, model: ModelRecord) -> Iterator[Fault]:
    limit = MAX_TOKEN_CHARS * model.max_model_len
    if not size:
        yield name, "must not be empty"
    elif size > limit:
        yield name, f"must have at most {limit} characters, has {size}"


def _tokens(request: pb.GenerateRequest, model: ModelRecord) -> Iterator[Fault]:
    ids = request.tokens.token_ids
    if not ids:
        yield "tokens.token_ids", "must not be empty"
        return
    if len(ids) >= model.max_model_len:
        yield (
            "tokens.token_ids",
            f"{len(ids)} tokens leave no room for an answer: at most {model.max_model_len - 1} (model length "
            f"{model.max_model_len})",
        )
    elif len(ids) + request.sampling.max_tokens > model.max_model_len:
        yield (
            "sampling.max_tokens",
            f"{len(ids)} prompt tokens + max_tokens {request.sampling.max_tokens} exceed the model length "
            f"{model.max_model_len}",
        )
    yield from _vocabulary("tokens.token_ids", max(ids), model)


def _sampling(s: pb.SamplingParameters, model: ModelRecord) -> Iterator[Fault]:
    for descriptor, value in s.ListFields():
        limits = RANGES.get(descriptor.name)
        if limits is not None:
            yield from _range(descriptor.name, value, *limits)
    if s.max_tokens > model.max_model_len:
        yield "sampling.max_tokens", f"must be at most the model length {model.max_model_len}, is {s.max_tokens}"
    if s.HasField("max_tokens") and s.min_tokens > s.max_tokens:
        yield "sampling.min_tokens", f"must be at most max_tokens ({s.max_tokens}), is {s.min_tokens}"
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(s, name) > model.max_logprobs:
            yield f"sampling.{name}", f"must be at most {model.max_logprobs}, is {getattr(s, name)}"
    if s.stop or s.bad_words:
        yield from _stops("stop", s.stop)
        yield from _stops("bad_words", s.bad_words)
    for name, ids, limit in (
        ("stop_token_ids", s.stop_token_ids, MAX_IDS),
        ("allowed_token_ids", s.allowed_token_ids, model.vocab_size),
        ("logit_bias", s.logit_bias, MAX_IDS),
    ):
        if len(ids) > limit:
            yield f"sampling.{name}", f"must have at most {limit} entries, has {len(ids)}"
        if ids:
            yield from _vocabulary(f"sampling.{name}", max(ids), model)
    for token, bias in s.logit_bias.items():
        yield from _range(f"logit_bias[{token}]", bias, -100, False, 100)


def _range(name: str, value: float, low: float, excluded: bool, high: float) -> Iterator[Fault]:
    if math.isfinite(value) and low <= value <= high and not (excluded and value == low):
        return
    if low == high:
        wanted = f"must be {low:g} for now"
    elif math.isinf(high):
        wanted = f"must be at least {low:g}"
    else:
        wanted = f"must be in {'(' if excluded else '['}{low:g}, {high:g}]"
    yield f"sampling.{name}", f"{wanted}, is {value:g}"


def _stops(name: str, strings: Sequence[str]) -> Iterator[Fault]:
    if len(strings) > MAX_STOPS:
        yield f"sampling.{name}", f"must have at most {MAX_STOPS} entries, has {len(strings)}"
    for i, text in enumerate(strings):
        if not 0 < len(text) <= MAX_STOP_CHARS:
            yield f"sampling.{name}[{i}]", f"must have 1 to {MAX_STOP_CHARS} characters, has {len(text)}"


def _vocabulary(name: str, largest: int, model: ModelRecord) -> Iterator[Fault]:
    if largest >= model.vocab_size:
        yield name, f"token id {largest} is outside the vocabulary (0 to {model.vocab_size - 1})"
