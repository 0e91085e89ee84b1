"""An engine without a model: on the real queue API, its tokens are a known function of prompt and position."""

import asyncio
from types import TracebackType

from folkmoot.gateway import tasks
from folkmoot.gateway.errors import StoreError
from folkmoot.gateway.holder import LeaseHolder
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import Held, Lease, ModelRecord, RequestQueue

MODEL = ModelRecord(name="echo", max_model_len=4096, vocab_size=1000, max_logprobs=5)
DEFAULT_TOKENS = 5
STORE_PAUSE_S = 0.05


def prompt_ids(request: pb.GenerateRequest) -> list[int]:
    """As a tokenizer would: one token a byte."""
    kind = request.WhichOneof("prompt")
    if kind == "tokens":
        return list(request.tokens.token_ids)
    if kind == "chat":
        return list("".join(f"{m.role}:{m.content}\n" for m in request.chat.messages).encode())
    return list(request.text.encode())


def answer_token(prompt: list[int], position: int) -> int:
    """The token at `position` of the answer to `prompt`."""
    return (sum(prompt) * 31 + position * 7) % MODEL.vocab_size


def answer(prompt: list[int], size: int) -> list[int]:
    """The first `size` tokens of the answer."""
    return [answer_token(prompt, i) for i in range(size)]


def text_of(tokens: list[int]) -> str:
    """What these tokens spell."""
    return "".join(f" {token}" for token in tokens)


class EchoEngine:
    """Leases and answers until it is left. `step_s`: pause before each token."""

    def __init__(
        self, queue: RequestQueue, name: str = "engine-1", step_s: float = 0.0, room: int = 64, chunk: int = 1
    ) -> None:
        self.name = name
        self.step_s = step_s
        self.chunk = chunk
        self.leases: list[Lease] = []
        self.ended: list[tuple[str, Held]] = []
        self.room = room
        self.holder = LeaseHolder(queue, name, MODEL, self._on_ended)
        self._running: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "EchoEngine":
        await self.holder.__aenter__()
        self._loop = asyncio.create_task(self._lease_loop())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await tasks.cancel([self._loop, *self._running])
        await self.holder.__aexit__(None, None, None)

    def _on_ended(self, lease: Lease, why: Held) -> None:
        self.ended.append((lease.request_id, why))

    async def _lease_loop(self) -> None:
        while True:
            if self._running and self.holder.num_held >= self.room:
                await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                await self.holder.flush()
                continue
            try:
                leases = await self.holder.lease(self.room - self.holder.num_held)
            except StoreError:
                await asyncio.sleep(STORE_PAUSE_S)
                continue
            for lease in leases:
                self.leases.append(lease)
                task = asyncio.create_task(self._answer(lease))
                self._running.add(task)
                task.add_done_callback(self._running.discard)

    async def _answer(self, lease: Lease) -> None:
        prompt = prompt_ids(lease.request)
        wanted = lease.request.sampling.max_tokens or DEFAULT_TOKENS
        tokens = answer(prompt, wanted)
        assert list(lease.token_ids) == tokens[: lease.offset], "the journal so far is not what the engines wrote"
        for start in range(lease.offset, wanted, self.chunk):
            await asyncio.sleep(self.step_s)
            piece = tokens[start : start + self.chunk]
            response = pb.GenerateResponse(token_ids=piece, text=text_of(piece))
            if start + len(piece) == wanted:
                response.finish.reason = pb.LENGTH
                response.usage.prompt_tokens = len(prompt)
            if not self.holder.write(lease, response):
                return
