"""`folkmoot up` and `folkmoot down`."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from folkmoot import logs
from folkmoot.cluster import interrupts
from folkmoot.cluster.cli_common import Failure, console, name_options, require_file
from folkmoot.cluster.cli_up_options import up_options
from folkmoot.cluster.placement import PlacementError
from folkmoot.cluster.state_file import AlreadyRunning, ClusterState, StateFolder
from folkmoot.cluster.up_options import StartError, UpOptions
from folkmoot.gateway.listen import is_local
from folkmoot.gateway.metrics_server import OFF

log = logging.getLogger(__name__)

DETACH_POLL_S = 0.1
DOWN_TIMEOUT_S = 60.0


@click.command()
@up_options
@click.option("--detach", is_flag=True, help="run in the background; return when it is ready")
@click.option("--timings", is_flag=True, help="say when each part was ready")
@name_options
def up(detach: bool, timings: bool, **options: Any) -> None:
    """Start a cluster: request store, gateway, Ray, expert hosts, engines.

    Runs in the foreground, and ends everything with Ctrl-C.

    \b
    Examples:
      folkmoot up --model demo
      folkmoot up --model demo --hosts 4 --replicas 2        lose any host, and go on
      folkmoot up --model ~/models/mixtral --experts-per-host 1 --detach
      folkmoot up --model ~/models/mixtral --engines 0..4    as many engines as work asks for
      folkmoot up --model ~/models/mixtral --expert-dtype auto:0.4 --expert-loads experts.json
      folkmoot up --model ~/models/scout --address auto --redis redis://store:6379
      folkmoot up --model demo --listen 0.0.0.0:50051 --require-keys --tls-cert tls.crt --tls-key tls.key
    """
    for name in ("engines", "hosts"):
        if (span := options[name]) is not None:
            options |= {name: span.least, f"most_{name}": None if span.least == span.most else span.most}
    chosen = UpOptions(**{**options, "rebalance": options["rebalance"] == "on"})
    if chosen.hosts is not None and chosen.experts_per_host is not None:
        raise click.UsageError("--hosts and --experts-per-host exclude each other")
    if chosen.host_groups and (options["hosts"] is not None or chosen.experts_per_host is not None):
        raise click.UsageError("--host-group excludes --hosts and --experts-per-host")
    if (chosen.tls_cert is None) != (chosen.tls_key is None) or (chosen.tls_client_ca and not chosen.tls_cert):
        raise click.UsageError("--tls-cert and --tls-key go together, and --tls-client-ca needs them")
    for path in filter(None, (chosen.tls_cert, chosen.tls_key, chosen.tls_client_ca)):
        require_file(path)
    if detach:
        _print_ready(_run_detached(chosen), chosen, timings)
    else:
        _run_foreground(chosen, timings)


def _run_foreground(options: UpOptions, timings: bool) -> None:
    """Start, say so, watch until a signal, and end everything, whatever happens."""
    from folkmoot.cluster.launch import Supervisor  # it brings what only who starts a cluster needs

    os.environ.update(logs.variables(options.log_format, options.log_level))
    if is_logged := options.log_format == "json":
        logs.set_up("up")
    progress = _Progress(is_logged)
    supervisor = Supervisor(options, progress.tell)
    failure: str | None = "it ended unexpectedly"
    interrupts.raise_on_signals()
    try:
        with progress:
            state = supervisor.start()
        if is_logged:
            log.info("ready: model %s, gateway %s", state.model, state.gateway)
        else:
            _print_ready(state, options, timings)
        failure = None
        supervisor.watch()
    except interrupts.Interrupted:
        failure = None
        progress.tell("stopping")
    except (StartError, AlreadyRunning, PlacementError, RuntimeError, OSError) as e:
        failure = str(e)
        raise Failure(str(e)) from e
    finally:
        interrupts.ignore_signals()
        supervisor.stop(failure)


def _run_detached(options: UpOptions) -> ClusterState:
    """Start `folkmoot up` in the background, and wait until it is ready."""
    folder = StateFolder(options.name, options.state_dir)
    if folder.is_held():
        folder.acquire()  # says who holds it
    folder.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = folder.logs / "up.log"
    arguments = without_redis([a for a in sys.argv[1:] if a != "--detach"])
    environment = os.environ if options.redis is None else {**os.environ, "FOLKMOOT_REDIS": options.redis}
    with open(log, "wb") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "folkmoot.cluster.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=environment,
        )
    interrupts.raise_on_signals()
    try:
        with _Progress() as progress:
            while child.poll() is None:
                state = folder.read()
                if state is not None and state.pid == child.pid:
                    if state.phase == "ready":
                        return state
                    if state.phase == "starting":
                        progress.tell(state.message)
                time.sleep(DETACH_POLL_S)
    except interrupts.Interrupted:
        child.terminate()
        child.wait()
        raise Failure("interrupted; nothing is left running") from None
    state = folder.read()
    message = state.message if state is not None and state.pid == child.pid else log.read_text(errors="replace").strip()
    raise Failure(f"{message}\n(log: {log})")


def without_redis(arguments: list[str]) -> list[str]:
    """The command line without the store's URL, which may hold a password, and is handed on in the environment."""
    kept, is_url = [], False
    for word in arguments:
        if not is_url and word != "--redis" and not word.startswith("--redis="):
            kept.append(word)
        is_url = not is_url and word == "--redis"
    return kept


def _print_ready(state: ClusterState, options: UpOptions, timings: bool) -> None:
    suffix = "" if state.name == "default" else f" --name {state.name}"
    console.print(f"[bold green]ready[/]: model {state.model}, gateway {state.gateway}")
    if state.experts is not None:
        console.print(f"  experts: {state.experts}")
    console.print(f'  folkmoot generate{suffix} "The capital of France is"')
    console.print(f"  folkmoot status{suffix}")
    if state.metrics is not None:
        console.print(f"  metrics for Prometheus: {state.metrics}")
    _say_who_may_call(options)
    if timings and state.timings_s:
        console.print("  ready after (s): " + ", ".join(f"{part} {t:.1f}" for part, t in state.timings_s.items()))


def _say_who_may_call(options: UpOptions) -> None:
    """Whom the gateway lets in, and what is not as safe as it could be."""
    if options.require_keys:
        console.print("  callers need an API key: folkmoot keys create --help")
    elif options.tls_client_ca is not None:
        console.print("  callers need a certificate")
    elif is_local(options.listen):
        console.print("  callers need no API key, so it listens on loopback only; to let others in: --require-keys")
    else:
        console.print(f"[bold red]  INSECURE: whoever reaches {options.listen} may use and change this cluster[/]")
    if options.metrics != OFF and not is_local(options.metrics):
        console.print(f"[bold red]  metrics can be read by whoever reaches {options.metrics}[/]")
    if not is_local(options.listen) and options.tls_cert is None:
        console.print("[bold red]  no TLS: prompts, answers and keys can be read on their way[/]")


class _Progress:
    """A spinner with the elapsed time on a terminal; elsewhere a line a change, of percentages one in two seconds, in
    the log where `is_logged`."""

    def __init__(self, is_logged: bool = False) -> None:
        self._began = time.monotonic()
        self._is_logged = is_logged
        self._status = console.status("starting") if console.is_terminal and not is_logged else None
        self._active = False
        self._last, self._printed_at = "", 0.0

    def __enter__(self) -> "_Progress":
        self._active = True
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._active = False
        if self._status is not None:
            self._status.stop()

    def tell(self, message: str) -> None:
        elapsed = f"{time.monotonic() - self._began:5.1f} s"
        if self._status is not None and self._active:
            self._status.update(f"{elapsed}  {message}")
        elif message != self._last and ("%" not in message or time.monotonic() - self._printed_at > 2):
            self._printed_at = time.monotonic()
            if self._is_logged:
                log.info("%s", message)
            else:
                console.print(f"{elapsed}  {message}")
        self._last = message


@click.command()
@name_options
def down(name: str, state_dir: Path | None) -> None:
    """Stop a cluster, and wait until all its processes are gone."""
    folder = StateFolder(name, state_dir)
    state = folder.read()
    if not folder.is_held():
        console.print(f"no cluster named {name!r} runs")
        return
    if state is None:
        raise Failure(f"the cluster {name!r} is just starting; try again in a moment")
    from folkmoot.cluster import processes

    with console.status("stopping") if console.is_terminal else interrupts.nothing():
        processes.kill([state.pid], interrupts.SIGTERM)
        if processes.wait_gone([state.pid], DOWN_TIMEOUT_S):
            processes.kill([state.pid])
            raise Failure(f"process {state.pid} did not stop within {DOWN_TIMEOUT_S:.0f} s, and was killed")
    console.print("stopped")
