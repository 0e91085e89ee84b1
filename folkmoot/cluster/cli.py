"""The `folkmoot` command. Each command's --help shows how it is used."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from folkmoot.cluster import cli_admin, cli_batch, cli_experts, cli_keys, cli_simulate, cli_up, interrupts
from folkmoot.cluster.cli_common import (
    F,
    Failure,
    access,
    address_of,
    console,
    gateway_options,
    watch_options,
)
from folkmoot.cluster.placement import PlacementError
from folkmoot.cluster.state_file import AlreadyRunning, StateFolder
from folkmoot.cluster.up_options import StartError
from folkmoot.gateway.client_errors import FolkmootError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="folkmoot")
def main() -> None:
    """Serve mixture-of-experts models with the routed experts outside the engine, as Ray actors.

    \b
    First steps:
      folkmoot demo                         see it work, and survive the loss of an expert host
      folkmoot up --model demo              start a cluster here; Ctrl-C ends it
      folkmoot chat                         talk to it (in another terminal)
      folkmoot status --watch               what runs where, and how loaded it is
      folkmoot scale hosts 4                change it while it runs; also: replicas, engines
      folkmoot batch submit prompts.jsonl --wait     run a file of prompts
      folkmoot keys create --help           let others in, each with a key
    """


for command in (
    *(cli_up.up, cli_up.down),
    *(cli_admin.scale, cli_admin.drain, cli_admin.replicate, cli_admin.roll),
    *(cli_batch.batch, cli_keys.keys, cli_simulate.simulate, cli_experts.experts),
):
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


@main.command()
@click.option("--json", "as_json", is_flag=True, help="the whole document, for programs; with --watch one a line")
@watch_options
@gateway_options
def status(gateway: str | None, name: str, state_dir: Path | None, as_json: bool, watch: bool, every_s: float) -> None:
    """Show engines, expert hosts, the expert map and the load.

    With --watch it stays, and shows also what is done a second: tokens by each engine, rows by each host. q or Ctrl-C
    leaves it. Where its output is no terminal, it prints one view below the other.

    \b
    Examples:
      folkmoot status
      folkmoot status --watch --every 1
      folkmoot status --json | jq .map.version
    """
    from folkmoot.cluster import live, status_view

    with _client(gateway, name, state_dir) as client:
        if not watch:
            document = {**status_view.fetch(client), "metrics": _metrics_at(gateway, name, state_dir)}
            if as_json:
                click.echo(json.dumps(document, indent=2))
            else:
                status_view.show(console, document)
        elif as_json:
            live.repeat(every_s, lambda: click.echo(json.dumps(status_view.fetch(client))))
        else:
            heard, views = live.LastHeard(lambda: status_view.fetch(client)), status_view.Watch()
            live.watch(console, every_s, lambda: heard.drawn(views.draw))


def _metrics_at(gateway: str | None, name: str, state_dir: Path | None) -> str | None:
    """Where a cluster of this machine offers its metrics."""
    state = StateFolder(name, state_dir).read() if gateway is None else None
    return None if state is None else state.metrics


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
