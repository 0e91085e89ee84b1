"""What it costs to be observed: throughput with metrics on, and scraped every second, over off.

Side by side in one run, in turns: two gateways on one store with an engine that answers at once (answers of one piece,
and of 32, each a message), and two small clusters (vLLM, four expert hosts each). Each figure is the median of the
rounds' ratios. `--quick` leaves the clusters out. OTEL_TRACES_SAMPLER says how many traces `--traces` records: all,
unless it is set.

    python -m benchmarks.observe --json observe.json
    python -m benchmarks.observe --traces                    # "on" makes traces, too, and sends them to a collector
    python -m benchmarks.observe --picture panels.png        # what the dashboard shows of a small cluster under load
"""

import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, nullcontext
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from benchmarks.checkpoints import tiny
from benchmarks.clusters import Cluster
from benchmarks.gateway import CONCURRENT, MODEL, free_port, gateway_process, process, rate
from benchmarks.load import Load, greedy
from benchmarks.prometheus import Prometheus, find_program, picture
from benchmarks.report import finish, parser, table
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.holder import LeaseHolder
from folkmoot.gateway.metrics_server import OFF, PATH
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import gateway_pb2_grpc
from folkmoot.gateway.queue import RequestQueue
from folkmoot.gateway.store import Store

SCRAPE_EVERY_S = 1.0
PIECES = (1, 32)
CLIENTS, TOKENS = 8, 32
CLUSTER = ("--hosts", "4", "--replicas", "2", "--max-model-len", "512")
Round = Callable[[], Awaitable[float]]
Told = Callable[[], AbstractContextManager[None]]
"""told(): what is started inside is on"""


def engine(url: str, ready: Event) -> None:
    """A process: an engine that answers at once with as many pieces of one token as it is asked for."""

    async def run() -> None:
        async with LeaseHolder(RequestQueue(Store(url)), "engine-1", MODEL) as holder:
            ready.set()
            while True:
                for lease in await holder.lease(4 * CONCURRENT):
                    size = lease.request.sampling.max_tokens
                    for i in range(size):
                        piece = pb.GenerateResponse(token_ids=[i], text=" x")
                        if i == size - 1:
                            piece.finish.reason = pb.LENGTH
                            piece.usage.prompt_tokens = 32
                        holder.write(lease, piece)

    asyncio.run(run())


@asynccontextmanager
async def scraped(url: str | None) -> AsyncIterator[list[int]]:
    """This URL is read every second while the block runs; the sizes of the texts."""
    sizes: list[int] = []

    def scrape(url: str) -> int:
        with urllib.request.urlopen(url, timeout=10.0) as reply:
            return len(reply.read())

    async def go_on(url: str) -> None:
        while True:
            sizes.append(await asyncio.to_thread(scrape, url))
            await asyncio.sleep(SCRAPE_EVERY_S)

    task = asyncio.create_task(go_on(url)) if url is not None else None
    try:
        yield sizes
    finally:
        if task is not None:
            task.cancel()


async def compared(rounds: Mapping[str, tuple[str | None, Round]], times: int) -> dict[str, list[float]]:
    """Rounds of "on" and "off" in turns, the first of each pair alternating; "on" is scraped meanwhile."""
    speeds: dict[str, list[float]] = {name: [] for name in rounds}
    for i in range(times + 1):
        for name in sorted(rounds, reverse=bool(i % 2)):
            url, run = rounds[name]
            async with scraped(url) as sizes:
                speed = await run()
            if url is not None and not all(sizes):
                raise RuntimeError(f"{url} said nothing")
            if i:  # the first warms up
                speeds[name].append(speed)
    return speeds


def ratio(speeds: Mapping[str, list[float]]) -> float:
    """On over off, the median of the rounds' ratios."""
    return statistics.median(on / off for on, off in zip(speeds["on"], speeds["off"], strict=True))


# ------------------------------------------------------------------------------------------------ gateways alone


async def of_gateways(on: str, url: str, off: str, times: int, seconds: float) -> dict[int, dict[str, list[float]]]:
    """Calls a second with CONCURRENT in flight, by the number of pieces of an answer. `url`: of the metrics of `on`."""
    found = {}
    for pieces in PIECES:
        request = pb.GenerateRequest(
            tokens=pb.TokenPrompt(token_ids=range(1, 33)), sampling=pb.SamplingParameters(max_tokens=pieces)
        )
        async with grpc.aio.insecure_channel(on) as one, grpc.aio.insecure_channel(off) as other:
            rounds = {"on": (url, _round(one, request, seconds)), "off": (None, _round(other, request, seconds))}
            found[pieces] = await compared(rounds, times)
    return found


def _round(channel: grpc.aio.Channel, request: pb.GenerateRequest, seconds: float) -> Round:
    stub = gateway_pb2_grpc.FolkmootStub(channel)  # type: ignore[no-untyped-call]

    async def call() -> None:
        size = 0
        async for piece in stub.Generate(request):
            size += len(piece.token_ids)
        if size != request.sampling.max_tokens:
            raise RuntimeError(f"{size} tokens came back")

    return lambda: rate(call, seconds)


# --------------------------------------------------------------------------------------------------- clusters


async def of_clusters(on: Cluster, off: Cluster, times: int, seconds: float) -> dict[str, list[float]]:
    """Tokens a second of CLIENTS clients."""
    return await compared(
        {"on": (on.state.metrics, lambda: tokens_s(on, seconds)), "off": (None, lambda: tokens_s(off, seconds))}, times
    )


async def tokens_s(cluster: Cluster, seconds: float) -> float:
    """Tokens a second that clients get from a cluster."""
    questions = greedy([[7 + i, 8, 9, 10] for i in range(16)], TOKENS)
    async with Load(cluster.addresses, questions, CLIENTS) as load:
        await asyncio.sleep(seconds / 4)
        begin_s = time.monotonic()
        await asyncio.sleep(seconds)
        return load.tokens_between(begin_s, time.monotonic()) / (time.monotonic() - begin_s)


async def draw(cluster: Cluster, prometheus: Prometheus, seconds: float, path: Path) -> dict[str, int]:
    """The dashboard's panels over some seconds of load."""
    begin_s = time.time()
    await tokens_s(cluster, seconds)
    return picture(prometheus, begin_s, time.time(), path)


def show(path: Path, seconds: float) -> None:
    """Start a small cluster and a Prometheus, and draw the panels."""
    with tempfile.TemporaryDirectory(prefix="fm-ob-") as name, Cluster(tiny("mixtral", Path(name) / "m"), CLUSTER) as c:
        assert c.state.metrics is not None
        target = c.state.metrics.removeprefix("http://").partition("/")[0]
        with Prometheus([target], Path(name) / "prometheus") as prometheus:
            counts = asyncio.run(draw(c, prometheus, seconds, path))
    for title, number in counts.items():
        print(f"{number:3} series  {title}")
    print(f"written to {path}")


def main() -> None:
    """Command line."""
    p = parser(__doc__)
    p.add_argument("--traces", action="store_true", help="traces on, too")
    p.add_argument("--picture", type=Path, metavar="FILE", help="draw the dashboard's panels instead")
    options = p.parse_args()
    if options.picture is not None:
        if find_program("prometheus") is None:
            p.error("no prometheus is at hand (Debian: apt-get install prometheus)")
        return show(options.picture, 10.0 if options.quick else 60.0)
    times, seconds = (2, 0.7) if options.quick else (9, 3.0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fm-ob-")))
        told: Told = stack.enter_context(traces()) if options.traces else nullcontext
        found = measured_gateways(folder, told, times, seconds)
        if not options.quick:
            found["cluster"] = measured_clusters(folder, told, times, 2 * seconds)
    report(found, "metrics_and_traces" if options.traces else "metrics", options.json)


def measured_gateways(folder: Path, told: Told, times: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Both of them on one store, and the engine."""
    with ExitStack() as stack:
        store = stack.enter_context(EmbeddedStore(folder / "store"))
        stack.enter_context(process(engine, store.url))
        metrics = f"127.0.0.1:{free_port()}"
        with told():
            on = stack.enter_context(gateway_process(store.url, "--metrics", metrics))
        off = stack.enter_context(gateway_process(store.url, "--metrics", OFF))
        speeds = asyncio.run(of_gateways(on, f"http://{metrics}{PATH}", off, times, seconds))
    return {f"gateway_{pieces}": one for pieces, one in speeds.items()}


def measured_clusters(folder: Path, told: Told, times: int, seconds: float) -> dict[str, list[float]]:
    """Two alike, but for what is measured."""
    model = tiny("mixtral", folder / "model")
    with ExitStack() as stack:
        with told():
            on = stack.enter_context(Cluster(model, CLUSTER, name="on"))
        off = stack.enter_context(Cluster(model, (*CLUSTER, "--metrics", OFF), name="off"))
        return asyncio.run(of_clusters(on, off, times, seconds))


def collector(port: int, received: Any, ready: Event) -> None:
    """A process: takes spans by OTLP, and counts them."""

    class Service(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            for group in request.resource_spans:
                received.value += sum(len(scope.spans) for scope in group.scope_spans)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    ready.set()
    server.wait_for_termination()


@contextmanager
def traces() -> Iterator[Told]:
    """A collector; what is started inside a context of what this gives sends its spans there. RuntimeError at the end
    where none has come."""
    received, port = multiprocessing.get_context("spawn").Value("q", 0), free_port()

    @contextmanager
    def told() -> Iterator[None]:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{port}"
        yield
        del os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"]

    with process(collector, port, received):
        yield told
    print(f"{received.value} spans")
    if not received.value:
        raise RuntimeError("no spans came")


def report(found: Mapping[str, dict[str, list[float]]], what: str, path: Path | None) -> None:
    """The table and the flat figures."""
    rows = [(name, *(statistics.median(s[which]) for which in ("on", "off")), ratio(s)) for name, s in found.items()]
    print(table(f"{what} on over off", ("", "on, a second", "off, a second", "ratio"), rows))
    ratios = {f"{what}_on_over_off_{name}": ratio(speeds) for name, speeds in found.items()}
    finish({f"{what}_on_over_off": min(ratios.values()), **ratios}, path)


if __name__ == "__main__":
    main()
