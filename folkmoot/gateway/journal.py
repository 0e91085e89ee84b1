"""A gateway's side of the journals: one subscription feeds all its streams, the journals themselves fill every gap.

The store pushes new entries to the gateways that watch a request. A push may be lost (a broken connection, a
restarted store), so it is only ever a shortcut: a stream takes a piece only at exactly its own position, and reads
the journal where it sees, or suspects, that it is behind.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

from folkmoot.gateway import tasks
from folkmoot.gateway.errors import GatewayError, GatewayStopping, StoreError, UnknownRequest
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import journal_pb2
from folkmoot.gateway.queue import RequestQueue

log = logging.getLogger(__name__)

ATTEND_S = 1.0  # how often a gateway says that it still streams, and how long a lost push can delay a token


class Stream:
    """The pieces of one answer from one position on, each once and in order; the last one has `finish`."""

    def __init__(self, reader: "JournalReader", request_id: str, offset: int) -> None:
        self.request_id = request_id
        self.position = offset  # index of the next token
        self.ended = False
        self.live = False  # the store knows the request
        self.reading = False  # its journal, from `position` on
        self.missed = False  # something was pushed that does not follow on, since its journal was last asked for
        self._prompt_tokens = 0
        self._reader = reader
        self._pieces: deque[pb.GenerateResponse] = deque()
        self._error: GatewayError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> pb.GenerateResponse:
        """The next piece. Raises UnknownRequest where the request vanished from the store."""
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self.ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._pieces.popleft()

    def close(self) -> None:
        """No more pieces are wanted."""
        self._reader.drop(self)

    def feed(self, piece: pb.GenerateResponse) -> bool:
        """Take a piece that follows on what came before; ignore what was already had. False where some are missing."""
        size = len(piece.token_ids)
        last = piece.HasField("finish")
        if self.ended or (size and piece.offset + size <= self.position and not last):
            return True
        if piece.offset > self.position:
            return False
        if last:
            self.ended = True
            piece.usage.completion_tokens = piece.offset + size
            piece.usage.prompt_tokens = piece.usage.prompt_tokens or self._prompt_tokens
            if piece.offset + size <= self.position:  # only its finish is news
                for name in ("token_ids", "text", "logprobs"):
                    piece.ClearField(name)
                piece.offset, size = self.position, 0
        self._prompt_tokens = piece.usage.prompt_tokens or self._prompt_tokens
        self.position = piece.offset + size
        self._pieces.append(piece)
        self._wake()
        return True

    def fail(self, error: GatewayError) -> None:
        """End with an error, after the pieces that are here."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class JournalReader:
    """All streams of one gateway process."""

    def __init__(self, queue: RequestQueue, gateway: str) -> None:
        self.gateway = gateway
        self._queue = queue
        self._streams: dict[str, set[Stream]] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator["JournalReader"]:
        """Streams move for as long as the block runs."""
        store = self._queue.store
        async with AsyncExitStack() as stack:
            channels = (store.keys.pushes(self.gateway),)
            await stack.enter_async_context(store.subscribed(channels, self._pushed, self._catch_up_all))
            task = asyncio.create_task(self._attend_loop())
            stack.push_async_callback(tasks.cancel, [task])
            yield self

    def open(self, request_id: str, offset: int = 0) -> Stream:
        """A stream for a request that is about to be submitted with this gateway as watcher.

        Set its `live` once that is done.
        """
        stream = Stream(self, request_id, offset)
        self._streams.setdefault(request_id, set()).add(stream)
        return stream

    async def follow(self, request_id: str, offset: int = 0) -> Stream:
        """A stream of a request that exists. Raises UnknownRequest, StoreError."""
        stream = self.open(request_id, offset)
        try:
            await self._catch_up(stream)
        except BaseException:
            stream.close()
            raise
        stream.live = True
        return stream

    def drop(self, stream: Stream) -> None:
        """Forget a stream."""
        others = self._streams.get(stream.request_id)
        if others is not None:
            others.discard(stream)
            if not others:
                del self._streams[stream.request_id]

    def stop(self) -> None:
        """End all streams with GatewayStopping."""
        for streams in self._streams.values():
            for stream in streams:
                stream.fail(GatewayStopping())

    async def attend(self, request_ids: Iterable[str]) -> None:
        """Say that clients wait for these requests; ends those past their deadline; fills gaps. Raises StoreError."""
        ids = list(request_ids)
        if not ids:
            return
        for request_id, (end, done) in zip(ids, await self._queue.store.run("attend", *ids), strict=True):
            streams = self._streams.get(request_id, set())
            if end < 0:
                for stream in streams:
                    stream.fail(UnknownRequest(request_id))
            for stream in list(streams):
                if end >= 0 and (stream.position < end or (done and not stream.ended)) and not stream.reading:
                    await self._catch_up(stream)

    def _pushed(self, channel: str, payload: bytes) -> None:
        for event in journal_pb2.Batch.FromString(payload).events:
            streams = self._streams.get(event.request_id)
            if streams is None:
                continue
            shared = len(streams) > 1
            for stream in streams:
                if not stream.feed(_copy(event.response) if shared else event.response):
                    self._catch_up_soon(stream)

    def _catch_up_soon(self, stream: Stream) -> None:
        """Not once for each piece after a gap: they are many where a stream is new, or the store was away."""
        stream.missed = True
        if not stream.reading:
            stream.reading = True
            asyncio.get_running_loop().create_task(self._catch_up_quietly(stream))

    async def _catch_up(self, stream: Stream) -> None:
        """Read its journal, again where more was pushed meanwhile than fitted. Raises UnknownRequest, StoreError."""
        stream.reading = stream.missed = True
        try:
            while stream.missed:
                stream.missed = False
                ask = ("follow", self.gateway, stream.request_id, stream.position)
                if (payloads := await self._queue.store.run(*ask)) is None:
                    raise UnknownRequest(stream.request_id)
                for payload in payloads:
                    stream.feed(pb.GenerateResponse.FromString(payload))
        finally:
            stream.reading = False

    async def _catch_up_quietly(self, stream: Stream) -> None:
        try:
            await self._catch_up(stream)
        except UnknownRequest as e:
            stream.fail(e)
        except StoreError as e:
            log.warning("a stream of %s waits for the store: %s", stream.request_id, e)

    async def _catch_up_all(self) -> None:
        await self.attend([i for i, streams in self._streams.items() if any(s.live for s in streams)])

    async def _attend_loop(self) -> None:
        while True:
            await asyncio.sleep(ATTEND_S)
            try:
                await self._catch_up_all()
            except GatewayError as e:
                log.warning("%d streams wait for the store: %s", len(self._streams), e)


def _copy(piece: pb.GenerateResponse) -> pb.GenerateResponse:
    mine = pb.GenerateResponse()
    mine.CopyFrom(piece)
    return mine
