"""The Python client's batches, for asyncio (`AsyncBatches`) and without (`Batches`), on a client that there is.

    with Client("localhost:50051") as client:
        batches = Batches(client)
        batch = batches.create(Path("prompts.jsonl"))
        batch = batches.wait(batch.id)
        for line in batches.results(batch.id):
            print(json.loads(line)["response"]["body"])

A broken connection is not an error: an upload is begun again under the same id, results go on after the last line.
All methods raise FolkmootError (client.py).
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc

from folkmoot.gateway.client import AsyncClient, Client, _Patience
from folkmoot.gateway.client_errors import Unavailable, error_of
from folkmoot.gateway.pb import batches_pb2 as pb
from folkmoot.gateway.pb import batches_pb2_grpc

PIECE_BYTES = 256 << 10
UPLOAD_TIMEOUT_S = 1800.0
POLL_S = 0.5
ENDED = frozenset({pb.BATCH_FAILED, pb.COMPLETED, pb.EXPIRED, pb.BATCH_CANCELLED})

Source = Path | Iterable[Mapping[str, Any]]
OnProgress = Callable[[pb.Batch], None]


class AsyncBatches:
    """For asyncio."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(
        self,
        source: Source,
        *,
        batch_id: str = "",
        completion_window_s: float = 0.0,
        endpoint: str = "",
        metadata: Mapping[str, str] | None = None,
        tenant: str = "",
    ) -> pb.Batch:
        """Send a file, or lines as objects. The same `batch_id` and content again change nothing. 0 seconds: 24 hours.
        Raises OSError where the file cannot be read."""
        header = pb.BatchHeader(
            batch_id=batch_id or f"batch_{secrets.token_hex(12)}",
            completion_window_s=completion_window_s,
            endpoint=endpoint,
            metadata=dict(metadata or {}),
            tenant=tenant,
        )
        if isinstance(source, Path):
            source.open("rb").close()  # an error inside a stream of requests would only end the call
        else:
            source = list(source)  # it may be sent more than once
        patience = _Patience(self._client._options.reconnect_s)
        while True:
            try:
                batch: pb.Batch = await self._stub().Create(
                    _messages(header, source), timeout=UPLOAD_TIMEOUT_S, metadata=self._client._options.metadata
                )
                return batch
            except grpc.aio.AioRpcError as e:
                await self._elsewhere(e, patience)

    async def get(self, batch_id: str) -> pb.Batch:
        """Raises NotFound."""
        found: pb.Batch = await self._call("Get", pb.GetBatchRequest(batch_id=batch_id))
        return found

    async def latest(self, *, tenant: str = "", most: int = 100) -> list[pb.Batch]:
        """The newest first."""
        found: list[pb.Batch] = []
        token = ""
        while len(found) < most:
            size = min(100, most - len(found))
            page = await self._call("List", pb.ListBatchesRequest(page_size=size, page_token=token, tenant=tenant))
            found += page.batches
            if not (token := page.next_page_token):
                break
        return found

    async def cancel(self, batch_id: str) -> pb.Batch:
        """What has a result keeps it. Raises NotFound."""
        found: pb.Batch = await self._call("Cancel", pb.CancelBatchRequest(batch_id=batch_id))
        return found

    async def wait(
        self, batch_id: str, timeout_s: float | None = None, on_progress: OnProgress = lambda batch: None
    ) -> pb.Batch:
        """The batch once it has ended, or as it is after `timeout_s`; `on_progress` is told twice a second."""
        ends_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            batch = await self.get(batch_id)
            on_progress(batch)
            if batch.status in ENDED or (ends_s is not None and time.monotonic() >= ends_s):
                return batch
            await asyncio.sleep(POLL_S)

    async def results(
        self, batch_id: str, *, errors: bool = False, line: int = 0, follow: bool = False
    ) -> AsyncIterator[bytes]:
        """The lines of the output (or error) file from number `line` on, without their ends; with `follow` also those
        that come until the batch has ended. Raises NotFound."""
        file = pb.ERRORS if errors else pb.OUTPUT
        patience = _Patience(self._client._options.reconnect_s)
        while True:
            request = pb.BatchResultsRequest(batch_id=batch_id, file=file, line=line, follow=follow)
            call = self._stub().Results(request, metadata=self._client._options.metadata)
            rest = b""
            try:
                async for message in call:
                    patience.reset()
                    *whole, rest = (rest + message.data).split(b"\n")
                    for text in whole:
                        line += 1
                        yield text
                return
            except grpc.aio.AioRpcError as e:
                await self._elsewhere(e, patience)
            finally:
                call.cancel()

    async def dead_letters(self, model: str = "", *, most: int = 100) -> list[pb.DeadLetter]:
        """Requests that were given up, the newest first. `model` may be left out where there is only one."""
        found: list[pb.DeadLetter] = []
        token = ""
        while len(found) < most:
            size = min(100, most - len(found))
            page = await self._call(
                "ListDeadLetters", pb.ListDeadLettersRequest(model=model, page_size=size, page_token=token)
            )
            found += page.letters
            if not (token := page.next_page_token):
                break
        return found

    async def replay(self, letter_id: str, model: str = "") -> str:
        """Queue a dead letter again; answers the id of the request, for `follow`. Raises NotFound."""
        answer = await self._call("ReplayDeadLetter", pb.ReplayDeadLetterRequest(model=model, id=letter_id))
        return str(answer.request_id)

    # ----------------------------------------------------------------------------------------- behind it

    def _stub(self) -> batches_pb2_grpc.BatchesStub:
        return batches_pb2_grpc.BatchesStub(self._client._channel())  # type: ignore[no-untyped-call]

    async def _call(self, name: str, message: Any) -> Any:
        return await self._client._call(lambda _: getattr(self._stub(), name), message)

    async def _elsewhere(self, e: grpc.aio.AioRpcError, patience: _Patience) -> None:
        """Turn to the next gateway. Raises the call's error where that does not help."""
        error = error_of(e)
        if not isinstance(error, Unavailable):
            raise error from e
        await self._client._try_elsewhere(error, patience, float("inf"))


class Batches:
    """The same without asyncio: its methods block."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._batches = AsyncBatches(client._client)

    def create(self, source: Source, **options: Any) -> pb.Batch:
        """See AsyncBatches.create."""
        return self.client._run(self._batches.create(source, **options))

    def get(self, batch_id: str) -> pb.Batch:
        """See AsyncBatches.get."""
        return self.client._run(self._batches.get(batch_id))

    def latest(self, **options: Any) -> list[pb.Batch]:
        """See AsyncBatches.latest."""
        return self.client._run(self._batches.latest(**options))

    def cancel(self, batch_id: str) -> pb.Batch:
        """See AsyncBatches.cancel."""
        return self.client._run(self._batches.cancel(batch_id))

    def wait(
        self, batch_id: str, timeout_s: float | None = None, on_progress: OnProgress = lambda batch: None
    ) -> pb.Batch:
        """See AsyncBatches.wait; `on_progress` is called on the client's own thread."""
        return self.client._run(self._batches.wait(batch_id, timeout_s, on_progress))

    def results(self, batch_id: str, **options: Any) -> Iterator[bytes]:
        """See AsyncBatches.results."""
        return self.client._iterate(lambda: self._batches.results(batch_id, **options))

    def dead_letters(self, model: str = "", **options: Any) -> list[pb.DeadLetter]:
        """See AsyncBatches.dead_letters."""
        return self.client._run(self._batches.dead_letters(model, **options))

    def replay(self, letter_id: str, model: str = "") -> str:
        """See AsyncBatches.replay."""
        return self.client._run(self._batches.replay(letter_id, model))


async def _messages(header: pb.BatchHeader, source: Source) -> AsyncIterator[pb.CreateBatchRequest]:
    yield pb.CreateBatchRequest(header=header)
    if isinstance(source, Path):
        with source.open("rb") as file:
            while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                yield pb.CreateBatchRequest(data=piece)
        return
    lines, size = pb.BatchLines(), 0
    for record in source:
        lines.lines.append(json.dumps(record).encode())
        size += len(lines.lines[-1])
        if size >= PIECE_BYTES:
            yield pb.CreateBatchRequest(lines=lines)
            lines, size = pb.BatchLines(), 0
    yield pb.CreateBatchRequest(lines=lines)
