"""What `folkmoot up` decides once, and hands to every actor as it is. Light: imported by all of them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from folkmoot.cluster.host_groups import HostGroup
from folkmoot.experts import expert_dtype, secret
from folkmoot.experts.expert_choice import Choice
from folkmoot.gateway.metrics_server import OFF

ROUTER = "ExpertRouter"
"""Name of the expert router's Ray actor, in the cluster's namespace."""

EXPERT_ACTOR_PREFIX = "expert-"
"""What the names of Ray actors that own an expert host begin with. A name is never used twice."""


@dataclass(frozen=True)
class ClusterSpec:
    """One cluster: a model, its experts' hosts, its engines, and where their files lie on each node."""

    name: str
    """what `--name` says; "default" unless several clusters run on one machine"""
    model_path: str
    """checkpoint folder; the same path on every node"""
    model: str
    """the name that clients ask for"""
    architecture: str
    moe_layers: tuple[int, ...]
    num_experts: int
    redis: str = field(repr=False)
    """URL of the request store; may hold a password"""
    store_namespace: str
    run_dir: str
    """unix sockets: a short path, since theirs may not exceed 107 bytes; made on each node, mode 0700"""
    log_dir: str
    secret: str = field(default_factory=secret.new, repr=False)
    """what engines and expert hosts prove to each other; Ray alone carries it, and each node keeps it in a file"""
    engines: int = 1
    """to begin with: exactly so many, or at least, where there is a `most_engines`"""
    most_engines: int | None = None
    """None: no autoscaling"""
    idle_s: float = 300.0
    """how long the last engine stays after the last interactive request"""
    hosts: int = 2
    """to begin with"""
    most_hosts: int | None = None
    """None: the autoscaler leaves their number alone"""
    replicas: int = 1
    placement: str = "spread"
    """"spread" or "pack": how Ray lays expert hosts over nodes"""
    dtype: str = "auto"
    expert_dtype: str = expert_dtype.CHECKPOINT
    """what expert hosts quantise their experts to (folkmoot.experts.expert_dtype)"""
    expert_choice: Choice | None = None
    """... where that is a budget: the dtype of each expert (folkmoot.cluster.expert_precision)"""
    device: str = "cpu"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_batch_seqs: int | None = None
    """of them batch requests; None: all, and three quarters within a minute of an interactive request"""
    batch_rows: int = 1
    """batch requests that take part in an engine's step beside interactive ones"""
    batch_prompt_tokens: int = 256
    """tokens of batch prompts that begin in one step"""
    batch_invariant: bool | None = None
    """a request's tokens do not depend on what else an engine computes meanwhile; None: on a CPU"""
    prefix_caching: bool = True
    """keep the KV cache of prompts' beginnings for others that begin alike"""
    compiled: bool = False
    """compile the engine's part of the model (torch.compile)"""
    speculative_tokens: int = 0
    """guess so many tokens ahead from what the text has had before (n-grams), and check them in one step; 0: none"""
    prefill_chunk: int | None = None
    """compute prompts in pieces of at most so many tokens, and no more of all prompts in a step, where it may be so
    small beside `max_num_seqs`; None: whole"""
    micro_batch_from: int | None = None
    """compute steps of at least so many requests in two halves that take turns; None: never"""
    seed: int = 0
    kv_cache_gib: float = 1.0
    transport: str = "auto"
    combine: str = "rows"
    share_weights: bool = False
    """keep experts once a node, in memory that its hosts share (folkmoot.experts.weights)"""
    templates: bool = False
    """keep a process for each expert host that has loaded its experts, and a fork of it that is its next life
    (folkmoot.cluster.host_template)"""
    hedge_s: float = 0.05
    """rows of an expert host later than this beyond some times its usual pace are asked of a replica as well"""
    stall_s: float = 1.0
    """an expert host later than this beyond some times its usual pace counts as stalled (folkmoot.experts.deadline)"""
    load_half_life_s: float = 60.0
    """after so long an expert's rows count half in its recent load"""
    rebalance: bool = False
    """give hot experts extra replicas (folkmoot.cluster.balance_live)"""
    spare_experts: int = 1
    """in each layer, so many extra replicas a host may hold"""
    no_replica_timeout_s: float = 60.0
    """how long running requests wait for an expert that has no live replica"""
    several_nodes: bool = False
    """whether hosts and engines may be on different nodes: only then do hosts listen on TCP"""
    background_workers: bool = False
    """make each engine's OpenMP workers SCHED_IDLE (folkmoot.experts.cores)"""
    host_cpus: float = 0.1
    """share of a CPU that Ray reserves for one expert host; a reservation, not a limit"""
    host_gpus: float = 0.0
    max_experts_per_host: int | None = None
    """no host is ever given more; None: any number"""
    host_groups: tuple[HostGroup, ...] = ()
    """hosts of several kinds to begin with; empty: all alike"""
    column_bytes: int = 0
    """about what one expert of every layer takes in memory, at most"""
    engine_cpus: float = 0.1
    engine_gpus: float = 0.0
    router_resources: Mapping[str, float] = field(default_factory=dict)
    """custom Ray resources that the expert router asks of its node; alike below: so each finds its own kind of node"""
    host_resources: Mapping[str, float] = field(default_factory=dict)
    engine_resources: Mapping[str, float] = field(default_factory=dict)
    grace_s: float = 10.0
    """how long a stopping engine may take to finish what runs"""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """variables of logs and traces that actors take over (folkmoot.cluster.environment); may hold a collector's key"""
    metrics: str = OFF
    """HOST:PORT at which each node answers Prometheus (folkmoot.gateway.metrics_server); "off": nowhere"""
    started_s: float = field(default_factory=time.time)
    """when this cluster was begun: of several on one store the newest takes charge (folkmoot.cluster.charge)"""

    def host_group(self, group: int) -> HostGroup:
        """What the hosts of a placement group are like: those of `folkmoot up` as it said, others all alike."""
        return self.host_groups[group] if group < len(self.host_groups) else HostGroup(self.hosts)

    @property
    def measures_speed(self) -> bool:
        """Whether expert hosts measure how quick they are: where there are several kinds, and none says its speed."""
        return bool(self.host_groups) and all(group.speed is None for group in self.host_groups)

    @property
    def first_engines(self) -> int:
        """Engines that are started at first: one in any case, which shows that the model loads."""
        return max(1, self.engines)

    @property
    def namespace(self) -> str:
        """Ray namespace of all actors of this cluster."""
        return namespace_of(self.name)

    @property
    def app(self) -> str:
        """Name of the Ray Serve application that holds the engines."""
        return self.namespace

    @property
    def warm_socket(self) -> Path:
        """Where a node's warm parent listens."""
        return Path(self.run_dir) / "warm.sock"

    @property
    def warm_log(self) -> Path:
        """Where a node's warm parent writes."""
        return Path(self.log_dir) / "warm.log"

    @property
    def secret_file(self) -> Path:
        """Where a node keeps the secret."""
        return Path(self.run_dir) / "secret"

    @property
    def metrics_dir(self) -> Path:
        """Where the processes of a node offer their metrics to each other."""
        return Path(self.run_dir) / "metrics"

    def log(self, part: str) -> Path:
        """The log file of one process."""
        return Path(self.log_dir) / f"{part}.log"


def namespace_of(name: str) -> str:
    """Of the cluster of this name: its Ray namespace, and the prefix of its keys in the request store."""
    return "folkmoot" if name == "default" else f"folkmoot-{name}"


def group_name(spec: ClusterSpec, group: int) -> str:
    """Name of the placement group that keeps room for expert hosts."""
    return f"experts-{spec.namespace}" + (f".{group}" if group else "")
