"""A real Ray cluster over two network namespaces. The link is taken down, or everything of one node killed, in the
middle of an answer.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import netns
from benchmarks.netns import Node, link_up, ray_start
from folkmoot.experts import secret
from tests.cluster.conftest import FLOAT32, eventually

pytestmark = pytest.mark.slow

CLIENT = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from folkmoot.gateway.client import Client
with Client(sys.argv[1]) as client:
    options = {"temperature": 0.0, "max_tokens": int(sys.argv[2]), "ignore_eos": True}
    def ask(prompt):
        for chunk in client.generate(prompt, **options):
            sys.stdout.write(json.dumps([time.monotonic(), prompt, list(chunk.token_ids)]) + "\\n")
            sys.stdout.flush()
    prompts = sys.argv[3:]
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(ask, prompts))
"""
STATUS = """
import sys
import time
from folkmoot.gateway.client import Client
with Client(sys.argv[1]) as client:
    print(client.status().json)
"""
GATEWAY = "10.77.0.1:50051"
HEAD = "10.77.0.1:6379"
MAX_TOKENS = 240
# Near replicas are taken first: it takes several answers at once, with experts of their own, to need the far hosts too.
PROMPTS = ("Each expert knows one thing well.", "Many hands", "No one is missed when", "All at once, 1 2 3 4")


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Node, Node]]:
    """Skips where this machine cannot have them."""
    if (reason := netns.why_not()) is not None:
        pytest.skip(f"two nodes need network namespaces: {reason}")
    with netns.two_nodes(folder) as nodes:
        yield nodes


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    with two_nodes(tmp_path) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def up(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    """A cluster of 4 hosts, 2 of them on each node, so that each node has every expert; the engine on the first."""
    folder = tmp_path_factory.mktemp("nodes")
    with two_nodes(folder) as (one, two):
        ray_start(one, "--head", "--port", "6379", "--num-cpus", "1", "--include-dashboard", "false")
        ray_start(two, "--address", HEAD, "--num-cpus", "1")
        command = [sys.executable, "-m", "folkmoot.cluster.cli", "up", "--detach", "--state-dir", str(folder / "state")]
        command += ["--model", str(mixtral), "--address", HEAD, "--hosts", "4", "--replicas", "2"]
        command += ["--listen", GATEWAY, "--insecure"]
        one.run(*command, "--cpus-per-host", "0.4", *FLOAT32, timeout_s=240.0)
        assert list(one.private.glob("folkmoot-*/engine-*.feed")), "the engine is on the first node"
        yield one, two


@pytest.fixture
def whole(up: tuple[Node, Node]) -> tuple[Node, Node]:
    """All four hosts live, and each node alone has every expert."""
    status = eventually(lambda: s if is_whole(s := status_of(up[0])) else None, 90.0, "all four hosts live")
    of_node: dict[str, set[int]] = {}
    for host in status["hosts"]:
        of_node.setdefault(host["node"], set()).update(host["experts"])
    assert list(of_node.values()) == [set(range(8))] * 2
    assert sorted(Counter(host["node"] for host in status["hosts"]).values()) == [2, 2]
    return up


def is_whole(status: dict[str, Any]) -> bool:
    return sum(h["alive"] for h in status.get("hosts", [])) == 4 and status["map"]["replicas_least"] == 2


def answers(node: Node, at_40: Callable[[], None] | None = None) -> tuple[dict[str, list[int]], float]:
    """The tokens of each prompt's answer, all asked at once, and the longest gap between two pieces of one answer;
    `at_40` is called after the first one's 40th token."""
    tokens: dict[str, list[int]] = {prompt: [] for prompt in PROMPTS}
    last_s: dict[str, float] = {}
    longest_s = 0.0
    with node.start(sys.executable, "-c", CLIENT, GATEWAY, str(MAX_TOKENS), *PROMPTS) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now_s, prompt, new = json.loads(line)
            longest_s = max(longest_s, now_s - last_s.get(prompt, now_s))
            last_s[prompt] = now_s
            tokens[prompt] += new
            if len(tokens[prompt]) >= 40 and at_40 is not None:
                at_40()
                at_40 = None
    assert process.returncode == 0
    assert at_40 is None
    return tokens, longest_s


@pytest.mark.parametrize("what", ["link", "node"])
def test_one_node_serves_on_without_the_other(
    whole: tuple[Node, Node], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In mid-answer the link goes down, or everything of the second node is killed: the same tokens, after a pause.
    When the link is back, so are its hosts."""
    one, two = whole
    undisturbed, usual_s = answers(one)
    assert {len(tokens) for tokens in undisturbed.values()} == {MAX_TOKENS}
    eventually(lambda: min(rows_of(one).values()) > MAX_TOKENS, 10.0, "all four hosts have worked")

    def strike() -> None:
        if what == "link":
            one.run("ip", "link", "set", "veth0", "down")
        else:
            two.kill()

    tokens, pause_s = answers(one, strike)
    assert tokens == undisturbed
    if what == "link":
        assert "state DOWN" in one.run("ip", "link", "show", "veth0")
    else:
        assert two.init.poll() is not None
    with capsys.disabled():
        print(f"\n[{what}] longest gap {pause_s:.2f} s, undisturbed {usual_s:.2f} s")
    assert answers(one)[0] == undisturbed, "and it goes on serving"
    eventually(lambda: sum(h["alive"] for h in status_of(one)["hosts"]) == 2, 30.0, "the router took two hosts out")
    assert status_of(one)["map"]["missing"] == 0
    if what == "link":
        link_up(one)
        eventually(lambda: is_whole(status_of(one)), 90.0, "all four hosts live again")
        assert answers(one)[0] == undisturbed


def status_of(node: Node) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(node.python(STATUS, GATEWAY).strip() or "{}")
    return document


def rows_of(node: Node) -> dict[str, int]:
    return {host["host"]: host["rows"] for host in status_of(node)["hosts"]}


HOST = """
import json, sys, time
from dataclasses import asdict
from folkmoot.experts.host import ExpertServer, HostSpec
calls = 0
def kernel(x, slots, out=None):
    global calls
    calls += 1
    time.sleep(60 if calls > 3 else 0)
    return out.copy_(x)
spec = HostSpec("far", 1, "", {0: [0]}, sys.argv[1], sys.argv[2], tcp="10.77.0.2:0")
server = ExpertServer(spec, {0: kernel}, {0: 1})
print(json.dumps(asdict(server.listen())), flush=True)
server.serve()
"""
ENGINE = """
import json, sys, time, torch
from pathlib import Path
from folkmoot.experts import expert_map as em
from folkmoot.experts.dispatch_config import DispatchConfig
from folkmoot.experts.dispatcher import Dispatcher
from folkmoot.experts.expert_map import HostAddress, NoReplicaError
expert_map = em.add_host(em.empty([0], 1), HostAddress(**json.loads(sys.argv[1])), {0: [0]})
Path(sys.argv[2]).write_text(expert_map.to_json())
d = Dispatcher(DispatchConfig("e", sys.argv[4], map_path=sys.argv[2], no_replica_timeout_s=0.05))
x, weights, ids = torch.randn(4, 96), torch.ones(4, 1), torch.zeros(4, 1).int()
for _ in range(3):
    d.forward(0, x, weights, ids)
print("ready", flush=True)
if sys.argv[3] == "nothing sent yet":
    sys.stdin.readline()
try:
    d.forward(0, x, weights, ids)
except NoReplicaError:
    print("gone", flush=True)
"""


@pytest.mark.parametrize("moment", ["nothing sent yet", "all acknowledged"])
def test_the_only_replica_behind_a_dead_link_is_given_up_before_any_deadline(
    nodes: tuple[Node, Node], tmp_path: Path, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the stall deadline (it is the last replica: 10 s) nor end-of-file says so: the kernel's clocks do, also
    where the request was acknowledged before, so that nothing of ours is unacknowledged."""
    one, two = nodes
    shared = str(secret.keep(tmp_path / "secret"))
    with two.start(sys.executable, "-c", HOST, str(two.temp / "far.sock"), shared) as host:
        assert host.stdout is not None
        address = host.stdout.readline()
        arguments = [address, str(tmp_path / "map.json"), moment, shared]
        with one.start(sys.executable, "-c", ENGINE, *arguments, stdin=subprocess.PIPE) as engine:
            assert engine.stdout is not None and engine.stdin is not None
            assert engine.stdout.readline() == "ready\n"
            if moment == "all acknowledged":
                eventually(lambda: unacknowledged(one) == [0], 5.0, "the request has been acknowledged")
            one.run("ip", "link", "set", "veth0", "down")
            down_s = time.monotonic()
            engine.stdin.write("\n")
            engine.stdin.flush()
            assert engine.stdout.readline() == "gone\n"
            took_s = time.monotonic() - down_s
            assert host.poll() is None
        two.kill()
    with capsys.disabled():
        print(f"\n[{moment}] given up {took_s:.2f} s after the link went down")


def unacknowledged(node: Node) -> list[int]:
    """Bytes sent and not acknowledged, of each established TCP connection of the node."""
    lines = node.run("cat", "/proc/net/tcp").splitlines()[1:]
    fields = [line.split() for line in lines]
    return [int(f[4].partition(":")[0], 16) for f in fields if f[3] == "01"]
