"""What the commands share: consoles, the options that name a cluster, errors as one paragraph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from folkmoot.cluster.autoscale import Limits
from folkmoot.cluster.state_file import StateFolder

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


class _Span(click.ParamType[Limits]):
    """ "3", or "0..4"."""

    name = "N|MIN..MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Limits:
        """As limits: alike for a single number."""
        if isinstance(value, Limits):
            return value
        least, _, most = str(value).partition("..")
        if not (least.isdecimal() and (most or least).isdecimal()) or str(value).endswith(".."):
            self.fail(f"{value!r} is neither a number nor MIN..MAX, such as 2 or 0..4", param, ctx)
        limits = Limits(int(least), int(most or least))
        if not limits.least <= limits.most or limits.most < 1:
            self.fail(f"{value!r}: the most must be at least 1, and no less than the least", param, ctx)
        return limits


SPAN = _Span()

F = TypeVar("F", bound=Callable[..., Any])


class Failure(click.ClickException):
    """An error that is shown as one paragraph, without a traceback; exit code 1."""

    def show(self, file: Any = None) -> None:
        errors.print(f"[bold red]error:[/] {self.message}", markup=True)


def name_options(command: F) -> F:
    """--name and --state-dir."""
    command = click.option("--name", default="default", show_default=True, help="which cluster, if several run here")(
        command
    )
    return click.option("--state-dir", type=click.Path(path_type=Path), help="where state and logs lie")(command)


def gateway_options(command: F) -> F:
    """--gateway, --name and --state-dir."""
    return click.option(
        "--gateway", metavar="HOST:PORT", help="a gateway anywhere, instead of the cluster started here"
    )(name_options(command))


def address_of(name: str, state_dir: Path | None) -> str:
    """The gateway of the cluster of this name. Raises Failure that says what to type."""
    folder = StateFolder(name, state_dir)
    state = folder.read()
    if not folder.is_held() or state is None:
        raise Failure("no cluster runs here: start one with `folkmoot up --model demo`, or give --gateway HOST:PORT")
    if state.gateway is None:
        raise Failure(f"the cluster is not ready yet ({state.message})")
    host, _, port = state.gateway.rpartition(":")
    return f"{'127.0.0.1' if host in ('0.0.0.0', '[::]') else host}:{port}"
