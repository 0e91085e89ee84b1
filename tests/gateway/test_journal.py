"""What a gateway's stream that is behind asks of a real store."""

import asyncio

from folkmoot.gateway.journal import JournalReader
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import journal_pb2
from folkmoot.gateway.queue import Append, Held, RequestQueue, Submission
from tests.gateway.conftest import token_request
from tests.gateway.echo import MODEL

TOKENS, LOST = 40, 5


async def test_a_stream_that_is_behind_asks_once(queue: RequestQueue) -> None:
    """Not once for each piece that was pushed after the gap, however many have come before the first answer."""
    request = token_request(1, max_tokens=100, request_id="one")
    await queue.submit(Submission("one", MODEL.name, request, 8, remaining_s=60.0, grace_s=0.0, gateway="g"))
    (lease,) = await queue.lease(MODEL.name, "engine-1", 1)
    pieces = [pb.GenerateResponse(offset=i, token_ids=[i], text=f" {i}") for i in range(TOKENS)]
    answers = await queue.append_many([Append("one", lease.epoch, piece) for piece in pieces])
    assert answers == [Held.OK] * TOKENS
    reader = JournalReader(queue, "g")
    stream = reader.open("one")
    for piece in pieces[LOST:]:
        event = journal_pb2.Event(request_id="one", response=piece)
        reader._pushed("", journal_pb2.Batch(events=[event]).SerializeToString())
    async with asyncio.timeout(5.0):
        tokens: list[int] = []
        while len(tokens) < TOKENS:
            tokens += (await anext(stream)).token_ids
    assert tokens == list(range(TOKENS))
    await asyncio.sleep(0.1)  # whatever else was asked has its answer, too
    assert sum(queue.store.counts.took_s["follow"].counts) <= 2
