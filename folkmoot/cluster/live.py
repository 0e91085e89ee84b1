"""Views that stay: drawn again every few seconds on a terminal, and printed one below the other elsewhere."""

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from folkmoot.cluster import interrupts
from folkmoot.gateway.client_errors import FolkmootError

LEAVE = ("q", "Q", "\x03", "\x04")
Wait = Callable[[float], bool]
"""wait(seconds): whether to leave"""


class LastHeard:
    """What was fetched last, for as long as nothing newer can be had."""

    def __init__(self, fetch: Callable[[], dict[str, Any]]) -> None:
        self._fetch = fetch
        self._last: dict[str, Any] | None = None

    def drawn(self, draw: Callable[[dict[str, Any]], RenderableType]) -> RenderableType:
        """The newest document drawn; why there is no newer one above it. Raises FolkmootError where there never was."""
        try:
            self._last = self._fetch()
            return draw(self._last)
        except FolkmootError as e:
            if self._last is None:
                raise
            return Group(Text(f"{e.code}: {e}", "bold red"), draw(self._last))


def watch(console: Console, every_s: float, frame: Callable[[], RenderableType]) -> None:
    """Show `frame()` every `every_s` seconds until q, Ctrl-C or SIGTERM. Whatever it raises ends it, too; the terminal
    is left as it was found."""
    if not console.is_terminal:
        repeat(every_s, lambda: console.print(frame()))
        return
    interrupts.raise_on_signals()
    with contextlib.suppress(interrupts.Interrupted):
        _redraw(console, every_s, frame)


def repeat(every_s: float, work: Callable[[], None]) -> None:
    """Do it every `every_s` seconds until Ctrl-C or SIGTERM, or until nobody reads what it prints."""
    interrupts.raise_on_signals()
    with contextlib.suppress(interrupts.Interrupted, BrokenPipeError):
        while True:
            work()
            sys.stdout.flush()
            time.sleep(every_s)


def _redraw(console: Console, every_s: float, frame: Callable[[], RenderableType]) -> None:
    first = frame()  # an error that is there from the beginning is shown on the ordinary screen
    with _keys() as wait, Live(first, console=console, screen=True, auto_refresh=False) as live:
        while not wait(every_s):
            live.update(frame(), refresh=True)


@contextlib.contextmanager
def _keys() -> Iterator[Wait]:
    """Keys as they are pressed, where standard input is a terminal."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield lambda seconds: _pressed(fd, seconds)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _pressed(fd: int, seconds: float) -> bool:
    """Wait for one of LEAVE; other keys are read and mean nothing."""
    until_s = time.monotonic() + seconds
    while (left_s := until_s - time.monotonic()) > 0:
        if select.select([fd], [], [], left_s)[0] and os.read(fd, 1).decode(errors="replace") in ("", *LEAVE):
            return True
    return False


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False
