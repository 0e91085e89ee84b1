"""What the tests of batches share: lines, uploads, and an account of what came of each line."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

from folkmoot.gateway.batch_client import ENDED, AsyncBatches
from folkmoot.gateway.pb import batches_pb2 as pb
from tests.gateway.echo import MODEL, answer, text_of


def line(i: int, **body: Any) -> dict[str, Any]:
    """A line for the echo engine, whose custom_id is c<i> and whose prompt p<i>."""
    fields = {"model": MODEL.name, "prompt": f"p{i}", "max_tokens": 4, **body}
    return {"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions", "body": fields}


def expected(i: int, size: int = 4) -> str:
    """What the echo engine answers to it."""
    return text_of(answer(list(f"p{i}".encode()), size))


def text_file(lines: Iterable[object]) -> bytes:
    """JSONL; what is bytes already stays as it is."""
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)


def messages(data: bytes, piece: int = 1 << 20, **header: Any) -> Iterator[pb.CreateBatchRequest]:
    """A Create call's."""
    yield pb.CreateBatchRequest(header=pb.BatchHeader(**header))
    for at in range(0, len(data), piece):
        yield pb.CreateBatchRequest(data=data[at : at + piece])


async def ended(batches: AsyncBatches, batch_id: str, timeout_s: float = 30.0) -> pb.Batch:
    """The batch once it has ended; fails the test where it does not."""
    batch = await batches.wait(batch_id, timeout_s)
    assert batch.status in ENDED, batch
    return batch


async def rows(batches: AsyncBatches, batch_id: str, *, errors: bool = False, **options: Any) -> list[dict[str, Any]]:
    """A result file, parsed."""
    return [json.loads(text) async for text in batches.results(batch_id, errors=errors, **options)]


def texts(answers: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The answers by custom_id; each must come once."""
    assert max(Counter(row["custom_id"] for row in answers).values(), default=1) == 1, "a line has two results"
    for row in answers:
        assert (row["error"], row["response"]["status_code"]) == (None, 200)
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in answers}


async def progressed(batches: AsyncBatches, batch_id: str, lines: int, timeout_s: float = 20.0) -> pb.Batch:
    """Poll until so many lines are answered, and not all of them."""
    async with asyncio.timeout(timeout_s):
        while (batch := await batches.get(batch_id)).completed < lines:
            await asyncio.sleep(0.02)
    assert batch.completed < batch.total, "it was over too soon for this test"
    return batch


async def as_stream(items: Iterable[Any]) -> AsyncIterator[Any]:
    """For grpc.aio."""
    for item in items:
        yield item
