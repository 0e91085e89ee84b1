"""Signals of a command that owns processes: the first Ctrl-C or SIGTERM unwinds it, later ones let it clean up.

An exception out of a signal handler may come in the middle of anything, which Ray's compiled parts do not survive. So
code that calls them runs in `deferred`, and says with `check` where it may be interrupted.
"""

import contextlib
import signal
from collections.abc import Iterator
from signal import SIGTERM
from types import FrameType

__all__ = ["SIGTERM", "Interrupted", "check", "deferred", "ignore_signals", "nothing", "raise_on_signals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """One of SIGNALS came. Not an Exception, so that no library swallows it."""


class _State:
    is_deferred = False
    pending: str | None = None


def raise_on_signals() -> None:
    """From now on these signals raise Interrupted in the main thread, once."""
    for sig in SIGNALS:
        signal.signal(sig, _on_signal)


def ignore_signals() -> None:
    """From now on they do nothing: what cleans up must not be interrupted."""
    for sig in SIGNALS:
        signal.signal(sig, signal.SIG_IGN)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal only takes effect at the next `check`, or at the end."""
    _State.is_deferred = True
    try:
        yield
    finally:
        _State.is_deferred = False
    check()


def check() -> None:
    """Raise Interrupted if a signal came while it was deferred."""
    if _State.pending is not None:
        name, _State.pending = _State.pending, None
        raise Interrupted(name)


def nothing() -> contextlib.AbstractContextManager[None]:
    """A context that does nothing, where a spinner would make no sense."""
    return contextlib.nullcontext()


def _on_signal(number: int, frame: FrameType | None) -> None:
    ignore_signals()
    if _State.is_deferred:
        _State.pending = signal.Signals(number).name
    else:
        raise Interrupted(signal.Signals(number).name)
