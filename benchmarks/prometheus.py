"""A real Prometheus that scrapes a running Folkmoot, and the dashboard's panels as it answers them.

The program is Debian's `prometheus` package, found on PATH or in the folder FOLKMOOT_PROMETHEUS.
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

DASHBOARD = Path(__file__).parents[1] / "k8s/components/monitoring/dashboard.json"
RATE_INTERVAL = "5s"
"""What Grafana would put for $__rate_interval, for scrapes a second apart."""
READY_S = 30.0


def find_program(name: str) -> str | None:
    """`prometheus` or `promtool`, if it is at hand."""
    folder = os.environ.get("FOLKMOOT_PROMETHEUS")
    return shutil.which(name, path=f"{folder}{os.pathsep}{os.environ.get('PATH', '')}" if folder else None)


@dataclass(frozen=True)
class Panel:
    """One of the dashboard: its queries, each with the legend's template."""

    row: str
    title: str
    queries: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Series:
    """What a query gave: labels, and (Unix seconds, value) in order."""

    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]


def panels(path: Path = DASHBOARD) -> list[Panel]:
    """All that the dashboard asks, with Grafana's variables put in."""
    found, row = [], ""
    for panel in json.loads(path.read_text())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            continue
        targets = ((t["expr"].replace("$__rate_interval", RATE_INTERVAL), t["legendFormat"]) for t in panel["targets"])
        found.append(Panel(row, panel["title"], tuple(targets)))
    return found


class Prometheus:
    """Scrapes `targets` (HOST:PORT) once a second while the context is open. Its files lie in `folder`."""

    def __init__(self, targets: Sequence[str], folder: Path) -> None:
        """Raises FileNotFoundError where there is no Prometheus."""
        program = find_program("prometheus")
        if program is None:
            raise FileNotFoundError("no prometheus (Debian: apt-get install prometheus)")
        self._program, self._targets, self._folder = program, list(targets), folder
        self._address = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Prometheus":
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "prometheus.yml"
        scrape = {"job_name": "folkmoot", "static_configs": [{"targets": self._targets}]}
        interval = {"scrape_interval": "1s", "scrape_timeout": "1s"}
        config.write_text(json.dumps({"global": interval, "scrape_configs": [scrape]}))  # JSON is YAML
        self._address = f"127.0.0.1:{_free_port()}"
        command = [self._program, f"--config.file={config}", f"--storage.tsdb.path={self._folder / 'data'}"]
        command += [f"--web.listen-address={self._address}", "--log.level=warn"]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._stop()

    def query(self, expression: str) -> list[Series]:
        """As of now."""
        return self._series("query", query=expression)

    def query_range(self, expression: str, begin_s: float, end_s: float, step_s: float = 1.0) -> list[Series]:
        """Over a span of time (Unix seconds), its end included."""
        first_s = end_s - (end_s - begin_s) // step_s * step_s
        return self._series("query_range", query=expression, start=first_s, end=end_s, step=step_s)

    def _series(self, kind: str, **arguments: object) -> list[Series]:
        found = self._get(f"/api/v1/{kind}?{urllib.parse.urlencode(arguments)}")["data"]["result"]
        return [
            Series(one["metric"], tuple((at, float(v)) for at, v in one.get("values") or [one["value"]]))
            for one in found
        ]

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self._address}{path}", timeout=10.0) as reply:
            return json.load(reply)

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline_s = time.monotonic() + READY_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                break
            try:
                if self.query("up"):
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"Prometheus does not come up:\n{(self._folder / 'log').read_text()}")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)


def picture(prometheus: Prometheus, begin_s: float, end_s: float, path: Path) -> dict[str, int]:
    """Draw all panels as they were between two times (Unix seconds); how many series each has, by title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    asked = panels()
    columns = 3
    rows = -(-len(asked) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(6.5 * columns, 2.8 * rows), squeeze=False)
    counts = {}
    for axis, panel in zip(axes.flat, asked, strict=False):
        counts[f"{panel.row}: {panel.title}"] = 0
        for expression, legend in panel.queries:
            for one in prometheus.query_range(expression, begin_s, end_s):
                times, values = zip(*one.points, strict=True)
                axis.plot([at - begin_s for at in times], values, label=_legend(legend, one.labels), linewidth=1)
                counts[f"{panel.row}: {panel.title}"] += 1
        axis.set_title(panel.title, fontsize=9)
        axis.tick_params(labelsize=7)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=5, loc="upper left", ncols=2)
    for axis in axes.flat[len(asked) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return counts


def _legend(template: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return template


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
