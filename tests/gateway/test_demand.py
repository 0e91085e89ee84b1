"""What an autoscaler reads in the store, and what gateways do while one lives: on both servers."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import grpc
import pytest

from folkmoot.gateway.batch_client import AsyncBatches
from folkmoot.gateway.client import AsyncClient
from folkmoot.gateway.demand import DEADLINE_STEP_S, MOST_LOOKED_AT, Demands, Owed, Scaling
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import gateway_pb2_grpc
from folkmoot.gateway.queue import Append, QueueSettings, RequestQueue, Submission
from folkmoot.gateway.readiness import is_ready
from tests.gateway.batches import line
from tests.gateway.conftest import MODEL, start_gateway, token_request, until
from tests.gateway.echo import EchoEngine

FROM_ZERO = Scaling(MODEL.name, least=0, most=4, ready=0, wanted=1, start_s=20.0)


async def submit(
    queue: RequestQueue, name: str, cost: int, remaining_s: float = 600.0, lane: "pb.Lane" = pb.BATCH
) -> None:
    request = token_request(1, 2, 3, lane=lane, request_id=name)
    assert await queue.submit(Submission(name, MODEL.name, request, cost, remaining_s, grace_s=0.0))


async def test_owed_is_what_waits_and_what_is_leased_and_lacks(queue: RequestQueue) -> None:
    demands = Demands(queue.store)
    assert (await demands.read(MODEL.name)).due == ()
    await submit(queue, "soon", 100, remaining_s=100.0)
    await submit(queue, "late", 30, remaining_s=4000.0)
    await submit(queue, "late-too", 12, remaining_s=4000.0)
    await submit(queue, "now", 7, lane=pb.INTERACTIVE)
    now_s = time.time()
    demand = await demands.read(MODEL.name)
    due = sorted(demand.due, key=lambda one: one.deadline_s)
    assert sum(one.tokens for one in due) == 142 and due[0].tokens == 100
    assert all(e - 2 * DEADLINE_STEP_S < one.deadline_s - now_s <= e for one, e in zip(due, (100, 4000, 4000)))  # noqa: B905
    assert (demand.interactive.waiting_tokens, demand.submitted) == (7, 7)

    (now, soon) = await queue.lease(MODEL.name, "engine-1", 2)
    assert (now.request_id, soon.request_id) == ("now", "soon")
    made = pb.GenerateResponse(token_ids=[5] * 40)
    assert await queue.append_many([Append("soon", soon.epoch, made)]) == ["ok"]
    demand = await demands.read(MODEL.name)
    assert sum(one.tokens for one in demand.due) == 42 + 60, "leased work counts, with what it lacks"
    assert demand.batch.waiting_tokens == 42 and demand.interactive.running_tokens == 7
    await queue.cancel("soon")
    await queue.cancel("now")
    demand = await demands.read(MODEL.name)
    assert sum(one.tokens for one in demand.due) == 42
    assert demand.submitted == 7, "what was submitted stays so"
    assert demand.finished == 107


async def test_a_long_queue_is_looked_at_in_part_and_counted_as_a_whole(queue: RequestQueue) -> None:
    many = MOST_LOOKED_AT + 500
    queue = RequestQueue(queue.store, QueueSettings(max_waiting_requests=many))
    for begin in range(0, many, 500):
        await asyncio.gather(*(submit(queue, f"r{n}", 10) for n in range(begin, begin + 500)))
    demand = await Demands(queue.store).read(MODEL.name)
    assert sum(one.tokens for one in demand.due) == pytest.approx(10 * many)


async def test_work_outside_the_queue_is_owed_while_somebody_says_so(
    queue: RequestQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    demands = Demands(queue.store)
    deadline_s = time.time() + 3600
    await demands.owe(MODEL.name, "batch:a", 5000.0, deadline_s)
    await demands.owe(MODEL.name, "batch:b", 70.0)
    demand = await demands.read(MODEL.name)
    assert set(demand.due) == {Owed(5000.0, deadline_s), Owed(70.0, float("inf"))} and demand.outside == 5070
    await demands.owe(MODEL.name, "batch:b", 0)
    assert (await demands.read(MODEL.name)).outside == 5000
    later_s = time.time() + 61
    monkeypatch.setattr("folkmoot.gateway.demand.time.time", lambda: later_s)
    assert (await demands.read(MODEL.name)).outside == 0, "who said it is gone"
    assert await queue.store.command("EXISTS", queue.store.keys.owed(MODEL.name)) == 0


async def test_gateways_are_ready_without_an_engine_where_one_would_be_started(queue: RequestQueue) -> None:
    demands = Demands(queue.store)
    assert not await is_ready(queue)
    await demands.announce(FROM_ZERO)
    assert await demands.scaling() == FROM_ZERO
    assert await is_ready(queue)
    assert 0 < await queue.store.command("PTTL", queue.store.keys.scaling) <= 10_000
    await demands.announce(Scaling(MODEL.name, 1, 4, 0, 1, 20.0))
    assert not await is_ready(queue), "one engine ought to be there, and is not"
    await demands.announce(FROM_ZERO)
    await demands.withdraw()
    assert not await is_ready(queue)


async def test_a_request_waits_for_an_engine_to_start(
    store_server: EmbeddedStore, namespace: str, queue: RequestQueue, stack: AsyncExitStack
) -> None:
    """Its patience is as long as some starts take, and shorter where no engine would come."""
    impatient = QueueSettings(lease_s=0.6, queue_timeout_s=0.2)
    address = await start_gateway(stack, store_server.url, namespace, queue=impatient, shutdown_s=0.0)
    stub = gateway_pb2_grpc.FolkmootStub(await stack.enter_async_context(grpc.aio.insecure_channel(address)))
    async with EchoEngine(queue):
        await until(lambda: knows(queue))

    async def ends_early() -> bool:
        """Whether a request that nobody takes ends by itself within two seconds: gateways look once a second."""
        try:
            async for _ in stub.Generate(token_request(1, 2, 3, max_tokens=3), timeout=2.0):
                pass
        except grpc.aio.AioRpcError as e:
            return "no engine took the request in time" in str(e.details())
        return False

    assert await ends_early()
    await Demands(queue.store).announce(FROM_ZERO)
    await until(lambda: changed(ends_early))
    call = stub.Generate(token_request(1, 2, 3, max_tokens=3))
    async with EchoEngine(queue):
        pieces = [piece async for piece in call]
    assert sum(len(piece.token_ids) for piece in pieces) == 3


async def knows(queue: RequestQueue) -> bool:
    return MODEL.name in await queue.models()


async def changed(question: Callable[[], Awaitable[bool]]) -> bool:
    return not await question()


async def test_a_batch_owes_what_is_in_the_queue_and_what_is_not_yet(gateway: str, queue: RequestQueue) -> None:
    """A batch keeps a window of its lines in the queue; all of it is owed, also while no engine is there."""
    async with EchoEngine(queue):
        await until(lambda: knows(queue))
    async with AsyncClient(gateway) as client:
        batches = AsyncBatches(client)
        await batches.create([line(i) for i in range(2000)], batch_id="b", tenant="t")
        demands = Demands(queue.store)

        async def owed() -> float:
            return sum(one.tokens for one in (await demands.read(MODEL.name)).due)

        async def is_queued() -> bool:
            demand = await demands.read(MODEL.name)
            return demand.batch.waiting_tokens > 0 and demand.outside > 0

        await until(is_queued)
        estimated = (await batches.get("b")).estimated_tokens
        await until(lambda: is_close(owed, estimated))
        await batches.cancel("b")
        await until(lambda: is_close(owed, 0.0))


async def is_close(question: Callable[[], Awaitable[float]], value: float) -> bool:
    return await question() == pytest.approx(value, rel=0.1)
