"""The front door's fuzzer, for a few seconds: nothing crashes, hangs or leaks, every answer is a documented status."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import fuzz

ROOT = Path(__file__).parents[2]
DOCUMENTED_ELSEWHERE = {"OK", "CLOSED", "ENDED"}


def test_fuzz(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.fuzz", "--requests", "800", "--seed", "7", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    figures = json.loads(path.read_text())
    assert figures["requests"] == 800
    for name in ("undocumented", "hangs", "crashes", "leaked_tasks", "leaked_fds", "leaked_keys", "bystander_failures"):
        assert figures[name] == 0, name
    assert figures["bystander_served"] > 0
    assert figures["not_sent"] < 30


def test_the_statuses_that_it_takes_are_those_of_the_docs() -> None:
    text = (ROOT / "docs" / "gateway.md").read_text()
    errors = text.partition("## Errors")[2].partition("\n## ")[0]
    for status in fuzz.DOCUMENTED - DOCUMENTED_ELSEWHERE:
        assert f"`{status}`" in errors, status
