"""Batches whose gateway, engine or store dies: each line still has exactly one result."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from folkmoot.gateway.batch_client import AsyncBatches
from folkmoot.gateway.batch_store import BatchLease, BatchSettings, BatchStore, Draft, Result
from folkmoot.gateway.client import AsyncClient, NotFound
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.errors import LostBatch
from folkmoot.gateway.queue import Lease, QueueSettings, RequestQueue
from tests.gateway.batches import ended, expected, line, progressed, rows, texts
from tests.gateway.conftest import GatewayProcess, start_gateway, until
from tests.gateway.echo import MODEL, EchoEngine
from tests.gateway.test_resume import vanish
from tests.gateway.test_store_failures import open_front

StartProcess = Callable[..., GatewayProcess]


async def test_another_gateway_takes_over_from_a_killed_one(queue: RequestQueue, gateway_process: StartProcess) -> None:
    first = gateway_process()
    async with EchoEngine(queue, step_s=0.05, room=40) as engine, AsyncClient(first.address) as client:
        await AsyncBatches(client).create([line(i) for i in range(300)], batch_id="b")
        before = await progressed(AsyncBatches(client), "b", 40)
        second = gateway_process()
        first.kill()
        assert first.process.returncode == -signal.SIGKILL
        async with AsyncClient(second.address) as other:
            batches = AsyncBatches(other)
            done = await ended(batches, "b")
            assert done.completed == 300 and before.completed < 300
            assert texts(await rows(batches, "b")) == {f"c{i}": expected(i) for i in range(300)}
        assert max(Counter(lease.request_id for lease in engine.leases).values()) == 1, "a line ran twice"


async def test_a_gateway_that_was_stopped_writes_nothing_twice(
    queue: RequestQueue, gateway_process: StartProcess
) -> None:
    """SIGSTOP until another one has the batch, then SIGCONT: both believe that they run it."""
    first = gateway_process()
    async with EchoEngine(queue, step_s=0.05, room=40) as engine, AsyncClient(first.address) as client:
        await AsyncBatches(client).create([line(i) for i in range(300)], batch_id="b")
        runner = (await progressed(AsyncBatches(client), "b", 40)).runner
        second = gateway_process()
        os.kill(first.process.pid, signal.SIGSTOP)
        async with AsyncClient(second.address) as other:
            batches = AsyncBatches(other)

            async def taken_over() -> bool:
                return (await batches.get("b")).runner not in (runner, "")

            await until(taken_over)
            os.kill(first.process.pid, signal.SIGCONT)
            assert (await ended(batches, "b")).completed == 300
            assert texts(await rows(batches, "b")) == {f"c{i}": expected(i) for i in range(300)}
        assert max(Counter(lease.request_id for lease in engine.leases).values()) == 1, "a line ran twice"


async def test_a_gateway_that_stops_hands_its_batches_over(
    store_server: EmbeddedStore, namespace: str, queue: RequestQueue
) -> None:
    """At once: without waiting for a lease of an hour to run out."""
    patient = QueueSettings(lease_s=3600.0)
    async with AsyncExitStack() as first, AsyncExitStack() as second, EchoEngine(queue, step_s=0.05, room=40):
        start = {"queue": patient, "shutdown_s": 0.0}
        address = await start_gateway(first, store_server.url, namespace, **start)
        async with AsyncClient(address) as client:
            await AsyncBatches(client).create([line(i) for i in range(200)], batch_id="b")
            await progressed(AsyncBatches(client), "b", 20)
        await first.aclose()
        other = await start_gateway(second, store_server.url, namespace, **start)
        async with AsyncClient(other) as client:
            assert (await ended(AsyncBatches(client), "b")).completed == 200


async def test_an_engine_dies_in_the_middle(batches: AsyncBatches, queue: RequestQueue) -> None:
    first = EchoEngine(queue, "engine-1", step_s=0.02, room=10_000)
    await first.__aenter__()
    await batches.create([line(i, max_tokens=4 + 4 * (i % 20)) for i in range(100)], batch_id="b")
    await progressed(batches, "b", 10)
    vanish(first)
    async with EchoEngine(queue, "engine-2", room=10_000) as second:
        assert (await ended(batches, "b")).completed == 100
        assert any(lease.attempt == 2 and lease.offset > 0 for lease in second.leases)
    assert texts(await rows(batches, "b")) == {f"c{i}": expected(i, 4 + 4 * (i % 20)) for i in range(100)}


async def test_the_store_dies_and_comes_back(
    mortal_server: EmbeddedStore, namespace: str, stack: AsyncExitStack
) -> None:
    front = await open_front(mortal_server, mortal_server.url, namespace, stack)
    await stack.enter_async_context(EchoEngine(front.queue, step_s=0.05, room=40))
    batches = AsyncBatches(await stack.enter_async_context(AsyncClient(front.address)))
    await batches.create([line(i) for i in range(200)], batch_id="b")
    await progressed(batches, "b", 20)
    mortal_server.kill()
    mortal_server.start()
    assert (await ended(batches, "b")).completed == 200
    assert texts(await rows(batches, "b")) == {f"c{i}": expected(i) for i in range(200)}


class Moody(EchoEngine):
    """Fails prompts that begin with "kill" as an engine does that dies of them, and aborts "abort" once."""

    async def _answer(self, lease: Lease) -> None:
        if lease.request.text.startswith("kill"):
            await self.holder.release([lease], "the engine died of it")
        elif lease.request.text == "abort" and [one.request.text for one in self.leases].count("abort") == 1:
            self.holder.fail(lease, "send it again", 10)
        else:
            await super()._answer(lease)


async def test_a_line_that_kills_its_engine_is_a_dead_letter_that_can_be_replayed(
    batches: AsyncBatches, queue: RequestQueue
) -> None:
    async with Moody(queue, room=10_000) as engine:
        await batches.create([line(0), line(1, prompt="kill"), line(2)], batch_id="b")
        assert (await ended(batches, "b")).completed == 2
        assert [lease.attempt for lease in engine.leases if lease.request.text == "kill"] == [1, 2, 3, 4]
    (row,) = await rows(batches, "b", errors=True)
    assert (row["custom_id"], row["response"]["status_code"]) == ("c1", 500)
    assert "given up after 4 attempts; last: the engine died of it" in row["response"]["body"]["error"]["message"]
    (letter,) = await batches.dead_letters()
    assert (letter.request_id, letter.attempts, letter.model) == ("batch:b:1", 4, MODEL.name)
    assert json.loads(letter.request_json)["text"] == "kill"
    async with EchoEngine(queue, "engine-2"):
        request_id = await batches.replay(letter.id)
        chunks = [chunk async for chunk in batches._client.follow(request_id)]
    assert chunks[-1].finish_reason == "length"
    assert await batches.dead_letters() == []
    with pytest.raises(NotFound):
        await batches.replay(letter.id)


async def test_a_line_that_was_aborted_is_asked_again(batches: AsyncBatches, queue: RequestQueue) -> None:
    async with Moody(queue, room=10_000) as engine:
        await batches.create([line(0, prompt="abort")], batch_id="b")
        assert (await ended(batches, "b")).completed == 1
        assert len(engine.leases) == 2


async def test_results_go_on_where_they_broke_off(queue: RequestQueue, gateway_process: StartProcess) -> None:
    """The gateway that streams them is killed, and so is the one that runs the batch, which is the same."""
    first, second = gateway_process(), gateway_process()
    async with EchoEngine(queue, step_s=0.02, room=40), AsyncClient([first.address, second.address]) as client:
        batches = AsyncBatches(client)
        await batches.create([line(i) for i in range(300)], batch_id="b")
        found = []
        async for text in batches.results("b", follow=True):
            found.append(json.loads(text))
            if len(found) == 50:
                first.kill()
        assert first.process.returncode == -signal.SIGKILL
        assert texts(found) == {f"c{i}": expected(i) for i in range(300)}
        assert await rows(batches, "b") == found
        assert await rows(batches, "b", line=123) == found[123:]
        assert await rows(batches, "b", line=300) == []


async def test_only_the_newest_lease_writes_and_the_first_result_counts(
    queue: RequestQueue, store_server: EmbeddedStore
) -> None:
    store = BatchStore(queue.store, BatchSettings(), lease_s=0.05)
    await store.create(Draft("b", None, b"d", 60.0, "", "", {}, 0, 3))
    first = await store.claim("gateway-1")
    assert first is not None

    later: list[BatchLease] = []

    async def taken_over() -> bool:
        later.extend(filter(None, [await store.claim("gateway-2")]))
        return bool(later)

    await until(taken_over)
    second = later[0]
    assert second.epoch == first.epoch + 1
    with pytest.raises(LostBatch):
        await store.write(first, [Result(0, "r0", "output", b"zombie")])
    with pytest.raises(LostBatch):
        await store.move(first, "validating", "failed")
    with pytest.raises(LostBatch):
        await store.renew(first, 0, 0)
    assert await store.write(second, [Result(0, "r0", "output", b"one"), Result(0, "r0", "errors", b"two")]) == 1
    assert await store.write(second, [Result(0, "r0", "output", b"three"), Result(2, "r2", "errors", b"four")]) == 1
    assert await store.results("b", "output", 0, 9) == [b"one\n"]
    assert await store.results("b", "errors", 0, 9) == [b"four\n"]
    batch = await store.get("b")
    assert (batch.completed, batch.failed) == (1, 1)
