"""Requests that were given up after their last attempt: to look at, and to try once more."""

import re

from google.protobuf import json_format

from folkmoot.gateway import tracing
from folkmoot.gateway.errors import UnknownLetter
from folkmoot.gateway.pb import batches_pb2
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import RequestQueue, Submission
from folkmoot.gateway.validate import InvalidRequest, choose_model, estimate_tokens

ENTRY = re.compile(r"\d{1,20}-\d{1,20}")


class DeadLetters:
    """Of all models. Every method may raise StoreError."""

    def __init__(self, queue: RequestQueue, max_request_s: float, default_answer_tokens: int) -> None:
        self._queue, self._max_request_s, self._answer_tokens = queue, max_request_s, default_answer_tokens

    async def model(self, name: str) -> str:
        """The model of this name, or the only one. Raises InvalidRequest."""
        return choose_model(pb.GenerateRequest(model=name), await self._queue.models()).name

    async def page(self, model: str, before: str, size: int) -> tuple[list[batches_pb2.DeadLetter], str]:
        """The newest first, and where the next page begins ('' = nowhere). Raises InvalidRequest."""
        if before and not ENTRY.fullmatch(before):
            raise InvalidRequest([("page_token", "must be what the page before gave as next_page_token")])
        newest = f"({before}" if before else "+"
        found = await self._queue.store.command(
            "XREVRANGE", self._queue.store.keys.dead(model), newest, "-", "COUNT", size + 1
        )
        letters = [_letter(model, entry.decode(), flat) for entry, flat in found[:size]]
        return letters, letters[-1].id if len(found) > size else ""

    async def replay(self, model: str, entry: str, request_id: str) -> None:
        """Queue it again under an id that must be the same however often this is tried.

        Raises UnknownLetter, QueueFull, InvalidRequest.
        """
        if not ENTRY.fullmatch(entry):
            raise InvalidRequest([("id", "must be the id of a dead letter")])
        key = self._queue.store.keys.dead(model)
        found = await self._queue.store.command("XRANGE", key, entry, entry)
        if not found:
            raise UnknownLetter(entry)
        request = pb.GenerateRequest.FromString(_fields(found[0][1])["body"])
        record = (await self._queue.models())[model]
        await self._queue.submit(
            Submission(
                request_id=request_id,
                model=model,
                request=request,
                cost=estimate_tokens(request, record, self._answer_tokens),
                remaining_s=self._max_request_s,
                grace_s=0.0,
                trace=tracing.current().context,
            )
        )
        await self._queue.store.command("XDEL", key, entry)


def _fields(flat: list[bytes]) -> dict[str, bytes]:
    return {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}


def _letter(model: str, entry: str, flat: list[bytes]) -> batches_pb2.DeadLetter:
    fields = _fields(flat)
    return batches_pb2.DeadLetter(
        id=entry,
        request_id=fields["id"].decode(),
        model=model,
        error=fields["error"].decode(errors="replace"),
        attempts=int(fields["attempts"]),
        time_ms=int(entry.partition("-")[0]),
        request_json=json_format.MessageToJson(pb.GenerateRequest.FromString(fields["body"]), indent=None),
    )
