"""The hop: what it costs to send a layer's rows to all expert hosts and get rows back, without any computing.

Beside it in the same run: a Ray actor call and a Ray compiled graph that carry the same bytes both ways, and the floor,
a memcpy of those bytes there and back. Each engine and host is a process of its own; all engines run at once. Sizes
are the bytes of all rows of one layer call, split evenly over the hosts.

    python -m benchmarks.hop --json hop.json
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from folkmoot.cluster import ray_head
from folkmoot.experts import expert_map as em
from folkmoot.experts import secret, warm
from folkmoot.experts.dispatch_config import DispatchConfig
from folkmoot.experts.dispatcher import Dispatcher
from folkmoot.experts.expert_map import ExpertMap, HostAddress
from folkmoot.experts.host import ExpertServer, HostSpec
from folkmoot.experts.warm import Control, exit_with_owner

HIDDEN = 1024  # bf16: 2 KiB a row
ROW_BYTES = HIDDEN * 2
SIZES = {"16k": 16 << 10, "256k": 256 << 10, "2.5m": 2560 << 10}
SHAPES = ((1, 1), (1, 4), (2, 4))  # engines : hosts


def host_main(spec: dict[str, Any], control: Control) -> None:
    """A host that sends rows back as they came: the hop alone."""
    torch.set_num_threads(1)
    host = HostSpec.from_dict(spec)

    def echo(x: torch.Tensor, slots: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return x if out is None else out.copy_(x)

    server = ExpertServer(host, {0: echo}, {0: len(host.experts[0])})
    address = server.listen()
    exit_with_owner(control)
    control.send({"address": asdict(address)})
    server.serve()


@contextmanager
def echo_hosts(num: int, parent: warm.WarmParent, directory: Path) -> Iterator[ExpertMap]:
    """`num` hosts with one expert each."""
    expert_map, children = em.empty([0], num), []
    try:
        for i in range(num):
            spec = {
                "host": f"h{i}",
                "incarnation": time.time_ns(),
                "checkpoint": "",
                "experts": {"0": [i]},
                "unix_path": str(directory / f"h{i}-{time.time_ns()}.sock"),
                "secret_file": str(secret.keep(directory / "secret")),
                "tcp": "127.0.0.1:0",
            }
            child = parent.spawn("benchmarks.hop:host_main", spec, directory / "hosts.log")
            children.append(child)
            ready = child.receive(30.0)
            assert ready is not None
            expert_map = em.add_host(expert_map, HostAddress(**ready["address"]), {0: [i]})
        yield expert_map
    finally:
        for child in children:
            child.kill()
            child.wait(5)
            child.control.close()


def timed(call: Callable[[], object], calls: int) -> list[float]:
    """Microseconds of each of `calls` calls, after a tenth as many to warm up."""
    for _ in range(max(3, calls // 10)):
        call()
    times = []
    for _ in range(calls):
        began = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - began) / 1e3)
    return times


def engine_main(pipe: Connection, map_path: str, transport: str, num_hosts: int, size: int, calls: int) -> None:
    """An engine's process: one token a row, spread evenly over the hosts."""
    torch.set_num_threads(1)
    secret_file = str(Path(map_path).with_name("secret"))
    config = DispatchConfig(str(os.getpid()), secret_file, map_path=map_path, transport=transport)
    dispatcher = Dispatcher(config)
    rows = max(num_hosts, size // ROW_BYTES)
    x = torch.randn((rows, HIDDEN)).to(torch.bfloat16)
    ids = (torch.arange(rows) % num_hosts).int()[:, None]
    weights = torch.ones((rows, 1))
    assert torch.equal(dispatcher.forward(0, x, weights, ids)[0], x)
    pipe.send("ready")
    pipe.recv()
    pipe.send(timed(lambda: dispatcher.forward(0, x, weights, ids), calls))
    dispatcher.close()


def measure_folkmoot(
    parent: warm.WarmParent, directory: Path, engines: int, hosts: int, size: int, transport: str, calls: int
) -> list[float]:
    """Round trips of all engines at once, microseconds."""
    context = multiprocessing.get_context("fork")
    with echo_hosts(hosts, parent, directory) as expert_map:
        path = directory / "map.json"
        path.write_text(expert_map.to_json())
        running = []
        for _ in range(engines):
            ours, theirs = context.Pipe()
            process = context.Process(target=engine_main, args=(theirs, str(path), transport, hosts, size, calls))
            process.start()
            running.append((ours, process))
        for pipe, _ in running:
            assert pipe.recv() == "ready"
        for pipe, _ in running:
            pipe.send("go")
        times = [t for pipe, _ in running for t in pipe.recv()]
        for _, process in running:
            process.join(10)
        return times


def measure_memcpy(size: int, calls: int) -> list[float]:
    """The floor: the bytes copied once there and once back."""
    source, there, back = (np.ones(size, np.uint8) for _ in range(3))

    def copy() -> None:
        there[:] = source
        back[:] = there

    return timed(copy, calls)


def measure_ray(hosts: int, size: int, calls: int) -> tuple[list[float], list[float]]:
    """Round trips of a Ray actor call, and of a Ray compiled graph, to `hosts` actors. Ray runs already."""
    import ray
    from ray.dag import InputNode, MultiOutputNode

    class Echo:
        def rows(self, x: Any) -> Any:
            return x

    actors = [ray.remote(num_cpus=0)(Echo).remote() for _ in range(hosts)]
    part = np.ones(max(1, size // hosts), np.uint8)
    by_call = timed(lambda: ray.get([a.rows.remote(part) for a in actors]), calls)
    with InputNode() as batch:
        graph = MultiOutputNode([a.rows.bind(batch) for a in actors])
    compiled = graph.experimental_compile()
    try:
        by_graph = timed(lambda: [ray.get(ref) for ref in compiled.execute(part)], calls)
    finally:
        compiled.teardown()
        for actor in actors:
            ray.kill(actor)
    return by_call, by_graph


def p(times: list[float], q: float) -> float:
    """The q-th percentile."""
    return float(np.percentile(times, q))


def run_folkmoot(directory: Path, sizes: dict[str, int], calls: int, figures: dict[str, object]) -> list[list[object]]:
    """All shapes, sizes and transports; fills `figures` and returns rows of the table."""
    rows: list[list[object]] = []
    process = warm.start(directory / "w.sock", directory / "w.log", modules=["benchmarks.hop"])
    try:
        parent = warm.connect(directory / "w.sock")
        for transport in ("shm", "tcp"):
            for engines, hosts in SHAPES:
                for name, size in sizes.items():
                    number = max(20, calls // (1 if size < 1 << 20 else 10))
                    times = measure_folkmoot(parent, directory, engines, hosts, size, transport, number)
                    rows.append([f"folkmoot {transport}", f"{engines}:{hosts}", name, p(times, 50), p(times, 99)])
                    key = f"{engines}x{hosts}_{name.replace('.', '_')}"
                    prefix = "" if transport == "shm" else "tcp_"
                    figures[f"{prefix}p50_us_{key}"] = p(times, 50)
                    figures[f"{prefix}p99_us_{key}"] = p(times, 99)
    finally:
        process.terminate()
        process.wait(10)
    return rows


def run_ray(sizes: dict[str, int], calls: int, figures: dict[str, object]) -> list[list[object]]:
    """Ray's own ways to carry the rows, one engine."""
    os.environ.setdefault("RAY_CGRAPH_get_timeout", "60")  # many processes share few cores
    import ray

    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory(prefix="fmr-") as temporary:
        with ray_head.bare():
            ray.init(
                address="local", num_cpus=2, include_dashboard=False, _temp_dir=temporary, log_to_driver=False,
                object_store_memory=200 << 20, configure_logging=False,
            )  # fmt: skip
        try:
            for hosts in (1, 4):
                for name, size in sizes.items():  # four actors of 0.6 MiB each: seconds a call
                    by_call, by_graph = measure_ray(hosts, size, max(20, calls // (1 if size < 1 << 20 else 10)))
                    for label, times in (("ray actor call", by_call), ("ray compiled graph", by_graph)):
                        rows.append([label, f"1:{hosts}", name, p(times, 50), p(times, 99)])
                    key = f"1x{hosts}_{name.replace('.', '_')}"
                    figures[f"ray_actor_p50_us_{key}"] = p(by_call, 50)
                    figures[f"ray_graph_p50_us_{key}"] = p(by_graph, 50)
        finally:
            ray.shutdown()
    return rows


def main() -> None:
    """Measure and report."""
    args = report.parser(__doc__).parse_args()
    sizes = {"16k": SIZES["16k"]} if args.quick else SIZES
    calls = 300 if args.quick else 3000
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="fm-") as name:
        rows = run_folkmoot(Path(name), sizes, calls, figures)
    for label, size in sizes.items():
        times = measure_memcpy(size, calls)
        rows.append(["memcpy (floor)", "-", label, p(times, 50), p(times, 99)])
        figures[f"memcpy_p50_us_{label.replace('.', '_')}"] = p(times, 50)
    rows += run_ray(sizes, 30 if args.quick else 200, figures)
    figures["ray_actor_over_folkmoot_1x4_16k"] = float(str(figures["ray_actor_p50_us_1x4_16k"])) / float(
        str(figures["p50_us_1x4_16k"])
    )
    print(report.table("One layer's round trip (us)", ["what", "engines:hosts", "bytes", "p50", "p99"], rows))
    report.finish(figures, args.json)


if __name__ == "__main__":
    main()
