"""What the commands share: consoles, the options that name a cluster, errors as one paragraph."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.markup import escape

from folkmoot.cluster.autoscale import Limits
from folkmoot.cluster.state_file import StateFolder
from folkmoot.experts import expert_dtype
from folkmoot.gateway.api_keys import KEY

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


class Span(click.ParamType[Limits]):
    """ "3", or "0..4": no less than `floor`."""

    name = "N|MIN..MAX"

    def __init__(self, floor: int) -> None:
        self._floor = floor

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Limits:
        """As limits: alike for a single number."""
        if isinstance(value, Limits):
            return value
        least, _, most = str(value).partition("..")
        if not (least.isdecimal() and (most or least).isdecimal()) or str(value).endswith(".."):
            self.fail(f"{value!r} is neither a number nor MIN..MAX, such as 2 or 0..4", param, ctx)
        limits = Limits(int(least), int(most or least))
        if limits.least < self._floor:
            self.fail(f"{limits.least} is not in the range x>={self._floor}", param, ctx)
        if not limits.least <= limits.most or limits.most < 1:
            self.fail(f"{value!r}: the most must be at least 1, and no less than the least", param, ctx)
        return limits


class ExpertDtype(click.ParamType[str]):
    """A dtype's name, or auto:BUDGET."""

    name = "|".join((*expert_dtype.NAMES, "auto:BUDGET"))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As it is, if it is one."""
        try:
            expert_dtype.check_name(str(value))
        except ValueError as e:
            self.fail(str(e), param, ctx)
        return str(value)


SPAN, HOSTS, EXPERT_DTYPE = Span(0), Span(1), ExpertDtype()

F = TypeVar("F", bound=Callable[..., Any])


class Failure(click.ClickException):
    """An error that is shown as one paragraph, without a traceback; exit code 1."""

    def show(self, file: Any = None) -> None:
        errors.print(f"[bold red]error:[/] {escape(self.message)}", markup=True)


def name_options(command: F) -> F:
    """--name and --state-dir."""
    command = click.option("--name", default="default", show_default=True, help="which cluster, if several run here")(
        command
    )
    return click.option("--state-dir", type=click.Path(path_type=Path), help="where state and logs lie")(command)


def gateway_options(command: F) -> F:
    """--gateway, --name and --state-dir; and those that `access` reads, which are no parameters of the command."""
    for option in (
        click.option(
            "--gateway",
            metavar="HOST:PORT",
            help="a gateway anywhere, instead of the cluster started here; https://HOST:PORT with TLS",
        ),
        _access_option("--tls-key", "private key of the client's own certificate (PEM)"),
        _access_option("--tls-cert", "the client's own certificate, where the gateway asks for one (PEM)"),
        _access_option("--tls-ca", "CA of the gateway's certificate (PEM); speaks TLS"),
        _access_option("--api-key-file", "file that holds the API key  [default: environment FOLKMOOT_API_KEY]"),
    ):
        command = option(command)
    return name_options(command)


def watch_options(command: F) -> F:
    """--watch and --every."""
    every = click.option(
        "--every", "every_s", type=click.FloatRange(0.2), default=2.0, show_default=True, help="seconds, with --watch"
    )
    return click.option("--watch", is_flag=True, help="stay, and show it again and again")(every(command))


def _access_option(name: str, text: str) -> Callable[[F], F]:
    def keep(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
        context.meta[f"{__name__}.{parameter.name}"] = value

    path = click.Path(path_type=Path)
    return click.option(name, type=path, metavar="FILE", expose_value=False, callback=keep, help=text)


def access() -> dict[str, Any]:
    """What `Client` and `AdminClient` are to be told of keys and TLS, by this command's options and the environment."""
    meta = click.get_current_context().meta
    files = {name: meta.get(f"{__name__}.{name}") for name in ("tls_ca", "tls_cert", "tls_key")}
    if (files["tls_cert"] is None) != (files["tls_key"] is None):
        raise click.UsageError("--tls-cert and --tls-key must be given together")
    for path in filter(None, files.values()):
        require_file(path)
    path = meta.get(f"{__name__}.api_key_file")
    return {"api_key": _key_in(path) if path else os.environ.get("FOLKMOOT_API_KEY") or None, **files}


def require_file(path: Path) -> None:
    """Raises Failure where there is no file of this name that can be read."""
    if not (path.is_file() and os.access(path, os.R_OK)):
        raise Failure(f"{path} is no file that can be read")


def _key_in(path: Path) -> str:
    require_file(path)
    text = path.read_text(errors="replace").strip()
    if not KEY.fullmatch(text):
        raise Failure(f"{path} holds no API key: it must hold one, `fmk_...`, and nothing else")
    return text


def address_of(name: str, state_dir: Path | None) -> str:
    """The gateway of the cluster of this name. Raises Failure that says what to type."""
    folder = StateFolder(name, state_dir)
    state = folder.read()
    if not folder.is_held() or state is None:
        raise Failure("no cluster runs here: start one with `folkmoot up --model demo`, or give --gateway HOST:PORT")
    if state.gateway is None:
        raise Failure(f"the cluster is not ready yet ({state.message})")
    host, _, port = state.gateway.rpartition(":")
    scheme = "https://" if state.tls else ""
    return f"{scheme}{'127.0.0.1' if host in ('0.0.0.0', '[::]') else host}:{port}"
