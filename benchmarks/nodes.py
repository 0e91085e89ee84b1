"""Many nodes: one cluster on two nodes against one on one node, in tokens/s and in what its clients read.

Two engines, four expert hosts with two replicas of each expert, two gateways and one store; on two nodes half of them
on each (the store on the first), so that rows between an engine and the other node's hosts go by TCP, and on one node
by shared memory. Both clusters stand at the same time, in network namespaces of their own, and are loaded in turn by
clients that begin at different gateways. All of it shares this machine's cores: what differs is the transport alone.

    ratio_two_nodes    tokens/s on two nodes over those on one, median over rounds
    tokens_different   of all answers on two nodes, from those on one, in float32

    python -m benchmarks.nodes --json nodes.json
"""

import argparse
import asyncio
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import load, report
from benchmarks.clusters import eventually
from benchmarks.engines import prompts_of
from benchmarks.failover import made
from benchmarks.load import Load
from benchmarks.netns import Node, ray_start, two_nodes
from folkmoot.gateway.embedded import find_server

HEAD, STORE, GATEWAY = "10.77.0.1:6379", ("10.77.0.1", 6400), "10.77.0.1:50051"
OPTIONS = (
    *("--dtype", "float32", "--max-model-len", "512", "--engines", "2", "--hosts", "4", "--replicas", "2"),
    *("--cpus-per-engine", "1", "--cpus-per-host", "0.4", "--address", HEAD, "--listen", GATEWAY, "--insecure"),
)
CPUS = 2
"""Ray's, a node of two: room for one engine and two hosts."""
CLIENTS, PROMPT_TOKENS, ANSWER_TOKENS, QUESTIONS = 16, 16, 32, 24
SETTLE_S = 2.0


@dataclass
class Site:
    """A cluster that is up. `first` is the node from which its clients ask."""

    first: Node
    gateways: Sequence[str]

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Run `INSIDE[what]` in the first node."""
        text = json.dumps({"what": what, "addresses": list(self.gateways), **arguments})
        answer: dict[str, Any] = json.loads(self.first.run(sys.executable, "-m", __spec__.name, "--inside", text))
        return answer


@contextmanager
def site(folder: Path, model: Path, num_nodes: int) -> Iterator[Site]:
    """The cluster on one node or on two; the second gateway is on the second node where there is one."""
    password = secrets.token_hex(16)
    with two_nodes(folder) as (one, two):
        host, port = STORE
        one.environment["PYTHONPATH"] = str(Path(__file__).parents[1])  # who enters a node begins at its root folder
        one.environment["FOLKMOOT_REDIS"] = two.environment["FOLKMOOT_REDIS"] = f"redis://:{password}@{host}:{port}"
        config = folder / "store.conf"
        config.write_text(f'bind {host}\nport {port}\nrequirepass {password}\nsave ""\ndir {folder}\n')
        one.start(str(find_server()), str(config))
        cpus = str(CPUS * 2 // num_nodes)
        ray_start(one, "--head", "--port", HEAD.partition(":")[2], "--num-cpus", cpus, "--include-dashboard", "false")
        if num_nodes == 2:
            ray_start(two, "--address", HEAD, "--num-cpus", cpus)
        up = [sys.executable, "-m", "folkmoot.cluster.cli", "up", "--detach", "--state-dir", str(folder / "state")]
        one.run(*up, "--name", "bench", "--model", str(model), *OPTIONS, timeout_s=300.0)
        last = two if num_nodes == 2 else one
        gateway = [sys.executable, "-m", "folkmoot.gateway", "--listen", f"{last.ip}:50052", "--insecure"]
        last.start(*gateway, "--namespace", "folkmoot-bench", stderr=subprocess.DEVNULL)
        made_site = Site(one, [GATEWAY, f"{last.ip}:50052"])
        eventually(lambda: made_site.ask("nodes_of")["engines"] == num_nodes, 120.0)
        yield made_site


def main() -> None:
    """Measure and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--model", choices=["demo", "tiny"], help="the demo model, or a tiny checkpoint")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(asyncio.run(_inside(**json.loads(args.inside)))))
        return
    rounds, window_s = (1, 3.0) if args.quick else (5, 15.0)
    kind = args.model or ("tiny" if args.quick else "demo")
    with tempfile.TemporaryDirectory(prefix="fm-") as name:
        folders = [Path(name) / place for place in ("model", "near", "far")]
        for folder in folders:
            folder.mkdir()
        model = made(kind, folders[0])
        with site(folders[1], model, 1) as near, site(folders[2], model, 2) as far:
            places = far.ask("nodes_of")
            owed = near.ask("record")["answers"]
            differing = [far.ask("record")["answers"]]
            speeds: dict[str, list[float]] = {"near": [], "far": []}
            for _ in range(rounds):
                for key, one in (("near", near), ("far", far)):
                    speeds[key].append(one.ask("speed", window_s=window_s)["tokens_s"])
            differing.append(far.ask("record")["answers"])
    figures = _report(kind, speeds, owed, differing)
    figures |= {"nodes_with_engines": places["engines"], "nodes_with_hosts": places["hosts"]}
    report.finish(figures, args.json)
    sys.exit(bool(figures["tokens_different"]))


def _report(
    kind: str, speeds: dict[str, list[float]], owed: dict[str, list[int]], differing: list[dict[str, list[int]]]
) -> dict[str, object]:
    """Print the table; the flat figures."""
    ratios = [b / a for a, b in zip(speeds["near"], speeds["far"], strict=True)]
    rows = [[i + 1, *pair, ratio] for i, (*pair, ratio) in enumerate(zip(*speeds.values(), ratios, strict=True))]
    print(report.table(f"Tokens/s, {kind} model, float32", ["round", "one node", "two nodes", "ratio"], rows))
    return {
        "ratio_two_nodes": statistics.median(ratios),
        "ratio_two_nodes_least": min(ratios),
        "ratio_two_nodes_most": max(ratios),
        "tokens_s_one_node": statistics.median(speeds["near"]),
        "tokens_s_two_nodes": statistics.median(speeds["far"]),
        "tokens_different": sum(_different(owed, answers) for answers in differing),
        "tokens_compared": sum(len(tokens) for answers in differing for tokens in answers.values()),
    }


def _different(owed: dict[str, list[int]], answers: dict[str, list[int]]) -> int:
    pairs = [(owed[key], answers[key]) for key in owed]
    return sum(abs(len(a) - len(b)) + sum(x != y for x, y in zip(a, b, strict=False)) for a, b in pairs)


async def _inside(what: str, addresses: list[str], window_s: float = 0.0) -> dict[str, Any]:
    """In a node's namespace, where its addresses are. `nodes_of` is on how many nodes there are engines and hosts."""
    questions = load.greedy(prompts_of(QUESTIONS, PROMPT_TOKENS, 500), ANSWER_TOKENS)
    if what == "record":
        return {"answers": await load.record(addresses, questions, CLIENTS)}
    if what == "nodes_of":
        from folkmoot.gateway.client import AsyncClient

        async with AsyncClient(addresses) as client:
            status = json.loads((await client.status()).json or "{}")
        return {kind: len({one["node"] for one in status.get(kind, [])}) for kind in ("engines", "hosts")}
    async with Load(addresses, questions, CLIENTS) as steady:
        await asyncio.sleep(SETTLE_S)
        began_s = time.monotonic()
        await asyncio.sleep(window_s)
        until_s = time.monotonic()
    return {"tokens_s": steady.tokens_between(began_s, until_s) / (until_s - began_s)}


if __name__ == "__main__":
    main()
