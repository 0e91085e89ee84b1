"""What manifests name, against the code that has it: each check answers with problems in words, none if all is well."""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from pydantic import ValidationError
from ray._private import ray_constants
from ray.scripts.scripts import start as ray_start

from folkmoot.cluster import app
from folkmoot.cluster.engine import Engine
from folkmoot.gateway.metrics_server import PATH
from folkmoot.gateway.probe import ADDRESS
from folkmoot.gateway.server import CUT_S, READY, SERVICE
from folkmoot.gateway.settings import GatewaySettings
from tests.k8s.checks_serve import serve_problems
from tests.k8s.manifests import (
    Object,
    containers,
    groups,
    labels,
    of_kind,
    pods,
    probes,
    ray_service,
    secrets_made,
    serve_config,
)

RAY_PORTS = {
    "gcs-server": ray_constants.DEFAULT_PORT,
    "dashboard": ray_constants.DEFAULT_DASHBOARD_PORT,
    "metrics": 8080,  # KubeRay's choice for --metrics-export-port
}
RAY_PROBE_PORT = ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
OTHER_VARIABLES = {"HOME", "REDISCLI_AUTH"}
DOCKERFILES = {"folkmoot": "docker/cluster.Dockerfile", "folkmoot-gateway": "docker/gateway.Dockerfile"}


class Parsed(Exception):
    """Ends a program whose command line was sound."""


def command_problem(module: str, arguments: list[str]) -> str:
    """Why `python -m MODULE ARGUMENTS` would not start, by the module's own parser; empty: it would."""
    if importlib.util.find_spec(module) is None:
        return f"there is no module {module}"
    real = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, *args: Any) -> None:
        raise Parsed(real(parser, *args))

    said = io.StringIO()
    parser, line = mock.patch.object(argparse.ArgumentParser, "parse_args", parse), [module, *arguments]
    with parser, mock.patch.object(sys, "argv", line), contextlib.redirect_stderr(said):
        try:
            importlib.import_module(_entry(module)).main()
        except Parsed as e:
            return _settings_problem(e.args[0]) if module == "folkmoot.gateway" else ""
        except SystemExit:
            return said.getvalue().strip().splitlines()[-1]
    return f"{module} reads no command line"


def _entry(module: str) -> str:
    spec = importlib.util.find_spec(module)
    return f"{module}.__main__" if spec is not None and spec.submodule_search_locations else module


def _settings_problem(given: argparse.Namespace) -> str:
    settings = {k: v for k, v in vars(given).items() if v is not None and k in GatewaySettings.model_fields}
    try:
        GatewaySettings(**settings)
    except ValidationError as e:
        return str(e)
    return ""


def words(container: Object) -> list[str]:
    """The command that a container runs; its image's own where the manifest names none."""
    return [*container.get("command", []), *container.get("args", [])]


def after(line: list[str], option: str) -> str | None:
    """What follows an option."""
    return line[line.index(option) + 1] if option in line else None


def file_problems(objects: list[Object]) -> list[str]:
    """Files that commands name and no volume has."""
    found = []
    for name, template in pods(objects):
        volumes = {v["name"]: v for v in template["spec"].get("volumes", [])}
        for container in template["spec"]["containers"]:
            mounts = {m["mountPath"]: volumes.get(m["name"], {}) for m in container.get("volumeMounts", [])}
            items = {f"{path}/{i['path']}" for path, v in mounts.items() for i in v.get("secret", {}).get("items", [])}
            lines = [words(container), *(probe.get("exec", {}).get("command", []) for probe in probes(container))]
            named = {word for line in lines for word in line if word.startswith("/etc/")}
            found += [f"{name}: nobody brings {file}" for file in sorted(named - items)]
    return found


def commands(objects: list[Object]) -> Iterator[tuple[str, list[str]]]:
    """Every command line that a manifest names: of containers, probes and hooks."""
    for name, container in containers(objects):
        if words(container):
            yield name, words(container)
        hooks = [hook for hook in container.get("lifecycle", {}).values() if "exec" in hook]
        for one in (*hooks, *(probe for probe in probes(container) if "exec" in probe)):
            yield name, one["exec"]["command"]


def command_problems(objects: list[Object]) -> list[str]:
    """Modules that are not there, options that they do not have. Valkey's own are tried by starting it."""
    found = []
    for name, line in commands(objects):
        if line[:2] == ["python", "-m"]:
            if problem := command_problem(line[2], line[3:]):
                found.append(f"{name}: {problem}")
        elif line[0] not in ("valkey-server", "valkey-cli"):
            found.append(f"{name}: {line[0]} is no program of ours")
    for group in groups(objects):
        options = {option.removeprefix("--") for parameter in ray_start.params for option in parameter.opts}
        unknown = sorted(set(group["rayStartParams"]) - options)
        found += [f"{group['groupName']}: `ray start` has no --{name}" for name in unknown]
    return found


def image_problems(objects: list[Object]) -> list[str]:
    """Images that nobody makes, or that have no version to tell them by."""
    found = []
    for name, container in containers(objects):
        repository, _, tag = container["image"].rpartition(":")
        kind = repository.rpartition("/")[2]
        if kind != "valkey" and kind not in DOCKERFILES:
            found.append(f"{name}: no Dockerfile makes {container['image']}")
        elif tag in ("", "latest"):  # which a kubelet pulls each time, also where it lies at hand
            found.append(f"{name}: {container['image']} has no tag that lasts")
    return found


def expected_ports(objects: list[Object], container: Object) -> dict[str, int]:
    """The ports on which the code in this container listens, by its own settings."""
    line = words(container)
    if "folkmoot.gateway" in line:
        return {name: _port(after(line, option)) for name, option in (("grpc", "--listen"), ("metrics", "--metrics"))}
    if line[:1] == ["valkey-server"]:
        return {"redis": int(after(line, "--port") or 0)}
    if not container["name"].startswith("ray-"):
        return {}
    (application,) = serve_config(objects)["applications"]
    node = {"node-metrics": _port(app.parse(application["args"]).metrics)}
    return {**(RAY_PORTS if container["name"] == "ray-head" else {"metrics": RAY_PORTS["metrics"]}), **node}


def _port(address: str | None) -> int:
    return int((address or "").rpartition(":")[2] or 0)


def port_problems(objects: list[Object]) -> list[str]:
    """Ports of containers, probes, Services and monitors on which nobody listens."""
    found = []
    for name, container in containers(objects):
        named = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        if named != (expected := expected_ports(objects, container)):
            found.append(f"{name}: ports {named}, but it listens on {expected}")
        is_ray = container["name"].startswith("ray-")
        for probe in probes(container):
            for kind in ("grpc", "tcpSocket", "httpGet"):
                port = probe.get(kind, {}).get("port")
                known = {*named, *named.values(), *([RAY_PROBE_PORT] if is_ray else [])}
                if port is not None and port not in known:
                    found.append(f"{name}: a probe asks port {port}")
            line = probe.get("exec", {}).get("command", [])
            if "folkmoot.gateway.probe" in line:
                port = int((after(line, "--address") or ADDRESS).rpartition(":")[2])
                if port not in named.values():
                    found.append(f"{name}: a probe asks port {port}")
    for service in of_kind(objects, "Service"):
        behind = _ports_of(_selected(objects, service["spec"]["selector"]))
        for port in service["spec"]["ports"]:
            if port["targetPort"] not in behind or behind[port["targetPort"]] != port["port"]:
                found.append(f"Service {service['metadata']['name']}: nobody listens on {port['targetPort']}")
            if port["appProtocol"] != port["name"]:
                found.append(f"Service {service['metadata']['name']}: appProtocol {port['appProtocol']}")
    for monitor in of_kind(objects, "PodMonitor"):
        for template in matching(objects, monitor["spec"]["selector"]):
            for end in monitor["spec"]["podMetricsEndpoints"]:
                if end.get("path", PATH) != PATH:
                    found.append(f"PodMonitor {monitor['metadata']['name']}: nothing is at {end['path']}")
                if end["port"] not in _ports_of([template]):
                    found.append(f"PodMonitor {monitor['metadata']['name']}: {labels(template)} has no {end['port']}")
    return found


def _ports_of(templates: list[Object]) -> dict[str, int]:
    return {
        port["name"]: port["containerPort"]
        for template in templates
        for container in template["spec"]["containers"]
        for port in container.get("ports", [])
    }


def probe_problems(objects: list[Object]) -> list[str]:
    """Probes of a health service's name that it does not have, or not as the gateway speaks; and no probes."""
    found = []
    for name, container in containers(objects):
        for probe in probes(container):
            line = probe.get("exec", {}).get("command", [])
            service = probe["grpc"].get("service", "") if "grpc" in probe else after(line, "--service") or ""
            if service not in ("", READY, SERVICE):
                found.append(f"{name}: the health service knows no {service!r}")
            if "folkmoot.gateway" in words(container) and ("--tls-cert" in words(container)) != ("--tls-ca" in line):
                found.append(f"{name}: gateway and probe do not both speak TLS")
        if name.startswith("folkmoot-demo-model"):
            continue
        if missing := {"readinessProbe", "livenessProbe"} - set(container):
            found.append(f"{name}: no {sorted(missing)}")
    return found


@functools.cache
def _source(package: str) -> bytes:
    """All Python and shared objects of a package, in one."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    files = [p for p in Path(spec.origin).parent.rglob("*") if p.suffix == ".py" or p.name == "_raylet.so"]
    return b"\0".join(path.read_bytes() for path in files)


def variable_problems(objects: list[Object]) -> list[str]:
    """Environment variables that nobody reads."""
    found = []
    for name, container in containers(objects):
        for variable in (entry["name"] for entry in container.get("env", [])):
            package = "ray" if variable.startswith("RAY_") else "folkmoot"
            literals = (f'"{variable}"'.encode(), f"\0{variable}\0".encode())  # in Python, in C++
            if variable not in OTHER_VARIABLES and not any(text in _source(package) for text in literals):
                found.append(f"{name}: nobody reads {variable}")
    return found


def secret_problems(objects: list[Object]) -> list[str]:
    """Secrets, or keys of them, that the script does not make, and passwords that stand in a manifest."""
    made = {s["metadata"]["name"]: set(s["stringData"]) for s in secrets_made()}
    asked = set(_references(objects))
    token = ray_service(objects)["rayClusterConfig"]["authOptions"]["secretName"]
    asked |= {(token, "auth_token")}  # the key that KubeRay reads
    asked |= {
        (entry["name"], entry["key"])
        for o in of_kind(objects, "TriggerAuthentication")
        for entry in o["spec"]["secretTargetRef"]
    }
    found = [f"no Secret {name} with a key {key}" for name, key in sorted(asked) if key not in made.get(name, ())]
    return found + [f"Secret {s['metadata']['name']} stands in a manifest" for s in of_kind(objects, "Secret")]


def _references(node: Any) -> Iterator[tuple[str, str]]:
    """Secrets and their keys, wherever environment variables and volumes name them."""
    if isinstance(node, list):
        for item in node:
            yield from _references(item)
    elif isinstance(node, dict):
        if "secretKeyRef" in node:
            yield node["secretKeyRef"]["name"], node["secretKeyRef"]["key"]
        if "secretName" in node and "items" in node:
            for item in node["items"]:
                yield node["secretName"], item["key"]
        for value in node.values():
            yield from _references(value)


def ending_problems(objects: list[Object]) -> list[str]:
    """Pods that are killed before they have handed over what they do."""
    found = []
    for name, template in pods(objects):
        grace_s = template["spec"].get("terminationGracePeriodSeconds", 30)
        for container in template["spec"]["containers"]:
            needs_s = _hook_s(container) + _drain_s(container)
            if container["name"] != "demo-model" and grace_s < needs_s:
                found.append(f"{name}: killed after {grace_s} s, but it takes {needs_s:g} s to leave")
    head, *workers = groups(objects)
    leaving_s = [_hook_s(group["template"]["spec"]["containers"][0]) for group in workers]
    drain_s = Engine._deployment_config.graceful_shutdown_timeout_s
    if min(leaving_s) <= drain_s:
        found.append(f"engines get {min(leaving_s):g} s, but Serve gives each {drain_s:g} s to finish")
    if _hook_s(head["template"]["spec"]["containers"][0]) < max(leaving_s):
        found.append(f"the head ends before the others have left, which takes {max(leaving_s):g} s")
    return found


def _hook_s(container: Object) -> float:
    """How long a container's preStop hook takes at most."""
    hook = container.get("lifecycle", {}).get("preStop", {})
    if "sleep" in hook:
        return float(hook["sleep"]["seconds"])
    line = hook.get("exec", {}).get("command", [])
    return float(after(line, "--within") or 0.0)


def _drain_s(container: Object) -> float:
    """How long a gateway takes after SIGTERM; for Ray a moment."""
    line = words(container)
    if "folkmoot.gateway" in line:
        return float(after(line, "--shutdown-s") or 0.0) + CUT_S
    return 5.0 if container["name"].startswith("ray-") else 0.0


def hardening_problems(objects: list[Object]) -> list[str]:
    """Pods that could do more than they need."""
    found = []
    for name, template in pods(objects):
        spec = template["spec"]
        context = spec.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            found.append(f"{name}: may run as root")
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            found.append(f"{name}: no seccomp profile")
        if spec.get("automountServiceAccountToken") is not False and name != "head":  # its autoscaler asks for pods
            found.append(f"{name}: has a token for the API server")
    found += [problem for name, container in containers(objects) for problem in _container_problems(name, container)]
    autoscaler = ray_service(objects)["rayClusterConfig"]["autoscalerOptions"]
    return [*found, *_container_problems("autoscaler", autoscaler)]


def _container_problems(name: str, container: Object) -> list[str]:
    context = container.get("securityContext", {})
    sound = {
        "may gain rights": context.get("allowPrivilegeEscalation") is False,
        "may write its root file system": context.get("readOnlyRootFilesystem") is True,
        "keeps capabilities": context.get("capabilities") == {"drop": ["ALL"]},
        "asks for nothing": {"cpu", "memory"} <= set(container.get("resources", {}).get("requests", {})),
        "has no limit of memory": "memory" in container.get("resources", {}).get("limits", {}),
    }
    return [f"{name}: {problem}" for problem, is_sound in sound.items() if not is_sound]


def reference_problems(objects: list[Object]) -> list[str]:
    """Selectors that select nothing, targets, volumes and claims that are not there."""
    found = []
    names = {(o["kind"], o["metadata"]["name"]) for o in objects}
    for o in of_kind(objects, "PodDisruptionBudget", "PodMonitor", "NetworkPolicy"):
        selector = o["spec"].get("selector", o["spec"].get("podSelector"))
        if not matching(objects, selector):
            found.append(f"{o['kind']} {o['metadata']['name']} selects no pod")
    for o in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        if ("Deployment", o["spec"]["scaleTargetRef"]["name"]) not in names:
            found.append(f"{o['kind']} {o['metadata']['name']} scales nothing")
    for name, template in pods(objects):
        claims = [v["persistentVolumeClaim"]["claimName"] for v in _volumes(template) if "persistentVolumeClaim" in v]
        found += [f"{name}: no claim {c}" for c in claims if ("PersistentVolumeClaim", c) not in names]
        have = {v["name"] for v in _volumes(template)} | _templates_of(objects, name)
        for container in template["spec"]["containers"]:
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            found += [f"{name}: no volume {volume}" for volume in sorted(mounted - have)]
    if wrong := [o["metadata"]["name"] for o in objects if o["metadata"].get("namespace", "") not in ("folkmoot", "")]:
        found.append(f"not in the namespace: {wrong}")
    return found


def _volumes(template: Object) -> list[Object]:
    volumes: list[Object] = template["spec"].get("volumes", [])
    return volumes


def _templates_of(objects: list[Object], name: str) -> set[str]:
    sets = [o for o in of_kind(objects, "StatefulSet") if o["metadata"]["name"] == name]
    return {claim["metadata"]["name"] for o in sets for claim in o["spec"]["volumeClaimTemplates"]}


def _selected(objects: list[Object], wanted: dict[str, str]) -> list[Object]:
    return matching(objects, {"matchLabels": wanted})


def matching(objects: list[Object], selector: Object) -> list[Object]:
    """The pod templates that a selector means."""
    return [template for _, template in pods(objects) if selects(selector, labels(template))]


def selects(selector: Object, have: dict[str, str]) -> bool:
    """Whether a label selector selects these labels."""
    equal = all(have.get(name) == value for name, value in selector.get("matchLabels", {}).items())
    return equal and all(have.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", []))


CHECKS = (
    *(
        command_problems,
        file_problems,
        image_problems,
        port_problems,
        probe_problems,
        variable_problems,
        secret_problems,
    ),
    *(serve_problems, ending_problems, hardening_problems, reference_problems),
)
