"""Seeds: warm parents that fork warm parents, so that who starts one cluster after another imports vLLM once.

For tests and benchmarks, which start dozens, on one node. Where FOLKMOOT_WARM_SEEDS names the socket of a `Seeds`, a
warm parent does not import vLLM: it asks there for a seed, has it fork, and only watches over the fork, which listens
in its stead and ends with it. There is one seed for each environment as an import may read it, started when it is first
asked for.

A seed does not see what changes in the code after its start. And a fork is no descendant of who asked for it.
"""

import contextlib
import itertools
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from setproctitle import getproctitle

from folkmoot import logs
from folkmoot.experts import warm
from folkmoot.experts.handshake import check_user

log = logging.getLogger(__name__)

READ_ON_IMPORT = ("GOMP_", "OMP_", "KMP_", "MKL_", "LD_", "PYTHON", "VLLM_", "TORCH", "CUDA_", "HF_", "SPT_")
"""How the names of variables begin that an import may read for good."""
ASK_TIMEOUT_S = 10.0
IMPORT_TIMEOUT_S = 300.0
END_TIMEOUT_S = 5.0


class Seeds:
    """Starts seeds in `directory`, whose path is short enough for sockets, for all who ask at `path`. They end when
    this context or this process does, however that happens."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "seeds.sock"
        self.started: dict[tuple[tuple[str, str], ...], tuple[Path, subprocess.Popen[bytes]]] = {}
        self._directory, self._numbers = directory, itertools.count()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._run, name="seeds", daemon=True)

    def __enter__(self) -> "Seeds":
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for _, process in self.started.values():
            process.terminate()
            process.wait()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # shut down
            try:
                with sock:
                    check_user(sock)
                    control = warm.Control(sock)
                    if (request := control.receive(ASK_TIMEOUT_S)) is not None:
                        control.send({"seed": str(self._seed(request["environment"]))})
            except Exception:  # whoever asks next shall have an answer
                log.exception("a request for a seed could not be answered")

    def _seed(self, environment: Mapping[str, str]) -> Path:
        key = tuple(sorted(item for item in environment.items() if _is_read(item[0])))
        if key not in self.started or self.started[key][1].poll() is not None:
            path = self._directory / f"{next(self._numbers)}.sock"
            command = [sys.executable, "-m", "folkmoot.experts.warm", "--socket", str(path), "--with-parent"]
            ours = {name: value for name, value in os.environ.items() if not _is_read(name) and name != warm.SEEDS}
            with path.with_suffix(".log").open("ab") as out:
                process = subprocess.Popen(
                    command,
                    env={**ours, **dict(key)},
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            self.started[key] = path, process
        return self.started[key][0]


def _is_read(name: str) -> bool:
    return name.startswith(READ_ON_IMPORT)


def follow(seeds: Path, socket_path: Path, owner: Any = None) -> int:
    """Have a fork of the right seed be the warm parent at `socket_path`, until SIGTERM, or until `owner`, anything with
    a fileno, says something or is gone: 0. Or until the fork is gone: 1. This process's output is the fork's log too.

    Raises WarmParentError where there is no seed.
    """
    spec = {"socket": str(socket_path), "environment": dict(os.environ), "folder": os.getcwd()}
    seed = warm.connect(_ask(seeds), IMPORT_TIMEOUT_S)
    fork = seed.spawn("folkmoot.experts.warm_seed:serve", spec, Path("/proc/self/fd/1").resolve())
    log.info("forked from the seed at %s: %d", seed.socket_path, fork.pid)
    if not fork.is_alive():
        return 1
    with contextlib.suppress(SystemExit):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        watched: Sequence[Any] = [fork.pidfd, *([] if owner is None else [owner])]
        if fork.pidfd in select.select(watched, [], [])[0]:
            return 1
    fork.control.close()
    fork.wait(END_TIMEOUT_S)
    return 0


def _ask(seeds: Path) -> Path:
    """The socket of the seed for this process's environment, which may still import."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(seeds))
            control = warm.Control(sock)
            control.send({"environment": dict(os.environ)})
            answer = control.receive(ASK_TIMEOUT_S)
        except (OSError, EOFError) as e:
            raise warm.WarmParentError(f"{warm.SEEDS}: nobody gives out seeds at {seeds}: {e}") from e
    if answer is None:
        raise warm.WarmParentError(f"{warm.SEEDS}: no answer at {seeds} within {ASK_TIMEOUT_S:g} s")
    return Path(answer["seed"])


def serve(spec: Mapping[str, Any], control: warm.Control) -> None:
    """Entry point in the fork: be a warm parent in the surroundings of who asked."""
    getproctitle()  # finds where a title goes by where the environment lies, which is about to move
    os.environ.clear()
    os.environ.update(spec["environment"])
    os.chdir(spec["folder"])
    logs.set_up("warm")
    warm.serve_forks(Path(spec["socket"]), control)
