"""`folkmoot experts`: how many rows each expert has had; as a table, as JSON, or recorded for `benchmarks.balance`."""

import json
import time
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from folkmoot.cluster.cli_common import Failure, access, address_of, console, gateway_options
from folkmoot.gateway.client import Client
from folkmoot.gateway.client_errors import FolkmootError

SHOWN = 5
"""Experts of a layer that the table names."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="everything, for programs: arrays [layer][expert]")
@click.option("--record", type=click.Path(path_type=Path), metavar="FILE", help="append one line of JSON each time")
@click.option("--every-s", type=click.FloatRange(0.1), default=10.0, show_default=True, help="with --record")
@click.option("--times", type=click.IntRange(1), help="with --record: end after so many lines")
@gateway_options
def experts(
    as_json: bool,
    record: Path | None,
    every_s: float,
    times: int | None,
    gateway: str | None,
    name: str,
    state_dir: Path | None,
) -> None:
    """Show how many rows (token, expert) each expert has had, and which ones are hot.

    \b
    Examples:
      folkmoot experts
      folkmoot experts --json | jq '.rows_total[0]'
      folkmoot experts --record trace.jsonl --every-s 5      # then: python -m benchmarks.balance --trace trace.jsonl
    """
    if as_json and record is not None:
        raise click.UsageError("--json and --record exclude each other")
    try:
        with Client(gateway or address_of(name, state_dir), **access()) as client:
            if record is not None:
                _record(client, record, every_s, times)
            elif as_json:
                click.echo(json.dumps(fetch(client)))
            else:
                console.print(table(fetch(client)))
    except FolkmootError as e:
        raise Failure(str(e)) from e


def fetch(client: Client) -> dict[str, Any]:
    """The rows of each expert. Raises Failure where nobody has counted any."""
    text = client.status(experts=True).experts_json
    if not text:
        raise Failure("no rows of experts have been counted yet: ask the model something first")
    document: dict[str, Any] = json.loads(text)
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


def table(document: dict[str, Any]) -> Table:
    """One line a layer: how uneven it is, and its hottest experts."""
    found = Table("layer", "rows", "busiest / mean", "hottest experts", title="rows of experts")
    for layer, rows in zip(document["layers"], document["rows_total"], strict=True):
        total = sum(rows)
        hottest = sorted(range(len(rows)), key=lambda e: -rows[e])[:SHOWN]
        named = ", ".join(f"{e} ({rows[e] / total:.0%})" for e in hottest if rows[e])
        found.add_row(str(layer), str(total), f"{max(rows) * len(rows) / total:.2f}" if total else "-", named)
    return found
