"""How engines and expert hosts share cores: who may spin, who yields to whom.

An engine and its hosts take turns: while hosts compute, the engine waits, and the other way round. What costs speed is
a thread neither computing nor asleep: an OpenMP worker that spins after its parallel region takes the core that a host
needs next. As SCHED_IDLE it may spin, and so be quick, since any other thread takes the core from it at once. The
price: beside other work that never sleeps it starves, and the engine with it. docs/performance.md has the figures.
"""

import contextlib
import os
import threading


def helper_threads() -> list[int]:
    """Kernel ids of this process's threads that Python did not start: OpenMP's workers, and a few of libraries."""
    own = {t.native_id for t in threading.enumerate()} | {os.getpid(), threading.get_native_id()}
    return [tid for name in os.listdir("/proc/self/task") if (tid := int(name)) not in own]


def to_background(done: set[int]) -> None:
    """Make the helper threads that are not in `done` SCHED_IDLE: they run only where nobody else wants the core.

    To be called again now and then, since a pool may grow. `done` is updated.
    """
    for tid in helper_threads():
        if tid not in done:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                os.sched_setscheduler(tid, os.SCHED_IDLE, os.sched_param(0))
            done.add(tid)
