"""A line becomes a request, and what came of that its result: pure, and the same for whichever gateway does it."""

from collections.abc import Mapping
from dataclasses import dataclass

from folkmoot.gateway import batch_answers
from folkmoot.gateway.batch_lines import BadLine, Line, parse
from folkmoot.gateway.batch_store import Result
from folkmoot.gateway.errors import LimitReached, public
from folkmoot.gateway.pb import batch_input_pb2
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import ModelRecord
from folkmoot.gateway.validate import InvalidRequest, check, choose_model, estimate_tokens

INVALID_ARGUMENT, RESOURCE_EXHAUSTED = 3, 8


@dataclass(frozen=True)
class Asked:
    """A line that is in the queue, or about to be; `cost` in estimated tokens."""

    index: int
    line: Line
    cost: int


@dataclass(frozen=True)
class Translation:
    """Of the lines of one batch."""

    batch_id: str
    endpoint: str
    tenant: str
    default_answer_tokens: int

    def request_id(self, index: int) -> str:
        """What a line's request is called in the store: whoever submits the line again joins it."""
        scope, slash, name = self.batch_id.rpartition("/")
        return f"{scope}{slash}batch:{name}:{index}"

    def parsed(self, index: int, line: batch_input_pb2.InputLine) -> Asked | Result:
        """A line as it stands, or its error."""
        try:
            return Asked(index, parse(line, self.endpoint), 0)
        except BadLine as e:
            if e.param is None:
                return self.unanswered(index, e.custom_id, e.code, str(e))
            fault = {"message": str(e), "param": e.param, "code": e.code}
            return self._refused(index, e.custom_id, INVALID_ARGUMENT, fault)

    def prepared(
        self, index: int, line: batch_input_pb2.InputLine, models: Mapping[str, ModelRecord]
    ) -> Asked | Result:
        """A line as a request that can be submitted, or its error."""
        asked = self.parsed(index, line)
        if isinstance(asked, Result):
            return asked
        request = asked.line.request
        try:
            model = choose_model(request, models)
            check(request, model)
        except InvalidRequest as e:
            return self._refused(index, asked.line.custom_id, INVALID_ARGUMENT, openai_error(e))
        request.model, request.lane, request.tenant = model.name, pb.BATCH, self.tenant
        request.on_disconnect = pb.DETACH  # tells engines that nobody waits for single tokens
        return Asked(index, asked.line, estimate_tokens(request, model, self.default_answer_tokens))

    def result(self, asked: Asked, whole: pb.GenerateResponse, now_s: int) -> Result:
        """What came of a request."""
        line, request_id = asked.line, public(self.request_id(asked.index))
        if whole.finish.code:
            return self._refused(asked.index, line.custom_id, whole.finish.code, {"message": whole.finish.message})
        body = batch_answers.body(whole, line.shape, request_id, line.request.model, now_s)
        text = batch_answers.answered(self._result_id(asked.index), line.custom_id, request_id, body)
        usage = (whole.usage.prompt_tokens, whole.usage.completion_tokens)
        return Result(asked.index, self.request_id(asked.index), "output", text, *usage)

    def unanswered(self, index: int, custom_id: str | None, code: str, message: str) -> Result:
        """The error of a line that never became a request, or whose request was not waited for."""
        text = batch_answers.not_run(self._result_id(index), custom_id, code, message)
        return Result(index, self.request_id(index), "errors", text)

    def over_limit(self, asked: Asked, e: LimitReached) -> Result:
        """The error of a line that asks for more than its tenant may have at all."""
        return self._refused(
            asked.index, asked.line.custom_id, RESOURCE_EXHAUSTED, {"message": str(e), "code": e.limit}
        )

    def _refused(self, index: int, custom_id: str | None, code: int, fault: Mapping[str, str | None]) -> Result:
        request_id = self.request_id(index)
        text = batch_answers.refused(self._result_id(index), custom_id, public(request_id), code, fault)
        return Result(index, request_id, "errors", text)

    def _result_id(self, index: int) -> str:
        return f"batch_req_{public(self.batch_id)}_{index}"


def openai_error(e: InvalidRequest) -> dict[str, str | None]:
    """The first fault, by the name that OpenAI's format has for the field."""
    name, text = e.faults[0]
    name = name.removeprefix("sampling.")
    if name in ("text", "tokens.token_ids"):
        name = "prompt"
    elif name.startswith("chat.messages"):
        name = name.removeprefix("chat.")
    code = "model_not_found" if name == "model" else "invalid_value"
    return {"message": f"{name}: {text}", "param": name, "code": code}
