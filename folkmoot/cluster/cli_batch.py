"""The commands for batches: submit, status, list, results, cancel, dead-letters."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click

from folkmoot.cluster import batch_view
from folkmoot.cluster.batch_view import ENDED, Watch
from folkmoot.cluster.cli_common import F, Failure, access, address_of, console, gateway_options
from folkmoot.gateway.batch_client import Batches
from folkmoot.gateway.client import Client
from folkmoot.gateway.client_errors import FolkmootError
from folkmoot.gateway.pb import batches_pb2 as pb

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
SECOND_CTRL_C_S = 2.0
RECONNECT_S = 10.0


@click.group()
def batch() -> None:
    """Run a file of prompts, in OpenAI's batch format.

    Each line of the file is a request: {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body":
    {"model": ..., "messages": [...]}}; /v1/completions works too. Each line has exactly one result, in the output file
    or in the error file, whatever dies meanwhile. Batches give way to interactive requests.

    \b
    Examples:
      folkmoot batch submit prompts.jsonl --wait --output answers.jsonl
      folkmoot batch list
      folkmoot batch status batch_1f0c --wait
      folkmoot batch results batch_1f0c --errors
      folkmoot batch cancel batch_1f0c
    """


def _json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="for programs: OpenAI's batch object, and more")(
        command
    )


def _window(_: click.Context, __: click.Parameter, value: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value)
    if found is None:
        raise click.BadParameter("must be a number with s, m, h or d behind it, such as 24h")
    return float(found[1]) * SECONDS[found[2]]


def _metadata(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    if any("=" not in value for value in values):
        raise click.BadParameter("must be KEY=VALUE")
    return {key: value for key, _, value in (one.partition("=") for one in values)}


@batch.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--wait", is_flag=True, help="show progress until it has ended; Ctrl-C leaves the batch running")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="write the answers there; waits")
@click.option("--errors", type=click.Path(dir_okay=False, path_type=Path), help="write the error file there; waits")
@click.option("--batch-id", default="", help="idempotency key: the same id and file again change nothing")
@click.option(
    "--completion-window",
    "window_s",
    default="24h",
    show_default=True,
    metavar="TIME",
    callback=_window,
    help="lines without an answer by then fail with batch_expired; 90s, 30m, 24h, 7d",
)
@click.option(
    "--metadata", multiple=True, metavar="KEY=VALUE", callback=_metadata, help="kept with it; may be repeated"
)
@click.option("--endpoint", default="", help="where given, each line's url must be this one")
@click.option("--tenant", default="", help="whose batch it is")
@_json_option
@gateway_options
def submit(
    file: Path,
    wait: bool,
    output: Path | None,
    errors: Path | None,
    batch_id: str,
    window_s: float,
    metadata: dict[str, str],
    endpoint: str,
    tenant: str,
    as_json: bool,
    **where: Any,
) -> None:
    """Send FILE, and queue its lines.

    \b
    Examples:
      folkmoot batch submit prompts.jsonl
      folkmoot batch submit prompts.jsonl --wait --output answers.jsonl --errors errors.jsonl
      folkmoot batch submit prompts.jsonl --batch-id nightly-2026-11-25 --completion-window 8h
    """
    with _batches(**where) as batches:
        made = batches.create(
            file,
            batch_id=batch_id,
            completion_window_s=window_s,
            endpoint=endpoint,
            metadata=metadata,
            tenant=tenant,
        )
        if wait or output or errors:
            if not as_json:
                click.echo(f"batch {made.id}: {made.total} lines")
            made = _watch(batches, made.id, quiet=as_json)
            for path, of_errors in ((output, False), (errors, True)):
                if path is not None:
                    with path.open("wb") as to:
                        _write(batches, to, made.id, errors=of_errors)
        _show(made, as_json)
    if made.status in ENDED and made.status != pb.COMPLETED:
        sys.exit(1)


@batch.command()
@click.argument("batch_id")
@click.option("--wait", is_flag=True, help="show progress until it has ended")
@_json_option
@gateway_options
def status(batch_id: str, wait: bool, as_json: bool, **where: Any) -> None:
    """Show how far a batch is.

    \b
    Examples:
      folkmoot batch status batch_1f0c
      folkmoot batch status batch_1f0c --json | jq .request_counts
    """
    with _batches(**where) as batches:
        _show(_watch(batches, batch_id, quiet=as_json) if wait else batches.get(batch_id), as_json)


@batch.command(name="list")
@click.option("--most", type=click.IntRange(1), default=20, show_default=True, help="how many, the newest first")
@click.option("--tenant", default="", help="only this tenant's")
@_json_option
@gateway_options
def list_(most: int, tenant: str, as_json: bool, **where: Any) -> None:
    """Show the newest batches.

    \b
    Example:
      folkmoot batch list --most 5
    """
    with _batches(**where) as batches:
        found = batches.latest(most=most, tenant=tenant)
    if as_json:
        click.echo(json.dumps([batch_view.as_json(one) for one in found], indent=2))
    else:
        batch_view.show_list(console, found)


@batch.command()
@click.argument("batch_id")
@click.option("--errors", is_flag=True, help="the error file instead of the answers")
@click.option("--follow", is_flag=True, help="also what is still to come, until the batch has ended")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="into this file  [default: stdout]")
@click.option("--resume", is_flag=True, help="the file has a part of it already: go on after its last whole line")
@gateway_options
def results(batch_id: str, errors: bool, follow: bool, output: Path | None, resume: bool, **where: Any) -> None:
    """Write the results that there are: one JSON object a line, in the order in which they came.

    \b
    Examples:
      folkmoot batch results batch_1f0c > answers.jsonl
      folkmoot batch results batch_1f0c --output answers.jsonl --resume
      folkmoot batch results batch_1f0c --follow | jq -r .custom_id
    """
    if resume and output is None:
        raise click.UsageError("--resume needs --output")
    with _batches(**where) as batches:
        if output is None:
            _write(batches, sys.stdout.buffer, batch_id, errors=errors, follow=follow)
        elif not resume or not output.exists():
            with output.open("wb") as to:
                _write(batches, to, batch_id, errors=errors, follow=follow)
        else:
            with output.open("r+b") as to:
                _write(batches, to, batch_id, errors=errors, follow=follow, line=_whole_lines(to))


@batch.command()
@click.argument("batch_id")
@_json_option
@gateway_options
def cancel(batch_id: str, as_json: bool, **where: Any) -> None:
    """End a batch. Lines that have an answer keep it; the others fail with batch_cancelled.

    \b
    Example:
      folkmoot batch cancel batch_1f0c
    """
    with _batches(**where) as batches:
        _show(batches.cancel(batch_id), as_json)


@batch.command(name="dead-letters")
@click.option("--model", default="", help="which model, if several are served")
@click.option("--most", type=click.IntRange(1), default=20, show_default=True, help="how many, the newest first")
@click.option("--replay", metavar="ID", help="try this one again, and stream its answer")
@click.option("--json", "as_json", is_flag=True, help="for programs, with the whole requests")
@gateway_options
def dead_letters(model: str, most: int, replay: str | None, as_json: bool, **where: Any) -> None:
    """Show requests that were given up after their last attempt: their engines died, or failed, each time.

    A replayed one is off the list; it comes back if it fails again. A batch keeps the error as the line's result.

    \b
    Examples:
      folkmoot batch dead-letters
      folkmoot batch dead-letters --replay 1764075600000-0
    """
    with _batches(**where) as batches:
        if replay is not None:
            request_id = batches.replay(replay, model)
            click.echo(f"queued as {request_id}")
            for chunk in batches.client.follow(request_id):
                click.echo(chunk.text, nl=False)
            click.echo()
            return
        letters = batches.dead_letters(model, most=most)
    if as_json:
        click.echo(json.dumps([_letter(one) for one in letters], indent=2))
    else:
        batch_view.show_letters(console, letters)


# ------------------------------------------------------------------------------------------------ what they share


@contextmanager
def _batches(*, gateway: str | None, name: str, state_dir: Path | None) -> Iterator[Batches]:
    """Calls to the chosen gateway, whose errors are shown as one paragraph."""
    try:
        with Client(gateway or address_of(name, state_dir), reconnect_s=RECONNECT_S, **access()) as client:
            yield Batches(client)
    except FolkmootError as e:
        raise Failure(f"{e.code}: {e}") from e


def _show(made: pb.Batch, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(batch_view.as_json(made), indent=2))
    else:
        batch_view.show(console, made)


def _watch(batches: Batches, batch_id: str, *, quiet: bool) -> pb.Batch:
    """The batch once it has ended. Ctrl-C leaves it running and ends this command; twice cancels it."""
    try:
        with Watch(console) as watch:
            on_progress: Callable[[pb.Batch], None] = lambda b: None if quiet else watch.tell(b, time.monotonic())  # noqa: E731
            return batches.wait(batch_id, on_progress=on_progress)
    except KeyboardInterrupt:
        pass
    try:
        click.echo(
            f"\nbatch {batch_id} runs on. Follow it:  folkmoot batch status {batch_id} --wait\n"
            f"Cancel it:  folkmoot batch cancel {batch_id}, or Ctrl-C again now"
        )
        time.sleep(SECOND_CTRL_C_S)
    except KeyboardInterrupt:
        batches.cancel(batch_id)
        click.echo(f"batch {batch_id} is being cancelled")
    sys.exit(130)


def _write(batches: Batches, to: BinaryIO, batch_id: str, *, errors: bool, follow: bool = False, line: int = 0) -> None:
    for text in batches.results(batch_id, errors=errors, follow=follow, line=line):
        to.write(text + b"\n")
        if follow:
            to.flush()


def _whole_lines(file: BinaryIO) -> int:
    """How many there are; what stands behind the last one is cut off."""
    num = end = 0
    for text in file:
        if text.endswith(b"\n"):
            num, end = num + 1, end + len(text)
    file.seek(end)
    file.truncate()
    return num


def _letter(one: pb.DeadLetter) -> dict[str, Any]:
    return {
        "id": one.id,
        "request_id": one.request_id,
        "model": one.model,
        "error": one.error,
        "attempts": one.attempts,
        "time_ms": one.time_ms,
        "request": json.loads(one.request_json),
    }
