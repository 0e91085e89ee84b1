"""What the documents say exists: commands and their options, make targets, linked files; code in them compiles."""

import re
import shlex
from pathlib import Path

import click
import pytest

from folkmoot.cluster.cli import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(path.read_text()) if name == language]


def commands(path: Path) -> list[list[str]]:
    """Lines of shell blocks that call folkmoot, without comments."""
    lines = [line for text in (*blocks(path, ""), *blocks(path, "sh")) for line in text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("folkmoot ")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_commands_parse(path: Path) -> None:
    """Every `folkmoot ...` line has a known command and known options with values that parse."""
    assert isinstance(main, click.Group)
    for words in commands(path):
        command = main.get_command(click.Context(main), words[1])
        assert command is not None, words
        arguments = [w.replace("PATH", str(ROOT)).replace("~/", "/") for w in words[2:]]
        command.make_context(words[1], arguments, resilient_parsing=False)


def test_the_readme_shows_commands() -> None:
    assert {words[1] for words in commands(ROOT / "README.md")} >= {"up", "chat", "generate", "status", "bench", "down"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_modules_exist(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), target
    for name in re.findall(r"python -m ((?:benchmarks|folkmoot)[\w.]*)", text):
        base = ROOT / name.replace(".", "/")
        assert base.with_suffix(".py").exists() or (base / "__main__.py").exists(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in re.findall(r"`make ([a-z-]+)", path.read_text()):
        assert name in targets, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_python_compiles(path: Path) -> None:
    for text in blocks(path, "python"):
        compile(text, str(path), "exec")


def test_every_module_stands_in_the_architecture() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    for room in ("experts", "cluster", "gateway"):
        for path in (ROOT / "folkmoot" / room).glob("*.py"):
            if not path.name.startswith("__"):
                assert path.name in text, f"{room}/{path.name}"
