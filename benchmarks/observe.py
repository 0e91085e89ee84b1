"""What it costs to be observed: throughput with metrics on, and scraped every second, over off; and with traces too.

Side by side in one run, in turns: four gateways on one store with an engine that answers at once (answers of one
piece, and of 32, each a message), and three clusters of the demo model (vLLM, four expert hosts each), started three
times. Traces are sampled as by default; those of the fourth gateway, all. They go to a collector that drops them, on
the same cores. Each figure is the median of the rounds' ratios. `--quick` leaves the clusters out.

    python -m benchmarks.observe --json observe.json
    python -m benchmarks.observe --only clusters --model tiny   # whose steps are as short as steps can be
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
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import grpc

from benchmarks.clusters import Cluster
from benchmarks.gateway import CONCURRENT, MODEL, free_port, gateway_process, process, rate, serve_alone
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
TRACES: dict[str, dict[str, str]] = {"both": {}, "all": {"OTEL_TRACES_SAMPLER_ARG": "1"}}
"""The subjects that have traces, and what they are told about them."""
CLUSTERS = ("off", "metrics", "both")
STARTS = 3
GATEWAYS = (*CLUSTERS, "all")
"""The subjects; all but the first have metrics."""
KEYS = {
    "metrics_on_over_off": "metrics",
    "metrics_and_traces_on_over_off": "both",
    "metrics_and_all_traces_on_over_off": "all",
}

Round = Callable[[], Awaitable[float]]
Speeds = dict[str, list[float]]
Gateway = tuple[str, str | None]
"""A gateway's address, and the URL of its metrics; None: it has none."""


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


async def compared(subjects: Mapping[str, tuple[str | None, Round]], times: int) -> Speeds:
    """Rounds in turns, each time in another order; who has a URL is scraped meanwhile."""
    speeds: Speeds = {name: [] for name in subjects}
    names = list(subjects)
    for i in range(times + 1):
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            url, run = subjects[name]
            async with scraped(url) as sizes:
                speed = await run()
            if url is not None and not all(sizes):
                raise RuntimeError(f"{url} said nothing")
            if i:  # the first warms up
                speeds[name].append(speed)
    return speeds


def ratio(speeds: Speeds, name: str) -> float:
    """Over off, the median of the rounds' ratios."""
    return statistics.median(on / off for on, off in zip(speeds[name], speeds["off"], strict=True))


def collector(port: int, received: Any, ready: Event) -> None:
    """A process: takes traces by OTLP, counts their spans, and drops them."""
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

    class Dropping(trace_service_pb2_grpc.TraceServiceServicer):
        async def Export(self, request: Any, context: object) -> object:
            scopes = (scope for group in request.resource_spans for scope in group.scope_spans)
            received.value += sum(len(scope.spans) for scope in scopes)
            return trace_service_pb2.ExportTraceServiceResponse()

    add: Callable[..., None] = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    serve_alone(lambda server: add(Dropping(), server), port, ready)


@contextmanager
def told(subject: str, endpoint: str) -> Iterator[None]:
    """What is started within has heard of OpenTelemetry only what this subject ought to."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OTEL_")}
    if subject in TRACES:
        os.environ |= {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **TRACES[subject]}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("OTEL_")]:
            del os.environ[name]
        os.environ |= before


# ------------------------------------------------------------------------------------------------ gateways alone


async def of_gateways(gateways: Mapping[str, Gateway], times: int, seconds: float) -> dict[str, Speeds]:
    """Calls a second with CONCURRENT in flight, by the number of pieces of an answer."""
    found = {}
    async with AsyncExitStack() as stack:
        channels = {
            name: await stack.enter_async_context(grpc.aio.insecure_channel(address))
            for name, (address, _) in gateways.items()
        }
        for pieces in PIECES:
            request = pb.GenerateRequest(
                tokens=pb.TokenPrompt(token_ids=range(1, 33)), sampling=pb.SamplingParameters(max_tokens=pieces)
            )
            subjects = {n: (url, _round(channels[n], request, seconds)) for n, (_, url) in gateways.items()}
            found[f"gateway_{pieces}"] = await compared(subjects, times)
    return found


@contextmanager
def four_gateways(endpoint: str) -> Iterator[dict[str, Gateway]]:
    """On one store, with one engine behind."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fm-ob-")))
        store = stack.enter_context(EmbeddedStore(folder / "store"))
        stack.enter_context(process(engine, store.url))
        gateways: dict[str, Gateway] = {}
        for name in GATEWAYS:
            metrics = OFF if name == "off" else f"127.0.0.1:{free_port()}"
            with told(name, endpoint):
                address = stack.enter_context(gateway_process(store.url, "--metrics", metrics))
            gateways[name] = address, None if metrics == OFF else f"http://{metrics}{PATH}"
        yield gateways


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


async def of_clusters(clusters: Mapping[str, Cluster], times: int, seconds: float) -> Speeds:
    """Tokens a second of CLIENTS clients."""

    def round_of(cluster: Cluster) -> Round:
        return lambda: tokens_s(cluster, seconds)

    return await compared({name: (one.state.metrics, round_of(one)) for name, one in clusters.items()}, times)


@contextmanager
def three_clusters(name_of_model: str, endpoint: str, turn: int) -> Iterator[dict[str, Cluster]]:
    """Of one model, started one after the other, another one first in each turn."""
    from benchmarks.failover import made  # it brings torch, which the processes that are measured do without

    with ExitStack() as stack:
        model = made(name_of_model, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fm-ob-"))))
        clusters = {}
        for name in (*CLUSTERS[turn % len(CLUSTERS) :], *CLUSTERS[: turn % len(CLUSTERS)]):
            options = (*CLUSTER, "--metrics", OFF if name == "off" else "127.0.0.1:0")
            with told(name, endpoint):
                clusters[name] = stack.enter_context(Cluster(model, options, name=name))
        yield clusters


def of_several_starts(model: str, endpoint: str, times: int, seconds: float) -> Speeds:
    """All rounds of all starts, since two clusters that are told the same differ by percents, from start to end."""
    total: Speeds = {name: [] for name in CLUSTERS}
    for turn in range(STARTS):
        with three_clusters(model, endpoint, turn) as clusters:
            speeds = asyncio.run(of_clusters(clusters, times, seconds))
        total = {name: [*total[name], *speeds[name]] for name in CLUSTERS}
        ratios = ", ".join(f"{name} {ratio(speeds, name):.3f}" for name in CLUSTERS[1:])
        print(f"clusters, start {turn + 1} of {STARTS}, over off: {ratios}", flush=True)
    return total


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
    from benchmarks.checkpoints import tiny

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
    p.add_argument("--picture", type=Path, metavar="FILE", help="draw the dashboard's panels instead")
    p.add_argument("--only", choices=["gateways", "clusters"], help="one of both")
    p.add_argument("--model", choices=["demo", "tiny"], default="demo", help="of the clusters  [default: demo]")
    options = p.parse_args()
    if options.picture is not None:
        if find_program("prometheus") is None:
            p.error("no prometheus is at hand (Debian: apt-get install prometheus)")
        return show(options.picture, 10.0 if options.quick else 60.0)
    times, seconds = (2, 0.4) if options.quick else (12, 1.5)
    port, spans = free_port(), multiprocessing.get_context("spawn").Value("q", 0)
    with process(collector, port, spans):
        endpoint = f"http://127.0.0.1:{port}"
        found: dict[str, Speeds] = {}
        if options.only != "clusters":
            with four_gateways(endpoint) as gateways:
                found = asyncio.run(of_gateways(gateways, times, seconds))
        if options.only == "clusters" or not (options.quick or options.only):
            found["cluster"] = of_several_starts(options.model, endpoint, times // 2, 2 * seconds)
    if not spans.value:
        raise RuntimeError("no span has come")
    report(found, spans.value, options.json)


def report(found: Mapping[str, Speeds], spans: int, path: Path | None) -> None:
    """The table and the flat figures."""
    rows = [
        (name, *(statistics.median(speeds[which]) if which in speeds else "" for which in GATEWAYS),
         *(ratio(speeds, which) if which in speeds else "" for which in GATEWAYS[1:]))
        for name, speeds in found.items()
    ]  # fmt: skip
    header = ("a second", "off", "metrics", "traces too", "all traces", "metrics / off", "traces / off", "all / off")
    print(table("Throughput, observed", header, rows))
    figures: dict[str, object] = {"spans": spans}
    for key, which in KEYS.items():
        ratios = {name: ratio(speeds, which) for name, speeds in found.items() if which in speeds}
        if not ratios:
            continue
        figures |= {key: min(ratios.values()), **{f"{key}_{name}": value for name, value in ratios.items()}}
    finish(figures, path)


if __name__ == "__main__":
    main()
