"""The commands that change a running cluster: scale, drain, replicate, roll."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from folkmoot.cluster.cli_common import F, Failure, access, address_of, console, gateway_options
from folkmoot.gateway.admin_client import AdminClient
from folkmoot.gateway.client_errors import FolkmootError
from folkmoot.gateway.pb import admin_pb2 as pb


def _waiting(command: F) -> F:
    for option in (
        click.option("--request-id", default="", help="idempotency key: giving the same one again changes nothing"),
        click.option(
            "--timeout",
            "timeout_s",
            type=click.FloatRange(0, min_open=True),
            default=600.0,
            show_default=True,
            help="how many seconds to wait; the operation goes on after that",
        ),
        click.option("--wait/--no-wait", default=True, show_default=True, help="return when it is done, or at once"),
    ):
        command = option(command)
    return gateway_options(command)


@click.command()
@click.argument("target", type=click.Choice(["hosts", "engines", "replicas"]))
@click.argument("count", type=click.IntRange(1))
@_waiting
def scale(target: str, count: int, **where: Any) -> None:
    """Set the number of expert hosts, engines, or replicas of each expert, while requests run.

    More hosts take experts over from those that there are; of fewer, the newest leave, once others have what they held.
    No request fails by it. Replicas of an expert are on different hosts, so there must be at least as many hosts.

    \b
    Examples:
      folkmoot scale hosts 4
      folkmoot scale replicas 2
      folkmoot scale engines 2 --no-wait
    """
    _carry_out(lambda client, request_id: client.scale(target, count, request_id), **where)


@click.command()
@click.argument("host")
@click.option("--force", is_flag=True, help="even if an expert is then without a replica: requests wait for one")
@_waiting
def drain(host: str, force: bool, **where: Any) -> None:
    """Take an expert host out of service for good, while requests run: for maintenance of its node, for instance.

    Other hosts take over its experts first; then it finishes what it was sent, and ends. `folkmoot status` shows the
    names of hosts. A later `folkmoot scale hosts N` starts others in its place.

    \b
    Example:
      folkmoot drain host-2
    """
    _carry_out(lambda client, request_id: client.drain(host, force=force, request_id=request_id), **where)


@click.command()
@click.argument("expert", type=click.IntRange(0))
@click.argument("replicas", type=click.IntRange(1))
@_waiting
def replicate(expert: int, replicas: int, **where: Any) -> None:
    """Set the number of replicas of one EXPERT (its number, in every layer), apart from the others: a hot one, say.

    \b
    Examples:
      folkmoot replicate 5 3            three hosts hold expert 5
      folkmoot replicate 5 1            one does
    """
    _carry_out(lambda client, request_id: client.replicate(expert, replicas, request_id), **where)


@click.command()
@click.argument("target", type=click.Choice(["engines"]))
@_waiting
def roll(target: str, **where: Any) -> None:
    """Replace the engines one by one, while requests run: for a new version of vLLM, or new contents of the checkpoint.

    A new engine is up before an old one is drained, so there must be room for one more.

    \b
    Example:
      folkmoot roll engines
    """
    _carry_out(lambda client, request_id: client.roll_engines(request_id), **where)


def _carry_out(
    submit: Callable[[AdminClient, str], pb.Operation],
    *,
    gateway: str | None,
    name: str,
    state_dir: Path | None,
    wait: bool,
    timeout_s: float,
    request_id: str,
) -> None:
    """Submit, and show progress until it has ended."""
    try:
        with AdminClient(gateway or address_of(name, state_dir), reconnect_s=5.0, **access()) as client:
            operation = submit(client, request_id)
            if wait:
                operation = client.wait(operation.request_id, timeout_s, lambda text: console.print(f"  {text}"))
    except FolkmootError as e:
        raise Failure(f"{e.code}: {e}") from e
    if operation.state == pb.FAILED:
        raise Failure(operation.message)
    if operation.state == pb.SUCCEEDED:
        console.print(f"done: {operation.message}")
    elif wait:
        raise Failure(f"not done within {timeout_s:.0f} s, and still under way: {operation.message}")
    else:
        console.print(f"under way as {operation.request_id}: {operation.message}")
