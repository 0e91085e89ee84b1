"""Every overlay, built by a real kubectl: schemas, and all that it names against the code that has it."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from folkmoot.gateway.embedded import EmbeddedStore, find_server
from folkmoot.gateway.probe import ask
from tests.k8s import checks, schemas
from tests.k8s.checks import words
from tests.k8s.manifests import OVERLAYS, ROOT, Object, built, containers, of_kind, secrets_made
from tests.k8s.network import Peer, may_talk, ours

CLIENT = Peer({}, {"folkmoot.dev/client": "true"})
STRANGER = Peer({}, {"kubernetes.io/metadata.name": "default"})
OPERATOR = Peer({"app.kubernetes.io/component": "kuberay-operator"}, {"kubernetes.io/metadata.name": "kuberay"})
KEDA = Peer({"app": "keda-operator"}, {"kubernetes.io/metadata.name": "keda"})
PROMETHEUS = Peer({"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"})
API_SERVER = Peer({}, {"kubernetes.io/metadata.name": "kube-system"})
RAYS = ("head", "engine", "expert-host")
ALLOWED = [
    *((CLIENT, ours("gateway"), 50051), (ours("gateway"), ours("store"), 6379)),
    *((ours("head"), ours("store"), 6379), (ours("engine"), ours("store"), 6379)),
    *((ours("head"), ours("ray-store"), 6379), (OPERATOR, ours("head"), 8265), (ours("head"), API_SERVER, 443)),
    *((ours(one), ours(other), 34567) for one in RAYS for other in RAYS),
]
REFUSED = [
    *((STRANGER, ours(part), port) for part, port in (("gateway", 50051), ("store", 6379), ("head", 8265))),
    *((CLIENT, ours(part), port) for part in ("store", "ray-store", *RAYS) for port in (6379, 8265, 34567)),
    *((ours("gateway"), ours(part), port) for part in ("ray-store", *RAYS) for port in (6379, 8265, 34567)),
    *((ours(part), ours("ray-store"), 6379) for part in ("engine", "expert-host", "store")),
    *((ours("expert-host"), ours("store"), 6379), (ours("expert-host"), API_SERVER, 443)),
    *((ours("store"), ours("gateway"), 50051), (OPERATOR, ours("store"), 6379), (CLIENT, ours("gateway"), 9)),
    *((who, ours(part), 9464) for who in (CLIENT, STRANGER, ours("store")) for part in ("gateway", *RAYS)),
]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_objects_fit_their_schemas(overlay: str) -> None:
    assert schemas.core_problems(built(overlay)) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_custom_objects_fit_their_schemas(overlay: str) -> None:
    if not schemas.CRDS.is_dir():
        pytest.skip(f"no CRDs of KubeRay and KEDA at {schemas.CRDS}: set FOLKMOOT_CRDS to a folder that has them")
    assert schemas.crd_problems(built(overlay)) == []


def test_every_kind_is_checked_but_those_that_are_named() -> None:
    kinds = {o["kind"] for overlay in OVERLAYS for o in built(overlay) if "." in o["apiVersion"].split("/")[0]}
    custom = {kind for kind in kinds if kind not in CORE}
    assert custom == {*schemas.CRD_FILES, *schemas.WITHOUT_SCHEMA}


CORE = {"NetworkPolicy"}
"""Kinds of Kubernetes' own in a group with a dot."""


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_what_a_manifest_names_is_there(overlay: str, check: Callable[[list[Object]], list[str]]) -> None:
    assert check(built(overlay)) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_who_must_talk_may_and_nobody_else(overlay: str) -> None:
    objects = built(overlay)
    assert [flow for flow in ALLOWED if not may_talk(objects, *flow)] == []
    assert [flow for flow in REFUSED if may_talk(objects, *flow)] == []
    assert may_talk(objects, KEDA, ours("store"), 6379) is bool(of_kind(objects, "ScaledObject"))
    for part, port in [("gateway", 9464), *((part, port) for part in RAYS for port in (8080, 9464))]:
        assert may_talk(objects, PROMETHEUS, ours(part), port) is bool(of_kind(objects, "PodMonitor"))


def test_the_documents_table_names_every_port() -> None:
    """docs/kubernetes.md lists each port of each kind of pod."""
    text = (ROOT / "docs/kubernetes.md").read_text()
    rows = set(re.findall(r"^\| ([a-z ]+) \| (\d+) ", text, re.MULTILINE))
    ports = {
        (name.split("/")[0].removeprefix("folkmoot-").replace("-", " "), str(port["containerPort"]))
        for overlay in OVERLAYS
        for name, container in containers(built(overlay))
        for port in container.get("ports", [])
    }
    assert ports <= rows


def test_the_stores_command_starts_a_server_that_asks_for_its_password(tmp_path: Path) -> None:
    """The manifest's arguments and the script's configuration on a real Valkey; only folders and port differ."""
    (line,) = {tuple(words(c)) for name, c in containers(built("gpu")) if c["name"] == "valkey"}
    (made,) = (s["stringData"] for s in secrets_made() if s["metadata"]["name"] == "folkmoot-store")
    (tmp_path / "valkey.conf").write_text(made["valkey.conf"])
    here = {"/etc/valkey/valkey.conf": str(tmp_path / "valkey.conf"), "/data": str(tmp_path), "6379": "0"}
    socket = tmp_path / "s"
    arguments = [here.get(word, word) for word in line[1:]]
    server = subprocess.Popen([find_server(), *arguments, "--unixsocket", str(socket)], stdout=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 20
        while not socket.exists():
            assert server.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.02)
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(unix_socket_path=str(socket), retry=Retry(NoBackoff(), 0)).ping()
        client = redis.Redis(unix_socket_path=str(socket), password=made["password"])
        assert client.ping()
        assert client.config_get("append*")["appendonly"] == "yes"
        client.close()
    finally:
        server.terminate()
        assert server.wait(20) == 0
    assert list(tmp_path.glob("appendonlydir/*"))


def test_the_gateways_command_starts_one_that_its_own_probes_find(tmp_path: Path) -> None:
    """The manifest's command and probes with the script's certificate, on a real store: alive, and without an engine
    not ready. Only the folder and the port are others; SIGTERM ends it."""
    container = dict(containers(built("gpu")))["folkmoot-gateway/gateway"]
    (made,) = (s["stringData"] for s in secrets_made() if s["metadata"]["name"] == "folkmoot-gateway-tls")
    for name, text in made.items():
        (tmp_path / name).write_text(text)

    def here(line: list[str], port: str) -> list[str]:
        local = [word.replace("/etc/folkmoot/tls", str(tmp_path)) for word in line]
        return [sys.executable, *(word.replace("0.0.0.0:50051", f"0.0.0.0:{port}") for word in local[1:])]

    with EmbeddedStore(tmp_path / "store") as store:
        environment = {**os.environ, "FOLKMOOT_REDIS": store.url}
        line = here(words(container), "0")
        gateway = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert gateway.stdout is not None
            port = gateway.stdout.readline().strip().rpartition(":")[2]
            alive, ready = (
                asked(container[f"{kind}Probe"], lambda line: here(line, port), port)
                for kind in ("liveness", "readiness")
            )
            assert (alive, "NOT_SERVING" in ready) == ("", True)
        finally:
            gateway.terminate()
            assert gateway.wait(20) == 0


def asked(probe: Object, here: Callable[[list[str]], list[str]], port: str) -> str:
    """What keeps a probe from succeeding; empty: nothing. A gRPC probe as the kubelet asks."""
    if "grpc" in probe:
        state = ask(f"127.0.0.1:{port}", probe["grpc"]["service"])
        return "" if state == "SERVING" else state
    line = [*here(probe["exec"]["command"]), "--address", f"127.0.0.1:{port}"]
    return subprocess.run(line, capture_output=True, text=True, check=False).stderr


def test_the_secrets_are_sound_and_new_each_time() -> None:
    first, second = secrets_made(), secrets_made()
    assert schemas.core_problems(first) == []
    values = [value for s in (*first, *second) for key, value in s["stringData"].items()]
    assert len(set(values)) == len(values)
    for s in first:
        data = s["stringData"]
        if "url" in data:
            assert data["url"] == f"redis://:{data['password']}@{s['metadata']['name']}:6379"
        if "valkey.conf" in data:
            assert data["valkey.conf"] == f"requirepass {data['password']}"


def test_a_second_cluster_is_made_by_what_the_documents_say() -> None:
    """The line that docs/kubernetes.md gives to upgrade changes rayClusterConfig, which KubeRay looks at."""
    text = (ROOT / "docs/kubernetes.md").read_text()
    (patch,) = (json.loads(found) for found in re.findall(r"--type json --patch '(.*?)'", text))
    objects = built("laptop")
    (service,) = of_kind(objects, "RayService")
    for change in patch:
        *path, last = change["path"].replace("~1", "\0").strip("/").split("/")
        node = service
        for step in path:
            node = node[step.replace("\0", "/")]
        node[last.replace("\0", "/")] = change["value"]
    assert service["spec"]["rayClusterConfig"] != of_kind(built("laptop"), "RayService")[0]["spec"]["rayClusterConfig"]
    if schemas.CRDS.is_dir():
        assert schemas.crd_problems(objects) == []
