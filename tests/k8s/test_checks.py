"""The checks of the manifests themselves: each finds what it is there for, in an overlay that is broken on purpose."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s import checks, schemas
from tests.k8s.checks_serve import serve_problems
from tests.k8s.manifests import Object, built, containers, groups, of_kind, ray_service
from tests.k8s.network import may_talk, ours

Break = Callable[[list[Object]], None]


def container(objects: list[Object], name: str) -> Object:
    return dict(containers(objects))[name]


def gateway(objects: list[Object]) -> Object:
    return container(objects, "folkmoot-gateway/gateway")


def put(find: Callable[[list[Object]], Any], key: Any, value: Any) -> Break:
    """Puts a value where `find` leads."""

    def change(objects: list[Object]) -> None:
        find(objects)[key] = value

    return change


def change(pick: Callable[[list[Object]], Object], key: str, old: str, new: str) -> Break:
    """Replaces a text that must be there."""

    def replace(objects: list[Object]) -> None:
        where = pick(objects)
        assert old in where[key]
        where[key] = where[key].replace(old, new)

    return replace


def word(find: Callable[[list[Object]], list[str]], old: str, new: str) -> Break:
    """Replaces a word that must be there."""

    def replace(objects: list[Object]) -> None:
        line = find(objects)
        line[line.index(old)] = new

    return replace


def config(old: str, new: str) -> Break:
    return change(ray_service, "serveConfigV2", old, new)


def group(number: int) -> Callable[[list[Object]], Object]:
    return lambda objects: groups(objects)[number]


def pod(number: int) -> Callable[[list[Object]], Object]:
    return lambda objects: groups(objects)[number]["template"]["spec"]


def ray_container(number: int) -> Callable[[list[Object]], Object]:
    return lambda objects: pod(number)(objects)["containers"][0]


def one(kind: str, number: int = 0) -> Callable[[list[Object]], Object]:
    return lambda objects: of_kind(objects, kind)[number]


def drop(find: Callable[[list[Object]], Any], key: Any) -> Break:
    def remove(objects: list[Object]) -> None:
        del find(objects)[key]

    return remove


def triggers(objects: list[Object]) -> list[Object]:
    found: list[Object] = one("ScaledObject")(objects)["spec"]["triggers"]
    return found


BROKEN: list[tuple[Callable[[list[Object]], list[str]], Break, str]] = [
    (schemas.core_problems, put(one("Deployment"), "replica", 3), "replica"),
    (schemas.core_problems, put(lambda o: gateway(o)["ports"][0], "containerPort", "grpc"), "containerPort"),
    (schemas.core_problems, put(lambda o: one("Service")(o)["spec"], "protocol", "TCP"), "protocol"),
    (schemas.core_problems, drop(lambda o: one("StatefulSet")(o)["spec"], "selector"), "selector"),
    (checks.command_problems, word(lambda o: gateway(o)["args"], "--shutdown-s", "--stop-s"), "--stop-s"),
    (checks.command_problems, word(lambda o: gateway(o)["args"], "30", "long"), "invalid float"),
    (checks.command_problems, word(lambda o: gateway(o)["args"], "0.0.0.0:50051", "nowhere"), "listen"),
    (checks.command_problems, word(lambda o: gateway(o)["command"], "folkmoot.gateway", "folkmoot.door"), "no module"),
    (checks.command_problems, put(lambda o: group(1)(o)["rayStartParams"], "num-cpu", "1"), "num-cpu"),
    (
        checks.command_problems,
        word(lambda o: ray_container(1)(o)["lifecycle"]["preStop"]["exec"]["command"], "--within", "--in"),
        "--within",
    ),
    (checks.image_problems, put(gateway, "image", "folkmoot-gate:1"), "no Dockerfile"),
    (checks.image_problems, put(gateway, "image", "folkmoot-gateway"), "no Dockerfile"),
    (checks.image_problems, put(gateway, "image", "folkmoot-gateway:latest"), "no tag"),
    (checks.port_problems, word(lambda o: gateway(o)["args"], "0.0.0.0:50051", "0.0.0.0:50052"), "50052"),
    (checks.port_problems, put(gateway, "livenessProbe", {"grpc": {"port": 50052}}), "asks port 50052"),
    (checks.port_problems, put(lambda o: ray_container(1)(o)["readinessProbe"]["httpGet"], "port", 52366), "52366"),
    (
        checks.port_problems,
        put(gateway, "livenessProbe", {"exec": {"command": ["folkmoot.gateway.probe", "--address", "127.0.0.1:9"]}}),
        "asks port 9",
    ),
    (checks.port_problems, put(lambda o: one("Service")(o)["spec"]["ports"][0], "targetPort", "http"), "listens on"),
    (checks.port_problems, put(lambda o: one("Service")(o)["spec"]["ports"][0], "port", 80), "listens on"),
    (checks.port_problems, put(lambda o: one("PodMonitor")(o)["spec"]["podMetricsEndpoints"][0], "port", "m"), "no m"),
    (checks.probe_problems, put(gateway, "readinessProbe", {"grpc": {"port": 50051, "service": "redy"}}), "redy"),
    (checks.probe_problems, put(gateway, "livenessProbe", {"exec": {"command": ["p", "--service", "liv"]}}), "liv"),
    (
        checks.probe_problems,
        lambda o: gateway(o).update(args=["--tls-cert"], livenessProbe={"exec": {"command": ["p"]}}),
        "do not both speak TLS",
    ),
    (checks.file_problems, lambda o: gateway(o)["args"].append("/etc/tls.key"), "nobody brings /etc/tls.key"),
    (checks.probe_problems, drop(gateway, "livenessProbe"), "livenessProbe"),
    (checks.variable_problems, put(lambda o: gateway(o)["env"][0], "name", "FOLKMOOT_REDI"), "FOLKMOOT_REDI"),
    (
        checks.variable_problems,
        put(lambda o: ray_container(0)(o)["env"][1], "name", "RAY_USAGE_STAT"),
        "RAY_USAGE_STAT",
    ),
    (checks.secret_problems, put(lambda o: gateway(o)["env"][0]["valueFrom"]["secretKeyRef"], "key", "uri"), "uri"),
    (
        checks.secret_problems,
        put(lambda o: ray_service(o)["rayClusterConfig"]["authOptions"], "secretName", "token"),
        "token",
    ),
    (checks.secret_problems, lambda o: o.append({"kind": "Secret", "metadata": {"name": "s"}}), "in a manifest"),
    (serve_problems, config("cluster.app:build", "cluster.app:built"), "built"),
    (serve_problems, config("hosts: 4", "host: 4"), "unknown arguments: host;"),
    (serve_problems, config("hosts: 4", "hosts: many"), "hosts"),
    (serve_problems, config("replicas: 2", "replicas: 0"), "replicas: 0 is not in the range"),
    (serve_problems, config("device: cuda", "placement: there"), "placement"),
    (serve_problems, config("proxy_location: Disabled", "proxy: Disabled"), "proxy"),
    (serve_problems, config("{folkmoot_engine: 1}", "{folkmoot_motor: 1}"), "2 engines have no room"),
    (serve_problems, config("{folkmoot_engine: 1}", "{folkmoot_expert_host: 1}"), "groups of their own"),
    (serve_problems, config("hosts: 4", "hosts: 99"), "99 hosts have no room"),
    (serve_problems, config("gpus_per_host: 1", "gpus_per_host: 0"), "each host gets 0 GPUs"),
    (serve_problems, config("/models/model", "/model/model"), "on no volume"),
    (serve_problems, config("/models/model", "/models/other"), "KEDA looks at"),
    (serve_problems, put(group(1), "minReplicas", 9), "between"),
    (serve_problems, put(lambda o: ray_service(o)["rayClusterConfig"], "rayVersion", "2.59.0"), "2.59.0"),
    (serve_problems, lambda o: triggers(o).pop(), "KEDA looks at"),
    (serve_problems, put(lambda o: triggers(o)[1]["metadata"], "consumerGroup", "engines"), "streamLength alone"),
    (serve_problems, put(lambda o: triggers(o)[1]["metadata"], "address", "store.folkmoot.svc:6379"), "nobody"),
    (serve_problems, put(lambda o: triggers(o)[1]["metadata"], "address", "folkmoot-store:6379"), "nobody is"),
    (checks.ending_problems, put(pod(1), "terminationGracePeriodSeconds", 30), "killed after 30 s"),
    (checks.ending_problems, word(lambda o: gateway(o)["args"], "30", "60"), "killed after 45 s"),
    (
        checks.ending_problems,
        word(lambda o: ray_container(1)(o)["lifecycle"]["preStop"]["exec"]["command"], "60", "15"),
        "engines get 15 s",
    ),
    (
        checks.ending_problems,
        put(lambda o: ray_container(0)(o)["lifecycle"]["preStop"]["sleep"], "seconds", 5),
        "the head ends",
    ),
    (checks.hardening_problems, put(lambda o: pod(2)(o)["securityContext"], "runAsNonRoot", False), "root"),
    (checks.hardening_problems, drop(lambda o: pod(2)(o), "automountServiceAccountToken"), "API server"),
    (
        checks.hardening_problems,
        put(lambda o: gateway(o)["securityContext"], "readOnlyRootFilesystem", False),
        "root file system",
    ),
    (checks.hardening_problems, drop(gateway, "resources"), "limit of memory"),
    (
        checks.reference_problems,
        put(lambda o: one("ScaledObject")(o)["spec"], "scaleTargetRef", {"name": "x"}),
        "scales nothing",
    ),
    (
        checks.reference_problems,
        put(lambda o: one("PodDisruptionBudget")(o)["spec"]["selector"], "matchLabels", {"a": "b"}),
        "selects no pod",
    ),
    (checks.reference_problems, put(lambda o: ray_container(1)(o)["volumeMounts"][0], "name", "m"), "no volume m"),
    (checks.reference_problems, put(one("Service", 1), "metadata", {"name": "s", "namespace": "other"}), "namespace"),
]


@pytest.mark.parametrize(
    ("check", "damage", "expected"), BROKEN, ids=[f"{i}-{check.__name__}" for i, (check, *_) in enumerate(BROKEN)]
)
def test_a_broken_manifest_is_found(check: Callable[[list[Object]], list[str]], damage: Break, expected: str) -> None:
    objects = built("gpu")
    damage(objects)
    found = check(objects)
    assert found
    assert any(expected in problem for problem in found), found


BROKEN_CUSTOM: list[tuple[Break, str]] = [
    (put(ray_service, "serveConfig", ""), "serveConfig"),
    (put(ray_container(1), "imagePullPolice", "Always"), "imagePullPolice"),
    (put(lambda o: ray_container(1)(o)["readinessProbe"]["httpGet"], "pth", "/"), "pth"),
    (put(group(1), "maxReplicas", "many"), "maxReplicas"),
    (drop(ray_container(2), "name"), "name"),
    (put(lambda o: triggers(o)[1], "metdata", {}), "metdata"),
    (put(lambda o: one("TriggerAuthentication")(o)["spec"]["secretTargetRef"][0], "keys", "x"), "keys"),
]


@pytest.mark.parametrize(("damage", "expected"), BROKEN_CUSTOM, ids=[expected for _, expected in BROKEN_CUSTOM])
def test_a_broken_custom_object_is_found(damage: Break, expected: str) -> None:
    if not schemas.CRDS.is_dir():
        pytest.skip(f"no CRDs of KubeRay and KEDA at {schemas.CRDS}: set FOLKMOOT_CRDS to a folder that has them")
    objects = built("gpu")
    damage(objects)
    assert any(expected in problem for problem in schemas.crd_problems(objects))


def test_holes_in_the_network_are_seen() -> None:
    """Without the policy that refuses everything, a policy for the target, or the right port: another answer."""
    objects = built("gpu")
    flow = ours("expert-host"), ours("store"), 6379
    assert not may_talk(objects, *flow)
    rules = next(o for o in of_kind(objects, "NetworkPolicy") if o["metadata"]["name"] == "store")["spec"]["ingress"]
    rules[0]["from"][0]["podSelector"] = {}
    assert not may_talk(objects, *flow), "it may not get out"
    assert may_talk([o for o in objects if o["metadata"]["name"] not in ("nobody", "names", "ray")], *flow)
    gateways = ours("gateway"), ours("store"), 6379
    assert may_talk(objects, *gateways)
    rules[0]["ports"][0]["port"] = 6380
    assert not may_talk(objects, *gateways)
