"""A keeper: a process that holds on to another one's memory, so that nobody waits for it to be taken apart.

A process that is killed first gives its memory back, page by page, and closes its sockets only then: a few hundred MiB
took 13 to 136 ms, in which its peers saw nothing and a core did nothing else. So it shares its memory with a keeper
(`clone` with CLONE_VM). Its sockets then close within a millisecond or so of its death, and the keeper takes the memory
apart, at the lowest priority. Until then the keeper sleeps. It holds no other descriptor; its parent is its owner's;
and being of the same memory it has the same command line: in `ps` its name (comm) tells it.
"""

import ctypes
import importlib.util
import logging
import os

log = logging.getLogger(__name__)

NAME = "memory-keeper"
"""of the process; the kernel keeps 15 bytes"""
_NAME_BYTES = NAME.encode()  # read by the keeper, so it must stay


def keep_memory() -> int | None:
    """Start a keeper of this process; its process id. None, and a warning, where that is not possible: the process
    then dies as slowly as others. Call it once, on one thread."""
    spec = importlib.util.find_spec("folkmoot.experts._keeper")
    if spec is None or spec.origin is None:
        log.warning("folkmoot.experts._keeper is not built: install Folkmoot again where a C compiler is at hand")
        return None
    found: int = ctypes.CDLL(spec.origin).fm_keep_memory(_NAME_BYTES)
    if found < 0:
        log.warning("no process could be made that keeps this one's memory: %s", os.strerror(-found))
        return None
    return found


def give_back_unused() -> None:
    """Give heap that is free back to the system: what loading has left behind would be taken apart, too."""
    ctypes.CDLL(None).malloc_trim(0)
