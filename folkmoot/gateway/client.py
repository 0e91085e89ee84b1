"""The Python client, for asyncio (`AsyncClient`) and without (`Client`). It needs grpcio and protobuf only.

    with Client("localhost:50051") as client:
        for chunk in client.generate("The capital of France is", max_tokens=32):
            print(chunk.text, end="", flush=True)

A broken connection is not an error: the client goes on at any of its addresses after the last token it has, without
gap or duplicate; the request keeps running meanwhile. Leaving the iteration early cancels the request.

    FolkmootError                  `code`: gRPC status name; `request_id`, where there is one
    ├── InvalidRequest             the request is at fault: `faults` has every field with its limit
    ├── Busy                       the queue is full: come back after `retry_after_s`
    ├── Unavailable                no gateway, or no store behind it, for `reconnect_s`
    ├── NotFound                   unknown request: never submitted, or its journal has expired
    ├── RequestIdInUse             this request_id belongs to a request of other content
    ├── Unauthenticated            no API key, or none that is good
    ├── PermissionDenied           the API key does not allow this call
    ├── Cancelled                  someone cancelled the request
    ├── DeadlineExceeded           `timeout_s` passed
    └── ServerError                anything else; a bug, or an engine that gave up
"""

import asyncio
import math
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import grpc

from folkmoot.gateway.client_channel import Access
from folkmoot.gateway.client_errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    FolkmootError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RequestIdInUse,
    ServerError,
    Unauthenticated,
    Unavailable,
    error_of,
)
from folkmoot.gateway.client_types import Chunk, TokenLogprob, build_request, chunk_of
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import gateway_pb2_grpc

__all__ = [
    "AsyncClient",
    "Busy",
    "Cancelled",
    "Chunk",
    "Client",
    "DeadlineExceeded",
    "FolkmootError",
    "InvalidRequest",
    "NotFound",
    "PermissionDenied",
    "RequestIdInUse",
    "ServerError",
    "TokenLogprob",
    "Unauthenticated",
    "Unavailable",
]

T = TypeVar("T")

TIMEOUT_S = 600.0  # a whole request, waiting included
RECONNECT_S = 30.0  # how long to look for a gateway before giving up
CALL_TIMEOUT_S = 10.0  # the calls that answer at once
SLACK_S = 2.0  # the gateway ends a late request itself, with what there is; the client's own clock comes after it
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.05, 1.0
CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 15_000),  # a peer that is gone without a word is noticed in 20 s
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", 64 << 20),
)


@dataclass(frozen=True)
class ClientOptions(Access):
    """Timeouts, all in seconds, beside how to connect and as whom (client_channel.py)."""

    timeout_s: float = TIMEOUT_S
    reconnect_s: float = RECONNECT_S


class AsyncClient:
    """For asyncio; belongs to one event loop. `addresses`: "host:port" (with TLS "https://host:port"), or several."""

    def __init__(self, addresses: str | Sequence[str] = "127.0.0.1:50051", **options: Any) -> None:
        """`options`: api_key, tls_ca, tls_cert, tls_key (ClientOptions). Raises ValueError."""
        self._addresses = [addresses] if isinstance(addresses, str) else list(addresses)
        if not self._addresses:
            raise ValueError("addresses must not be empty")
        self._options = ClientOptions(**options)
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._at = 0  # index of the address in use
        self._background: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Send the cancellations that are under way, and close the connections."""
        if self._background:
            await asyncio.wait(self._background, timeout=CALL_TIMEOUT_S)
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> AsyncIterator[Chunk]:
        """Stream the answer to a text, a conversation ({"role": .., "content": ..} each) or token ids.

        `options`: model, lane ("interactive" or "batch"), tenant, request_id, timeout_s, detach (True: the request
        runs on when the iteration is left), and vLLM's sampling parameters (max_tokens, temperature, seed, stop, ...).
        Raises TypeError for an unknown option, FolkmootError for the rest.
        """
        request = build_request(prompt, messages, token_ids, self._options.timeout_s, options)
        return self._answer(request)

    async def generate_text(self, prompt: str | None = None, **options: Any) -> str:
        """The whole answer at once."""
        return "".join([chunk.text async for chunk in self.generate(prompt, **options)])

    async def follow(self, request_id: str, offset: int = 0) -> AsyncIterator[Chunk]:
        """The answer to an earlier request from token `offset` on. Leaving it does not cancel. Raises NotFound."""
        async for chunk in self._resuming(None, request_id, offset, self._options.timeout_s):
            yield chunk

    async def cancel(self, request_id: str) -> bool:
        """End a request; False where it had ended already. Raises NotFound."""
        answer = await self._call(lambda stub: stub.Cancel, pb.CancelRequest(request_id=request_id))
        return bool(answer.was_running)

    async def request(self, request_id: str) -> pb.RequestStatus:
        """What is known of a request. Raises NotFound."""
        found: pb.RequestStatus = await self._call(
            lambda stub: stub.GetRequest, pb.GetRequestRequest(request_id=request_id)
        )
        return found

    async def models(self) -> list[pb.Model]:
        """The models, with their engines and load."""
        return list((await self._call(lambda stub: stub.ListModels, pb.ListModelsRequest())).models)

    async def status(self, *, experts: bool = False) -> pb.GetClusterStatusResponse:
        """The cluster's own document (`json`) and the models; with `experts` also each expert's rows."""
        found: pb.GetClusterStatusResponse = await self._call(
            lambda stub: stub.GetClusterStatus, pb.GetClusterStatusRequest(experts=experts)
        )
        return found

    # ----------------------------------------------------------------------------------------- behind it

    async def _answer(self, request: pb.GenerateRequest) -> AsyncIterator[Chunk]:
        finished = False
        try:
            async for chunk in self._resuming(request, request.request_id, 0, request.timeout_s):
                finished = chunk.finish_reason is not None
                yield chunk
        except FolkmootError:
            finished = True  # it has ended, or cannot be reached: then its grace period ends it
            raise
        finally:
            if not finished and request.on_disconnect != pb.DETACH:
                task = asyncio.get_running_loop().create_task(self._cancel_quietly(request.request_id))
                self._background.add(task)
                task.add_done_callback(self._background.discard)

    async def _resuming(
        self, request: pb.GenerateRequest | None, request_id: str, offset: int, timeout_s: float
    ) -> AsyncIterator[Chunk]:
        """The one retry loop of streams: whatever breaks, go on at `offset` elsewhere."""
        ends_s = time.monotonic() + timeout_s
        patience = _Patience(self._options.reconnect_s)
        while True:
            left_s = max(0.001, ends_s - time.monotonic())
            stub, metadata = self._stub(), self._options.metadata
            if request is not None and offset == 0:  # joins itself, where it is known already
                request.timeout_s = left_s
                call = stub.Generate(request, timeout=left_s + SLACK_S, metadata=metadata)
            else:
                wanted = pb.FollowRequest(request_id=request_id, offset=offset)
                call = stub.Follow(wanted, timeout=left_s + SLACK_S, metadata=metadata)
            try:
                async for piece in call:
                    patience.reset()
                    if not piece.token_ids and not piece.HasField("finish"):
                        continue
                    offset = piece.offset + len(piece.token_ids)
                    if not piece.finish.code:  # else the status says it
                        yield chunk_of(piece)
                return
            except grpc.aio.AioRpcError as e:
                error = error_of(e, request_id)
                if not isinstance(error, Unavailable):
                    raise error from e
                await self._try_elsewhere(error, patience, ends_s)
            finally:
                call.cancel()

    async def _call(self, method: Callable[[Any], Any], message: Any) -> Any:
        patience = _Patience(self._options.reconnect_s)
        while True:
            try:
                return await method(self._stub())(message, timeout=CALL_TIMEOUT_S, metadata=self._options.metadata)
            except grpc.aio.AioRpcError as e:
                error = error_of(e, getattr(message, "request_id", ""))
                if not isinstance(error, Unavailable):
                    raise error from e
                await self._try_elsewhere(error, patience, math.inf)

    async def _cancel_quietly(self, request_id: str) -> None:
        with suppress(FolkmootError):  # then its grace period ends it
            await self.cancel(request_id)

    def _stub(self) -> gateway_pb2_grpc.FolkmootStub:
        return gateway_pb2_grpc.FolkmootStub(self._channel())  # type: ignore[no-untyped-call]

    def _channel(self) -> grpc.aio.Channel:
        address = self._addresses[self._at]
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._options.aio_channel(address, CHANNEL_OPTIONS)
        return channel

    async def _try_elsewhere(self, error: Unavailable, patience: "_Patience", ends_s: float) -> None:
        """Wait a moment, and turn to the next address. Raises `error` where patience, or the time, is over."""
        address = self._addresses[self._at]
        self._at = (self._at + 1) % len(self._addresses)
        try:
            await patience.wait(error, ends_s)
        except Unavailable:
            error.args = (f"{error}{await asyncio.to_thread(self._options.hint, address)}",)
            raise


class Client:
    """The same without asyncio: its methods block. One client may be used from several threads."""

    def __init__(self, addresses: str | Sequence[str] = "127.0.0.1:50051", **options: Any) -> None:
        self._client = AsyncClient(addresses, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="folkmoot-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. The client cannot be used afterwards."""
        if self._thread.is_alive():
            self._run(self._client.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> Iterator[Chunk]:
        """See AsyncClient.generate."""
        return self._iterate(lambda: self._client.generate(prompt, messages=messages, token_ids=token_ids, **options))

    def generate_text(self, prompt: str | None = None, **options: Any) -> str:
        """See AsyncClient.generate_text."""
        return self._run(self._client.generate_text(prompt, **options))

    def follow(self, request_id: str, offset: int = 0) -> Iterator[Chunk]:
        """See AsyncClient.follow."""
        return self._iterate(lambda: self._client.follow(request_id, offset))

    def cancel(self, request_id: str) -> bool:
        """See AsyncClient.cancel."""
        return self._run(self._client.cancel(request_id))

    def request(self, request_id: str) -> pb.RequestStatus:
        """See AsyncClient.request."""
        return self._run(self._client.request(request_id))

    def models(self) -> list[pb.Model]:
        """See AsyncClient.models."""
        return self._run(self._client.models())

    def status(self, *, experts: bool = False) -> pb.GetClusterStatusResponse:
        """See AsyncClient.status."""
        return self._run(self._client.status(experts=experts))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _iterate(self, start: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
        chunks = start()

        async def step() -> T | None:
            return await anext(chunks, None)

        async def leave() -> None:
            with suppress(RuntimeError):  # still inside a step that is being cancelled, which ends it too
                await chunks.aclose()  # type: ignore[attr-defined]

        try:
            while (chunk := self._run(step())) is not None:
                yield chunk
        finally:
            if self._thread.is_alive():
                self._run(leave())


class _Patience:
    """Back-off between tries: doubled, jittered, reset by success, over after `limit_s` without any."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.reset()

    def reset(self) -> None:
        self._since_s = time.monotonic()
        self._pause_s = BACKOFF_FIRST_S

    async def wait(self, error: Unavailable, ends_s: float) -> None:
        """Sleep before the next try. Raises `error` where patience, or the time of the request, is over."""
        now_s = time.monotonic()
        if now_s >= ends_s:
            raise DeadlineExceeded("the time was up while no gateway answered", "DEADLINE_EXCEEDED", error.request_id)
        if now_s - self._since_s > self._limit_s:
            raise error
        await asyncio.sleep(min(self._pause_s * random.uniform(0.5, 1.0), max(0.0, ends_s - now_s)))
        self._pause_s = min(2 * self._pause_s, BACKOFF_MAX_S)
