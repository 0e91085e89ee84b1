"""From lines to requests and from answers to lines, in OpenAI's format; nothing that a file can hold breaks it."""

import asyncio
import json
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from folkmoot.gateway import batch_answers
from folkmoot.gateway.batch_check import FileCheck
from folkmoot.gateway.batch_lines import BadLine, Shape, parse
from folkmoot.gateway.batch_run import window
from folkmoot.gateway.batch_store import BatchSettings, Result
from folkmoot.gateway.batch_translate import Asked, Translation
from folkmoot.gateway.batch_upload import Upload
from folkmoot.gateway.pb import batch_input_pb2, batches_pb2
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import Load, QueueSettings, sampling_fields
from tests.gateway.echo import MODEL

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TRANSLATION = Translation("b", "", "tenant", 512)


def record(url: str = CHAT, **body: Any) -> dict[str, Any]:
    prompt = {"messages": MESSAGES} if url == CHAT else {"prompt": "Hello"}
    return {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "echo", **prompt, **body}}


def input_line(text: object) -> batch_input_pb2.InputLine:
    return batch_input_pb2.InputLine(text=text if isinstance(text, bytes) else json.dumps(text).encode(), number=7)


def refusal(text: object, endpoint: str = "") -> BadLine:
    with pytest.raises(BadLine) as refused:
        parse(input_line(text), endpoint)
    return refused.value


def test_a_chat_line_of_openais_reference() -> None:
    line = parse(input_line(record(
        frequency_penalty=0.5, presence_penalty=-1, logit_bias={"5": -100}, logprobs=True, top_logprobs=3,
        max_completion_tokens=20, n=1, seed=4, stop="end", temperature=1, top_p=0.5, user="u", stream=False,
        tools=None, response_format={"type": "text"}, service_tier="auto", max_tokens=None,
    )))  # fmt: skip
    assert (line.custom_id, line.url, line.request.model) == ("a", CHAT, "echo")
    assert [(m.role, m.content) for m in line.request.chat.messages] == [("system", "Be brief."), ("user", "Hi")]
    assert sampling_fields(line.request) == {
        "frequency_penalty": 0.5, "presence_penalty": -1.0, "logit_bias": {5: -100.0}, "logprobs": 3,
        "max_tokens": 20, "seed": 4, "stop": ["end"], "temperature": 1.0, "top_p": 0.5,
    }  # fmt: skip
    assert line.shape == Shape(is_chat=True, logprobs=3)


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    line = parse(input_line(record(messages=[{"role": "user", "content": parts}])))
    assert line.request.chat.messages[0].content == "one two"


@pytest.mark.parametrize(
    ("prompt", "kind", "value"),
    [
        ("text", "text", "text"),
        (["text"], "text", "text"),
        ([1, 2], "tokens", [1, 2]),
        ([[1, 2]], "tokens", [1, 2]),
    ],
)
def test_a_completion_takes_one_prompt_of_any_kind(prompt: object, kind: str, value: object) -> None:
    request = parse(input_line(record(COMPLETIONS, prompt=prompt))).request
    assert request.WhichOneof("prompt") == kind
    assert (request.text if kind == "text" else list(request.tokens.token_ids)) == value
    assert request.sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("url", "body", "param", "text"),
    [
        (CHAT, {"tools": [{"type": "function"}]}, "tools", "not supported"),
        (CHAT, {"n": 2}, "n", "must be absent or 1"),
        (CHAT, {"stream": True}, "stream", "must be absent or false"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", "unknown field"),
        (CHAT, {"temperature": "1"}, "temperature", "must be a number"),
        (CHAT, {"temperature": True}, "temperature", "must be a number"),
        (CHAT, {"temperature": 10**400}, "temperature", "too large"),
        (CHAT, {"seed": 1 << 70}, "seed", "out of range"),
        (CHAT, {"seed": 1.5}, "seed", "whole number"),
        (CHAT, {"max_tokens": -1}, "max_tokens", "at least 0"),
        (CHAT, {"max_tokens": 0}, "max_tokens", "at least 1"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        (CHAT, {"stop": [1]}, "stop", "list of strings"),
        (CHAT, {"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        (CHAT, {"messages": []}, "messages", "must not be empty"),
        (CHAT, {"messages": "hi"}, "messages", "must be a list"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", ""),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "tool"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name", "not supported"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "body", "surrogate"),
        (CHAT, {"echo": True}, "echo", "not supported"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt", "one text"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt", "one text"),
        (COMPLETIONS, {"prompt": ""}, "prompt", "must not be empty"),
        (COMPLETIONS, {"suffix": "x"}, "suffix", "not supported"),
        (COMPLETIONS, {"best_of": 3}, "best_of", "must be absent or 1"),
        (COMPLETIONS, {"echo": True, "prompt": [1]}, "echo", "needs logprobs"),
        (COMPLETIONS, {"logprobs": 6}, "logprobs", "at most 5"),
        (COMPLETIONS, {"model": "other"}, "model", "unknown model"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(url: str, body: dict[str, Any], param: str, text: str) -> None:
    result = TRANSLATION.prepared(3, input_line(record(url, **body)), {"echo": MODEL})
    assert isinstance(result, Result) and result.file == "errors"
    row = json.loads(result.text)
    error = row["response"]["body"]["error"]
    assert (row["custom_id"], row["response"]["status_code"], row["error"]) == ("a", 400, None)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert param in error["message"] and text in error["message"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"custom_id": 5}, "invalid_custom_id"),
        ({"custom_id": ""}, "invalid_custom_id"),
        ({"custom_id": "x" * 513}, "invalid_custom_id"),
        ({"method": "GET"}, "invalid_method"),
        ({"url": "/v1/embeddings"}, "invalid_url"),
        ({"url": ["x"]}, "invalid_url"),
        ({"body": None}, "invalid_body"),
        ({"extra": 1}, "unknown_field"),
    ],
)
def test_a_line_that_is_no_request(change: dict[str, Any], code: str) -> None:
    assert refusal({**record(), **change}).code == code


def test_the_endpoint_of_the_batch_counts() -> None:
    assert refusal(record(CHAT), endpoint=COMPLETIONS).code == "invalid_url"
    assert parse(input_line(record(CHAT)), CHAT).custom_id == "a"


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"nope", b"[1]", b'{"a": NaN}', b"[" * 50_000, b'{"a":' * 50_000, b"9" * 10_000, b"null"]
)
def test_what_is_no_json_object_is_told_with_its_line(text: bytes) -> None:
    bad = refusal(text)
    assert bad.code == "invalid_json_line" and "line 7 " in str(bad)


def test_the_name_of_a_broken_line_is_found_where_it_can_be() -> None:
    assert refusal(b'{"custom_id": "r\\u00e9sum\\"e", "body": {').custom_id == 'résum"e'
    assert refusal(b'{"custom_id": "half \\ud800", "body": {').custom_id is None
    long = batch_input_pb2.InputLine(text=b'{"custom_id": "x", "body": "yyy', number=3, too_long=9999)
    with pytest.raises(BadLine, match="9999 bytes") as refused:
        parse(long)
    assert refused.value.custom_id == "x"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        *("model", "messages", "prompt", "temperature", "stop", "logit_bias", "max_tokens", "max_completion_tokens"),
        *("logprobs", "top_logprobs", "prompt_logprobs", "echo", "n", "tools", "seed", "min_tokens", "stop_token_ids"),
        *("bad_words", "response_format", "ignore_eos", "continue_final_message", "return_token_ids", "unheard_of"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([CHAT, COMPLETIONS]), st.dictionaries(FIELDS, ANYTHING, max_size=4), st.booleans())
@example(COMPLETIONS, {"prompt": [2**31, True]}, False)
@example(CHAT, {"logit_bias": {"\u0661": 1}}, False)
def test_whatever_a_body_holds_it_becomes_a_request_or_an_error(url: str, body: dict[str, Any], bare: bool) -> None:
    text = json.dumps({**record(url), "body": body} if bare else record(url, **body)).encode()
    made = TRANSLATION.prepared(0, input_line(text), {"echo": MODEL})
    if isinstance(made, Result):
        row = json.loads(made.text)
        assert made.file == "errors" and (row["error"] or row["response"]["body"]["error"])["message"]
    else:
        assert made.cost >= 1 and made.line.request.lane == pb.BATCH and made.line.request.tenant == "tenant"
        assert pb.GenerateRequest.FromString(made.line.request.SerializeToString()) == made.line.request


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_whatever_a_line_holds_it_becomes_a_request_or_an_error(text: bytes) -> None:
    assert isinstance(TRANSLATION.prepared(0, input_line(text), {"echo": MODEL}), Result)


# ------------------------------------------------------------------------------------------------------ answers


def entries(*found: tuple[int, str, float, int]) -> pb.TokenLogprobs:
    """Of (id, text, logprob, rank), the chosen one first."""
    return pb.TokenLogprobs(entries=[pb.Logprob(token_id=i, token=t, logprob=p, rank=r) for i, t, p, r in found])


def choice_of(line: dict[str, Any], *pieces: pb.GenerateResponse) -> dict[str, Any]:
    asked = TRANSLATION.prepared(0, input_line(line), {"echo": MODEL})
    assert isinstance(asked, Asked)
    result = TRANSLATION.result(asked, batch_answers.joined(list(pieces)), 1)
    assert result.file == "output"
    row = json.loads(result.text, parse_constant=pytest.fail)
    choice: dict[str, Any] = row["response"]["body"]["choices"][0]
    choice["usage"] = row["response"]["body"]["usage"]
    return choice


LAST = pb.Finish(reason=pb.STOP, stop_string="end")
CHOSEN = entries((5, " five", -2.5, 3), (1, " one", -0.5, 1), (2, " two", -1.0, 2))


def test_chat_logprobs_name_the_likeliest_tokens() -> None:
    piece = pb.GenerateResponse(token_ids=[5], text=" five", logprobs=[CHOSEN], finish=LAST)
    choice = choice_of(record(logprobs=True, top_logprobs=2), piece)
    (token,) = choice["logprobs"]["content"]
    assert (token["token"], token["logprob"], token["bytes"]) == (" five", -2.5, list(b" five"))
    assert [top["token"] for top in token["top_logprobs"]] == [" one", " two"]
    assert choice["message"] == {"role": "assistant", "content": " five", "refusal": None}
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "end")


def test_infinity_is_written_as_a_number() -> None:
    piece = pb.GenerateResponse(token_ids=[5], text="x", logprobs=[entries((5, "x", -math.inf, 1))], finish=LAST)
    assert choice_of(record(logprobs=True), piece)["logprobs"]["content"][0]["logprob"] == -9999.0


PROMPT = [pb.TokenLogprobs(), entries((8, "lo", -1.0, 1), (9, "p", -2.0, 2))]


def test_echo_with_logprobs_scores_the_prompt() -> None:
    """max_tokens 0: the token that an engine has to make is left out."""
    piece = pb.GenerateResponse(
        token_ids=[5], text=" five", logprobs=[CHOSEN], prompt_logprobs=PROMPT, finish=pb.Finish(reason=pb.LENGTH),
        usage=pb.Usage(prompt_tokens=2),
    )  # fmt: skip
    line = record(COMPLETIONS, prompt="Hello", echo=True, logprobs=2, max_tokens=0)
    assert parse(input_line(line)).request.sampling.max_tokens == 1
    choice = choice_of(line, piece)
    assert (choice["text"], choice["finish_reason"]) == ("Hello", "length")
    assert choice["logprobs"] == {
        "tokens": ["Hel", "lo"], "token_logprobs": [None, -1.0], "top_logprobs": [None, {"lo": -1.0, "p": -2.0}],
        "text_offset": [0, 3],
    }  # fmt: skip
    assert choice["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}
    longer = choice_of({**line, "body": {**line["body"], "max_tokens": 1}}, piece)
    assert (longer["text"], longer["logprobs"]["tokens"]) == ("Hello five", ["Hel", "lo", " five"])
    assert longer["logprobs"]["text_offset"] == [0, 3, 5]


def test_vllms_prompt_logprobs_are_by_token_id() -> None:
    piece = pb.GenerateResponse(token_ids=[5], text=" five", prompt_logprobs=PROMPT, finish=LAST)
    for url in (CHAT, COMPLETIONS):
        choice = choice_of(record(url, prompt_logprobs=2, return_token_ids=True), piece)
        assert choice["prompt_logprobs"] == [
            None,
            {"8": {"logprob": -1.0, "rank": 1, "decoded_token": "lo"},
             "9": {"logprob": -2.0, "rank": 2, "decoded_token": "p"}},
        ]  # fmt: skip
        assert choice["token_ids"] == [5] and choice["logprobs"] is None


@pytest.mark.parametrize(("code", "status"), [(3, 400), (1, 499), (13, 500), (14, 503)])
def test_a_failed_request_has_the_http_status_of_its_error(code: int, status: int) -> None:
    asked = TRANSLATION.prepared(0, input_line(record()), {"echo": MODEL})
    assert isinstance(asked, Asked)
    failed = pb.GenerateResponse(finish=pb.Finish(reason=pb.ERROR, code=code, message="why"))
    result = TRANSLATION.result(asked, batch_answers.joined([failed]), 1)
    response = json.loads(result.text)["response"]
    assert (result.file, response["status_code"]) == ("errors", status)
    assert response["body"]["error"]["message"] == "why"


# --------------------------------------------------------------------------------------------------- whole files


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40).filter(lambda one: b"\n" not in one), max_size=8), st.integers(1, 60))
def test_a_file_comes_out_as_its_lines_however_it_is_cut(lines: list[bytes], piece: int) -> None:
    blocks: list[batch_input_pb2.InputBlock] = []

    async def put(number: int, block: batch_input_pb2.InputBlock) -> None:
        assert number == len(blocks)
        blocks.append(block)

    async def upload() -> Upload:
        made = Upload(BatchSettings(max_line_bytes=30), put)
        data = b"\n".join(lines)
        for at in range(0, len(data), piece):
            await made.feed(batches_pb2.CreateBatchRequest(data=data[at : at + piece]))
        await made.finish(batches_pb2.BatchHeader())
        return made

    made = asyncio.run(upload())
    found = [one for block in blocks for one in block.lines]
    kept = [(i, one) for i, one in enumerate(lines, 1) if one.removeprefix(b"\xef\xbb\xbf" * (i == 1)).strip()]
    assert [one.number for one in found] == [i for i, _ in kept]
    assert [one.too_long for one in found] == [len(one) if len(one) > 30 else 0 for _, one in kept]
    assert [one.text for one in found if not one.too_long] == [
        one.removeprefix(b"\xef\xbb\xbf" * (i == 1)).strip() for i, one in kept if len(one) <= 30
    ]
    assert made.lines == len(found)
    assert [block.first for block in blocks] == [sum(len(b.lines) for b in blocks[:i]) for i in range(len(blocks))]


def test_a_long_line_costs_no_memory() -> None:
    async def put(number: int, block: batch_input_pb2.InputBlock) -> None:
        assert block.ByteSize() < 5000

    async def upload() -> int:
        made = Upload(BatchSettings(max_line_bytes=1000), put)
        most = 0
        for _ in range(100):
            await made.feed(batches_pb2.CreateBatchRequest(data=b"x" * 100_000))
            most = max(most, len(made._rest))
        await made.finish(batches_pb2.BatchHeader())
        return most

    assert asyncio.run(upload()) <= 4096


def test_the_estimate_is_what_admission_would_say() -> None:
    check = FileCheck({"echo": MODEL}, "", 512)
    for text in (record(COMPLETIONS, prompt=[1, 2, 3], max_tokens=7), record(COMPLETIONS, max_tokens=-1), [1]):
        check.add(input_line({**text, "custom_id": str(text)} if isinstance(text, dict) else text))
    assert (check.estimated, check.faults()) == ({"echo": 10}, [])


def test_the_window_grows_with_what_runs_and_leaves_room_for_others() -> None:
    s = QueueSettings(max_waiting_requests=100, max_waiting_tokens=1000)
    assert window(Load(), 50, s) == 50
    assert window(Load(running_tokens=300), 50, s) == 600
    assert window(Load(waiting_requests=50, running_tokens=300), 50, s) == 0
    assert window(Load(waiting_tokens=500, running_tokens=300), 50, s) == 0
