"""Batches in the store: one method is one step of their state machine (batch_scripts.py), one round trip.

Input lies there in compressed blocks, results line by line, so that nobody ever has to hold a whole batch in memory.
"""

import json
import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from folkmoot.gateway.errors import BatchIdTaken, LostBatch, UnknownBatch
from folkmoot.gateway.limits import NO_LIMITS, Limits
from folkmoot.gateway.pb import batch_input_pb2, gateway_pb2
from folkmoot.gateway.pb import batches_pb2 as pb
from folkmoot.gateway.store import Store
from folkmoot.gateway.tracing import TraceContext

File = Literal["output", "errors"]
Answer = list[gateway_pb2.GenerateResponse]

STATUSES: dict[str, "pb.BatchStatus"] = {
    "validating": pb.VALIDATING,
    "failed": pb.BATCH_FAILED,
    "in_progress": pb.IN_PROGRESS,
    "finalizing": pb.FINALIZING,
    "completed": pb.COMPLETED,
    "expired": pb.EXPIRED,
    "cancelling": pb.CANCELLING,
    "cancelled": pb.BATCH_CANCELLED,
}
ENDED = frozenset({pb.BATCH_FAILED, pb.COMPLETED, pb.EXPIRED, pb.BATCH_CANCELLED})
UPLOAD_TTL_S = 3600
"""An upload that makes no progress for so long is forgotten."""
COLLECT_BYTES = 4 << 20


@dataclass(frozen=True)
class BatchSettings:
    """What gateways of one deployment should agree on about batches."""

    max_batch_lines: int = 50_000
    max_batch_bytes: int = 200_000_000
    max_line_bytes: int = 1 << 20  # a longer line goes to the error file
    max_completion_window_s: float = 7 * 86_400.0
    batch_retention_s: float = 7 * 86_400.0  # a batch and its results are kept for so long after its end
    batch_window_tokens: int = 32_768  # of each batch in the queue, estimated, or twice what engines run of its model
    max_running_batches: int = 64  # of one gateway; others wait


@dataclass(frozen=True)
class Draft:
    """A batch that is about to be created. `upload` names its blocks; None: there is no line."""

    batch_id: str
    upload: str | None
    digest: bytes
    window_s: float
    endpoint: str
    tenant: str
    metadata: dict[str, str]
    input_bytes: int
    total: int
    limits: Limits = NO_LIMITS
    """of its tenant, when it was created"""
    trace: TraceContext | None = None
    """the call that created it; no part of its identity"""


@dataclass(frozen=True)
class BatchLease:
    """The right to run a batch: only the newest epoch may write."""

    batch_id: str
    epoch: int


@dataclass(frozen=True)
class Result:
    """The one result of a line. `request_id`: the request that made it, or would have."""

    index: int
    request_id: str
    file: File
    text: bytes
    prompt_tokens: int = 0
    completion_tokens: int = 0


class BatchStore:
    """All that gateways do to batches. Every method may raise StoreError; those with a lease, LostBatch."""

    def __init__(self, store: Store, settings: BatchSettings, lease_s: float) -> None:
        self.store = store
        self.settings = settings
        self.lease_s = lease_s

    # ------------------------------------------------------------------------------------ for those who ask

    async def put_block(self, batch_id: str, upload: str, number: int, block: batch_input_pb2.InputBlock) -> None:
        """A part of a file that is being uploaded."""
        key = self.store.keys.batch_part(batch_id, f"input:{upload}")
        await self.store.command("HSET", key, number, zlib.compress(block.SerializeToString(), 3))
        await self.store.command("EXPIRE", key, UPLOAD_TTL_S)

    async def drop_upload(self, batch_id: str, upload: str) -> None:
        """An upload came to nothing."""
        await self.store.command("UNLINK", self.store.keys.batch_part(batch_id, f"input:{upload}"))

    async def create(self, draft: Draft) -> None:
        """The batch exists from now on, and gateways look for it. Raises BatchIdTaken (same id, other content)."""
        fields: dict[str, str | int] = {
            "endpoint": draft.endpoint,
            "tenant": draft.tenant,
            "metadata": json.dumps(draft.metadata),
            "input_bytes": draft.input_bytes,
            "total": draft.total,
            "limits": json.dumps(draft.limits.given()),
            "trace": "" if draft.trace is None else draft.trace.packed,
        }
        flat = [part for pair in fields.items() for part in pair]
        times = (_ms(draft.window_s), _ms(self.settings.batch_retention_s))
        answer = await self.store.run("batch_create", draft.batch_id, draft.upload or "", draft.digest, *times, *flat)
        if answer == b"taken":
            raise BatchIdTaken(draft.batch_id)

    async def get(self, batch_id: str) -> pb.Batch:
        """Raises UnknownBatch."""
        flat = await self.store.command("HGETALL", self.store.keys.batch(batch_id))
        if not flat:
            raise UnknownBatch(batch_id)
        return _batch(
            batch_id, {k.decode(): v.decode(errors="replace") for k, v in zip(flat[::2], flat[1::2], strict=True)}
        )

    async def page(self, tenant: str, before: str, size: int) -> tuple[list[pb.Batch], str]:
        """A page of batches, the newest first, and where the next one begins ('' = nowhere)."""
        ids, after = await self.store.run("batch_list", tenant, before, size)
        found = []
        for batch_id in ids:
            try:
                found.append(await self.get(batch_id.decode()))
            except UnknownBatch:  # it expired just now
                continue
        return found, after.decode()

    async def cancel(self, batch_id: str) -> None:
        """Raises UnknownBatch."""
        if await self.store.run("batch_cancel", batch_id) is None:
            raise UnknownBatch(batch_id)

    async def results(self, batch_id: str, file: File, first: int, most: int) -> list[bytes]:
        """Up to `most` lines of a result file from number `first` on, each with its end; none where there are no more
        yet."""
        key = self.store.keys.batch_part(batch_id, file)
        found = await self.store.command("XRANGE", key, f"{first}-1", "+", "COUNT", most)
        return [zlib.decompress(item[1][1]) for item in found]

    # ------------------------------------------------------------------------------------ for the one who runs it

    async def claim(self, gateway: str) -> BatchLease | None:
        """A batch that nobody runs, if there is one."""
        answer = await self.store.run("batch_claim", gateway, _ms(self.lease_s))
        return None if answer is None else BatchLease(answer[0].decode(), answer[1])

    async def renew(self, lease: BatchLease, lines_per_s: float, tokens_per_s: float) -> tuple[str, float]:
        """The status, and how many seconds are left until the deadline."""
        args = (_ms(self.lease_s), f"{lines_per_s:.3f}", f"{tokens_per_s:.3f}")
        answer = await self._held("batch_renew", lease, *args)
        return answer[0].decode(), answer[1] / 1000

    async def leave(self, lease: BatchLease) -> None:
        """Another gateway may take it at once."""
        await self._held("batch_renew", lease, 0, 0, 0)

    async def move(self, lease: BatchLease, come_from: str, to: str, **fields: str | int) -> str:
        """To another status, where it is in one of `come_from`; the status that it has then."""
        flat = [part for pair in fields.items() for part in pair]
        answer: bytes = await self._held("batch_move", lease, come_from, to, *flat)
        return answer.decode()

    async def limits(self, lease: BatchLease) -> Limits:
        """Which its requests have to keep."""
        found: bytes = await self.store.command("HGET", self.store.keys.batch(lease.batch_id), "limits")
        return Limits(**json.loads(found))

    async def trace(self, lease: BatchLease) -> TraceContext | None:
        """The call that created it."""
        found: bytes | None = await self.store.command("HGET", self.store.keys.batch(lease.batch_id), "trace")
        return TraceContext.unpacked(found.decode(errors="replace")) if found else None

    async def estimates(self, lease: BatchLease) -> dict[str, int]:
        """Estimated tokens by model; nothing before the file was validated."""
        found: bytes | None = await self.store.command("HGET", self.store.keys.batch(lease.batch_id), "estimates")
        return dict(json.loads(found)) if found else {}

    async def outcome(self, lease: BatchLease) -> str:
        """How a batch that is finalizing ends: completed or expired."""
        found: bytes = await self.store.command("HGET", self.store.keys.batch(lease.batch_id), "outcome")
        return found.decode()

    async def blocks(self, lease: BatchLease) -> AsyncIterator[batch_input_pb2.InputBlock]:
        """The input, block by block."""
        key, number = self.store.keys.batch_part(lease.batch_id, "input"), 0
        while (packed := await self.store.command("HGET", key, number)) is not None:
            yield batch_input_pb2.InputBlock.FromString(zlib.decompress(packed))
            number += 1

    async def done(self, lease: BatchLease) -> bytes:
        """Bitmap of the lines that have their result: bit 7 of byte 0 is line 0."""
        found: bytes | None = await self.store.command("GET", self.store.keys.batch_part(lease.batch_id, "done"))
        return found or b""

    async def write(self, lease: BatchLease, results: Sequence[Result]) -> int:
        """Results of lines, and their requests are forgotten; how many of them were the first of their line."""
        args: list[bytes | str | int] = []
        for one in results:
            packed = zlib.compress(one.text + b"\n", 1)
            args += (one.index, one.request_id, one.file, packed, one.prompt_tokens, one.completion_tokens)
        news: int = await self._held("batch_write", lease, *args)
        return news

    async def collect(self, request_ids: Sequence[str], *, look: bool) -> AsyncIterator[tuple[int, Answer | None]]:
        """Those of these requests that have ended: their indices, with their whole answers; None: the store knows no
        such request. `look`: end those past their deadline."""
        first = 0
        while first < len(request_ids):
            seen, rows = await self.store.run("batch_collect", COLLECT_BYTES, int(look), *request_ids[first:])
            for i, payloads in rows:
                parse = gateway_pb2.GenerateResponse.FromString
                yield first + i, None if payloads is None else [parse(payload) for payload in payloads]
            first += seen

    async def again(self, lease: BatchLease, index: int, request_id: str) -> int:
        """Forget a request that is to be asked anew; how often that has happened to its line."""
        times: int = await self._held("batch_again", lease, index, request_id)
        return times

    async def _held(self, script: str, lease: BatchLease, *args: bytes | str | int) -> Any:
        answer = await self.store.run(script, lease.batch_id, lease.epoch, *args)
        if answer is None:
            raise LostBatch(lease.batch_id)
        return answer


def _batch(batch_id: str, f: dict[str, str]) -> pb.Batch:
    """From the record's fields."""
    number = {name: int(value) for name, value in f.items() if value.isascii() and value.isdigit()}
    batch = pb.Batch(
        id=batch_id,
        status=STATUSES[f["status"]],
        tenant=f["tenant"],
        endpoint=f["endpoint"],
        metadata=json.loads(f["metadata"]),
        completion_window_s=number["window"] / 1000,
        input_bytes=number["input_bytes"],
        total=number["total"],
        completed=number.get("output", 0),
        failed=number.get("errors", 0),
        errors=[pb.BatchError(**fault) for fault in json.loads(f.get("faults", "[]"))],
        created_ms=number["created"],
        deadline_ms=number["deadline"],
        in_progress_ms=number.get("in_progress_at", 0),
        finalizing_ms=number.get("finalizing_at", 0),
        cancelling_ms=number.get("cancelling_at", 0),
        ended_ms=number.get("ended", 0),
        expires_ms=number.get("expires", 0),
        prompt_tokens=number.get("prompt_tokens", 0),
        completion_tokens=number.get("completion_tokens", 0),
        estimated_tokens=number.get("estimated", 0),
        runner=f.get("runner", ""),
    )
    if batch.status not in ENDED:
        batch.tokens_per_s = float(f.get("rate_tokens", 0))
        if (lines_per_s := float(f.get("rate_lines", 0))) > 0:
            batch.eta_s = (batch.total - batch.completed - batch.failed) / lines_per_s
    return batch


def _ms(seconds: float) -> int:
    return max(0, int(seconds * 1000))
