"""Faults for the failover and chaos benchmarks: a process of some role is killed or stopped, and that is proved."""

import asyncio
import random
import time
from dataclasses import dataclass

from benchmarks import clusters
from benchmarks.clusters import Cluster, Role


class DidNotHappen(RuntimeError):
    """The fault could not be injected: there was no such process, or it survived."""


@dataclass(frozen=True)
class Fault:
    """SIGKILL to one process of a role; or, with `stop_s`, SIGSTOP, and SIGCONT after so many seconds."""

    name: str
    role: Role
    stop_s: float = 0.0


@dataclass(frozen=True)
class Injected:
    """A fault that has happened: to which process, and when (monotonic clock; just before the signal)."""

    fault: Fault
    pid: int
    at_s: float


KILL_HOST = Fault("kill an expert host", Role.HOST)
KILL_ACTOR = Fault("kill an expert actor", Role.ACTOR)
KILL_ENGINE = Fault("kill an engine", Role.ENGINE)
KILL_CORE = Fault("kill an engine's core", Role.CORE)
KILL_REPLICA = Fault("kill an engine's Serve replica", Role.REPLICA)
KILL_ROUTER = Fault("kill the expert router", Role.ROUTER)
KILL_GATEWAY = Fault("kill a gateway", Role.GATEWAY)
KILL_STORE = Fault("kill the store", Role.STORE)
KILL_WARM = Fault("kill the warm parent", Role.WARM)
KILL_TEMPLATE = Fault("kill a host's template", Role.TEMPLATE)
KILL_RESERVE = Fault("kill a host's next life, in reserve", Role.RESERVE)
STALL_HOST = Fault("stop an expert host", Role.HOST, stop_s=5.0)
STALL_ENGINE = Fault("stop an engine", Role.ENGINE, stop_s=5.0)
STALL_ROUTER = Fault("stop the expert router", Role.ROUTER, stop_s=3.0)
STALL_STORE = Fault("stop the store", Role.STORE, stop_s=1.0)


def inject(cluster: Cluster, fault: Fault, rng: random.Random) -> Injected:
    """Kill or stop a random process of the fault's role; a stopped one goes on before this returns.

    Raises DidNotHappen.
    """
    pids = cluster.pids(fault.role)
    if not pids:
        raise DidNotHappen(f"{fault.name}: there is none")
    pid = rng.choice(pids)
    injected = Injected(fault, pid, time.monotonic())
    try:
        if fault.stop_s:
            with clusters.stopped(pid):
                time.sleep(fault.stop_s)
        else:
            clusters.kill(pid)
    except (ProcessLookupError, TimeoutError) as e:
        raise DidNotHappen(f"{fault.name}: process {pid}: {e!r}") from e
    return injected


async def inject_soon(cluster: Cluster, fault: Fault, rng: random.Random) -> Injected:
    """`inject` in a thread."""
    return await asyncio.to_thread(inject, cluster, fault, rng)
