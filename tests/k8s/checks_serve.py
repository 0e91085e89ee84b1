"""The Serve config against Serve, our builder, the groups of Ray pods and KEDA: problems in words, or none."""

import importlib
from pathlib import Path

import ray
from pydantic import ValidationError
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from folkmoot.cluster import app
from folkmoot.gateway.keys import LANES, Keys
from tests.k8s.manifests import Object, groups, of_kind, ray_resources, ray_service, serve_config


def serve_problems(objects: list[Object]) -> list[str]:
    """What Serve, our builder or Ray's groups would not take of the config."""
    config = serve_config(objects)
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as e:
        return [str(e)]
    (application,) = config["applications"]
    known = {*ServeDeploySchema.model_fields, *ServeApplicationSchema.model_fields}
    unknown = {*config, *application} - known
    if unknown:  # which Serve passes over in silence
        return [f"Serve knows no {', '.join(sorted(unknown))}"]
    module, _, name = application["import_path"].partition(":")
    if getattr(importlib.import_module(module), name, None) is not app.build:
        return [f"{application['import_path']} builds no application"]
    try:
        app.build(application["args"])
        options = app.parse(application["args"])
    except ValueError as e:
        return [str(e)]
    return [*_placement_problems(objects, options), *_cluster_problems(objects, options)]


def _placement_problems(objects: list[Object], options: app.AppOptions) -> list[str]:
    """Parts of the cluster for which no group of Ray's pods has room."""
    found = []
    head, *workers = groups(objects)
    if not _has(head, options.router_resources):
        found.append(f"the head does not offer {options.router_resources}")
    engines = [w for w in workers if _has(w, options.engine_resources)]
    hosts = [w for w in workers if _has(w, options.host_resources)]
    if not options.engine_resources or not options.host_resources or any(w in hosts for w in engines):
        found.append("engines and expert hosts do not have groups of their own")
    parts = (("engines", engines, options.engines, 1), ("hosts", hosts, options.hosts or 0, 0))
    for part, of_part, number, spare in parts:
        if sum(w["maxReplicas"] for w in of_part) < number + spare:  # a new engine comes before an old one goes
            found.append(f"{number} {part} have no room: {[w['groupName'] for w in of_part]}")
    gpus = (("engine", engines, options.gpus_per_engine), ("host", hosts, options.gpus_per_host))
    for part, of_part, number in gpus:
        for group in of_part:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            if int(limits.get("nvidia.com/gpu", 0)) != number:
                found.append(f"{group['groupName']}: {limits}, but each {part} gets {number:g} GPUs")
    return found


def _has(group: Object, wanted: dict[str, float]) -> bool:
    return all(ray_resources(group).get(name, 0) >= amount for name, amount in wanted.items())


def _cluster_problems(objects: list[Object], options: app.AppOptions) -> list[str]:
    found = []
    cluster = ray_service(objects)["rayClusterConfig"]
    if cluster["rayVersion"] != ray.__version__:
        found.append(f"rayVersion {cluster['rayVersion']}, but the images have {ray.__version__}")
    for group in groups(objects):
        mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
        if not any(options.model.startswith(f"{mount['mountPath']}/") for mount in mounts):
            found.append(f"{group['groupName']}: {options.model} is on no volume")
        if not group.get("minReplicas", 1) <= group.get("replicas", 1) <= group.get("maxReplicas", 1):
            found.append(f"{group['groupName']}: replicas are not between the least and the most")
    return [*found, *_queue_problems(objects, options)]


def _queue_problems(objects: list[Object], options: app.AppOptions) -> list[str]:
    """KEDA must look at the streams of every lane, by their whole length: entries that were delivered count."""
    expected = {Keys("folkmoot").queue(Path(options.model).name, lane) for lane in LANES}
    found = []
    for scaled in of_kind(objects, "ScaledObject"):
        redis = [t["metadata"] for t in scaled["spec"]["triggers"] if t["type"] == "redis-streams"]
        if (seen := {trigger["stream"] for trigger in redis}) != expected:
            found.append(f"KEDA looks at {sorted(seen)}, but the queues are {sorted(expected)}")
        if any("streamLength" not in trigger or "consumerGroup" in trigger for trigger in redis):
            found.append("KEDA must go by streamLength alone: a consumer group's lag leaves out what was delivered")
        services = {s["metadata"]["name"]: s for s in of_kind(objects, "Service")}
        for trigger in redis:
            host, _, port = trigger["address"].partition(":")
            name, _, rest = host.partition(".")  # KEDA runs in another namespace
            ports = [p["port"] for p in services[name]["spec"]["ports"]] if name in services else []
            if rest != "folkmoot.svc" or int(port) not in ports:
                found.append(f"KEDA asks {trigger['address']}, where nobody is")
    return found
