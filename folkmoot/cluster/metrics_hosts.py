"""Metrics of expert hosts, as their actors tell them. Labels: host, and layer where a sum would hide something."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import Metric as Family

from folkmoot.gateway.metrics import Metric

HOST = ("host",)
CALLS = Metric("folkmoot_host_calls_total", "counter", "Layer calls that the host has answered", HOST)
ROWS = Metric("folkmoot_host_rows_total", "counter", "(token, expert) rows that it has computed", (*HOST, "layer"))
BUSY = Metric("folkmoot_host_busy_seconds_total", "counter", "Seconds spent on them", (*HOST, "layer"))
WAITED = Metric(
    "folkmoot_host_waited_seconds_total",
    "counter",
    "Seconds that requests lay before the host began with them (over TCP: from their arrival)",
    HOST,
)
RECEIVED = Metric("folkmoot_host_received_bytes_total", "counter", "Bytes of requests: rows and indices", HOST)
SENT = Metric("folkmoot_host_sent_bytes_total", "counter", "Bytes of replies", HOST)
REFUSED = Metric(
    "folkmoot_host_refused_total", "counter", "Requests that broke the protocol, or failed in the kernel", HOST
)
EXPERTS = Metric("folkmoot_host_experts", "gauge", "Experts that it holds of each layer", HOST)
WEIGHTS = Metric(
    "folkmoot_host_weights_bytes", "gauge", "Their weights: its own, or shared with its node", (*HOST, "kind")
)
RESIDENT = Metric(
    "folkmoot_host_resident_bytes",
    "gauge",
    "Memory of its processes by the kernel's kinds: anonymous, file, shmem",
    (*HOST, "kind"),
)
CPU = Metric("folkmoot_host_cpu_seconds_total", "counter", "Processor time of its process", HOST)
LOAD_SECONDS = Metric("folkmoot_host_load_seconds", "gauge", "How long it took to load its experts", HOST)
METRICS = (CALLS, ROWS, BUSY, WAITED, RECEIVED, SENT, REFUSED, EXPERTS, WEIGHTS, RESIDENT, CPU, LOAD_SECONDS)

MEMORY_KINDS = ("anonymous", "file", "shmem")
OF_LOAD = {
    CALLS: "requests",
    WAITED: "waited_s",
    RECEIVED: "received_bytes",
    SENT: "sent_bytes",
    REFUSED: "refused",
}
"""Numbers of a host's report (folkmoot.experts.host_load) that stand for themselves."""


@dataclass(frozen=True)
class Usage:
    """What the kernel says of a process: resident bytes by kind, and processor seconds. Pages that a fork still shares
    with its parent count as anonymous in each."""

    anonymous: int = 0
    file: int = 0
    shmem: int = 0
    cpu_s: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class HostFigures:
    """One expert host; bytes of its weights, and of them shared ones. `load`: its last report, empty at first."""

    host: str
    num_experts: int
    bytes: int
    shared_bytes: int
    load_s: float
    usage: Usage = Usage()
    load: dict[str, Any] = field(default_factory=dict)


def families(hosts: Sequence[HostFigures]) -> Iterator[Family]:
    """Pure: for Prometheus."""
    for metric, name in OF_LOAD.items():
        yield metric.family(((one.host,), one.load.get(name, 0)) for one in hosts)
    for metric, name in ((ROWS, "rows"), (BUSY, "busy_s")):
        yield metric.family(
            ((one.host, layer), share[name]) for one in hosts for layer, share in one.load.get("layers", {}).items()
        )
    yield EXPERTS.family(((one.host,), one.num_experts) for one in hosts)
    yield LOAD_SECONDS.family(((one.host,), one.load_s) for one in hosts)
    yield CPU.family(((one.host,), one.usage.cpu_s) for one in hosts)
    weights = [(one.host, {"private": one.bytes - one.shared_bytes, "shared": one.shared_bytes}) for one in hosts]
    memory = [(one.host, {kind: getattr(one.usage, kind) for kind in MEMORY_KINDS}) for one in hosts]
    for metric, figures in ((WEIGHTS, weights), (RESIDENT, memory)):
        yield metric.family(((host, kind), size) for host, sizes in figures for kind, size in sizes.items())


def usage_of(pid: int) -> Usage:
    """Nothing where the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return Usage()
    size = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in status.splitlines() if line[:3] == "Rss"}
    cpu_s = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    return Usage(size.get("RssAnon", 0), size.get("RssFile", 0), size.get("RssShmem", 0), cpu_s)
