"""The laptop's `serveConfigV2` on a real Ray of four nodes with the manifest's Ray resources; then one node leaves.

The nodes are processes of this machine (Ray's own test cluster). The config goes in by what Ray's dashboard calls when
KubeRay sends it. Store, gateway, vLLM and a tiny checkpoint are real too; only the model in the config is another.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from folkmoot.cluster.processes import is_alive
from folkmoot.gateway.client import Client
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.metrics_server import PATH
from tests.cluster.conftest import Cluster, eventually, mixtral, processes_of, temp_of
from tests.gateway.conftest import GatewayProcess
from tests.gateway.scrapes import Scrape
from tests.k8s.manifests import built, groups, probes, ray_resources, serve_config

__all__ = ["mixtral"]  # a fixture

pytestmark = pytest.mark.slow

START_S = 270.0
RAY = """
import json, sys, ray
from ray.cluster_utils import Cluster
from folkmoot.cluster.leave import leave
groups, config = json.loads(sys.stdin.readline())
cluster = Cluster()
options = {"object_store_memory": 80 << 20, "dashboard_agent_listen_port": 0}
(cpus, resources), *workers = groups
head = {"include_dashboard": False, "temp_dir": sys.argv[1]}
made = [cluster.add_node(num_cpus=cpus, resources=resources, **options, **head)]
made += [cluster.add_node(wait=False, num_cpus=cpus, resources=resources, **options) for cpus, resources in workers]
cluster.wait_for_nodes()
nodes = [node.node_id for node in made]
ray.init(address=cluster.address, log_to_driver=False)
from ray import serve
from ray._private import ray_constants
from ray.dashboard.consts import DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX
from ray.experimental.internal_kv import _internal_kv_get
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema

parsed = ServeDeploySchema.model_validate(config)
client = serve_start(proxy_location=parsed.proxy_location)
apply = client.deploy_apps
apply(parsed)

def replicas(app):
    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in names if name.startswith("SERVE_REPLICA::" + app + "#")]

def applications():
    return {name: [a.status.value, a.message] for name, a in serve.status().applications.items()}

def agents():
    prefix, namespace = DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX, ray_constants.KV_NAMESPACE_DASHBOARD
    said = [_internal_kv_get(f"{prefix}{node}", namespace=namespace) for node in nodes]
    return [json.loads(text)[:2] for text in said if text]

for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
ray.shutdown()
cluster.shutdown()
"""
RAY_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
PROMPT = "Each expert knows one thing well."


class RayNodes:
    """The process that owns Ray's nodes, to which the config is applied; `ask` evaluates an expression in it."""

    def __init__(
        self, owner: Cluster, nodes: list[tuple[int, dict[str, float]]], config: dict[str, Any], redis: str
    ) -> None:
        environment = {**owner.environment, **RAY_ENVIRONMENT, "FOLKMOOT_REDIS": redis}
        command = [sys.executable, "-c", RAY, f"{temp_of(owner.marker)}/ray"]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._say(json.dumps([nodes, config]))

    def ask(self, expression: str) -> Any:
        self._say(expression)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the owner of Ray's nodes died"
        return json.loads(line)

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


@dataclass
class Service:
    ray: RayNodes
    gateway: GatewayProcess
    metrics: str

    def status(self) -> dict[str, Any]:
        with Client(self.gateway.address) as client:
            document: dict[str, Any] = json.loads(client.status().json)
        return document


@pytest.fixture(scope="module")
def service(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The laptop's config on: a head, two nodes for engines (one is spare), one with room for two expert hosts."""
    config = serve_config(built("laptop"))
    (application,) = config["applications"]
    with socket.create_server(("127.0.0.1", 0)) as free:  # the manifest's port may be somebody else's here
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    application["args"] |= {"model": str(mixtral), "dtype": "float32", "max_model_len": 512, "metrics": metrics}
    head, engines, hosts = (
        (int(group["rayStartParams"]["num-cpus"]), ray_resources(group)) for group in groups(built("laptop"))
    )
    nodes = [head, engines, engines, (hosts[0], {name: 2 * amount for name, amount in hosts[1].items()})]
    owner = Cluster(tmp_path_factory.mktemp("unused"), secrets.token_hex(4))
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as store:
        ray, gateway = None, None
        try:
            ray = RayNodes(owner, nodes, config, store.tcp_url)
            gateway = GatewayProcess(store.tcp_url, "folkmoot")
            eventually(lambda: is_running(ray.ask("applications()")), START_S, "both applications run")
            yield Service(ray, gateway, f"http://{metrics}{PATH}")
        finally:
            if gateway is not None:
                gateway.kill()
            if ray is not None:
                ray.end()
            left = eventually_gone(owner)
            shutil.rmtree(temp_of(owner.marker), ignore_errors=True)
    assert not left, f"left behind: {left}"


def is_running(applications: dict[str, list[str]]) -> bool:
    """Whether config's and the engines' application run; an AssertionError with Serve's message if one never will."""
    assert not any(state == "DEPLOY_FAILED" for state, _ in applications.values()), applications
    return [applications.get(name, [""])[0] for name in ("folkmoot-cluster", "folkmoot")] == ["RUNNING"] * 2


def eventually_gone(owner: Cluster) -> dict[int, str]:
    """Kills and returns what is left of it after 20 s."""
    deadline_s = time.monotonic() + 20.0
    while (left := processes_of(owner.marker)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, 9)
    return left


def answer(service: Service, at_40: Callable[[], None] = lambda: None) -> list[int]:
    """The tokens of one answer through the gateway; `at_40` is called once in the middle of it."""
    tokens: list[int] = []
    with Client(service.gateway.address) as client:
        for chunk in client.generate(PROMPT, temperature=0.0, max_tokens=240, ignore_eos=True):
            before = len(tokens)
            tokens += chunk.token_ids
            if before < 40 <= len(tokens):
                at_40()
    return tokens


def node_of(service: Service, engine: dict[str, Any]) -> int:
    """The place of an engine's node among the service's."""
    place: int = service.ray.ask("nodes").index(engine["node"])
    return place


def test_the_config_serves_and_every_part_is_on_its_own_kind_of_node(service: Service) -> None:
    assert len(answer(service)) == 240

    def have_worked() -> list[bool]:
        return [host["alive"] and host["rows"] > 0 for host in service.status()["hosts"]]

    eventually(lambda: have_worked() == [True, True], 10.0, "both hosts have worked")
    status = service.status()
    nodes = service.ray.ask("nodes")
    assert {host["node"] for host in status["hosts"]} == {nodes[3]}
    assert [node_of(service, engine) in (1, 2) for engine in status["engines"]] == [True]


def test_the_probes_of_rays_pods_are_answered_without_a_token(service: Service) -> None:
    rays = [group["template"]["spec"]["containers"][0] for group in groups(built("laptop"))]
    paths = {probe["httpGet"]["path"] for container in rays for probe in probes(container)}
    assert paths
    agents = service.ray.ask("agents()")
    assert len(agents) == 4
    for path in paths:
        for host, port in agents:
            with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=10.0) as reply:
                assert reply.status == 200


def test_prometheus_hears_of_all_parts_but_gateways_which_have_ports_of_their_own(service: Service) -> None:
    """All of Ray's nodes are this machine here, so one address speaks for them."""
    with urllib.request.urlopen(service.metrics, timeout=30.0) as reply:
        now = Scrape(reply.read().decode())
    assert now("folkmoot_router_hosts", phase="ready") == 2 and now("folkmoot_engine_generated_tokens_total") >= 240
    assert now.labels("host") == {"host-0", "host-1"} and now("folkmoot_host_rows_total") > 0
    assert now.has("vllm:kv_cache_usage_perc") and not now.has("folkmoot_gateway_store_up")


def test_the_application_started_again_finds_its_cluster(service: Service) -> None:
    """Its replica is killed: Serve starts another one, which changes nothing."""
    before = service.status()
    (replica,) = service.ray.ask("replicas('folkmoot-cluster')")
    service.ray.ask(f"ray.kill(ray.get_actor({replica!r}, 'serve'))")
    eventually(lambda: service.ray.ask("replicas('folkmoot-cluster')") not in ([], [replica]), 60.0, "another replica")
    eventually(lambda: is_running(service.ray.ask("applications()")), 60.0, "it runs again")
    after = service.status()
    assert [host["pid"] for host in after["hosts"]] == [host["pid"] for host in before["hosts"]]
    assert [engine["pid"] for engine in after["engines"]] == [engine["pid"] for engine in before["engines"]]


def test_an_engines_node_leaves_in_mid_answer_and_no_token_is_lost(service: Service) -> None:
    undisturbed = answer(service)
    (engine,) = service.status()["engines"]
    place = node_of(service, engine)
    said: list[str] = []

    def leave() -> None:
        said.append(service.ray.ask(f"leave(nodes[{place}], 'default', 60.0)"))

    assert answer(service, leave) == undisturbed
    assert said == [""], "it has left in time"
    (other,) = [e for e in service.status()["engines"] if e["phase"] == "ready"]
    assert (node_of(service, other), other["engine"]) == (3 - place, other["engine"]) != (place, engine["engine"])
    assert not is_alive(engine["pid"])


def test_experts_that_can_go_nowhere_else_are_named_and_serve_on(service: Service) -> None:
    left = service.ray.ask("leave(nodes[3], 'default', 4.0)")
    assert left == f"experts {list(range(8))} are nowhere else yet"
    assert len(answer(service)) == 240
