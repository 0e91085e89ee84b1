"""`folkmoot up` and `folkmoot down`."""

import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from folkmoot import logs
from folkmoot.cluster import host_groups, interrupts
from folkmoot.cluster.cli_common import HOSTS, SPAN, Failure, console, name_options, require_file
from folkmoot.cluster.launch import Supervisor
from folkmoot.cluster.placement import PlacementError
from folkmoot.cluster.state_file import AlreadyRunning, ClusterState, StateFolder
from folkmoot.cluster.up_options import StartError, UpOptions
from folkmoot.experts import expert_dtype
from folkmoot.gateway.metrics_server import OFF
from folkmoot.gateway.settings import is_local

log = logging.getLogger(__name__)

DETACH_POLL_S = 0.1
DOWN_TIMEOUT_S = 60.0
PEM = click.Path(resolve_path=True, path_type=Path)


def _checked_weights(_context: click.Context, _option: click.Parameter, text: str) -> str:
    from folkmoot.gateway.settings import parse_weights

    try:
        parse_weights(text)
    except ValueError as e:
        raise click.BadParameter(str(e)) from e
    return text


def _checked_metrics(_context: click.Context, _option: click.Parameter, text: str) -> str:
    if not re.fullmatch(r"off|.+:\d{1,5}", text):
        raise click.BadParameter(f"{text!r} is neither HOST:PORT nor off")
    return text


def _checked_groups(
    _context: click.Context, _option: click.Parameter, texts: tuple[str, ...]
) -> tuple[host_groups.HostGroup, ...]:
    try:
        return tuple(host_groups.parse(text) for text in texts)
    except ValueError as e:
        raise click.BadParameter(str(e)) from e


@click.command()
@click.option("--model", required=True, metavar="PATH|demo", help='checkpoint folder (Hugging Face layout), or "demo"')
@click.option(
    "--engines",
    type=SPAN,
    default=str(UpOptions.engines),
    show_default=True,
    help="vLLM engines; with MIN..MAX (0..4) as many as the work that is owed asks for, one to begin with",
)
@click.option(
    "--idle-s",
    type=click.FloatRange(0),
    default=UpOptions.idle_s,
    show_default=True,
    help="with --engines 0..MAX: the last engine stays for so long after the last interactive request",
)
@click.option(
    "--hosts",
    type=HOSTS,
    help="expert hosts to spread the experts over; with MIN..MAX more come when the busiest is the bottleneck  "
    "[default: 2, or as many as --replicas]",
)
@click.option(
    "--experts-per-host",
    type=click.IntRange(1),
    metavar="K",
    help="instead of --hosts: experts (of every layer) a host holds",
)
@click.option(
    "--host-group",
    "host_groups",
    multiple=True,
    callback=_checked_groups,
    metavar="N:cpu=C,memory=SIZE",
    help="instead of --hosts, and repeatable: N expert hosts with C cores and room for SIZE (as 8GiB) of experts each; "
    "each gets its share of them by its cores, or by speed=S",
)
@click.option(
    "--replicas",
    type=click.IntRange(1),
    help="hosts that can run each expert; any but one may die  [default: all hosts where --share-weights makes that "
    "cost no memory (one node, a CPU), else 1]",
)
@click.option(
    "--share-weights/--no-share-weights",
    default=UpOptions.share_weights,
    help="the expert hosts of a node keep experts in memory that they share, once a node: replicas cost no memory, and "
    "a host that is started again finds its experts there  [default: on a CPU]",
)
@click.option(
    "--templates/--no-templates",
    default=UpOptions.templates,
    help="keep a process for each expert host that has loaded its experts, so that its next life is forked from that "
    "within milliseconds; without shared weights it holds a copy of them  [default: where weights are shared]",
)
@click.option(
    "--placement",
    type=click.Choice(["spread", "pack"]),
    default=UpOptions.placement,
    show_default=True,
    help="hosts over nodes",
)
@click.option(
    "--listen",
    default=UpOptions.listen,
    show_default=True,
    metavar="HOST:PORT",
    help="the gateway's address; port 0 takes a free one",
)
@click.option("--require-keys", is_flag=True, help="serve only who sends an API key; `folkmoot keys` makes them")
@click.option(
    "--insecure", is_flag=True, help="serve whoever comes, also where --listen is an address others can reach"
)
@click.option("--tls-cert", type=PEM, metavar="FILE", help="certificate chain (PEM): the gateway speaks TLS")
@click.option("--tls-key", type=PEM, metavar="FILE", help="its private key; both are read again when they change")
@click.option("--tls-client-ca", type=PEM, metavar="FILE", help="CA of clients' certificates: others are not let in")
@click.option(
    "--metrics",
    default=UpOptions.metrics,
    show_default=True,
    metavar="HOST:PORT|off",
    callback=_checked_metrics,
    help="where each node answers Prometheus, for all its processes; port 0 takes a free one",
)
@click.option(
    "--redis",
    metavar="URL",
    envvar="FOLKMOOT_REDIS",
    help="request store (Redis 7+ or Valkey); better by environment variable FOLKMOOT_REDIS, where it has a password  "
    "[default: an embedded one]",
)
@click.option(
    "--address", metavar="ADDRESS", help='join a running Ray cluster ("auto" or HOST:PORT)  [default: a local Ray]'
)
@click.option(
    "--max-model-len", type=click.IntRange(2), help="longest prompt and answer in tokens  [default: the model's]"
)
@click.option(
    "--max-num-seqs",
    type=click.IntRange(1),
    default=UpOptions.max_num_seqs,
    show_default=True,
    help="requests an engine runs at once",
)
@click.option(
    "--max-batch-seqs",
    type=click.IntRange(1),
    help="of them batch requests  [default: three quarters of --max-num-seqs]",
)
@click.option(
    "--batch-rows",
    type=click.IntRange(0),
    default=UpOptions.batch_rows,
    show_default=True,
    help="batch requests that take part in a step beside interactive ones; the others wait, and keep their memory",
)
@click.option(
    "--batch-prompt-tokens",
    type=click.IntRange(1),
    default=UpOptions.batch_prompt_tokens,
    show_default=True,
    help="tokens of batch prompts that begin in one step",
)
@click.option(
    "--tenant-weights",
    metavar="NAME=WEIGHT,...",
    default=UpOptions.tenant_weights,
    callback=_checked_weights,
    help="shares of each lane, by tokens; 1 for who is not named",
)
@click.option("--dtype", default=UpOptions.dtype, show_default=True, help="auto, bfloat16, float16 or float32")
@click.option(
    "--expert-dtype",
    type=click.Choice(expert_dtype.NAMES),
    default=UpOptions.expert_dtype,
    show_default=True,
    help="what expert hosts quantise experts to while they load them; kept beside the checkpoint for the next start",
)
@click.option("--device", default=UpOptions.device, show_default=True, help="cpu or cuda")
@click.option(
    "--kv-cache-gib",
    type=float,
    default=UpOptions.kv_cache_gib,
    show_default=True,
    help="KV cache of each engine, on a CPU",
)
@click.option("--seed", type=int, default=UpOptions.seed, show_default=True)
@click.option(
    "--transport",
    type=click.Choice(["auto", "shm", "tcp"]),
    default=UpOptions.transport,
    show_default=True,
    help="how rows travel",
)
@click.option(
    "--combine",
    type=click.Choice(["rows", "sum"]),
    default=UpOptions.combine,
    show_default=True,
    help="rows: the answer does not depend on the placement; sum: fewer bytes come back",
)
@click.option(
    "--stall-s",
    type=click.FloatRange(0.05, 10.0),
    default=UpOptions.stall_s,
    show_default=True,
    help="an expert host that is silent for this long, and four times what it lately took for as many rows, counts as "
    "stalled: its rows go to a replica, and it is replaced. Lower: shorter pauses; higher: safer on a busy machine. "
    "The last replica of an expert is given 10 s",
)
@click.option(
    "--rebalance",
    type=click.Choice(["off", "on"]),
    default="on" if UpOptions.rebalance else "off",
    show_default=True,
    help="give hot experts extra replicas on hosts that are less busy, while requests run (docs/balance.md)",
)
@click.option(
    "--spare-experts",
    type=click.IntRange(1),
    default=UpOptions.spare_experts,
    show_default=True,
    metavar="K",
    help="with --rebalance: extra replicas that a host may hold in each layer, beyond its experts",
)
@click.option(
    "--load-half-life-s",
    type=click.FloatRange(0.5, 86400.0),
    default=UpOptions.load_half_life_s,
    show_default=True,
    help="after so long rows count half in the load of an expert; balance is looked at twice in that time",
)
@click.option(
    "--no-replica-timeout-s",
    type=click.FloatRange(0.1),
    default=UpOptions.no_replica_timeout_s,
    show_default=True,
    help="how long running requests wait for a replacement when an expert has no live replica; then they end with an "
    "error that says so, and the engine goes on",
)
@click.option(
    "--background-workers/--no-background-workers",
    default=UpOptions.background_workers,
    help="engines' OpenMP workers yield to everything else; quick where only this cluster computes, slow beside other "
    "work  [default: with one engine on a CPU]",
)
@click.option(
    "--cpus-per-host",
    type=float,
    default=UpOptions.cpus_per_host,
    show_default=True,
    help="share of a CPU that Ray reserves for an expert host",
)
@click.option("--gpus-per-host", type=float, default=UpOptions.gpus_per_host, show_default=True)
@click.option(
    "--cpus-per-engine",
    type=float,
    default=UpOptions.cpus_per_engine,
    show_default=True,
    help="share of a CPU that Ray reserves for an engine; what no node has room for makes Ray's autoscaler add one",
)
@click.option("--gpus-per-engine", type=float, default=UpOptions.gpus_per_engine, show_default=True)
@click.option(
    "--max-experts-per-host",
    type=click.IntRange(1),
    metavar="K",
    help="most experts (of every layer) that fit on a host, also when it stands in for another  [default: all]",
)
@click.option(
    "--log-format",
    type=click.Choice(logs.FORMATS),
    default=UpOptions.log_format,
    show_default=True,
    envvar=logs.FORMAT_VARIABLE,
    help="how the lines of all logs look; json: one object a line, for programs",
)
@click.option(
    "--log-level",
    type=click.Choice(logs.LEVELS),
    default=UpOptions.log_level,
    show_default=True,
    envvar=logs.LEVEL_VARIABLE,
    help="the least that is logged",
)
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
