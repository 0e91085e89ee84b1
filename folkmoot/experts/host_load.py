"""What an expert host has done since its start: plain numbers that its computing thread adds to, and reports."""

from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_WAIT_S = 600.0
"""A request that claims to be older was not posted by this machine's clock."""


@dataclass
class LayerLoad:
    """One layer's share."""

    rows: int = 0
    busy_s: float = 0.0


@dataclass
class Load:
    """All of it, and of each layer its share. `waited_s`: from the engine's posting of a request (over TCP: from its
    arrival) until this host began with it. `refused`: requests that broke the protocol, or failed in the kernel."""

    requests: int = 0
    rows: int = 0
    busy_s: float = 0.0
    waited_s: float = 0.0
    received_bytes: int = 0
    sent_bytes: int = 0
    refused: int = 0
    layers: dict[int, LayerLoad] = field(default_factory=dict)

    @staticmethod
    def of(layers: Iterable[int]) -> "Load":
        """Nothing yet, of these layers."""
        return Load(layers={layer: LayerLoad() for layer in layers})

    def answered(self, layer: int, rows: int, busy_s: float, received_bytes: int, sent_bytes: int) -> None:
        """One more layer call."""
        self.requests += 1
        self.rows += rows
        self.busy_s += busy_s
        self.received_bytes += received_bytes
        self.sent_bytes += sent_bytes
        share = self.layers[layer]
        share.rows += rows
        share.busy_s += busy_s

    def waited(self, posted_s: float, now_s: float) -> None:
        """The same call's wait, on one monotonic clock; what a peer made up counts as nothing."""
        if posted_s > 0.0 and 0.0 <= now_s - posted_s <= MAX_WAIT_S:
            self.waited_s += now_s - posted_s
