"""The benchmark's quick preset runs, and writes what others rely on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray.serve")


@pytest.mark.slow
def test_quick_preset(tmp_path: Path) -> None:
    figures = tmp_path / "gateway.json"
    command = [sys.executable, "-m", "benchmarks.gateway", "--quick", "--json", str(figures)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    found = json.loads(figures.read_text())
    for key in ("added_p50_ms", "rate_ratio_to_grpc_aio", "rate_ratio_to_ray_serve", "folkmoot_calls_per_s"):
        assert isinstance(found[key], float)
    assert found["rate_ratio_to_ray_serve"] > 1
    assert "Ray Serve gRPC" in run.stdout
