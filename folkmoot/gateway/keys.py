"""Every key and channel name in the store. One hash tag holds them in one Redis Cluster slot.

A second namespace is a second, independent Folkmoot in the same store.
"""

from dataclasses import dataclass
from typing import Literal

Lane = Literal["interactive", "batch"]
LANES: tuple[Lane, Lane] = ("interactive", "batch")  # in the order they are leased
GROUP = "engines"  # the consumer group of every queue


@dataclass(frozen=True)
class Keys:
    """Key names under one namespace. `prelude.PRELUDE` builds the same names in Lua from `root`."""

    namespace: str = "folkmoot"

    @property
    def root(self) -> str:
        """The hash tag that all keys begin with."""
        return "{" + self.namespace + "}"

    def queue(self, model: str, lane: Lane) -> str:
        """Stream of waiting and running requests: fields id, cost."""
        return f"{self.root}:queue:{model}:{lane}"

    def load(self, model: str, lane: Lane) -> str:
        """Hash of counters: {waiting,running}_{requests,tokens}."""
        return f"{self.root}:load:{model}:{lane}"

    def dead(self, model: str) -> str:
        """Dead-letter stream: fields id, error, attempts, body."""
        return f"{self.root}:dead:{model}"

    def request(self, request_id: str) -> str:
        """Hash: what is known of one request."""
        return f"{self.root}:request:{request_id}"

    def journal(self, request_id: str) -> str:
        """Stream of one request's tokens: entry id <offset>-<n>, field d = serialised GenerateResponse."""
        return f"{self.root}:journal:{request_id}"

    @property
    def engines(self) -> str:
        """Sorted set: engine -> when its heartbeat runs out (Unix ms)."""
        return f"{self.root}:engines"

    @property
    def engine_models(self) -> str:
        """Hash: engine -> the model it serves."""
        return f"{self.root}:engine-models"

    def gone(self, engine: str) -> str:
        """String with a TTL: this engine is dead, why, and gets no lease any more."""
        return f"{self.root}:gone:{engine}"

    def trial(self, engine: str) -> str:
        """String with a TTL: id of the request on its last attempt that this engine runs, or ran last."""
        return f"{self.root}:trial:{engine}"

    @property
    def models(self) -> str:
        """Hash: model -> its record as JSON."""
        return f"{self.root}:models"

    @property
    def cluster(self) -> str:
        """String with a TTL: the cluster's status document."""
        return f"{self.root}:cluster"

    @property
    def wish(self) -> str:
        """String: what the expert router was last asked to make of the cluster."""
        return f"{self.root}:wish"

    @property
    def charge(self) -> str:
        """String with a TTL: which of several clusters on this store answers for them."""
        return f"{self.root}:charge"

    def ready(self, engine: str) -> str:
        """String with a TTL: this engine can serve now."""
        return f"{self.root}:ready:{engine}"

    @property
    def operations(self) -> str:
        """Stream of changes that the cluster was asked for: field id."""
        return f"{self.root}:operations"

    def operation(self, request_id: str) -> str:
        """String, with a TTL from its end on: one of those changes, and what has become of it."""
        return f"{self.root}:operation:{request_id}"

    def work(self, model: str) -> str:
        """Channel: something to lease has come."""
        return f"{self.root}:work:{model}"

    def control(self, engine: str) -> str:
        """Channel to one engine: ids of requests that have ended under it, one a line."""
        return f"{self.root}:control:{engine}"

    def pushes(self, gateway: str) -> str:
        """Channel to one gateway: new journal entries of requests it watches (internal.Batch)."""
        return f"{self.root}:pushes:{gateway}"
