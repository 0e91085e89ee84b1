"""The six calls of the service. Each is: validate, one step on the queue, answer or stream."""

import asyncio
import logging
import secrets
import time
from collections.abc import Coroutine
from typing import Any

import grpc

from folkmoot import logs
from folkmoot.gateway import lease_span, metrics, status, tracing
from folkmoot.gateway.demand import Demands
from folkmoot.gateway.errors import GatewayError, GatewayStopping, OtherTenant, StoreError, UnknownRequest, public
from folkmoot.gateway.journal import JournalReader, Stream
from folkmoot.gateway.loads import lane_loads, total
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import gateway_pb2_grpc
from folkmoot.gateway.queue import LANE_OF, ModelRecord, RequestQueue, Submission
from folkmoot.gateway.readiness import ready_engines
from folkmoot.gateway.settings import GatewaySettings
from folkmoot.gateway.tenancy import caller
from folkmoot.gateway.validate import REQUEST_ID, InvalidRequest, check, check_id, choose_model, estimate_tokens

log = logging.getLogger(__name__)

MODELS_FRESH_S = 1.0  # how long a gateway trusts its copy of the model records
STARTS_WAITED = 3  # a request waits for so many starts of an engine, where engines come and go

# A client's deadline is seen as its cancellation, which may come a little before the gateway's own clock says so.
LATE_SLACK_S = 0.1
LATE = status.Status(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the request was finished")

Context = grpc.aio.ServicerContext[Any, Any]


class FolkmootService(gateway_pb2_grpc.FolkmootServicer):
    """`folkmoot.v1.Folkmoot` on one queue. See gateway.proto for what each call promises."""

    def __init__(self, settings: GatewaySettings, queue: RequestQueue, reader: JournalReader) -> None:
        self._settings = settings
        self._queue = queue
        self._reader = reader
        self._models: dict[str, ModelRecord] = {}
        self._models_read_s = -MODELS_FRESH_S
        self._queue_timeout_s = settings.queue.queue_timeout_s
        self._background: set[asyncio.Task[None]] = set()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Submit, then stream until the last piece."""
        metrics.current().lane = LANE_OF.get(request.lane, "")
        began_s = time.monotonic()
        try:
            on_disconnect = request.on_disconnect
            submission = await self._accept(request, context.time_remaining())
            stream = self._reader.open(submission.request_id)
            try:
                if not await self._queue.submit(submission):  # a second try: what it has missed stands in the journal
                    stream.close()
                    stream = await self._reader.follow(submission.request_id)
            except BaseException:
                stream.close()
                raise
        except (GatewayError, InvalidRequest) as e:
            await status.abort(context, status.of(e))
        stream.live = True
        ends_s = time.monotonic() + submission.remaining_s  # not before the store's own clock says so
        try:
            await self._stream(stream, context, ends_s, submission.request_id)
        except asyncio.CancelledError:
            if time.monotonic() >= began_s + submission.remaining_s - LATE_SLACK_S:
                self._keep(self._settle_late(submission.request_id, ends_s))
            elif on_disconnect in (pb.ON_DISCONNECT_UNSPECIFIED, pb.CANCEL):
                self._keep(self._cancel_quietly(submission.request_id))
            raise
        finally:
            stream.close()

    async def Follow(self, request: pb.FollowRequest, context: Context) -> None:
        """Stream an existing request; cancelling this call leaves it alone."""
        try:
            request_id = _named(request.request_id)
            stream = await self._reader.follow(request_id, request.offset)
        except (GatewayError, InvalidRequest) as e:
            await status.abort(context, status.of(e))
        try:
            await self._stream(stream, context, time.monotonic() + self._settings.max_request_s, request_id)
        finally:
            stream.close()

    async def GetRequest(self, request: pb.GetRequestRequest, context: Context) -> pb.RequestStatus:
        """One look at a request."""
        try:
            found = await self._queue.status(_named(request.request_id))
            found.request_id = request.request_id
            return found
        except (GatewayError, InvalidRequest) as e:
            await status.abort(context, status.of(e))

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        """End a request."""
        try:
            return pb.CancelResponse(was_running=await self._queue.cancel(_named(request.request_id)))
        except (GatewayError, InvalidRequest) as e:
            await status.abort(context, status.of(e))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """All models with their engines and load."""
        try:
            return pb.ListModelsResponse(models=await self._list_models())
        except GatewayError as e:
            await status.abort(context, status.of(e))

    async def GetClusterStatus(
        self, request: pb.GetClusterStatusRequest, context: Context
    ) -> pb.GetClusterStatusResponse:
        """The cluster's document as it is, and the models."""
        try:
            document = await self._queue.cluster_status()
            experts = await self._queue.expert_rows() if request.experts else ""
            models = await self._list_models()
            return pb.GetClusterStatusResponse(json=document, models=models, experts_json=experts)
        except GatewayError as e:
            await status.abort(context, status.of(e))

    # ----------------------------------------------------------------------------------------- behind it

    async def _accept(self, request: pb.GenerateRequest, call_remaining_s: float | None) -> Submission:
        """Validated, with id, cost and budget of time. Raises InvalidRequest, OtherTenant, StoreError."""
        who = caller()
        if REQUEST_ID.fullmatch(request.request_id):
            logs.bind(request_id=request.request_id)
        if who.tenant and request.tenant not in ("", who.tenant):
            raise OtherTenant
        request.tenant = who.tenant or request.tenant
        model = choose_model(request, await self._known_models(request.model))
        check(request, model)
        request.model = model.name
        if not request.request_id:
            request.request_id = secrets.token_hex(12)
        _name(request)
        budget_s = self._settings.max_request_s
        if request.HasField("timeout_s"):
            budget_s = min(budget_s, request.timeout_s)
        if call_remaining_s is not None and request.on_disconnect != pb.DETACH:
            budget_s = min(budget_s, call_remaining_s)
        grace_s = 0.0 if request.on_disconnect == pb.DETACH else self._settings.grace_s
        # A second try of the same request may have less time left, and still is the same request.
        request.ClearField("timeout_s")
        request.ClearField("on_disconnect")
        return Submission(
            request_id=who.scoped(request.request_id),
            model=model.name,
            request=request,
            cost=estimate_tokens(request, model, self._settings.default_answer_tokens),
            remaining_s=budget_s,
            grace_s=grace_s,
            gateway=self._reader.gateway,
            limits=who.limits,
            queue_timeout_s=self._queue_timeout_s,
            trace=tracing.current().context,
        )

    async def _stream(self, stream: Stream, context: Context, ends_s: float, request_id: str) -> None:
        """Write all pieces; then end the call as the last piece says."""
        try:
            async with asyncio.timeout(ends_s - time.monotonic()):
                piece = await self._write_pieces(stream, context, request_id)
        except TimeoutError:
            self._keep(self._settle_late(request_id, ends_s))
            await status.abort(context, LATE)
        except UnknownRequest as e:
            await status.abort(context, status.Status(grpc.StatusCode.DATA_LOSS, f"the request store lost it: {e}"))
        except GatewayStopping as e:
            await status.abort(context, status.of(e))
        if piece.finish.code:
            await status.abort(context, status.Status(status.CODES[piece.finish.code], piece.finish.message))

    async def _write_pieces(self, stream: Stream, context: Context, request_id: str) -> pb.GenerateResponse:
        try:
            async with asyncio.timeout(self._settings.accept_after_s):
                piece = await anext(stream)
        except TimeoutError:
            await context.write(pb.GenerateResponse(request_id=public(request_id), offset=stream.position))
            piece = await anext(stream)
        tracing.current().event("first piece")
        call = metrics.current()
        piece.request_id = public(request_id)
        await context.write(piece)
        call.wrote(len(piece.token_ids))
        while not piece.HasField("finish"):
            piece = await anext(stream)
            await context.write(piece)
            call.wrote(len(piece.token_ids))
        if (span := tracing.current()).is_made:
            span.set(lease_span.usage_of(piece))
        return piece

    async def _cancel_quietly(self, request_id: str) -> None:
        try:
            await self._queue.cancel(request_id, "the call was cancelled")
        except GatewayError as e:  # nobody attends to it any more, so the grace period ends it
            log.warning("cancelling %s: %s", request_id, e)

    async def _settle_late(self, request_id: str, ends_s: float) -> None:
        """Have the store look at a request whose deadline passes at `ends_s`, which ends it."""
        await asyncio.sleep(ends_s - time.monotonic())
        try:
            await self._reader.attend([request_id])
        except StoreError as e:  # whoever touches it next ends it
            log.warning("ending %s: %s", request_id, e)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _known_models(self, wanted: str) -> dict[str, ModelRecord]:
        age_s = time.monotonic() - self._models_read_s
        if age_s > MODELS_FRESH_S or not self._models or (wanted and wanted not in self._models):
            self._models = await self._queue.models()
            scaling = await Demands(self._queue.store).scaling()
            starts_s = STARTS_WAITED * scaling.start_s if scaling is not None else 0.0
            self._queue_timeout_s = max(self._settings.queue.queue_timeout_s, starts_s)
            self._models_read_s = time.monotonic()
        return self._models

    async def _list_models(self) -> list[pb.Model]:
        engines = list((await self._queue.engines()).values())
        ready = list((await ready_engines(self._queue)).values())
        models = []
        for name, record in sorted((await self._queue.models()).items()):
            lanes = [_visible(lane) for lane in await lane_loads(self._queue, name)]
            models.append(
                pb.Model(
                    name=name,
                    max_model_len=record.max_model_len,
                    vocab_size=record.vocab_size,
                    max_logprobs=record.max_logprobs,
                    num_engines=engines.count(name),
                    num_ready_engines=ready.count(name),
                    load=total(lanes),
                    lanes=lanes,
                )
            )
        return models


def _visible(lane: pb.LaneLoad) -> pb.LaneLoad:
    """A lane's load without tenants that are not the caller's, unless it may see the whole cluster."""
    who = caller()
    if who.roles.isdisjoint(("status", "admin")):
        own = [tenant for tenant in lane.tenants if tenant.tenant == who.tenant]
        del lane.tenants[:]
        lane.tenants.extend(own)
    return lane


def _name(request: pb.GenerateRequest) -> None:
    """What the call is about, on its log lines and its span."""
    logs.bind(request_id=request.request_id, tenant=request.tenant)
    if (span := tracing.current()).is_made:
        span.set(lease_span.about(request))


def _named(request_id: str) -> str:
    """The store's name of a request of the caller's. Raises InvalidRequest for what no id can be."""
    check_id(request_id)
    logs.bind(request_id=request_id)
    tracing.current().set({"folkmoot.request_id": request_id})
    return caller().scoped(request_id)
