"""Where a running cluster is written down: one folder a name, under XDG_STATE_HOME/folkmoot.

<root>/<name>/state.json   phase, supervisor's pid, gateway's address
<root>/<name>/lock         held by the supervisor for as long as it lives, whatever kills it
<root>/<name>/logs/        one file a process
<root>/<name>/store/       the embedded request store's data
<root>/<name>.metrics.json where to scrape, as Prometheus' file_sd_configs reads it
<root>/prometheus.yml      a configuration for Prometheus that finds these files of all clusters
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

PROMETHEUS = """\
# Written by `folkmoot up`. prometheus --config.file=THIS FILE scrapes every cluster that runs beside it.
global:
  scrape_interval: 5s
scrape_configs:
  - job_name: folkmoot
    file_sd_configs:
      - files: ["*.metrics.json"]
        refresh_interval: 10s
"""

PHASES = ("starting", "ready", "stopping", "failed")


class AlreadyRunning(RuntimeError):
    """A cluster of this name runs already."""


@dataclass(frozen=True)
class ClusterState:
    """What other commands need to know of a running cluster. `message` says what it is doing, or why it failed."""

    name: str
    phase: str
    pid: int
    message: str = ""
    gateway: str | None = None
    tls: bool = False
    metrics: str | None = None
    """URL for Prometheus, of all processes of this node"""
    store: str | None = None
    """URL of the request store where it is the cluster's own, which has no password"""
    model: str | None = None
    ray_address: str | None = None
    run_dir: str | None = None
    experts: str | None = None
    """in words the dtypes of the experts, where a budget has decided them"""
    timings_s: dict[str, float] | None = None

    def with_(self, **changes: Any) -> "ClusterState":
        """A changed copy."""
        return replace(self, **changes)


def default_root() -> Path:
    """`folkmoot` under XDG_STATE_HOME, which the XDG base directory rules default to ~/.local/state."""
    root = os.environ.get("XDG_STATE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".local" / "state") / "folkmoot"


class StateFolder:
    """The folder of one cluster name."""

    def __init__(self, name: str, root: Path | None = None) -> None:
        self.name = name
        self.path = (root or default_root()) / name
        self._lock_fd: int | None = None

    @property
    def logs(self) -> Path:
        """Log files."""
        return self.path / "logs"

    @property
    def store(self) -> Path:
        """The embedded request store's data."""
        return self.path / "store"

    def acquire(self) -> None:
        """Become the supervisor of this name, and clear what a dead one left. Raises AlreadyRunning."""
        self.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            state = self.read()
            who = f"process {state.pid}, gateway {state.gateway}" if state else "it is starting"
            raise AlreadyRunning(
                f"a cluster named {self.name!r} runs already ({who}): stop it with `folkmoot down"
                f"{'' if self.name == 'default' else f' --name {self.name}'}`, or choose another --name"
            ) from None
        self._lock_fd = fd
        self._file.unlink(missing_ok=True)
        self._scrapes.unlink(missing_ok=True)
        for log in self.logs.glob("*.log"):
            if log.name != "up.log":
                log.unlink()

    def is_held(self) -> bool:
        """Whether a supervisor of this name lives."""
        try:
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def release(self) -> None:
        """Stop being the supervisor; a failure stays to be read, a clean end leaves nothing."""
        self._scrapes.unlink(missing_ok=True)
        state = self.read()
        if state is not None and state.phase != "failed":
            self._file.unlink(missing_ok=True)
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def write(self, state: ClusterState) -> None:
        """Replace the state file in one step."""
        _replace(self._file, json.dumps(asdict(state), indent=2) + "\n")

    def write_scrapes(self) -> None:
        """Tell Prometheus where this cluster's metrics are; nothing where it has none."""
        state = self.read()
        if state is None or state.metrics is None:
            return
        target = state.metrics.removeprefix("http://").partition("/")[0]
        found = [{"targets": [target], "labels": {"cluster": self.name}}]
        _replace(self._scrapes, json.dumps(found, indent=2) + "\n")
        _replace(self.path.parent / "prometheus.yml", PROMETHEUS)

    def read(self) -> ClusterState | None:
        """What was written last; None if nothing was."""
        try:
            return ClusterState(**json.loads(self._file.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @property
    def _file(self) -> Path:
        return self.path / "state.json"

    @property
    def _scrapes(self) -> Path:
        return self.path.parent / f"{self.name}.metrics.json"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
