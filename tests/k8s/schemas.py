"""Objects against the schemas of their kinds: Kubernetes' own, and KubeRay's and KEDA's from their CRDs."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.k8s.manifests import ROOT, Object

KUBERNETES = "1.34"
CRDS = Path(os.environ.get("FOLKMOOT_CRDS", ROOT.parent / "shared/crds"))
CRD_FILES = {
    "RayService": "ray.io_rayservices.yaml",
    "ScaledObject": "keda.sh_scaledobjects.yaml",
    "TriggerAuthentication": "keda.sh_triggerauthentications.yaml",
}
WITHOUT_SCHEMA = frozenset({"PodMonitor", "PrometheusRule"})
"""Kinds of others, of which no definition is at hand."""


def core_problems(objects: list[Object]) -> list[str]:
    """What is wrong with objects of Kubernetes' own kinds; unknown fields too."""
    found = []
    for o in objects:
        if o["kind"] not in CRD_FILES and o["kind"] not in WITHOUT_SCHEMA and (problem := _core_problem(json.dumps(o))):
            found.append(f"{_name(o)}: {problem}")
    return found


@functools.cache
def _core_problem(text: str) -> str:
    """The same object in several overlays is looked at once, which takes 0.1 s."""
    try:
        kubernetes_validate.validate(json.loads(text), KUBERNETES, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as e:
        return f"{'/'.join(map(str, getattr(e, 'path', [])))}: {getattr(e, 'message', e)}"
    return ""


def crd_problems(objects: list[Object]) -> list[str]:
    """What is wrong with objects of the CRDs' kinds; unknown fields too. Needs the folder CRDS."""
    found = []
    for o in objects:
        if o["kind"] in CRD_FILES:
            validator = _validator(o["kind"], o["apiVersion"])
            found += [f"{_name(o)}: {e.json_path}: {e.message}" for e in validator.iter_errors(o)]
    return found


@functools.cache
def _validator(kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    definition = yaml.load((CRDS / CRD_FILES[kind]).read_text(), Loader=yaml.CSafeLoader)["spec"]
    group, _, version = api_version.partition("/")
    assert (definition["group"], definition["names"]["kind"]) == (group, kind)
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in definition["versions"] if v["name"] == version and v["served"])
    return jsonschema.Draft202012Validator(_strict(schema, at_top=True))


def _strict(schema: Any, *, at_top: bool = False) -> Any:
    """The same schema that refuses what it does not know, where it does not say that anything goes. A CRD leaves
    metadata to Kubernetes."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: _strict(value) for key, value in schema.items() if key not in ("default", "format")}
    properties = changed.get("properties")
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(properties, dict) and schema.get("type") == "object" and not open_ended:
        changed["additionalProperties"] = False
    if at_top:
        properties["metadata"] = {"type": "object", "required": ["name"]}
    return changed


def _name(o: Object) -> str:
    return f"{o['kind']} {o['metadata']['name']}"
