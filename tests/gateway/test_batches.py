"""Batches through real gateways on both servers, with engines that echo: each line has exactly one result."""

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from folkmoot.gateway.api_keys import KeyStore
from folkmoot.gateway.batch_client import AsyncBatches
from folkmoot.gateway.batch_store import BatchSettings
from folkmoot.gateway.client import AsyncClient, InvalidRequest, NotFound, PermissionDenied, RequestIdInUse
from folkmoot.gateway.demand import DEADLINE_STEP_S, Demands
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.limits import Limits
from folkmoot.gateway.pb import batches_pb2 as pb
from folkmoot.gateway.pb import batches_pb2_grpc, gateway_pb2
from folkmoot.gateway.queue import Load, QueueSettings, RequestQueue
from tests.gateway.batches import ended, expected, line, messages, progressed, rows, text_file, texts
from tests.gateway.conftest import QUICK, start_gateway, until
from tests.gateway.echo import MODEL, EchoEngine


async def nothing_is_left(queue: RequestQueue, batch_id: str) -> None:
    """No request of the batch waits, runs or is remembered, and of the batch itself only its results are kept."""
    assert await queue.load(MODEL.name) == Load()
    keys = await queue.store.command("KEYS", f"{queue.store.keys.root}:*".replace("{", "[{]").replace("}", "[}]"))
    names = {key.decode().removeprefix(f"{queue.store.keys.root}:") for key in keys}
    assert not {name for name in names if name.startswith(("request:", "journal:"))}
    mine = {name for name in names if name.startswith(f"batch:{batch_id}")}
    assert mine <= {f"batch:{batch_id}", f"batch:{batch_id}:output", f"batch:{batch_id}:errors"}
    for name in mine:
        assert await queue.store.command("PTTL", f"{queue.store.keys.root}:{name}") > 0


async def test_each_line_has_one_result(batches: AsyncBatches, roomy: EchoEngine, queue: RequestQueue) -> None:
    lines = [line(i) for i in range(500)]
    made = await batches.create(lines, batch_id="b", metadata={"for": "test"}, tenant="t")
    assert (made.id, made.total, made.tenant, dict(made.metadata)) == ("b", 500, "t", {"for": "test"})
    done = await ended(batches, "b")
    assert (done.status, done.completed, done.failed) == (pb.COMPLETED, 500, 0)
    assert texts(await rows(batches, "b")) == {f"c{i}": expected(i) for i in range(500)}
    assert await rows(batches, "b", errors=True) == []
    assert done.completion_tokens == 2000 and done.prompt_tokens == sum(len(f"p{i}") for i in range(500))
    assert done.created_ms <= done.in_progress_ms <= done.finalizing_ms <= done.ended_ms < done.expires_ms
    assert all(lease.request.lane == gateway_pb2.BATCH and lease.request.tenant == "t" for lease in roomy.leases)
    assert len({lease.request_id for lease in roomy.leases}) == 500
    await nothing_is_left(queue, "b")


async def test_the_output_has_openais_shape(batches: AsyncBatches, roomy: EchoEngine) -> None:
    chat = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 2}
    await batches.create([line(0), {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": chat}],
                         batch_id="b")  # fmt: skip
    await ended(batches, "b")
    by_id = {row["custom_id"]: row for row in await rows(batches, "b")}
    for row in by_id.values():
        assert set(row) == {"id", "custom_id", "response", "error"}
        assert set(row["response"]) == {"status_code", "request_id", "body"}
    body = by_id["x"]["response"]["body"]
    assert body["object"] == "chat.completion" and body["model"] == "echo"
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length" and choice["index"] == 0
    prompt_tokens = len(b"user:hi\n")
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens, "completion_tokens": 2, "total_tokens": prompt_tokens + 2
    }  # fmt: skip
    assert by_id["c0"]["response"]["body"]["object"] == "text_completion"


async def test_a_bad_line_goes_to_the_error_file_and_stops_nothing(batches: AsyncBatches, roomy: EchoEngine) -> None:
    bad: list[object] = [
        b'{"custom_id": "broken", ',
        b"\xff\xfe not text",
        b"[" * 100_000,
        b'{"custom_id": "nan", "body": NaN}',
        {"custom_id": "tools", **{k: v for k, v in line(0, tools=[{}]).items() if k != "custom_id"}},
        {**line(0), "custom_id": "model", "body": {"model": "other", "prompt": "x"}},
        {**line(0, temperature=-1), "custom_id": "hot"},
        {**line(0), "custom_id": "url", "url": "/v1/embeddings"},
        {**line(0, prompt=[7, 1000]), "custom_id": "vocabulary"},
    ]
    data = text_file([line(0), *bad[:4], b"", *bad[4:], line(1)])
    async with grpc.aio.insecure_channel(batches._client._addresses[0]) as channel:
        stub = batches_pb2_grpc.BatchesStub(channel)  # type: ignore[no-untyped-call]
        await stub.Create(messages(data, piece=777, batch_id="b"))
    done = await ended(batches, "b")
    assert (done.status, done.total, done.completed, done.failed) == (pb.COMPLETED, 11, 2, 9)
    assert texts(await rows(batches, "b")) == {"c0": expected(0), "c1": expected(1)}
    errors = await rows(batches, "b", errors=True)
    unread = [row for row in errors if row["response"] is None]
    assert sorted((row["custom_id"] or "", row["error"]["code"]) for row in unread) == [
        ("", "invalid_json_line"), ("", "invalid_json_line"), ("broken", "invalid_json_line"),
        ("nan", "invalid_json_line"), ("url", "invalid_url"),
    ]  # fmt: skip
    assert "line 2 " in next(row["error"]["message"] for row in unread if row["custom_id"] == "broken")
    refused = {row["custom_id"]: row["response"] for row in errors if row["response"]}
    params = {name: response["body"]["error"]["param"] for name, response in refused.items()}
    assert params == {"tools": "tools", "model": "model", "hot": "temperature", "vocabulary": "prompt"}
    assert {response["status_code"] for response in refused.values()} == {400}
    assert "0 to 999" in refused["vocabulary"]["body"]["error"]["message"]


@pytest.mark.parametrize(
    ("data", "codes"),
    [
        (b"", {"empty_file": 0}),
        (b"\n \n", {"empty_file": 0}),
        (text_file([line(0), line(1), line(0)]), {"duplicate_custom_id": 3}),
        (b"a,b\n1,2\n", {"invalid_json_line": 2}),
    ],
)
async def test_a_file_that_is_unsound_as_a_whole_fails(
    batches: AsyncBatches, roomy: EchoEngine, data: bytes, codes: dict[str, int], tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(data)
    await batches.create(tmp_path / "in.jsonl", batch_id="b")
    done = await ended(batches, "b")
    assert (done.status, done.completed, done.failed) == (pb.BATCH_FAILED, 0, 0)
    assert {error.code: error.line for error in done.errors} == codes
    assert roomy.leases == []


async def test_creating_again_changes_nothing(batches: AsyncBatches, roomy: EchoEngine) -> None:
    await batches.create([line(0)], batch_id="b")
    await ended(batches, "b")
    again = await batches.create([line(0)], batch_id="b")
    assert (again.status, again.completed) == (pb.COMPLETED, 1)
    for other in ([line(1)], [line(0), line(1)]):
        with pytest.raises(RequestIdInUse, match="'b' is already in use"):
            await batches.create(other, batch_id="b")
    with pytest.raises(RequestIdInUse):
        await batches.create([line(0)], batch_id="b", completion_window_s=60)
    assert len(roomy.leases) == 1
    keys = await roomy.holder._queue.store.command("KEYS", "*:input:*")
    assert keys == [], "an upload is left behind"


async def test_limits(store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack, roomy: EchoEngine) -> None:
    limits = BatchSettings(max_batch_lines=3, max_batch_bytes=20_000, max_line_bytes=5000)
    address = await start_gateway(stack, store_server.url, namespace, queue=QUICK, shutdown_s=0.0, batches=limits)
    batches = AsyncBatches(await stack.enter_async_context(AsyncClient(address)))
    with pytest.raises(InvalidRequest, match="max_batch_lines = 3"):
        await batches.create([line(i) for i in range(4)])
    with pytest.raises(InvalidRequest, match="max_batch_bytes = 20000"):
        await batches.create([line(0, prompt="x" * 30_000)])
    await batches.create([line(0), line(1, prompt="y" * 6000), line(2)], batch_id="b")
    await ended(batches, "b")
    assert texts(await rows(batches, "b")) == {"c0": expected(0), "c2": expected(2)}
    (row,) = await rows(batches, "b", errors=True)
    assert (row["custom_id"], row["error"]["code"]) == ("c1", "line_too_long")


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ({"batch_id": "a:b"}, "batch_id"),
        ({"batch_id": "x" * 97}, "batch_id"),
        ({"completion_window_s": -1.0}, "completion_window_s"),
        ({"completion_window_s": float("nan")}, "completion_window_s"),
        ({"completion_window_s": 1e9}, "completion_window_s: must be above 0 and at most 604800"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata: must have at most 16 keys, has 17"),
        ({"metadata": {"a": "v" * 513}}, "512"),
    ],
)
async def test_a_bad_header_is_refused(batches: AsyncBatches, header: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        await batches.create([line(0)], **header)  # type: ignore[arg-type]
    assert await batches.latest() == []


async def test_calls_that_name_nothing(batches: AsyncBatches) -> None:
    for call in (batches.get("never"), batches.cancel("never"), anext(batches.results("never"))):
        with pytest.raises(NotFound, match="'never'"):
            await call
    async with grpc.aio.insecure_channel(batches._client._addresses[0]) as channel:
        stub = batches_pb2_grpc.BatchesStub(channel)  # type: ignore[no-untyped-call]
        for wrong in (stub.Create(iter(())), stub.Create(iter([pb.CreateBatchRequest(data=b"x")])),
                      stub.Create(iter([pb.CreateBatchRequest(header=pb.BatchHeader())] * 2)),
                      stub.List(pb.ListBatchesRequest(page_size=101)),
                      stub.List(pb.ListBatchesRequest(page_token="(x"))):  # fmt: skip
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await wrong
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_pages_have_each_batch_once(batches: AsyncBatches) -> None:
    for i in range(7):
        await batches.create([line(0)], batch_id=f"b{i}", tenant="odd" if i % 2 else "even")
    async with grpc.aio.insecure_channel(batches._client._addresses[0]) as channel:
        stub = batches_pb2_grpc.BatchesStub(channel)  # type: ignore[no-untyped-call]
        for tenant, names in (("", "6543210"), ("odd", "531"), ("none", "")):
            found, token = [], ""
            while True:
                page = await stub.List(pb.ListBatchesRequest(page_size=2, page_token=token, tenant=tenant))
                found += [batch.id for batch in page.batches]
                if not (token := page.next_page_token):
                    break
            assert found == [f"b{name}" for name in names]


async def test_what_is_not_answered_in_time_expires(
    batches: AsyncBatches, queue: RequestQueue, engine: EchoEngine
) -> None:
    """One line is answered, one runs for ever, and the rest waits behind it."""
    engine.room, engine.step_s = 2, 0.0
    await batches.create([line(0)], batch_id="quick")
    await ended(batches, "quick")
    engine.step_s = 0.2
    slow = [line(0, max_tokens=1), *(line(i, max_tokens=4000) for i in range(1, 40))]
    await batches.create(slow, batch_id="b", completion_window_s=1.5)
    done = await ended(batches, "b")
    assert (done.status, done.completed, done.failed) == (pb.EXPIRED, 1, 39)
    errors = await rows(batches, "b", errors=True)
    assert sorted(row["custom_id"] for row in errors) == sorted(f"c{i}" for i in range(1, 40))
    assert {row["error"]["code"] for row in errors} == {"batch_expired"}
    assert texts(await rows(batches, "b")) == {"c0": expected(0, 1)}
    await nothing_is_left(queue, "b")


async def test_cancelling_ends_what_runs_and_keeps_what_is_done(
    batches: AsyncBatches, queue: RequestQueue, roomy: EchoEngine
) -> None:
    roomy.step_s = 0.02
    lines = [line(i, max_tokens=4 if i < 20 else 4000) for i in range(60)]
    await batches.create(lines, batch_id="b")
    await progressed(batches, "b", 20)
    assert (await batches.cancel("b")).status in (pb.CANCELLING, pb.BATCH_CANCELLED)
    done = await ended(batches, "b")
    assert (done.status, done.completed, done.failed) == (pb.BATCH_CANCELLED, 20, 40)
    assert {row["error"]["code"] for row in await rows(batches, "b", errors=True)} == {"batch_cancelled"}
    assert texts(await rows(batches, "b")) == {f"c{i}": expected(i) for i in range(20)}

    async def dropped() -> bool:
        return len(roomy.ended) >= 5 and roomy.holder.num_held == 0

    await until(dropped)  # the engine heard of it
    await nothing_is_left(queue, "b")
    assert (await batches.cancel("b")).status == pb.BATCH_CANCELLED


async def test_a_full_queue_only_slows_a_batch_down(
    store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack, queue: RequestQueue
) -> None:
    """Half of the queue's places stay free for others, all the time."""
    small = QueueSettings(lease_s=QUICK.lease_s, max_waiting_requests=16)
    address = await start_gateway(stack, store_server.url, namespace, queue=small, shutdown_s=0.0)
    batches = AsyncBatches(await stack.enter_async_context(AsyncClient(address)))
    await queue.register("engine-0", MODEL, 60.0)
    await batches.create([line(i) for i in range(60)], batch_id="b")

    async def waits() -> bool:
        return (await queue.load(MODEL.name)).waiting_requests > 0

    await until(waits)
    most = 0
    async with EchoEngine(queue, step_s=0.001, room=8):
        while (batch := await batches.get("b")).completed < 60:
            assert batch.failed == 0
            most = max(most, (await queue.load(MODEL.name)).waiting_requests)
            await asyncio.sleep(0.005)
    assert 0 < most <= 16


async def test_autoscalers_hear_of_what_is_not_queued_yet(batches: AsyncBatches, queue: RequestQueue) -> None:
    await queue.register("engine-0", MODEL, 60.0)  # a model without an engine that works
    await batches.create([line(i, max_tokens=1000) for i in range(200)], batch_id="b", completion_window_s=1000)
    demands = Demands(queue.store)

    async def owed() -> bool:
        return (await demands.read(MODEL.name)).outside > 0

    await until(owed)
    batch, demand = await batches.get("b"), await demands.read(MODEL.name)
    assert sum(one.tokens for one in demand.due) == pytest.approx(batch.estimated_tokens, rel=0.01)
    assert all(abs(one.deadline_s - batch.deadline_ms / 1000) <= DEADLINE_STEP_S for one in demand.due)
    assert 0.7 * batch.estimated_tokens < demand.outside < batch.estimated_tokens
    await batches.cancel("b")
    await ended(batches, "b")
    assert (await demands.read(MODEL.name)).due == ()


async def test_a_batch_is_forgotten_after_its_retention(
    store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack, roomy: EchoEngine
) -> None:
    short = BatchSettings(batch_retention_s=4.0)
    address = await start_gateway(stack, store_server.url, namespace, queue=QUICK, shutdown_s=0.0, batches=short)
    batches = AsyncBatches(await stack.enter_async_context(AsyncClient(address)))
    await batches.create([line(0)], batch_id="b")
    assert [batch.id for batch in await batches.latest()] == ["b"]

    async def forgotten() -> bool:
        return await batches.latest() == []

    await until(forgotten)
    with pytest.raises(NotFound):
        await batches.get("b")

    async def nothing_left() -> bool:
        keys = await roomy.holder._queue.store.command("KEYS", f"*{namespace}*")
        return not [key for key in keys if b"}:batch" in key]

    await until(nothing_left)


async def test_tenants_have_batches_and_limits_of_their_own(
    store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack, queue: RequestQueue, roomy: EchoEngine
) -> None:
    address = await start_gateway(stack, store_server.url, namespace, queue=QUICK, shutdown_s=0.0, require_keys=True)
    keys, clients = KeyStore(queue.store), {}
    for tenant, limits in (
        ("alice", Limits(concurrent_requests=5)),
        ("bob", Limits(batch_lines=3, tokens_per_minute=60)),
    ):
        _, key = await keys.create(tenant, ["batch"], limits=limits)
        clients[tenant] = AsyncBatches(await stack.enter_async_context(AsyncClient(address, api_key=key)))
    alice, bob = clients["alice"], clients["bob"]
    with pytest.raises(InvalidRequest):  # more than there may be at all: waiting does not help
        await bob.create([line(i) for i in range(4)])
    assert await bob.latest() == []
    with pytest.raises(PermissionDenied):
        await bob.create([line(0)], tenant="alice")
    await alice.create([line(i) for i in range(40)], batch_id="b")
    await bob.create([line(7), line(8, max_tokens=100)], batch_id="b")  # the same id, another name space
    assert (await ended(alice, "b")).completed == 40
    done = await ended(bob, "b")
    assert (done.id, done.tenant, done.completed, done.failed) == ("b", "bob", 1, 1)
    assert texts(await rows(alice, "b")) == {f"c{i}": expected(i) for i in range(40)}
    (answered,), (refused,) = await rows(bob, "b"), await rows(bob, "b", errors=True)
    assert (answered["custom_id"], answered["response"]["request_id"]) == ("c7", "batch:b:0")
    assert refused["response"]["status_code"] == 429 and "tokens_per_minute = 60" in json.dumps(refused)
    assert [one.id for one in await alice.latest()] == ["b"]
    assert {lease.request.tenant for lease in roomy.leases} == {"alice", "bob"}
    await alice.create([line(0)], batch_id="mine")
    for call in (bob.get("mine"), bob.cancel("mine"), anext(bob.results("mine"))):
        with pytest.raises(NotFound, match="unknown batch 'mine'"):
            await call
    with pytest.raises(PermissionDenied):
        await bob.dead_letters()
