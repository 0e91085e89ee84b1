"""The `folkmoot` command. Each command's --help shows how it is used."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from folkmoot.cluster import cli_admin, cli_keys, interrupts
from folkmoot.cluster.cli_common import (
    F,
    Failure,
    access,
    address_of,
    console,
    gateway_options,
    name_options,
    require_file,
)
from folkmoot.cluster.launch import StartError, Supervisor, UpOptions
from folkmoot.cluster.placement import PlacementError
from folkmoot.cluster.state_file import AlreadyRunning, ClusterState, StateFolder
from folkmoot.gateway.client_errors import FolkmootError
from folkmoot.gateway.settings import is_local

DETACH_POLL_S = 0.1
DOWN_TIMEOUT_S = 60.0
PEM = click.Path(resolve_path=True, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="folkmoot")
def main() -> None:
    """Serve mixture-of-experts models with the routed experts outside the engine, as Ray actors.

    \b
    First steps:
      folkmoot demo                         see it work, and survive the loss of an expert host
      folkmoot up --model demo              start a cluster here; Ctrl-C ends it
      folkmoot chat                         talk to it (in another terminal)
      folkmoot status                       what runs where, and how loaded it is
      folkmoot scale hosts 4                change it while it runs; also: replicas, engines
      folkmoot keys create --help           let others in, each with a key
    """


for command in (cli_admin.scale, cli_admin.drain, cli_admin.replicate, cli_admin.roll, cli_keys.keys):
    main.add_command(command)


def _sampling(command: F) -> F:
    for option in (
        click.option("--seed", type=int, help="same seed, same answer"),
        click.option("--stop", multiple=True, metavar="TEXT", help="end where this text comes; may be repeated"),
        click.option("--top-k", type=int, help="only the k likeliest tokens"),
        click.option("--top-p", type=float, help="only the likeliest tokens that sum up to p"),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0: always the likeliest token"),
        click.option("--max-tokens", type=int, default=256, show_default=True),
    ):
        command = option(command)
    return command


def _checked_weights(_context: click.Context, _option: click.Parameter, text: str) -> str:
    from folkmoot.gateway.settings import parse_weights

    try:
        parse_weights(text)
    except ValueError as e:
        raise click.BadParameter(str(e)) from e
    return text


@main.command()
@click.option("--model", required=True, metavar="PATH|demo", help='checkpoint folder (Hugging Face layout), or "demo"')
@click.option("--engines", type=click.IntRange(1), default=UpOptions.engines, show_default=True, help="vLLM engines")
@click.option(
    "--hosts",
    type=click.IntRange(1),
    help="expert hosts to spread the experts over  [default: 2, or as many as --replicas]",
)
@click.option(
    "--experts-per-host",
    type=click.IntRange(1),
    metavar="K",
    help="instead of --hosts: experts (of every layer) a host holds",
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
    "--max-experts-per-host",
    type=click.IntRange(1),
    metavar="K",
    help="most experts (of every layer) that fit on a host, also when it stands in for another  [default: all]",
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
      folkmoot up --model ~/models/scout --address auto --redis redis://store:6379
      folkmoot up --model demo --listen 0.0.0.0:50051 --require-keys --tls-cert tls.crt --tls-key tls.key
    """
    chosen = UpOptions(**options)
    if chosen.hosts is not None and chosen.experts_per_host is not None:
        raise click.UsageError("--hosts and --experts-per-host exclude each other")
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
    progress = _Progress()
    supervisor = Supervisor(options, progress.tell)
    failure: str | None = "it ended unexpectedly"
    interrupts.raise_on_signals()
    try:
        with progress:
            state = supervisor.start()
        _print_ready(state, options, timings)
        failure = None
        supervisor.watch()
    except interrupts.Interrupted:
        failure = None
        console.print("stopping")
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
    if not is_local(options.listen) and options.tls_cert is None:
        console.print("[bold red]  no TLS: prompts, answers and keys can be read on their way[/]")


class _Progress:
    """A spinner with the elapsed time on a terminal; elsewhere a line a change, of percentages one in two seconds."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._status = console.status("starting") if console.is_terminal else None
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
            console.print(f"{elapsed}  {message}")
        self._last = message


@main.command()
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


@main.command()
@click.option("--json", "as_json", is_flag=True, help="the whole document, for programs")
@gateway_options
def status(gateway: str | None, name: str, state_dir: Path | None, as_json: bool) -> None:
    """Show engines, expert hosts, the expert map and the load.

    \b
    Examples:
      folkmoot status
      folkmoot status --json | jq .map.version
    """
    from folkmoot.cluster import status_view

    with _client(gateway, name, state_dir) as client:
        document = status_view.fetch(client)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        status_view.show(console, document)


@main.command()
@click.argument("prompt")
@click.option("--model", default="", help="which model, if several are served")
@click.option("--chat/--raw", "as_chat", default=False, help="wrap the prompt in the model's chat template")
@_sampling
@gateway_options
def generate(
    prompt: str, model: str, as_chat: bool, gateway: str | None, name: str, state_dir: Path | None, **sampling: Any
) -> None:
    """Continue PROMPT, and stream the answer.

    \b
    Examples:
      folkmoot generate "The capital of France is" --max-tokens 20
      folkmoot generate --chat "Who wrote Faust?" --temperature 0.7 --seed 1
    """
    options = {"model": model, **_given(sampling)}
    question = {"messages": [{"role": "user", "content": prompt}]} if as_chat else {"prompt": prompt}
    with _client(gateway, name, state_dir) as client:
        for chunk in client.generate(**question, **options):
            click.echo(chunk.text, nl=False)
        click.echo()


@main.command()
@click.option("--model", default="", help="which model, if several are served")
@click.option("--system", metavar="TEXT", help="what the model is told first")
@_sampling
@gateway_options
def chat(
    model: str, system: str | None, gateway: str | None, name: str, state_dir: Path | None, **sampling: Any
) -> None:
    """Talk to the model; an empty line or Ctrl-D ends it, Ctrl-C cuts an answer short.

    \b
    Example:
      folkmoot chat --system "Answer in one sentence." --temperature 0.7
    """
    messages = [{"role": "system", "content": system}] if system else []
    with _client(gateway, name, state_dir) as client:
        while text := _ask():
            messages.append({"role": "user", "content": text})
            answer = ""
            try:
                for chunk in client.generate(messages=messages, model=model, **_given(sampling)):
                    answer += chunk.text
                    click.echo(chunk.text, nl=False)
            except KeyboardInterrupt:
                pass
            click.echo()
            messages.append({"role": "assistant", "content": answer})


@main.command()
@click.option("--requests", "num_requests", type=click.IntRange(1), default=32, show_default=True)
@click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True, help="requests under way at once")
@click.option("--prompt-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--model", default="", help="which model, if several are served")
@click.option("--json", "as_json", is_flag=True, help="flat JSON, for programs")
@gateway_options
def bench(
    num_requests: int,
    concurrency: int,
    prompt_tokens: int,
    max_tokens: int,
    model: str,
    as_json: bool,
    gateway: str | None,
    name: str,
    state_dir: Path | None,
) -> None:
    """Measure a running cluster: tokens/s, time to first token, time between tokens.

    \b
    Example:
      folkmoot bench --requests 64 --concurrency 16
    """
    from folkmoot.cluster import bench as measure

    address = gateway or address_of(name, state_dir)
    load = measure.Load(num_requests, concurrency, prompt_tokens, max_tokens, model)
    with console.status(f"{num_requests} requests") if console.is_terminal else interrupts.nothing():
        figures = _translated(lambda: measure.run(address, load, **access()))
    if as_json:
        click.echo(json.dumps(figures, indent=2))
    else:
        measure.show(console, load, figures)


@main.command()
@click.option("--hosts", type=click.IntRange(2), default=2, show_default=True)
@click.option("--state-dir", type=click.Path(path_type=Path), help="where state and logs lie")
def demo(hosts: int, state_dir: Path | None) -> None:
    """Real English out of experts in other processes; one of them is killed, and the tokens stay the same.

    Starts a cluster of its own (2 replicas of each expert), asks three questions, kills an expert host in the middle
    of an answer, compares, and cleans up. About a minute; the first time one more, to make the model.
    """
    from folkmoot.cluster import demo as demonstration

    interrupts.raise_on_signals()
    try:
        succeeded = demonstration.run(console, hosts, state_dir)
    except interrupts.Interrupted:
        raise Failure("interrupted; nothing is left running") from None
    except (StartError, AlreadyRunning, PlacementError, FolkmootError) as e:
        raise Failure(str(e)) from e
    sys.exit(0 if succeeded else 1)


class _client:
    """A gRPC client of the chosen gateway, whose errors are shown as one paragraph."""

    def __init__(self, gateway: str | None, name: str, state_dir: Path | None) -> None:
        from folkmoot.gateway.client import Client

        self._client = Client(gateway or address_of(name, state_dir), reconnect_s=5.0, **access())

    def __enter__(self) -> Any:
        return self._client

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._client.close()
        if isinstance(error, FolkmootError):
            raise Failure(f"{error.code}: {error}") from error


def _translated(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    try:
        return work()
    except FolkmootError as e:
        raise Failure(f"{e.code}: {e}") from e


def _given(sampling: dict[str, Any]) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in sampling.items()
        if value not in (None, ())
    }


def _ask() -> str:
    try:
        text: str = console.input("[bold]you:[/] ")
    except (EOFError, KeyboardInterrupt):
        return ""
    return text.strip()


if __name__ == "__main__":
    main()
