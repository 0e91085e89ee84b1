"""What a dispatcher has done since its start: plain numbers of the thread that runs the model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class DispatchCounts:
    """`rows` are (token, expert) pairs, each counted once; `rows_again`: asked for once more, since the host that had
    them was late or dropped, or its row was not finite. `host_s`: from posting to the whole reply, by host."""

    calls: int = 0
    rows: int = 0
    rows_again: int = 0
    late_hosts: int = 0
    """times that a host was late, and its rows were asked of others"""
    dropped_hosts: int = 0
    waits: int = 0
    """times that a layer had to wait, since an expert had no live replica"""
    waited_s: float = 0.0
    """how long in all"""
    given_up: int = 0
    """times that it waited in vain"""
    host_s: dict[str, float] = field(default_factory=dict)

    def answered(self, host: str, took_s: float) -> None:
        """A host's reply is here."""
        self.host_s[host] = self.host_s.get(host, 0.0) + took_s

    def to_json(self) -> dict[str, Any]:
        """A copy, as JSON data. Any thread may call."""
        return {**asdict(self), "host_s": dict(self.host_s)}


def summed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Two counts by name, or counts of such counts, added up."""
    return {
        name: summed(a.get(name, {}), b.get(name, {}))
        if isinstance(a.get(name, b.get(name)), Mapping)
        else a.get(name, 0) + b.get(name, 0)
        for name in {**a, **b}
    }
