"""`folkmoot experts`: which experts are hot, and where they are; a heat map, JSON, or a record for a benchmark."""

import json
import time
from pathlib import Path
from typing import Any

import click

from folkmoot.cluster import live
from folkmoot.cluster.cli_common import Failure, access, address_of, console, gateway_options, watch_options
from folkmoot.gateway.client import Client
from folkmoot.gateway.client_errors import FolkmootError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="everything, for programs: arrays [layer][expert]")
@click.option("--layer", type=click.IntRange(0), metavar="L", help="this layer, expert by expert")
@click.option("--total", is_flag=True, help="rows since the beginning, instead of lately")
@watch_options
@click.option("--record", type=click.Path(path_type=Path), metavar="FILE", help="append one line of JSON each time")
@click.option(
    "--every-s", "record_every_s", type=click.FloatRange(0.1), default=10.0, show_default=True, help="with --record"
)
@click.option("--times", type=click.IntRange(1), help="with --record: end after so many lines")
@gateway_options
def experts(
    as_json: bool,
    layer: int | None,
    total: bool,
    watch: bool,
    every_s: float,
    record: Path | None,
    record_every_s: float,
    times: int | None,
    gateway: str | None,
    name: str,
    state_dir: Path | None,
) -> None:
    """Show how many rows (token, expert) each expert has, which ones are hot, and which hosts hold them.

    A line a layer, a cell an expert, lighter where more rows went; right of it the busiest expert, and its rows over
    the mean of its layer. NO_COLOR in the environment makes it a map of characters.

    \b
    Examples:
      folkmoot experts                                       # lately: rows a second, which count half after a minute
      folkmoot experts --watch --every 1                     # q leaves it
      folkmoot experts --layer 3 --total                     # each expert of one layer, with its hosts
      folkmoot experts --json | jq '.rows_total[0]'
      folkmoot experts --record trace.jsonl --every-s 5      # then: python -m benchmarks.balance --trace trace.jsonl
      folkmoot experts --record rows.json --times 1          # then: folkmoot up --expert-dtype auto:0.4 --expert-loads
    """
    from folkmoot.cluster import expert_view  # it brings numpy

    if as_json and record is not None:
        raise click.UsageError("--json and --record exclude each other")
    try:
        with Client(gateway or address_of(name, state_dir), reconnect_s=5.0, **access()) as client:
            if record is not None:
                _record(client, record, record_every_s, times)
            elif as_json and watch:
                live.repeat(every_s, lambda: click.echo(json.dumps(fetch(client))))
            elif as_json:
                click.echo(json.dumps(fetch(client)))
            elif watch:
                heard = live.LastHeard(lambda: fetch(client))
                live.watch(
                    console,
                    every_s,
                    lambda: heard.drawn(lambda d: expert_view.view(console, d, layer, total, fits=True)),
                )
            else:
                console.print(expert_view.view(console, fetch(client), layer, total, fits=False))
    except (FolkmootError, expert_view.UnknownLayer) as e:
        raise Failure(str(e)) from e


def fetch(client: Client) -> dict[str, Any]:
    """The rows of each expert. Raises Failure where there is nothing to be counted, or nobody to count."""
    text = client.status(experts=True).experts_json
    if not text:
        raise Failure("the expert router has not said how many rows each expert has had: it may have just started")
    document: dict[str, Any] = json.loads(text)
    if not document["layers"]:
        raise Failure("a dense model: it has no experts")
    return document


def _record(client: Client, path: Path, every_s: float, times: int | None) -> None:
    written = 0
    with path.open("a") as file:
        while times is None or written < times:
            if written:
                time.sleep(every_s)
            file.write(json.dumps(fetch(client), separators=(",", ":")) + "\n")
            file.flush()
            written += 1
