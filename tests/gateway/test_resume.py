"""Nothing is lost and nothing comes twice: killed gateways and engines, zombies, second tries, the Python client."""

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack

import grpc
import pytest

from folkmoot.gateway.client import AsyncClient, Cancelled, Chunk, Client, InvalidRequest, NotFound, Unavailable
from folkmoot.gateway.client_types import build_request
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.holder import LeaseHolder
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import gateway_pb2_grpc
from folkmoot.gateway.queue import Append, Held, Lease, QueueSettings, RequestQueue
from folkmoot.gateway.server import serve
from folkmoot.gateway.settings import GatewaySettings
from tests.gateway.conftest import QUICK, GatewayProcess, token_request, until
from tests.gateway.echo import MODEL, EchoEngine, answer, text_of

StartProcess = Callable[..., GatewayProcess]


def tokens_of(chunks: list[Chunk]) -> list[int]:
    """All tokens, having checked that each chunk follows on the one before."""
    tokens: list[int] = []
    for chunk in chunks:
        assert chunk.offset == len(tokens)
        tokens += chunk.token_ids
    assert "".join(chunk.text for chunk in chunks) == text_of(tokens)
    return tokens


async def test_client_survives_a_killed_gateway(queue: RequestQueue, gateway_process: StartProcess) -> None:
    first, second = gateway_process(), gateway_process()
    async with EchoEngine(queue, step_s=0.01) as engine, AsyncClient([first.address, second.address]) as client:
        chunks = []
        async for chunk in client.generate(token_ids=[5, 6], max_tokens=100):
            chunks.append(chunk)
            if len(chunks) == 20:
                first.kill()
        assert tokens_of(chunks) == answer([5, 6], 100)
        assert chunks[-1].finish_reason == "length"
        assert (chunks[-1].prompt_tokens, chunks[-1].completion_tokens) == (2, 100)
        assert first.process.returncode == -signal.SIGKILL
        assert len(engine.leases) == 1  # it ran once


async def test_client_survives_a_restart_on_the_same_address(
    queue: RequestQueue, gateway_process: StartProcess
) -> None:
    first = gateway_process()
    async with EchoEngine(queue, step_s=0.01) as engine, AsyncClient(first.address) as client:
        chunks = []
        async for chunk in client.generate(token_ids=[5], max_tokens=60):
            chunks.append(chunk)
            if len(chunks) == 20:
                first.kill()
                gateway_process(listen=first.address)
        assert tokens_of(chunks) == answer([5], 60)
        assert len(engine.leases) == 1


async def test_gateway_that_stops_hands_its_streams_over(queue: RequestQueue, gateway_process: StartProcess) -> None:
    first, second = gateway_process("--shutdown-s", "0.1"), gateway_process()
    async with EchoEngine(queue, step_s=0.02) as engine, AsyncClient([first.address, second.address]) as client:
        chunks = []
        async for chunk in client.generate(token_ids=[5], max_tokens=60):
            chunks.append(chunk)
            if len(chunks) == 10:
                os.kill(first.process.pid, signal.SIGTERM)
        assert tokens_of(chunks) == answer([5], 60)
        assert await asyncio.to_thread(first.process.wait, 10) == 0
        assert len(engine.leases) == 1


async def test_streams_finish_within_the_grace(
    store_server: EmbeddedStore, queue: RequestQueue, namespace: str
) -> None:
    stop = asyncio.Event()
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    settings = GatewaySettings(listen="127.0.0.1:0", redis=store_server.url, namespace=namespace, queue=QUICK)
    serving = asyncio.create_task(serve(settings, stop, address.set_result))
    async with EchoEngine(queue, step_s=0.01), grpc.aio.insecure_channel(await address) as channel:
        call = gateway_pb2_grpc.FolkmootStub(channel).Generate(token_request(1, max_tokens=50))
        pieces = [await anext(aiter(call))]
        stop.set()
        pieces += [piece async for piece in call]
        assert [token for piece in pieces for token in piece.token_ids] == answer([1], 50)
        await asyncio.wait_for(serving, 5.0)


async def taken_over(engines: AsyncExitStack, queue: RequestQueue, client: AsyncClient) -> EchoEngine:
    """An engine vanishes in mid answer, and another one finishes it, which lives as long as `engines`."""
    first = EchoEngine(queue, "engine-1", step_s=0.01)
    await first.__aenter__()
    chunks = []
    async for chunk in client.generate(token_ids=[9], max_tokens=60):
        chunks.append(chunk)
        if len(chunks) == 15:
            vanish(first)
            second = await engines.enter_async_context(EchoEngine(queue, "engine-2", step_s=0.01))
    assert tokens_of(chunks) == answer([9], 60)
    return second


async def test_takeover_after_a_dead_engine(queue: RequestQueue, gateway: str) -> None:
    """The first engine vanishes without a word; the second goes on after its last token."""
    async with AsyncExitStack() as engines, AsyncClient(gateway) as client:
        second = await taken_over(engines, queue, client)
        assert 15 <= second.leases[0].offset < 60
        assert (second.leases[0].epoch, second.leases[0].attempt) == (2, 2)


def vanish(engine: EchoEngine) -> None:
    """As SIGKILL does: everything of the engine stops, nothing is given back."""
    for task in [engine._loop, *engine._running, *engine.holder._tasks]:
        task.cancel()


async def test_who_sees_an_engine_die_gives_its_requests_back_at_once(
    store_server: EmbeddedStore, queue: RequestQueue, gateway: str
) -> None:
    """No lease has run out, and one that the dead engine had lost before stays with its successor."""
    patient = RequestQueue(queue.store, QueueSettings(lease_s=3600.0))
    async with AsyncExitStack() as engines, AsyncClient(gateway) as client:
        first = EchoEngine(patient, "engine-1", step_s=0.01)
        await first.__aenter__()
        second: EchoEngine | None = None
        chunks = []
        async for chunk in client.generate(token_ids=[9], max_tokens=60):
            chunks.append(chunk)
            if len(chunks) == 15:
                vanish(first)
                second = await engines.enter_async_context(EchoEngine(patient, "engine-2", step_s=0.01))
                assert await queue.abandon("engine-1", "the engine died") == 1
            elif len(chunks) == 40:
                assert await queue.abandon("engine-1", "the engine died") == 0
        assert second is not None
        assert tokens_of(chunks) == answer([9], 60)
        assert [(lease.epoch, lease.attempt) for lease in second.leases] == [(2, 2)]
        assert list(await queue.engines()) == ["engine-2"]


async def test_what_kills_its_engines_takes_nobody_along(queue: RequestQueue) -> None:
    """One of six requests kills whoever runs it. The other five were in the same engines twice, and all end well; also
    the one whose engine dies of something else just when it is alone."""
    names = [f"r{i}" for i in range(6)]
    for name in names:
        await queue.submit(_submission(name))
    rounds: list[list[str]] = []
    while len(rounds) < 20:
        engine = f"engine-{len(rounds)}"
        leases = await queue.lease(MODEL.name, engine, 10)
        if not leases:
            break
        rounds.append([lease.request_id for lease in leases])
        if "r3" in rounds[-1] or rounds.count(["r1"]) == 1:
            await queue.abandon(engine, "segmentation fault")
        else:
            done = pb.GenerateResponse(token_ids=[1], finish=pb.Finish(reason=pb.STOP))
            await queue.append_many([Append(lease.request_id, lease.epoch, done) for lease in leases])
    assert rounds == [names, names, ["r0"], ["r1"], ["r1"], ["r2"], ["r3"], ["r3"], ["r4"], ["r5"]]
    finishes = {name: (await queue.status(name)).finish for name in names}
    assert {name for name, finish in finishes.items() if finish.reason == pb.STOP} == set(names) - {"r3"}
    assert finishes["r3"].message == "given up after 4 attempts; last: segmentation fault"
    assert len(await queue.store.command("XRANGE", queue.store.keys.dead(MODEL.name), "-", "+")) == 1


async def test_two_that_kill_their_engines_take_nobody_along(queue: RequestQueue) -> None:
    """While the first lot is on its last attempts a second one comes, with another killer: nobody is blamed for it."""
    first, second, killers = [f"r{i}" for i in range(4)], [f"s{i}" for i in range(4)], {"r1", "s2"}
    for name in first:
        await queue.submit(_submission(name))
    for i in range(40):
        engine = f"engine-{i}"
        leases = await queue.lease(MODEL.name, engine, 10)
        if i == 1:
            for name in second:
                await queue.submit(_submission(name))
        held = {lease.request_id for lease in leases}
        assert len(held & set(first)) in (0, 1, 4) and (i < 2 or not held & set(first) or len(held) == 1)
        if killers & held:
            await queue.abandon(engine, "segmentation fault")
        else:
            done = pb.GenerateResponse(token_ids=[1], finish=pb.Finish(reason=pb.STOP))
            await queue.append_many([Append(lease.request_id, lease.epoch, done) for lease in leases])
    reasons = {name: (await queue.status(name)).finish.reason for name in (*first, *second)}
    assert {name for name, reason in reasons.items() if reason != pb.STOP} == killers


async def test_what_kills_its_engine_after_some_tokens_takes_nobody_along(queue: RequestQueue) -> None:
    """Two of 40 kill their engine once all in it have journalled a token, again and again. There are two engines at any
    time, and what one leaves behind goes to the other. Nobody else is given up."""
    names, killers, tokens = [f"r{i}" for i in range(40)], {"r7", "r23"}, Counter[str]()
    for name in names:
        await queue.submit(_submission(name, max_tokens=16))
    running: dict[str, list[Lease]] = {"engine-0": [], "engine-1": []}
    deaths = 0
    for _ in range(200):
        for engine in list(running):
            leases = running[engine]
            leases += await queue.lease(MODEL.name, engine, 64 - len(leases))
            for lease in list(leases):
                name, at = lease.request_id, tokens[lease.request_id]
                step = pb.GenerateResponse(offset=at, token_ids=[at])
                if at == 15 and name not in killers:
                    step.finish.reason = pb.STOP
                    leases.remove(lease)
                assert await queue.append_many([Append(name, lease.epoch, step)]) == [Held.OK]
                tokens[name] += 1
            if killers & {lease.request_id for lease in leases}:
                await queue.abandon(engine, "segmentation fault")
                del running[engine]
                deaths += 1
                running[f"engine-{deaths + 1}"] = []
    finishes = {name: (await queue.status(name)).finish for name in names}
    assert {name for name, finish in finishes.items() if finish.reason != pb.STOP} == killers
    assert {finishes[name].message for name in killers} == {"given up after 8 attempts; last: segmentation fault"}
    assert 2 * QUICK.max_attempts <= deaths <= 2 * 2 * QUICK.max_attempts


async def test_a_trial_waits_for_suspects_and_nothing_joins_it(queue: RequestQueue) -> None:
    """What has journalled something since it was leased is none: it goes on beside."""

    async def leased(engine: str) -> list[Lease]:
        return await queue.lease(MODEL.name, engine, 9)

    async def move_on(lease: Lease) -> None:
        await queue.append_many([Append(lease.request_id, lease.epoch, pb.GenerateResponse(token_ids=[1]))])

    await queue.submit(_submission("tried"))
    await leased("a")
    await queue.abandon("a", "it died")
    await leased("b")
    await queue.submit(_submission("plain"))
    (plain,) = await leased("c")
    await queue.abandon("b", "it died")
    await queue.submit(_submission("third"))
    assert await leased("c") == [], "plain might be what kills it"
    await move_on(plain)
    (tried,) = await leased("c")
    assert (tried.request_id, tried.attempt) == ("tried", 3)
    assert await leased("c") == [], "third might be"
    await move_on(tried)
    assert [lease.request_id for lease in await leased("c")] == ["third"]


async def test_an_engine_that_was_held_up_does_not_take_over_from_itself(queue: RequestQueue, gateway: str) -> None:
    async with EchoEngine(queue, step_s=0.02) as engine, AsyncClient(gateway) as client:
        chunks = []
        async for chunk in client.generate(token_ids=[9], max_tokens=40, detach=True):
            chunks.append(chunk)
            if len(chunks) == 10:
                time.sleep(3 * QUICK.lease_s)  # nothing of this process runs, and the lease runs out
        assert tokens_of(chunks) == answer([9], 40)
        assert len(engine.leases) == 1


async def test_an_engine_that_leaves_by_an_error_says_why(queue: RequestQueue) -> None:
    await queue.submit(_submission("x"))
    for attempt in range(1, QUICK.max_attempts + 1):
        holder = await LeaseHolder(queue, f"engine-{attempt}", MODEL).__aenter__()
        (lease,) = await holder.lease(1)
        assert lease.attempt == attempt
        await holder.__aexit__(RuntimeError, RuntimeError("the core is dead"), None)
    finish = (await queue.status("x")).finish
    assert finish.message == "given up after 4 attempts; last: the engine failed: the core is dead"
    assert (await queue.load(MODEL.name)).waiting_requests == 0


async def test_zombie_cannot_write(queue: RequestQueue, engine: EchoEngine, gateway: str) -> None:
    """An engine that stalls past its lease comes back and writes: refused, in the journal and at the finish."""
    await asyncio.sleep(0)
    await queue.submit(submission := _submission("z"))
    lease = (await _leased_by(queue, engine, submission.request_id))[0]
    stale = Append(lease.request_id, lease.epoch - 1, pb.GenerateResponse(token_ids=[666], offset=0))
    closing = Append(lease.request_id, lease.epoch - 1, pb.GenerateResponse(finish=pb.Finish(reason=pb.STOP)))
    assert await queue.append_many([stale, closing]) == [Held.LOST, Held.LOST]


def _submission(request_id: str, max_tokens: int = 5):  # type: ignore[no-untyped-def]
    from folkmoot.gateway.queue import Submission

    request = token_request(1, max_tokens=max_tokens, request_id=request_id)
    return Submission(request_id, MODEL.name, request, 8, remaining_s=60.0, grace_s=0.0)


async def _leased_by(queue: RequestQueue, engine: EchoEngine, request_id: str):  # type: ignore[no-untyped-def]
    async def leased() -> bool:
        return any(lease.request_id == request_id for lease in engine.leases)

    await until(leased)
    return [lease for lease in engine.leases if lease.request_id == request_id]


async def test_second_submit_joins(gateway: str, queue: RequestQueue) -> None:
    async with EchoEngine(queue, step_s=0.02) as engine, grpc.aio.insecure_channel(gateway) as channel:
        stub = gateway_pb2_grpc.FolkmootStub(channel)
        calls = [stub.Generate(token_request(3, max_tokens=30, request_id="one"))]
        await anext(aiter(calls[0]))
        calls.append(stub.Generate(token_request(3, max_tokens=30, request_id="one")))
        late = [piece async for piece in calls[1]]
        assert [token for piece in late for token in piece.token_ids] == answer([3], 30)
        afterwards = [p async for p in stub.Generate(token_request(3, max_tokens=30, request_id="one"))]
        assert [token for piece in afterwards for token in piece.token_ids] == answer([3], 30)
        assert len(engine.leases) == 1


@pytest.mark.parametrize("offset", [0, 3, 7, 10])
async def test_follow_from_an_offset(gateway: str, engine: EchoEngine, offset: int) -> None:
    async with AsyncClient(gateway) as client:
        await client.generate_text(token_ids=[1], max_tokens=10, request_id="x")
        chunks = [chunk async for chunk in client.follow("x", offset)]
        assert [t for chunk in chunks for t in chunk.token_ids] == answer([1], 10)[offset:]
        assert chunks[-1].finish_reason == "length"


async def test_follow_sends_whole_pieces(gateway: str, queue: RequestQueue) -> None:
    async with EchoEngine(queue, chunk=4), AsyncClient(gateway) as client:
        await client.generate_text(token_ids=[1], max_tokens=10, request_id="x")
        chunks = [chunk async for chunk in client.follow("x", 6)]
        assert [(chunk.offset, len(chunk.token_ids)) for chunk in chunks] == [(4, 4), (8, 2)]


async def test_cancelling_a_follower_leaves_the_request_alone(gateway: str, queue: RequestQueue) -> None:
    async with EchoEngine(queue, step_s=0.01), AsyncClient(gateway) as client:
        chunks: list[Chunk] = []
        async for chunk in client.generate(token_ids=[1], max_tokens=40, request_id="x"):
            chunks.append(chunk)
            if len(chunks) == 3:
                async with grpc.aio.insecure_channel(gateway) as channel:
                    call = gateway_pb2_grpc.FolkmootStub(channel).Follow(pb.FollowRequest(request_id="x"))
                    await anext(aiter(call))
                    call.cancel()
        assert tokens_of(chunks) == answer([1], 40)


async def test_leaving_the_iteration_cancels(gateway: str, queue: RequestQueue) -> None:
    async with EchoEngine(queue, step_s=0.01), AsyncClient(gateway) as client:
        async for _ in client.generate(token_ids=[1], max_tokens=4000, request_id="x"):
            break

        async def cancelled() -> bool:
            return (await client.request("x")).finish.reason == pb.CANCELLED

        await until(cancelled, 0.9)  # less than the grace period


async def test_detached_request_runs_on(gateway: str, queue: RequestQueue) -> None:
    async with EchoEngine(queue, step_s=0.02), AsyncClient(gateway) as client:
        async for _ in client.generate(token_ids=[1], max_tokens=80, request_id="x", detach=True):
            break

        async def finished() -> bool:
            return (await client.request("x")).finish.reason == pb.LENGTH

        await until(finished)  # 1.6 s, more than the grace period of 1 s
        chunks = [chunk async for chunk in client.follow("x")]
        assert tokens_of(chunks) == answer([1], 80)


async def test_nobody_comes_back(gateway: str, queue: RequestQueue) -> None:
    """A dropped connection without a Cancel, as from a client that died: after the grace period the engine is freed."""
    async with EchoEngine(queue, step_s=0.01) as engine, grpc.aio.insecure_channel(gateway) as channel:
        request = token_request(1, max_tokens=4000, request_id="x", on_disconnect=pb.GRACE)
        call = gateway_pb2_grpc.FolkmootStub(channel).Generate(request)
        await anext(aiter(call))
        call.cancel()
        await asyncio.sleep(0.3)
        assert engine.holder.num_held == 1  # it runs on for a while

        async def freed() -> bool:
            return engine.holder.num_held == 0

        await until(freed, 5.0)
        status = await queue.status("x")
        assert status.finish.reason == pb.CANCELLED
        assert "did not come back" in status.finish.message


async def test_cancel_from_elsewhere(gateway: str, queue: RequestQueue) -> None:
    async with EchoEngine(queue, step_s=0.01), AsyncClient(gateway) as client:

        async def cancel_at_the_first_token() -> None:
            async for _ in client.generate(token_ids=[1], max_tokens=4000, request_id="x"):
                await client.cancel("x")

        with pytest.raises(Cancelled) as caught:
            await cancel_at_the_first_token()
        assert caught.value.request_id == "x"
        assert not await client.cancel("x")


async def test_bad_engine_ends_in_the_dead_letters(gateway: str, queue: RequestQueue) -> None:
    async with EchoEngine(queue, step_s=60.0) as engine, AsyncClient(gateway) as client:

        async def refuse() -> None:
            seen = 0
            while seen < QUICK.max_attempts:
                if len(engine.leases) > seen:
                    await engine.holder.release([engine.leases[seen]], error="CUDA error")
                    seen += 1
                await asyncio.sleep(0.01)

        refusing = asyncio.create_task(refuse())
        with pytest.raises(Exception, match=r"given up after 4 attempts; last: CUDA error"):
            await client.generate_text(token_ids=[1])
        await refusing
        dead = await queue.store.command("XRANGE", queue.store.keys.dead(MODEL.name), "-", "+")
        assert len(dead) == 1
        assert dead[0][1][3] == b"given up after 4 attempts; last: CUDA error"
        assert [lease.attempt for lease in engine.leases] == [1, 2, 3, 4]


async def test_draining_engine_hands_over(gateway: str, queue: RequestQueue) -> None:
    async with AsyncClient(gateway) as client, AsyncExitStack() as engines:
        chunks: list[Chunk] = []
        async with AsyncExitStack() as first:
            await first.enter_async_context(EchoEngine(queue, "engine-1", step_s=0.01))
            async for chunk in client.generate(token_ids=[1], max_tokens=40):
                chunks.append(chunk)
                if len(chunks) == 10:
                    await first.aclose()
                    second = await engines.enter_async_context(EchoEngine(queue, "engine-2", step_s=0.01))
        assert tokens_of(chunks) == answer([1], 40)
        assert (second.leases[0].epoch, second.leases[0].attempt) == (2, 1)  # draining is not a failed attempt


def test_sync_client(store_server: EmbeddedStore, namespace: str, gateway_process: StartProcess) -> None:
    """All calls of the blocking client, against a gateway process and an engine in another thread."""
    process = gateway_process()
    stop = threading.Event()
    engine = threading.Thread(target=_run_engine, args=(store_server.url, namespace, stop))
    engine.start()
    try:
        with Client(process.address) as client:
            poll_until_served(client)
            chunks = list(client.generate(token_ids=[1, 2], max_tokens=6, request_id="x"))
            assert tokens_of(chunks) == answer([1, 2], 6)
            assert client.generate_text("ab", max_tokens=3) == text_of(answer(list(b"ab"), 3))
            hello = [{"role": "user", "content": "hi"}]
            assert client.generate_text(messages=hello, max_tokens=2) == text_of(answer(list(b"user:hi\n"), 2))
            assert [t for c in client.follow("x", 4) for t in c.token_ids] == answer([1, 2], 6)[4:]
            assert client.request("x").state == pb.DONE
            assert [(m.name, m.num_engines) for m in client.models()] == [("echo", 1)]
            assert client.status().models[0].name == "echo"
            with pytest.raises(NotFound):
                client.cancel("never")
            with pytest.raises(InvalidRequest) as caught:
                client.generate_text("ab", top_p=2.0)
            assert caught.value.faults == (("sampling.top_p", "must be in (0, 1], is 2"),)
            with pytest.raises(TypeError, match="temprature"):
                client.generate_text("ab", temprature=0.0)
            for _ in client.generate("ab", max_tokens=4000, request_id="left"):
                break
    finally:
        stop.set()
        engine.join()


def poll_until_served(client: Client) -> None:
    for _ in range(500):
        if any(m.num_engines for m in client.models()):
            return
        threading.Event().wait(0.01)
    pytest.fail("no engine appeared")


def _run_engine(url: str, namespace: str, stop: threading.Event, step_s: float = 0.0) -> None:
    from folkmoot.gateway.store import Store

    async def run() -> None:
        store = Store(url, namespace)
        async with EchoEngine(RequestQueue(store, QUICK), step_s=step_s):
            await asyncio.to_thread(stop.wait)
        await store.close()

    asyncio.run(run())


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_sync_client_goes_on_at_another_gateway(
    store_server: EmbeddedStore, namespace: str, gateway_process: StartProcess, sig: signal.Signals
) -> None:
    first, second = gateway_process("--shutdown-s", "0.1"), gateway_process()
    stop = threading.Event()
    engine = threading.Thread(target=_run_engine, args=(store_server.url, namespace, stop, 0.02))
    engine.start()
    try:
        with Client([first.address, second.address]) as client:
            poll_until_served(client)
            chunks = []
            for chunk in client.generate(token_ids=[5, 6], max_tokens=60, request_id="x"):
                chunks.append(chunk)
                if len(chunks) == 15:
                    os.kill(first.process.pid, sig)
            assert tokens_of(chunks) == answer([5, 6], 60)
            assert client.request("x").attempts == 1
            assert first.process.wait(10) == (-signal.SIGKILL if sig == signal.SIGKILL else 0)
    finally:
        stop.set()
        engine.join()


async def test_nobody_there() -> None:
    async with AsyncClient("127.0.0.1:1", reconnect_s=0.3) as client:
        with pytest.raises(Unavailable):
            await client.generate_text("x")


def test_build_request_refuses_what_it_cannot_carry() -> None:
    with pytest.raises(InvalidRequest):
        build_request("x", None, None, 1.0, {"max_tokens": -1})
    with pytest.raises(ValueError, match="exactly one"):
        build_request("x", None, [1], 1.0, {})
