"""The request queue: submit, lease, renew, append, release, cancel. One method is one round trip.

+------------------------------------------------------------------------------------------------------+
| A request may RUN twice (an engine that stalls loses its lease, another one takes over), but each     |
| token is JOURNALLED once: only the holder of the newest epoch can append, at exactly the next offset. |
+------------------------------------------------------------------------------------------------------+
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from enum import StrEnum
from typing import Any

from folkmoot.gateway.batching import Batcher
from folkmoot.gateway.errors import LimitReached, QueueFull, RequestIdTaken, UnknownRequest
from folkmoot.gateway.keys import LANES, Lane
from folkmoot.gateway.limits import NO_LIMITS, Limits
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.store import Store
from folkmoot.gateway.tracing import TraceContext

LANE_OF: dict[int, Lane] = {pb.LANE_UNSPECIFIED: "interactive", pb.INTERACTIVE: "interactive", pb.BATCH: "batch"}
PB_LANE: dict[str, "pb.Lane"] = {"interactive": pb.INTERACTIVE, "batch": pb.BATCH}
PB_STATE: dict[str, "pb.RequestState"] = {"queued": pb.QUEUED, "running": pb.RUNNING, "done": pb.DONE}

UNLIMITED = 1 << 40
HANDED_BACK_MS = 3_600_000  # handed back leases count as idle for a day; no lease that runs is idle for so long


@dataclass(frozen=True)
class QueueSettings:
    """What gateways and engines of one deployment must agree on."""

    lease_s: float = 2.0  # an engine that does not renew for so long loses its requests
    max_attempts: int = 4  # in a row without a token, or twice as many in all: a dead letter
    retention_s: float = 600.0  # a finished journal can be read for so long
    max_waiting_requests: int = 1024  # per model and lane
    max_waiting_tokens: int = 4_000_000  # per model and lane, prompt and answer, estimated
    queue_timeout_s: float = 300.0  # an interactive request that no engine ever took ends after so long
    retry_after_ms: int = 1000  # the hint that goes with a refusal
    tenant_weights: Mapping[str, float] = field(default_factory=dict)  # shares of a lane; 1 for who is not named


@dataclass(frozen=True)
class Submission:
    """One request on its way into the queue."""

    request_id: str
    model: str
    request: pb.GenerateRequest  # its bytes are its identity: a second try must have the same
    cost: int  # estimated tokens, prompt and answer
    remaining_s: float  # until its deadline
    grace_s: float  # it is cancelled when no gateway attended to it for so long; 0: never
    gateway: str = ""  # whom to push its journal to
    limits: Limits = NO_LIMITS  # of the request's tenant
    queue_timeout_s: float | None = None  # it ends when no engine took it for so long; None: as in the settings
    trace: TraceContext | None = None  # the span that engines' spans come below; no part of its identity


@dataclass(frozen=True)
class Lease:
    """The right to run one request. What earlier holders journalled stands in token_ids and text: go on after it."""

    request_id: str
    epoch: int  # the fencing token
    attempt: int  # 1 for the first
    request: pb.GenerateRequest
    offset: int  # index of the next token to journal == len(token_ids)
    remaining_s: float  # until the deadline, at the time of the lease
    waited_s: float  # since it was submitted
    cost: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    entries: tuple[tuple[int, int], ...] = ()  # of their journal, in order: tokens and characters
    trace: TraceContext | None = None

    @property
    def is_batch(self) -> bool:
        """Which of the two lanes."""
        return LANE_OF[self.request.lane] == "batch"


class Held(StrEnum):
    """What renew and append say of a lease."""

    HELD = "held"  # renew: yours
    OK = "ok"  # append: journalled (or was already)
    LOST = "lost"  # someone else has it, or it is gone: drop it
    DONE = "done"  # it ended meanwhile (cancelled, deadline): drop it
    GAP = "gap"  # the store has fewer tokens than you (it lost its last second): drop it, it will be leased anew


@dataclass(frozen=True)
class Append:
    """Tokens for one journal. `response.offset` is the index of its first token; `response.finish` ends the request."""

    request_id: str
    epoch: int
    response: pb.GenerateResponse


@dataclass(frozen=True)
class Room:
    """What an engine has room for: requests, and estimated tokens (the last one may go beyond them)."""

    requests: int = UNLIMITED
    tokens: int = UNLIMITED


@dataclass(frozen=True)
class Load:
    """Requests and estimated tokens of one model, of one lane or one tenant or all together."""

    waiting_requests: int = 0
    waiting_tokens: int = 0
    running_requests: int = 0
    running_tokens: int = 0

    def __add__(self, other: "Load") -> "Load":
        return Load(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


COUNTERS = tuple(one.name for one in fields(Load))


@dataclass(frozen=True)
class ModelRecord:
    """What an engine says of the model it serves; the gateway validates against it."""

    name: str
    max_model_len: int
    vocab_size: int
    max_logprobs: int = 20
    has_chat_template: bool = True
    extra: dict[str, str] = field(default_factory=dict)


class RequestQueue:
    """All a gateway and an engine do to requests. Every method may raise StoreError."""

    def __init__(self, store: Store, settings: QueueSettings | None = None) -> None:
        self.store = store
        self.settings = settings or QueueSettings()
        self._submissions = Batcher(self._submit_many)

    # ------------------------------------------------------------------------------------ a gateway's side

    async def submit(self, submission: Submission) -> bool:
        """Queue a request; concurrent calls share a round trip. False where this id was already submitted.

        Raises QueueFull, LimitReached, RequestIdTaken (same id, other content), StoreError.
        """
        answer = await self._submissions(submission)
        if answer in (b"ok", b"same"):
            return answer == b"ok"
        if answer == b"taken":
            raise RequestIdTaken(submission.request_id)
        if answer.startswith(b"limit:"):
            raise self._limit_reached(submission, answer)
        s = self.settings
        limit, value = (
            ("max_waiting_requests", s.max_waiting_requests)
            if answer == b"full:requests"
            else ("max_waiting_tokens", s.max_waiting_tokens)
        )
        raise QueueFull(limit, value, s.retry_after_ms)

    def _limit_reached(self, submission: Submission, answer: bytes) -> LimitReached:
        _, name, wait = answer.decode().split(":")
        retry_after_ms = None if wait == "-1" else int(wait) or self.settings.retry_after_ms
        return LimitReached(name, getattr(submission.limits, name), retry_after_ms, submission.cost)

    async def _submit_many(self, submissions: Sequence[Submission]) -> list[bytes]:
        s = self.settings
        args: list[bytes | str | int] = [submissions[0].gateway]  # one gateway process, one name
        for one in submissions:
            body = one.request.SerializeToString(deterministic=True)
            args += (
                one.request_id,
                one.model,
                LANE_OF[one.request.lane],
                one.request.tenant,
                hashlib.blake2b(body, digest_size=16).digest(),
                body,
                one.cost,
                min(one.request.sampling.max_tokens, one.cost),
                str(s.tenant_weights.get(one.request.tenant, 1.0)),
                _ms(one.remaining_s),
                _ms(s.queue_timeout_s if one.queue_timeout_s is None else one.queue_timeout_s),
                _ms(one.grace_s),
                _ms(s.retention_s),
                s.max_waiting_requests,
                s.max_waiting_tokens,
                one.limits.packed,
                "" if one.trace is None else one.trace.packed,
            )
        answers: list[bytes] = await self.store.run("submit", *args)
        return answers

    async def cancel(self, request_id: str, reason: str = "cancelled by the client") -> bool:
        """End a request. False where it had ended already. Raises UnknownRequest."""
        answer: bytes = await self.store.run("cancel", request_id, reason)
        if answer == b"unknown":
            raise UnknownRequest(request_id)
        return answer == b"cancelled"

    async def status(self, request_id: str) -> pb.RequestStatus:
        """What is known of a request. Raises UnknownRequest."""
        names = ("model", "state", "lane", "tenant", "next", "attempts", "engine", "submitted")
        values = await self.store.command("HMGET", self.store.keys.request(request_id), *names)
        if values[0] is None:
            raise UnknownRequest(request_id)
        found = {name: value.decode() for name, value in zip(names, values, strict=True)}
        status = pb.RequestStatus(
            request_id=request_id,
            model=found["model"],
            state=PB_STATE[found["state"]],
            lane=PB_LANE[found["lane"]],
            tenant=found["tenant"],
            num_tokens=int(found["next"]),
            attempts=int(found["attempts"]),
            engine=found["engine"],
            submitted_ms=int(found["submitted"]),
        )
        if status.state == pb.DONE:
            last = await self.store.command("XREVRANGE", self.store.keys.journal(request_id), "+", "-", "COUNT", 1)
            if last:
                status.finish.CopyFrom(pb.GenerateResponse.FromString(last[0][1][1]).finish)
        return status

    # ------------------------------------------------------------------------------------ an engine's side

    async def lease(
        self, model: str, engine: str, max_requests: int, max_tokens: int = UNLIMITED, *, batch: Room | None = None
    ) -> list[Lease]:
        """Take up to `max_requests` requests, until their estimates reach `max_tokens`: interactive ones, then of the
        batch lane what also has room in `batch` (default: no limits of its own).

        Does not wait. Those handed back are taken first; also expired leases, but only where the store has been within
        reach for a whole lease_s, since while it was away nobody could renew.
        """
        s = self.settings
        batch = batch or Room()
        idle_ms = _ms(s.lease_s) if self.store.steady_for_s > s.lease_s else HANDED_BACK_MS
        limits = (max_requests, max_tokens, batch.requests, batch.tokens)
        rows = await self.store.run("lease", model, engine, *limits, s.max_attempts, idle_ms)
        return [_lease(row) for row in rows]

    async def renew(self, leases: Sequence[Lease]) -> list[Held]:
        """Keep leases for another lease_s. One answer a lease: HELD, LOST or DONE."""
        if not leases:
            return []
        args = [part for lease in leases for part in (lease.request_id, lease.epoch)]
        return [Held(answer.decode()) for answer in await self.store.run("renew", *args)]

    async def append_many(self, appends: Sequence[Append]) -> list[Held]:
        """Journal tokens of many requests in one round trip. One answer an append: OK, LOST, DONE or GAP.

        May be repeated with the same arguments after a StoreError: what is journalled already is OK again.
        Raises ValueError for an append that has neither tokens nor a finish.
        """
        if not appends:
            return []
        args: list[bytes | str | int] = []
        for one in appends:
            size = len(one.response.token_ids)
            last = one.response.HasField("finish")
            if not size and not last:
                raise ValueError("an append needs tokens or a finish: text alone would be sent twice to who resumes")
            prompt = one.response.usage.prompt_tokens
            used = prompt + one.response.offset + size if prompt else 0
            payload = one.response.SerializeToString()
            args += (one.request_id, one.epoch, one.response.offset, size, payload, int(last), used)
        return [Held(answer.decode()) for answer in await self.store.run("append", *args)]

    async def release(self, leases: Sequence[Lease], error: str = "") -> list[str]:
        """Give leases back; another engine takes them first of all, and goes on after the last journalled token.

        With an `error` the attempt counts, and after the last one the request is dead-lettered with it; without
        (an engine that drains) it does not count. Answers per lease: requeued, buried, lost, done.
        """
        if not leases:
            return []
        args = [part for lease in leases for part in (lease.request_id, lease.epoch, error)]
        answers = await self.store.run("release", self.settings.max_attempts, *args)
        return [answer.decode() for answer in answers]

    async def abandon(self, engine: str, error: str = "") -> int:
        """Give back whatever `engine` holds, for one who knows that it is dead; answers how many leases that were.

        `error` as for `release`. No engine of this name gets a lease for the next ten minutes, so that one which is
        not quite dead does not take them again: a new engine process needs a new name.
        """
        given: int = await self.store.run("abandon", engine, self.settings.max_attempts, error)
        return given

    async def load(self, model: str) -> Load:
        """Waiting and running work of one model, both lanes together."""
        return sum([await self.lane_load(model, lane) for lane in LANES], Load())

    async def lane_load(self, model: str, lane: Lane) -> Load:
        """Waiting and running work of one lane."""
        values = await self.store.command("HMGET", self.store.keys.load(model, lane), *COUNTERS)
        return Load(*(int(value or 0) for value in values))

    async def tenant_loads(self, model: str, lane: Lane, limit: int = 10) -> dict[str, Load]:
        """The tenants that are owed the most tokens in a lane, the greatest first, at most `limit`."""
        keys = self.store.keys
        tenants = await self.store.command("ZRANGE", keys.tenants(model, lane), 0, limit - 1, "REV")
        if not tenants:
            return {}
        names = [name.encode() + b" " + tenant for tenant in tenants for name in COUNTERS]
        flat = [int(value or 0) for value in await self.store.command("HMGET", keys.tenant_load(model, lane), *names)]
        size = len(COUNTERS)
        return {tenant.decode(): Load(*flat[i * size : (i + 1) * size]) for i, tenant in enumerate(tenants)}

    # ---------------------------------------------------------------------------------- models and cluster

    async def register(self, engine: str, record: ModelRecord, beat_s: float) -> None:
        """Say that `engine` serves this model, and is alive for the next `beat_s` seconds."""
        text = json.dumps(asdict(record), sort_keys=True)
        await self.store.run("register", record.name, engine, _ms(beat_s), text)

    async def unregister(self, engine: str) -> None:
        """The engine is gone; the model stays known, so that requests may wait for another engine."""
        await self.store.command("ZREM", self.store.keys.engines, engine)

    async def forget_model(self, model: str) -> None:
        """Requests for this model are refused from now on."""
        await self.store.command("HDEL", self.store.keys.models, model)

    async def models(self) -> dict[str, ModelRecord]:
        """All known models, also those that no engine serves just now."""
        flat = await self.store.command("HGETALL", self.store.keys.models)
        pairs = zip(flat[::2], flat[1::2], strict=True)
        return {name.decode(): ModelRecord(**json.loads(record)) for name, record in pairs}

    async def engines(self) -> dict[str, str]:
        """Engines whose heartbeat is fresh, with the model each serves."""
        keys = self.store.keys
        seconds, micros = await self.store.command("TIME")
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        alive = await self.store.command("ZRANGE", keys.engines, now_ms, "+inf", "BYSCORE")
        if not alive:
            return {}
        served = await self.store.command("HMGET", keys.engine_models, *alive)
        return {engine.decode(): model.decode() for engine, model in zip(alive, served, strict=True) if model}

    async def set_cluster_status(self, document: str, ttl_s: float) -> None:
        """Publish the cluster's status document (JSON) for `ttl_s` seconds."""
        await self.store.command("SET", self.store.keys.cluster, document, "PX", _ms(ttl_s))

    async def cluster_status(self) -> str:
        """The cluster's status document, empty where there is none."""
        value: bytes | None = await self.store.command("GET", self.store.keys.cluster)
        return value.decode() if value else ""

    async def set_expert_rows(self, document: str, ttl_s: float) -> None:
        """Publish how many rows each logical expert has had, as JSON."""
        await self.store.command("SET", self.store.keys.experts, document, "PX", _ms(ttl_s))

    async def expert_rows(self) -> str:
        """Rows of each logical expert as JSON, empty where nobody has said so lately."""
        value: bytes | None = await self.store.command("GET", self.store.keys.experts)
        return value.decode() if value else ""


def sampling_fields(request: pb.GenerateRequest) -> dict[str, object]:
    """The sampling fields that the client set, by vLLM's names: `SamplingParams(**sampling_fields(request))`."""
    fields: dict[str, object] = {}
    for descriptor, value in request.sampling.ListFields():
        if descriptor.name == "logit_bias":
            fields["logit_bias"] = dict(value)
        elif descriptor.is_repeated:
            fields[descriptor.name] = list(value)
        else:
            fields[descriptor.name] = value
    return fields


def _lease(row: Sequence[Any]) -> Lease:
    request_id, epoch, attempt, body, offset, remaining_ms, _, waited_ms, cost, payloads, trace = row
    pieces = [pb.GenerateResponse.FromString(payload) for payload in payloads]
    return Lease(
        request_id=request_id.decode(),
        epoch=epoch,
        attempt=attempt,
        request=pb.GenerateRequest.FromString(body),
        offset=offset,
        remaining_s=remaining_ms / 1000,
        waited_s=waited_ms / 1000,
        cost=cost,
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        text="".join(piece.text for piece in pieces),
        entries=tuple((len(piece.token_ids), len(piece.text)) for piece in pieces),
        trace=TraceContext.unpacked(trace.decode(errors="replace")),
    )


def _ms(seconds: float) -> int:
    return max(0, int(seconds * 1000))
