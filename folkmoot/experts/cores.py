"""How engines and expert hosts share cores: who may spin, who yields to whom.

An engine and its hosts take turns: while hosts compute, the engine waits, and the other way round. What costs speed is
a thread neither computing nor asleep: an OpenMP worker that spins after its parallel region takes the core that
a host needs next. benchmarks/throughput.py measures these settings; docs/performance.md has the table.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterable

log = logging.getLogger(__name__)


def helper_threads() -> list[int]:
    """Kernel ids of this process's threads that Python did not start: OpenMP's workers, and a few of libraries."""
    own = {t.native_id for t in threading.enumerate()} | {os.getpid(), threading.get_native_id()}
    return [tid for name in os.listdir("/proc/self/task") if (tid := int(name)) not in own]


def lower_helpers(nice: int, done: set[int]) -> None:
    """Give helper threads that are not in `done` this niceness (0 to 19), so that they never delay a host's thread.

    To be called again now and then: a pool may grow. `done` is updated.
    """
    for tid in helper_threads():
        if tid not in done:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                os.setpriority(os.PRIO_PROCESS, tid, nice)
            done.add(tid)


def pin(cpus: Iterable[int]) -> None:
    """Keep this process, and the threads it starts from now on, on these cores; those it may not use are left out."""
    wanted = set(cpus) & os.sched_getaffinity(0)
    if wanted:
        os.sched_setaffinity(0, wanted)
    else:
        log.warning("none of the cores %s may be used; not pinned", sorted(cpus))
