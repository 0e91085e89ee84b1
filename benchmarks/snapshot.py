"""What a cluster holds of the machine's resources at a moment, to be compared with another moment: is anything left?"""

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import redis

from benchmarks.clusters import Cluster, is_keeper

PROCESSES, DESCRIPTORS = "processes ", "file descriptors of "
MEMFD = re.compile(r"/memfd:(folkmoot[^ ]*)")
MEMORY_SLACK = 0.10
"""Allocators and caches warm up: memory that has grown by less than this share is not called a leak."""

DESCRIPTOR_SLACK = 4
"""A process: pools keep as many connections as were once in use at the same time. A leak with each fault is more."""

RAYS_OWN = ("/ray/_private/", "/ray/dashboard/", "/ray/core/", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's daemons: their files and connections are Ray's to look after."""

STORES = ("valkey-server", "redis-server")
"""Their connections are counted at the other end, each process's by itself."""

STAND_IN = "ray::NodeAgent"
"""Comes where a warm parent died and an expert actor needed the next one before `folkmoot up` had looked; and stays."""

Snapshot = Mapping[str, int]


def take(cluster: Cluster) -> Snapshot:
    """Counts of processes, file descriptors, shared segments, keys, and bytes of memory, by name."""
    pids = cluster.all_pids()
    counts: Counter[str] = Counter()
    segments: set[tuple[str, int]] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            if title(pid) == STAND_IN or is_keeper(pid):
                continue
            counts[PROCESSES + title(pid)] += 1
            counts[DESCRIPTORS + title(pid)] += _descriptors(pid)
            counts["memory bytes"] += _pss(pid)
            segments |= _segments(pid)
    for name, _ in segments:
        counts[f"segments {name}"] += 1
    counts["files in /dev/shm"] = len(os.listdir("/dev/shm"))
    counts.update(_keys(cluster))
    return dict(counts)


def leaks(before: Snapshot, after: Snapshot) -> list[str]:
    """Pure: what there is more of than before, one line each."""
    found = []
    for name, number in sorted(after.items()):
        had = before.get(name, 0)
        if number > _limit(name, had, before):
            found.append(f"{name}: {had} before, {number} after")
    return found


def _limit(name: str, had: int, before: Snapshot) -> float:
    if name == "memory bytes":
        return had * (1 + MEMORY_SLACK)
    if name.startswith(DESCRIPTORS):
        return had + DESCRIPTOR_SLACK * before.get(name.replace(DESCRIPTORS, PROCESSES), 0)
    return had


def settled_leaks(cluster: Cluster, before: Snapshot, timeout_s: float) -> list[str]:
    """`leaks` once there are none, or after `timeout_s`: what is just being cleared away does not count.

    Where a process has too many files open, what they are is printed, since nobody can look later."""
    deadline = time.monotonic() + timeout_s
    while (found := leaks(before, take(cluster))) and time.monotonic() < deadline:
        time.sleep(1.0)
    for pid in cluster.all_pids():
        with contextlib.suppress(OSError):
            if any(line.startswith(f"{DESCRIPTORS}{title(pid)}:") for line in found):
                print(f"open files of {title(pid)} ({pid}): {dict(_kinds(pid))}")
    return found


def title(pid: int) -> str:
    """What kind of process it is: the title it gave itself, or the module or program that it runs."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    if not words:  # it has ended, and its parent has not been told
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
        return f"{name} (ended) of {title(int(rest.split()[1]))}"
    if words and "::" in words[0]:
        return words[0].split(".")[0]
    return next((w for w in words if w.startswith("folkmoot.") or w.endswith(".py")), words[0] if words else "?")


def _descriptors(pid: int) -> int:
    """Open files of a process. Of an actor, without what Ray opens in it: logs, and connections to other actors, which
    it keeps a while after those have died."""
    kind = title(pid)
    if any(part in kind for part in (*RAYS_OWN, *STORES)):
        return 0
    names = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(link))
    if not kind.startswith("ray::"):
        return len(names)
    tcp = _tcp_inodes(pid)  # Ray's
    return sum(name[8:-1] not in tcp and not name.endswith((".log", ".out", ".err")) for name in names)


def _kinds(pid: int) -> Counter[str]:
    """How many open files there are of each kind: connections over TCP, other sockets, and files by name."""
    tcp, kinds = _tcp_inodes(pid), Counter[str]()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            name = os.readlink(link)
            kinds["TCP" if name[8:-1] in tcp else name.partition(":[")[0]] += 1
    return kinds


def _tcp_inodes(pid: int) -> set[str]:
    lines = [line for kind in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]]
    return {line.split()[9] for line in lines}


def _pss(pid: int) -> int:
    """Bytes of a process, shared pages counted as its share of them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _segments(pid: int) -> set[tuple[str, int]]:
    """(name, inode) of each of our shared-memory segments that a process maps."""
    found = set()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if (match := MEMFD.search(line)) is not None:
            found.add((match[1].split(" ")[0], int(line.split()[4])))
    return found


def _keys(cluster: Cluster) -> Counter[str]:
    """Keys in the store that would stay for ever, by kind, and requests that are not at an end."""
    counts: Counter[str] = Counter()
    with redis.Redis.from_url(cluster.store_url) as store:
        for key in store.scan_iter(match=f"{{{cluster.namespace}}}*", count=1000):
            name = key.decode()
            if ":request:" in name and store.hget(key, "state") not in (b"done", None):
                counts["requests that are not done"] += 1
            elif store.ttl(key) == -1:  # the others go by themselves
                counts[f"keys {name.split(':')[1]} without an end"] += 1
    return counts
