"""The settings of a dispatcher, which travel in an environment variable to the process that runs the model."""

import json
from dataclasses import dataclass, fields

ENVIRONMENT = "FOLKMOOT_DISPATCH"


class DispatchError(RuntimeError):
    """The dispatcher was configured or called wrongly."""


@dataclass(frozen=True, slots=True)
class DispatchConfig:
    """How an engine reaches its experts. Exactly one of `feed` and `map_path` is set."""

    engine: str
    secret_file: str
    """the secret that hosts must know, as this engine does (secret.py)"""
    feed: str | None = None
    """unix socket that serves expert maps (feed.py)"""
    map_path: str | None = None
    """file with one expert map that never changes"""
    transport: str = "auto"
    """"auto", "shm" or "tcp" """
    combine: str = "rows"
    """"rows": one unweighted row a pair, exact under any placement; "sum": hosts return weighted sums"""
    hedge_s: float = 0.05
    """rows of a host that is later than this beyond some times its usual pace are asked of a replica; never where
    it is not below stall_s: deadline.py"""
    stall_s: float = 1.0
    """and it counts as stalled when it is later than this"""
    call_timeout_s: float = 10.0
    """and at the latest by then"""
    no_replica_timeout_s: float = 60.0
    """how long a layer waits for a new map when an expert has no live replica; then the running requests end"""
    micro_batches: bool = False
    """whether two halves of a step may be under way at once"""
    connect_timeout_s: float = 5.0
    yield_us: int = 40
    """how long to yield the core before blocking; never spins"""
    background_workers: bool = False
    """make the engine's OpenMP workers SCHED_IDLE, so that they never delay a host on the same core: cores.py"""
    max_tokens: int = 2048
    """a layer call with more tokens is split, so that a link's areas stay bounded"""
    expert_cost: int = 16
    """what visiting one more expert costs a host, in rows: its weights have to be read"""
    far_cost: int = 16
    """what asking a host of another node costs more than one of this node, in rows: near replicas are taken first"""

    @property
    def late_s(self) -> float:
        """Beyond its usual pace, what makes a host late."""
        return min(self.hedge_s, self.stall_s)

    @staticmethod
    def from_json(text: str) -> "DispatchConfig":
        """Parse and check. Raises DispatchError naming what is wrong."""
        try:
            raw = json.loads(text)
            unknown = set(raw) - {f.name for f in fields(DispatchConfig)}
            if unknown:
                raise DispatchError(f"{ENVIRONMENT}: unknown keys {sorted(unknown)}")
            config = DispatchConfig(**raw)
        except (TypeError, ValueError) as e:
            raise DispatchError(f"{ENVIRONMENT} is not a dispatch configuration: {e}") from e
        if (config.feed is None) == (config.map_path is None):
            raise DispatchError(f"{ENVIRONMENT}: exactly one of feed and map_path must be set")
        if config.transport not in ("auto", "shm", "tcp"):
            raise DispatchError(f"{ENVIRONMENT}: transport must be auto, shm or tcp, not {config.transport!r}")
        if config.combine not in ("rows", "sum"):
            raise DispatchError(f"{ENVIRONMENT}: combine must be rows or sum, not {config.combine!r}")
        if not 0 < config.stall_s <= config.call_timeout_s:
            limit = f"at most call_timeout_s ({config.call_timeout_s})"
            raise DispatchError(f"{ENVIRONMENT}: stall_s must be above 0 and {limit}, not {config.stall_s}")
        if not config.hedge_s > 0:
            raise DispatchError(f"{ENVIRONMENT}: hedge_s must be above 0, not {config.hedge_s}")
        if not config.no_replica_timeout_s > 0:
            raise DispatchError(
                f"{ENVIRONMENT}: no_replica_timeout_s must be above 0, not {config.no_replica_timeout_s}"
            )
        return config
