"""Whether a batch file is sound as a whole, and how much it asks for. One bad line is only that line's error."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress

from folkmoot.gateway.batch_lines import BadLine, parse, read
from folkmoot.gateway.pb import batch_input_pb2
from folkmoot.gateway.queue import ModelRecord
from folkmoot.gateway.validate import InvalidRequest, choose_model, estimate_tokens

MAX_FAULTS = 100

Fault = dict[str, str | int]
"""As a BatchError: code, message, param, line."""


class FileCheck:
    """Is told all lines, one after the other; keeps 16 bytes of each."""

    def __init__(self, models: Mapping[str, ModelRecord], endpoint: str, default_answer_tokens: int) -> None:
        self._models, self._endpoint, self._answer_tokens = models, endpoint, default_answer_tokens
        self._seen: set[bytes] = set()
        self._no_json: list[Fault] = []
        self._doubled: list[Fault] = []
        self._objects = 0
        self.estimated: Counter[str] = Counter()
        """tokens by model, prompt and answer, as admission estimates them"""

    def add(self, line: batch_input_pb2.InputLine) -> None:
        """The next line."""
        try:
            record = read(line)
        except BadLine as e:
            self._note(self._no_json, e.code, str(e), line.number)
            return
        self._objects += 1
        if isinstance(custom_id := record.get("custom_id"), str):
            digest = hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
            if digest in self._seen:
                message = f"custom_id {custom_id[:100]!r} stands in an earlier line too"
                self._note(self._doubled, "duplicate_custom_id", message, line.number, "custom_id")
            self._seen.add(digest)
        self._estimate(line)

    def faults(self) -> list[Fault]:
        """Why nothing of the file is to be run; empty where something is."""
        if self._objects:
            return self._doubled
        return self._no_json or [{"code": "empty_file", "message": "the file has no lines", "line": 0}]

    def _estimate(self, line: batch_input_pb2.InputLine) -> None:
        with suppress(BadLine, InvalidRequest):
            request = parse(line, self._endpoint).request
            model = choose_model(request, self._models)
            self.estimated[model.name] += estimate_tokens(request, model, self._answer_tokens)

    @staticmethod
    def _note(faults: list[Fault], code: str, message: str, line: int, param: str = "") -> None:
        if len(faults) < MAX_FAULTS:
            faults.append({"code": code, "message": message, "param": param, "line": line})
