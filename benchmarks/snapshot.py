"""What a cluster holds of the machine's resources at a moment, to be compared with another moment: is anything left?"""

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import redis

from benchmarks.clusters import Cluster

MEMFD = re.compile(r"/memfd:(folkmoot[^ ]*)")
MEMORY_SLACK = 0.10
"""Allocators and caches warm up: memory that has grown by less than this share is not called a leak."""

Snapshot = Mapping[str, int]


def take(cluster: Cluster) -> Snapshot:
    """Counts of processes, file descriptors, shared segments, keys, and bytes of memory, by name."""
    pids = cluster.all_pids()
    counts: Counter[str] = Counter()
    segments: set[tuple[str, int]] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            counts[f"processes {_title(pid)}"] += 1
            counts[f"file descriptors of {_title(pid)}"] += len(os.listdir(f"/proc/{pid}/fd"))
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
        limit = had * (1 + MEMORY_SLACK) if name == "memory bytes" else had
        if number > limit:
            found.append(f"{name}: {had} before, {number} after")
    return found


def settled_leaks(cluster: Cluster, before: Snapshot, timeout_s: float) -> list[str]:
    """`leaks` once there are none, or after `timeout_s`: what is just being cleared away does not count."""
    deadline = time.monotonic() + timeout_s
    while (found := leaks(before, take(cluster))) and time.monotonic() < deadline:
        time.sleep(1.0)
    return found


def _title(pid: int) -> str:
    """What kind of process it is: the title it gave itself, or the module or program that it runs."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    if words and "::" in words[0]:
        return words[0].split(".")[0]
    return next((w for w in words if w.startswith("folkmoot.") or w.endswith(".py")), words[0] if words else "?")


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
