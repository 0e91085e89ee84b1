"""What the front door costs: gateway + queue + journal before an engine that answers at once.

Beside it, in the same run and in turn: the same call on a bare grpc.aio server (the same messages, no queue behind),
bare Redis streams (write, read by a group, acknowledge), and Ray Serve's own gRPC ingress. Every server is a process
of its own; the client is this one, closed loop, at 1 and at 64 calls in flight.

    python -m benchmarks.gateway [--quick] [--json FILE]
"""

import asyncio
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import grpc
import redis.asyncio as aioredis

from benchmarks.report import finish, parser, table
from folkmoot.cluster import ray_head
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.holder import LeaseHolder
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import gateway_pb2_grpc
from folkmoot.gateway.queue import ModelRecord, RequestQueue
from folkmoot.gateway.store import Store

MODEL = ModelRecord("instant", max_model_len=4096, vocab_size=32000)
REQUEST = pb.GenerateRequest(
    tokens=pb.TokenPrompt(token_ids=range(1, 33)), sampling=pb.SamplingParameters(max_tokens=8)
)
ANSWER = pb.GenerateResponse(
    token_ids=range(8),
    text="eight tokens, all of them at once",
    finish=pb.Finish(reason=pb.LENGTH),
    usage=pb.Usage(prompt_tokens=32, completion_tokens=8),
)
CONCURRENT = 64
Call = Callable[[], Awaitable[None]]


@dataclass
class Measured:
    """One subject: rates at 64 in flight, and latencies of one call alone."""

    rates: list[float] = field(default_factory=list)
    alone_ms: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def p50_ms(self) -> float:
        return statistics.median(self.alone_ms)

    @property
    def p99_ms(self) -> float:
        return statistics.quantiles(self.alone_ms, n=100)[98]


# ------------------------------------------------------------------------------------------------- servers


class BareService(gateway_pb2_grpc.FolkmootServicer):
    """The same call with nothing behind it."""

    async def Generate(self, request: pb.GenerateRequest, context: object) -> None:
        await context.write(ANSWER)  # type: ignore[attr-defined]


def bare_server(port: int, ready: Event) -> None:
    """A process: grpc.aio alone."""
    add: Callable[..., None] = gateway_pb2_grpc.add_FolkmootServicer_to_server
    serve_alone(lambda server: add(BareService(), server), port, ready)


def serve_alone(add: Callable[[grpc.aio.Server], None], port: int, ready: Event) -> None:
    """Serve, on loopback, what `add` adds to a server, until this process is ended."""

    async def run() -> None:
        server = grpc.aio.server()
        add(server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        ready.set()
        await server.wait_for_termination()

    asyncio.run(run())


def instant_engine(url: str, ready: Event) -> None:
    """A process: an engine on the real queue API that answers as soon as it has the lease."""

    async def run() -> None:
        queue = RequestQueue(Store(url))
        async with LeaseHolder(queue, "engine-1", MODEL) as holder:
            ready.set()
            while True:
                for lease in await holder.lease(4 * CONCURRENT):
                    answer = pb.GenerateResponse()
                    answer.CopyFrom(ANSWER)
                    holder.write(lease, answer)

    asyncio.run(run())


@contextmanager
def process(target: Callable[..., None], *args: object) -> Iterator[None]:
    """Run `target(*args, ready)` in a fresh process until the block is left."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    child = context.Process(target=target, args=(*args, ready), daemon=True)
    child.start()
    try:
        if not ready.wait(60):
            raise RuntimeError(f"{target.__name__} did not start")
        yield
    finally:
        child.kill()
        child.join()


@contextmanager
def gateway_process(url: str, *options: str) -> Iterator[str]:
    """A real gateway; its address."""
    command = [sys.executable, "-m", "folkmoot.gateway", "--listen", "127.0.0.1:0", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "FOLKMOOT_REDIS": url}
    ) as child:
        try:
            assert child.stdout is not None
            yield child.stdout.readline().decode().split()[-1]
        finally:
            child.kill()


@contextmanager
def ray_serve_ingress() -> Iterator[str]:
    """Ray Serve with its gRPC proxy, one replica that answers at once; the proxy's address."""
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray
    from ray import serve
    from ray.serve.config import gRPCOptions

    @serve.deployment(max_ongoing_requests=4 * CONCURRENT, ray_actor_options={"num_cpus": 0})
    class Instant:
        async def Generate(self, request: pb.GenerateRequest):  # type: ignore[no-untyped-def]
            yield ANSWER

    port = free_port()
    temp = tempfile.mkdtemp(prefix="fmr-")  # short: Ray puts unix sockets under it
    with ray_head.bare():
        ray.init(
            address="local",
            num_cpus=2,
            namespace=f"bench-{os.getpid()}",
            include_dashboard=False,
            _temp_dir=temp,
            log_to_driver=False,
        )
    try:
        added = "folkmoot.gateway.pb.gateway_pb2_grpc.add_FolkmootServicer_to_server"
        serve.start(
            http_options={"host": "127.0.0.1", "port": free_port()},
            grpc_options=gRPCOptions(port=port, grpc_servicer_functions=[added]),
        )
        serve.run(Instant.bind(), name="instant", route_prefix="/instant")  # type: ignore[attr-defined]
        yield f"127.0.0.1:{port}"
    finally:
        with suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        shutil.rmtree(temp, ignore_errors=True)


def free_port() -> int:
    """A port nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# ------------------------------------------------------------------------------------------------ measuring


def grpc_call(channel: grpc.aio.Channel) -> Call:
    """One Generate, read to its end."""
    stub = gateway_pb2_grpc.FolkmootStub(channel)  # type: ignore[no-untyped-call]

    async def call() -> None:
        size = 0
        async for piece in stub.Generate(REQUEST):
            size += len(piece.token_ids)
        if size != len(ANSWER.token_ids):
            raise RuntimeError(f"{size} tokens came back")

    return call


async def streams_call(url: str) -> Call:
    """One entry through a bare Redis stream: write, read by a consumer group, acknowledge."""
    client: Any = aioredis.Redis.from_url(url, protocol=2)
    await client.xgroup_create("bench", "g", mkstream=True)
    payload = REQUEST.SerializeToString()

    async def call() -> None:
        await client.xadd("bench", {"d": payload})
        got = await client.xreadgroup("g", "c", {"bench": ">"}, count=1)
        entry = got[0][1][0][0]
        await client.xack("bench", "g", entry)
        await client.xdel("bench", entry)

    return call


async def alone_ms(call: Call, repeats: int) -> list[float]:
    """Latencies of single calls, one after the other."""
    times = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        await call()
        times.append(1000 * (time.perf_counter() - started_s))
    return times


async def rate(call: Call, seconds: float) -> float:
    """Calls a second with CONCURRENT in flight."""
    until_s = time.perf_counter() + seconds
    done = 0

    async def worker() -> None:
        nonlocal done
        while time.perf_counter() < until_s:
            await call()
            done += 1

    started_s = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(CONCURRENT)))
    return done / (time.perf_counter() - started_s)


async def measure(calls: dict[str, Call], rounds: int, seconds: float, repeats: int) -> dict[str, Measured]:
    """All subjects in turn, `rounds` times."""
    results = {name: Measured() for name in calls}
    for call in calls.values():
        await rate(call, 0.3)  # warm
    for _ in range(rounds):
        for name, call in calls.items():
            results[name].alone_ms += await alone_ms(call, repeats)
            results[name].rates.append(await rate(call, seconds))
    return results


async def run(gateway: str, bare: str, serve: str | None, url: str, quick: bool) -> dict[str, Measured]:
    """Connect to everything and measure."""
    addresses = {"Folkmoot": gateway, "bare grpc.aio": bare, "Ray Serve gRPC": serve}
    async with asyncio.timeout(500):
        channels = {name: grpc.aio.insecure_channel(a) for name, a in addresses.items() if a is not None}
        calls = {}
        for name, channel in channels.items():
            await channel.channel_ready()
            calls[name] = grpc_call(channel)
        calls["bare Redis streams"] = await streams_call(url)
        try:
            return await measure(calls, rounds=2 if quick else 7, seconds=1.0 if quick else 2.0, repeats=60)
        finally:
            for channel in channels.values():
                await channel.close()


def main() -> None:
    """Command line."""
    options = parser(__doc__).parse_args()
    port = free_port()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = stack.enter_context(EmbeddedStore(folder / "store"))
        plain = stack.enter_context(EmbeddedStore(folder / "plain"))
        stack.enter_context(process(bare_server, port))
        stack.enter_context(process(instant_engine, store.url))
        gateway = stack.enter_context(gateway_process(store.url))
        serve = stack.enter_context(ray_serve_ingress())
        results = asyncio.run(run(gateway, f"127.0.0.1:{port}", serve, plain.url, options.quick))
    report(results, options.json)


def report(results: dict[str, Measured], path: Path | None) -> None:
    """The table and the flat figures."""
    rows = [(name, one.rate, one.p50_ms, one.p99_ms) for name, one in results.items()]
    print(table(f"Front door: {CONCURRENT} in flight, and alone", ("", "calls/s", "p50 ms", "p99 ms"), rows))
    ours, bare, serve = results["Folkmoot"], results["bare grpc.aio"], results["Ray Serve gRPC"]
    figures: dict[str, object] = {
        "added_p50_ms": ours.p50_ms - bare.p50_ms,
        "rate_ratio_to_grpc_aio": ours.rate / bare.rate,
        "rate_ratio_to_ray_serve": ours.rate / serve.rate,
        "folkmoot_calls_per_s": ours.rate,
        "folkmoot_p50_ms": ours.p50_ms,
        "folkmoot_p99_ms": ours.p99_ms,
        "grpc_aio_calls_per_s": bare.rate,
        "grpc_aio_p50_ms": bare.p50_ms,
        "ray_serve_calls_per_s": serve.rate,
        "ray_serve_p50_ms": serve.p50_ms,
        "redis_streams_entries_per_s": results["bare Redis streams"].rate,
        "concurrent": CONCURRENT,
    }
    finish(figures, path)


if __name__ == "__main__":
    main()
