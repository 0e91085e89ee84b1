"""Idle: the processor time of a whole cluster that has nothing to do, by kind of process, in percent of one core.

    idle_own_percent     our processes and the store; goal: under 2
    idle_core_percent    vLLM's engine core
    idle_ray_percent     Ray's own daemons, and what Ray does in its actors' processes

It has answered a few questions before, so that everything has been at work once.

    python -m benchmarks.idle --json idle.json
"""

import asyncio
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from benchmarks import load, report
from benchmarks.clusters import Cluster
from benchmarks.cost import cpu_s
from benchmarks.engines import prompts_of
from benchmarks.failover import made
from benchmarks.snapshot import title

SETTLE_S = 15.0
RAY = ("ray::", "/ray/", "ray_agent.py")
CORE = "VLLM::EngineCore"


def processor_s(pids: list[int]) -> dict[int, float]:
    """Seconds of processor time of each so far, of those that live."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            found[pid] = cpu_s([pid])
    return found


def main() -> None:
    """Measure and report."""
    args = report.parser(__doc__).parse_args()
    seconds, settle_s = (5.0, 3.0) if args.quick else (60.0, SETTLE_S)
    percent: defaultdict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory(prefix="fm-ck-") as name:
        model = made("tiny" if args.quick else "demo", Path(name))
        with Cluster(model, ("--max-model-len", "512", "--hosts", "2", "--replicas", "2")) as cluster:
            questions = load.greedy(prompts_of(4, 16, 500), 16)
            asyncio.run(load.record(cluster.addresses, questions, 4))
            time.sleep(settle_s)
            before, began_s = processor_s(cluster.all_pids()), time.monotonic()
            time.sleep(seconds)
            after, took_s = processor_s(cluster.all_pids()), time.monotonic() - began_s
            for pid in before.keys() & after.keys():
                percent[title(pid)] += 100 * (after[pid] - before[pid]) / took_s
    of_ray = sum(value for name, value in percent.items() if any(part in name for part in RAY))
    figures: dict[str, object] = {
        "idle_own_percent": sum(percent.values()) - of_ray - percent[CORE],
        "idle_core_percent": percent[CORE],
        "idle_ray_percent": of_ray,
    }
    rows = [[name.rpartition("/")[2], value] for name, value in sorted(percent.items(), key=lambda item: -item[1])]
    print(report.table("An idle cluster", ["process", "% of a core"], rows))
    report.finish(figures, args.json)


if __name__ == "__main__":
    main()
