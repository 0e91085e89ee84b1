"""Parts of a computation that take turns on one thread: one goes on where another has to wait.

They are greenlets, since threads would each have OpenMP workers of their own, and would hand the interpreter's lock to
and fro where nothing else is at stake.
"""

import contextvars
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")


class Part(greenlet):
    """One of several that take turns."""

    number: int


def run(parts: Sequence[Callable[[], T]], around: Callable[[int], AbstractContextManager[object]]) -> list[T]:
    """What each part returns. The next one's turn comes whenever one gives way or ends; part i runs within `around(i)`.

    What one of them raises ends the others too (they see GreenletExit), and is raised here.
    """
    pending, results = deque[Part](), dict[int, T]()
    for i, part in enumerate(parts):
        pending.append(task := Part(part))
        task.number, task.gr_context = i, contextvars.copy_context()
    try:
        while pending:
            task = pending.popleft()
            with around(task.number):
                result: Any = task.switch()
            if task.dead:
                results[task.number] = result
            else:
                pending.append(task)
    finally:
        for task in pending:
            task.throw()
    return [results[i] for i in range(len(parts))]


def give_way() -> None:
    """Let the next part run first. Nothing outside of `run`."""
    current = getcurrent()
    if isinstance(current, Part):
        assert current.parent is not None
        current.parent.switch()


def number() -> int:
    """Which part this is; 0 outside of `run`."""
    current = getcurrent()
    return current.number if isinstance(current, Part) else 0
