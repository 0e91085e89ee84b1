"""`folkmoot keys`: API keys are made, listed, rotated and revoked in the request store, by who has access to it."""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.table import Table

from folkmoot.cluster.cli_common import F, Failure, console, errors, name_options
from folkmoot.cluster.spec import namespace_of
from folkmoot.cluster.state_file import StateFolder
from folkmoot.gateway.api_keys import FRESH_S, ROLES, ApiKey, KeyChanged, KeyStore, UnknownKey
from folkmoot.gateway.errors import StoreError
from folkmoot.gateway.limits import Limits

T = TypeVar("T")

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Duration(click.ParamType[float]):
    """A number with a unit: 90s, 30m, 12h, 7d. In seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,9})([smhd])", str(value))
        if match is None:
            self.fail(f"{value!r} is not a duration such as 90s, 30m, 12h or 7d", param, ctx)
        return float(int(match[1]) * UNITS_S[match[2]])


def _store_options(command: F) -> F:
    for option in (
        click.option("--namespace", metavar="NAME", help="prefix of the store's keys  [default: the cluster's]"),
        click.option(
            "--redis",
            metavar="URL",
            envvar="FOLKMOOT_REDIS",
            help="the request store; better by environment variable FOLKMOOT_REDIS, where it has a password  "
            "[default: that of the cluster started here]",
        ),
    ):
        command = option(command)
    return name_options(command)


@click.group()
def keys() -> None:
    """Make, list, rotate and revoke API keys.

    A cluster that is up with --require-keys serves only who sends one. The commands speak to the request store itself,
    so whoever has access to that can run them, before there is any key.

    \b
    Examples:
      folkmoot keys create --tenant search --role generate
      folkmoot keys create --tenant search --role batch --tokens-per-minute 100000 --expires-in 90d
      folkmoot keys create --tenant operators --role admin --role status
      folkmoot keys list
      folkmoot keys rotate 5f0c2a9be1d4 --overlap 12h
      folkmoot keys revoke 5f0c2a9be1d4
    """


@keys.command()
@click.option("--tenant", required=True, help="whose key it is: requests, limits and fair shares are counted by tenant")
@click.option(
    "--role",
    "roles",
    type=click.Choice(ROLES),
    multiple=True,
    required=True,
    help="generate: requests; batch: batches; status: the cluster's status; admin: change the cluster. May be repeated",
)
@click.option("--requests-per-minute", type=click.IntRange(1))
@click.option("--tokens-per-minute", type=click.IntRange(1), help="prompt and answer")
@click.option("--concurrent-requests", type=click.IntRange(1), help="waiting and running")
@click.option("--queue-share", type=click.FloatRange(0, 1, min_open=True), help="part of the queue's places, 0 to 1")
@click.option("--batch-lines", type=click.IntRange(1), help="lines of one batch")
@click.option("--expires-in", type=Duration(), help="90s, 30m, 12h, 7d  [default: never]")
@click.option("--note", default="", help="what it is for; shown by `list`")
@click.option("--json", "as_json", is_flag=True, help="key and record, for programs")
@_store_options
def create(
    tenant: str, roles: Sequence[str], expires_in: float | None, note: str, as_json: bool, **options: Any
) -> None:
    """Make a key, and show it: this once, since only its hash is kept.

    \b
    Example:
      folkmoot keys create --tenant search --role generate > key; chmod 600 key
    """
    where = {name: options.pop(name) for name in ("redis", "namespace", "name", "state_dir")}
    limits, expires_s = Limits(**options), None if expires_in is None else time.time() + expires_in
    key, text = _in_store(lambda store: store.create(tenant, roles, limits, expires_s, note), **where)
    _show_new(key, text, as_json)


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="for programs")
@_store_options
def list_(as_json: bool, **where: Any) -> None:
    """Show all keys: whose they are, what they allow, until when; not the keys themselves."""
    found = _in_store(lambda store: store.all(), **where)
    if as_json:
        click.echo(json.dumps([_facts(key) for key in found], indent=2))
        return
    table = Table("id", "tenant", "roles", "limits", "made", "expires", "secrets", "note", box=None, pad_edge=False)
    for key in found:
        limits = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in key.limits.given().items())
        expires = "never" if key.expires_s is None else _when(key.expires_s)
        good = sum(h.until_s is None or h.until_s > time.time() for h in key.hashes)
        table.add_row(
            key.id, key.tenant, " ".join(key.roles), limits, _when(key.created_s), expires, str(good), key.note
        )
    console.print(table)


@keys.command()
@click.argument("key_id", metavar="ID")
@_store_options
def revoke(key_id: str, **where: Any) -> None:
    """Take a key back. Calls that are under way end as they would have.

    \b
    Example:
      folkmoot keys revoke 5f0c2a9be1d4
    """
    _in_store(lambda store: store.revoke(key_id), **where)
    console.print(f"revoked; no gateway takes it any more in {FRESH_S:g} s")


@keys.command()
@click.argument("key_id", metavar="ID")
@click.option("--overlap", type=Duration(), default="24h", show_default=True, help="how long the old secret stays good")
@click.option("--json", "as_json", is_flag=True, help="key and record, for programs")
@_store_options
def rotate(key_id: str, overlap: float, as_json: bool, **where: Any) -> None:
    """Give a key a new secret, and show it; the old one stays good for the overlap. Id, roles and limits stay.

    \b
    Examples:
      folkmoot keys rotate 5f0c2a9be1d4
      folkmoot keys rotate 5f0c2a9be1d4 --overlap 0s       the old one has leaked
    """
    key, text = _in_store(lambda store: store.rotate(key_id, overlap), **where)
    _show_new(key, text, as_json)


def _show_new(key: ApiKey, text: str, as_json: bool) -> None:
    """The key alone on standard output, what is to be said of it beside it."""
    if as_json:
        click.echo(json.dumps({"key": text, **_facts(key)}, indent=2))
        return
    click.echo(text)
    errors.print(
        f"key {key.id} of tenant {key.tenant} ({', '.join(key.roles)}); it cannot be shown again. Clients send it as "
        "metadata `authorization: Bearer KEY`; `folkmoot` commands take it from the environment variable "
        "FOLKMOOT_API_KEY, or --api-key-file"
    )


def _facts(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "roles": list(key.roles),
        "limits": key.limits.given(),
        "created_s": key.created_s,
        "expires_s": key.expires_s,
        "note": key.note,
        "secrets_until_s": [h.until_s for h in key.hashes],
    }


def _when(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


def _in_store(
    work: Callable[[KeyStore], Awaitable[T]],
    *,
    redis: str | None,
    namespace: str | None,
    name: str,
    state_dir: Path | None,
) -> T:
    """Run `work` on the keys of the chosen store, with errors as one paragraph."""
    from folkmoot.gateway.store import Store  # it brings the store's client, which other commands do without

    async def run(url: str) -> T:
        store = Store(url, namespace or namespace_of(name))
        try:
            return await work(KeyStore(store))
        finally:
            await store.close()

    try:
        return asyncio.run(run(redis or _store_of(name, state_dir)))
    except (StoreError, UnknownKey, KeyChanged, ValueError) as e:
        raise Failure(str(e)) from e


def _store_of(name: str, state_dir: Path | None) -> str:
    """The embedded store of the cluster of this name. Raises Failure that says what to type."""
    folder = StateFolder(name, state_dir)
    state = folder.read()
    if not folder.is_held() or state is None:
        raise Failure("no cluster runs here: give the request store's URL by --redis or FOLKMOOT_REDIS")
    if state.store is None:
        raise Failure("the cluster has a request store of its own: give its URL by --redis or FOLKMOOT_REDIS")
    return state.store
