"""Signals of a command that owns processes: the first Ctrl-C or SIGTERM unwinds it, later ones let it clean up."""

import contextlib
import signal
from signal import SIGTERM
from types import FrameType

__all__ = ["SIGTERM", "Interrupted", "ignore_signals", "nothing", "raise_on_signals"]


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP came. Not an Exception, so that no library swallows it."""


def raise_on_signals() -> None:
    """From now on these signals raise Interrupted in the main thread, once."""
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, _raise)


def ignore_signals() -> None:
    """From now on they do nothing: what cleans up must not be interrupted."""
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, signal.SIG_IGN)


def nothing() -> contextlib.AbstractContextManager[None]:
    """A context that does nothing, where a spinner would make no sense."""
    return contextlib.nullcontext()


def _raise(number: int, frame: FrameType | None) -> None:
    ignore_signals()
    raise Interrupted(signal.Signals(number).name)
