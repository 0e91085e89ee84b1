"""The calls of `folkmoot.v1.Batches`: take a file, tell how far it is, stream results. Runners do the rest."""

import asyncio
import math
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import grpc

from folkmoot import logs
from folkmoot.gateway import status, tracing
from folkmoot.gateway.batch_lines import URLS
from folkmoot.gateway.batch_store import ENDED, BatchStore, Draft, File
from folkmoot.gateway.batch_upload import Upload
from folkmoot.gateway.dead_letters import DeadLetters
from folkmoot.gateway.errors import GatewayError, OtherTenant, public
from folkmoot.gateway.pb import batches_pb2 as pb
from folkmoot.gateway.pb import batches_pb2_grpc
from folkmoot.gateway.tenancy import caller
from folkmoot.gateway.validate import Fault, InvalidRequest

BATCH_ID = re.compile(r"[A-Za-z0-9._-]{1,96}")
DAY_S = 86_400.0
PAGE, MAX_PAGE = 20, 100
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
MESSAGE_BYTES, MOST_LINES = 1 << 20, 256
FOLLOW_S = 0.25
FILES: dict[int, File] = {pb.OUTPUT: "output", pb.ERRORS: "errors"}

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]


class BatchService(batches_pb2_grpc.BatchesServicer):
    """See batches.proto for what each call promises."""

    def __init__(self, batches: BatchStore, letters: DeadLetters) -> None:
        self._batches = batches
        self._letters = letters

    async def Create(self, requests: AsyncIterator[pb.CreateBatchRequest], context: Context) -> pb.Batch:
        """Store the file block by block, then the batch."""
        return await _or_abort(context, lambda: self._create(requests))

    async def Get(self, request: pb.GetBatchRequest, context: Context) -> pb.Batch:
        """One look."""
        return await _or_abort(context, lambda: self._get(request.batch_id))

    async def List(self, request: pb.ListBatchesRequest, context: Context) -> pb.ListBatchesResponse:
        """A page."""

        async def listed() -> pb.ListBatchesResponse:
            size = _page_size(request.page_size)
            if request.page_token and not request.page_token.isdigit():
                raise InvalidRequest([("page_token", "must be what the page before gave as next_page_token")])
            tenant = caller().tenant or request.tenant
            batches, after = await self._batches.page(tenant, request.page_token, size)
            return pb.ListBatchesResponse(batches=map(_shown, batches), next_page_token=after)

        return await _or_abort(context, listed)

    async def Cancel(self, request: pb.CancelBatchRequest, context: Context) -> pb.Batch:
        """Whoever runs it ends it."""

        async def cancelled() -> pb.Batch:
            await self._batches.cancel(caller().scoped(request.batch_id))
            return await self._get(request.batch_id)

        return await _or_abort(context, cancelled)

    async def Results(self, request: pb.BatchResultsRequest, context: Context) -> None:
        """A result file from a line on."""

        async def written() -> None:
            if request.file not in FILES:
                raise InvalidRequest([("file", f"must be OUTPUT or ERRORS, is {request.file}")])
            async for text in self._lines(request):
                for at in range(0, len(text), MESSAGE_BYTES):
                    await context.write(pb.BatchResults(data=text[at : at + MESSAGE_BYTES]))

        await _or_abort(context, written)

    async def ListDeadLetters(self, request: pb.ListDeadLettersRequest, context: Context) -> pb.ListDeadLettersResponse:
        """A page."""

        async def listed() -> pb.ListDeadLettersResponse:
            model = await self._letters.model(request.model)
            letters, after = await self._letters.page(model, request.page_token, _page_size(request.page_size))
            return pb.ListDeadLettersResponse(letters=letters, next_page_token=after)

        return await _or_abort(context, listed)

    async def ReplayDeadLetter(
        self, request: pb.ReplayDeadLetterRequest, context: Context
    ) -> pb.ReplayDeadLetterResponse:
        """One request again."""

        async def replayed() -> pb.ReplayDeadLetterResponse:
            model = await self._letters.model(request.model)
            name = f"replay:{request.id}"
            await self._letters.replay(model, request.id, caller().scoped(name))
            return pb.ReplayDeadLetterResponse(request_id=name)

        return await _or_abort(context, replayed)

    # ----------------------------------------------------------------------------------------- behind it

    async def _create(self, requests: AsyncIterator[pb.CreateBatchRequest]) -> pb.Batch:
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidRequest([("header", "must be the first message")])
        header, settings, who = first.header, self._batches.settings, caller()
        if who.tenant and header.tenant not in ("", who.tenant):
            raise OtherTenant
        if faults := list(_faults(header, settings.max_completion_window_s)):
            raise InvalidRequest(faults)
        header.tenant = who.tenant or header.tenant
        name, upload_id = header.batch_id or f"batch_{secrets.token_hex(12)}", secrets.token_hex(8)
        batch_id = who.scoped(name)
        logs.bind(batch_id=name, tenant=header.tenant)
        tracing.current().set({"folkmoot.batch.id": name})
        upload = Upload(settings, lambda n, block: self._batches.put_block(batch_id, upload_id, n, block))
        try:
            async for message in requests:
                if message.WhichOneof("part") not in ("data", "lines"):
                    raise InvalidRequest([("part", "must be data or lines after the header")])
                await upload.feed(message)
                who.limits.check_batch(upload.lines)
            draft = Draft(
                batch_id=batch_id,
                upload=upload_id if upload.lines else None,
                digest=await upload.finish(header),
                window_s=header.completion_window_s or min(DAY_S, settings.max_completion_window_s),
                endpoint=header.endpoint,
                tenant=header.tenant,
                metadata=dict(header.metadata),
                input_bytes=upload.bytes,
                total=upload.lines,
                limits=who.limits,
                trace=tracing.current().context,
            )
            await self._batches.create(draft)
        except BaseException:
            await self._batches.drop_upload(batch_id, upload_id)
            raise
        return await self._get(name)

    async def _get(self, name: str) -> pb.Batch:
        return _shown(await self._batches.get(caller().scoped(name)))

    async def _lines(self, request: pb.BatchResultsRequest) -> AsyncIterator[bytes]:
        """Lines joined, some at a time."""
        line, file, batch_id = request.line, FILES[request.file], caller().scoped(request.batch_id)
        most = 1  # until it is known how long lines are
        while True:
            batch = await self._batches.get(batch_id)  # before the look, so that nothing comes in between
            found = await self._batches.results(batch_id, file, line, most)
            line += len(found)
            if found:
                text = b"".join(found)
                most = max(1, min(MOST_LINES, MESSAGE_BYTES * len(found) // len(text)))
                yield text
            elif batch.status in ENDED or not request.follow:
                return
            else:
                await asyncio.sleep(FOLLOW_S)


def _faults(header: pb.BatchHeader, max_window_s: float) -> Iterator[Fault]:
    if header.batch_id and not BATCH_ID.fullmatch(header.batch_id):
        yield "batch_id", "must be 1 to 96 characters of A-Z a-z 0-9 . _ -"
    window_s = header.completion_window_s
    if not (math.isfinite(window_s) and 0 <= window_s <= max_window_s):
        yield "completion_window_s", f"must be above 0 and at most {max_window_s:g}, is {window_s}"
    if header.endpoint not in ("", *URLS):
        yield "endpoint", f"must be {' or '.join(URLS)}, is {header.endpoint!r}"
    if len(header.tenant) > 128:
        yield "tenant", f"must have at most 128 characters, has {len(header.tenant)}"
    if len(header.metadata) > MAX_METADATA:
        yield "metadata", f"must have at most {MAX_METADATA} keys, has {len(header.metadata)}"
    for key, value in header.metadata.items():
        if len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE:
            limits = f"{MAX_METADATA_KEY} characters, their values {MAX_METADATA_VALUE}"
            yield f"metadata[{key[:MAX_METADATA_KEY]}]", f"keys must have at most {limits}"


def _shown(batch: pb.Batch) -> pb.Batch:
    """As its tenant knows it."""
    batch.id = public(batch.id)
    return batch


def _page_size(asked: int) -> int:
    if asked > MAX_PAGE:
        raise InvalidRequest([("page_size", f"must be at most {MAX_PAGE}, is {asked}")])
    return asked or PAGE


async def _or_abort(context: Context, work: Callable[[], Awaitable[T]]) -> T:
    try:
        return await work()
    except (GatewayError, InvalidRequest) as e:
        await status.abort(context, status.of(e))
