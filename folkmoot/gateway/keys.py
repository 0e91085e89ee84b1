"""Every key and channel name in the store. One hash tag holds them in one Redis Cluster slot.

A second namespace is a second, independent Folkmoot in the same store.
"""

from dataclasses import dataclass
from typing import Literal

Lane = Literal["interactive", "batch"]
LAYOUT = 2
"""Grows with every change of what stands under these names; a store says its own (`Keys.layout`)."""
LANES: tuple[Lane, Lane] = ("interactive", "batch")  # in the order they are leased


@dataclass(frozen=True)
class Keys:
    """Key names under one namespace. `prelude.PRELUDE` builds the same names in Lua from `root`."""

    namespace: str = "folkmoot"

    @property
    def root(self) -> str:
        """The hash tag that all keys begin with."""
        return "{" + self.namespace + "}"

    @property
    def layout(self) -> str:
        """String: the layout that this store was written in (LAYOUT)."""
        return f"{self.root}:layout"

    def queue(self, model: str, lane: Lane) -> str:
        """Stream of waiting and running requests: fields id, cost, tenant. Its length is what an outside scaler reads.

        An entry is deleted when its request ends. The sets below hold these entries' ids.
        """
        return f"{self.root}:queue:{model}:{lane}"

    def leases(self, model: str, lane: Lane) -> str:
        """Sorted set: entry of a leased request -> when it was renewed last (Unix ms); 0: handed back."""
        return f"{self.root}:leases:{model}:{lane}"

    def last(self, model: str, lane: Lane) -> str:
        """Sorted set: entry of a request handed back that may not run beside all others -> its deadline (Unix ms)."""
        return f"{self.root}:last:{model}:{lane}"

    def waiting(self, model: str, lane: Lane, tenant: str) -> str:
        """Sorted set: entry of a tenant's request that nobody has leased yet -> its deadline (Unix ms)."""
        return f"{self.root}:waiting:{lane}:{len(model.encode())}:{model}:{tenant}"

    def turns(self, model: str, lane: Lane) -> str:
        """Sorted set: tenant with such requests -> what it was served and has reserved, in shares (shares.py)."""
        return f"{self.root}:turns:{model}:{lane}"

    def served(self, model: str, lane: Lane) -> str:
        """Sorted set: the same tenants -> what each was served, in shares."""
        return f"{self.root}:served:{model}:{lane}"

    def past(self, model: str, lane: Lane) -> str:
        """Sorted set: tenant without -> what it was served, where that is more than a new tenant begins with."""
        return f"{self.root}:past:{model}:{lane}"

    def load(self, model: str, lane: Lane) -> str:
        """Hash: {waiting,running}_{requests,tokens}; floor, the shares that a new tenant begins with; and what only
        grows: submitted_tokens, ended_OUTCOME, leased_again, leases_expired."""
        return f"{self.root}:load:{model}:{lane}"

    def tenant_load(self, model: str, lane: Lane) -> str:
        """Hash of the same counters a tenant, as long as they are not 0: "waiting_requests TENANT", ..."""
        return f"{self.root}:tenant-load:{model}:{lane}"

    def tenants(self, model: str, lane: Lane) -> str:
        """Sorted set: tenant -> its estimated tokens, waiting and running."""
        return f"{self.root}:tenants:{model}:{lane}"

    def held(self, engine: str) -> str:
        """Set: ids of the requests that this engine holds."""
        return f"{self.root}:held:{engine}"

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
    def experts(self) -> str:
        """String with a TTL: rows of each logical expert, as the expert router knows them."""
        return f"{self.root}:experts"

    def owed(self, model: str) -> str:
        """Hash: who keeps work outside the queue -> [tokens, deadline (Unix s) or null, until when that holds]."""
        return f"{self.root}:owed:{model}"

    def measured(self, model: str) -> str:
        """String: what the autoscaler found out of this model's engines."""
        return f"{self.root}:measured:{model}"

    @property
    def scaling(self) -> str:
        """String with a TTL: an autoscaler lives, and what it does."""
        return f"{self.root}:scaling"

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

    @property
    def batches(self) -> str:
        """Sorted set: batch -> when it was created (Unix us)."""
        return f"{self.root}:batches"

    @property
    def open_batches(self) -> str:
        """Sorted set: batches that have not ended -> their deadline (Unix ms)."""
        return f"{self.root}:batches:open"

    @property
    def counts(self) -> str:
        """Hash of what only grows: batches_STATUS that have ended so, lines_{output,errors} that have their result."""
        return f"{self.root}:counts"

    def batch(self, batch_id: str) -> str:
        """Hash: what is known of one batch."""
        return f"{self.root}:batch:{batch_id}"

    def batch_part(self, batch_id: str, part: str) -> str:
        """What belongs to it. `input`: hash of block number -> zlib of internal.InputBlock (`input:<upload>` before it
        is whole); `done`: bitmap of lines that have their result; `retries`: hash of line -> how often it was asked
        again; `output`, `errors`: streams of results, entry id <line of the file>-1, field d = zlib of the line."""
        return f"{self.root}:batch:{batch_id}:{part}"

    def use(self, tenant: str) -> str:
        """Hash, until they have passed: when what a tenant has used of its minutes is paid off (access_scripts.py)."""
        return f"{self.root}:use:{tenant}"

    @property
    def api_keys(self) -> str:
        """Hash: id of an API key -> its record as JSON, with hashes of its secrets."""
        return f"{self.root}:api-keys"

    def work(self, model: str) -> str:
        """Channel: something to lease has come."""
        return f"{self.root}:work:{model}"

    def control(self, engine: str) -> str:
        """Channel to one engine: ids of requests that have ended under it, one a line."""
        return f"{self.root}:control:{engine}"

    def pushes(self, gateway: str) -> str:
        """Channel to one gateway: new journal entries of requests it watches (internal.Batch)."""
        return f"{self.root}:pushes:{gateway}"
