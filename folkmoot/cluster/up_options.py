"""What `folkmoot up` may be asked for, what of it cannot be, and the `ClusterSpec` that comes of it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from folkmoot import logs
from folkmoot.cluster import environment, host_groups
from folkmoot.cluster.expert_precision import read_loads
from folkmoot.cluster.host_groups import HostGroup
from folkmoot.cluster.placement import num_hosts_for
from folkmoot.cluster.spec import ClusterSpec, namespace_of
from folkmoot.experts import expert_choice, expert_dtype, warm
from folkmoot.gateway.listen import OPEN_WITHOUT_KEYS, is_local

if TYPE_CHECKING:
    from folkmoot.experts.vllm_api import ModelShape

SHARED_WITH_SPEC = (
    *("name", "engines", "most_engines", "most_hosts", "idle_s", "placement", "dtype", "expert_dtype"),
    *("device", "max_model_len", "max_num_seqs", "max_batch_seqs", "batch_rows", "batch_prompt_tokens"),
    *("batch_invariant", "prefix_caching", "compiled", "speculative_tokens", "prefill_chunk", "micro_batch_from"),
    *("kv_cache_gib", "seed", "transport", "combine", "max_experts_per_host", "host_groups"),
    *("hedge_s", "stall_s", "no_replica_timeout_s", "load_half_life_s", "rebalance", "spare_experts"),
)


MOST_FEW_CORES = 4  # measured on two only (docs/speed.md)


class StartError(RuntimeError):
    """The cluster did not come up. The message says why, and names the log to read."""


@dataclass(frozen=True)
class UpOptions:
    """What `folkmoot up` was asked for; the command line takes its defaults from here."""

    model: str
    """checkpoint folder, or "demo" for the built-in model"""
    name: str = "default"
    engines: int = 1
    most_engines: int | None = None
    """None: exactly `engines`; else from so many to this, as work asks for"""
    idle_s: float = ClusterSpec.idle_s
    hosts: int | None = None
    """expert hosts; None: from experts_per_host, else as few as the replicas allow, at least two"""
    most_hosts: int | None = None
    """None: their number stays; else the autoscaler may start so many"""
    experts_per_host: int | None = None
    host_groups: tuple[HostGroup, ...] = ()
    """instead of `hosts`: hosts of several kinds"""
    replicas: int | None = None
    """None: as many as hosts where weights are shared by hosts on one node, so that they cost no memory; else 1"""
    share_weights: bool | None = None
    """None: on a CPU"""
    templates: bool | None = None
    """None: where weights are shared"""
    placement: str = "spread"
    listen: str = "127.0.0.1:50051"
    require_keys: bool = False
    """ask for an API key with every call"""
    insecure: bool = False
    """listen on an open address without keys all the same"""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    metrics: str = "127.0.0.1:0"
    """where each node answers Prometheus; port 0: any free one of this node; "off": nowhere"""
    redis: str | None = field(default=None, repr=False)
    """URL of a request store; None: an embedded one"""
    address: str | None = None
    """address of a running Ray cluster; None: a local one"""
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_batch_seqs: int | None = None
    """of them batch requests; None: all, and three quarters within a minute of an interactive request"""
    batch_rows: int = ClusterSpec.batch_rows
    batch_prompt_tokens: int = ClusterSpec.batch_prompt_tokens
    batch_invariant: bool | None = None
    prefix_caching: bool = ClusterSpec.prefix_caching
    compiled: bool = ClusterSpec.compiled
    speculative_tokens: int = ClusterSpec.speculative_tokens
    prefill_chunk: int | None = None
    micro_batch_from: int | None = None
    dtype: str = "auto"
    expert_dtype: str = ClusterSpec.expert_dtype
    expert_loads: Path | None = None
    """what `folkmoot experts --json` printed: where a budget decides, experts that are often used get more bits"""
    device: str = "cpu"
    tenant_weights: str = ""
    """NAME=WEIGHT,...: shares of each lane; 1 for who is not named"""
    kv_cache_gib: float = 1.0
    seed: int = 0
    transport: str = "auto"
    combine: str = "rows"
    hedge_s: float = ClusterSpec.hedge_s
    stall_s: float = ClusterSpec.stall_s
    no_replica_timeout_s: float = ClusterSpec.no_replica_timeout_s
    load_half_life_s: float = ClusterSpec.load_half_life_s
    rebalance: bool = ClusterSpec.rebalance
    spare_experts: int = ClusterSpec.spare_experts
    background_workers: bool | None = None
    """None: where it helps, with one engine on a CPU"""
    cpus_per_host: float = 0.1
    gpus_per_host: float = 0.0
    cpus_per_engine: float = ClusterSpec.engine_cpus
    gpus_per_engine: float = ClusterSpec.engine_gpus
    max_experts_per_host: int | None = None
    log_format: str = logs.DEFAULT_FORMAT
    log_level: str = logs.DEFAULT_LEVEL
    state_dir: Path | None = None


def make_spec(
    options: UpOptions, model_path: Path, shape: "ModelShape", *, redis: str, metrics: str, run_dir: str, log_dir: str
) -> ClusterSpec:
    """What was asked for, with everything decided that was left open. Raises StartError, PlacementError."""
    hosts, replicas = num_hosts_and_replicas(options, shape.num_experts)
    return ClusterSpec(
        model_path=str(model_path),
        model="demo" if options.model == "demo" else model_path.name,
        architecture=shape.architecture,
        moe_layers=shape.moe_layers,
        num_experts=shape.num_experts,
        redis=redis,
        metrics=metrics,
        store_namespace=namespace_of(options.name),
        run_dir=run_dir,
        log_dir=log_dir,
        hosts=hosts,
        replicas=replicas,
        share_weights=shares_weights(options),
        templates=shares_weights(options) if options.templates is None else options.templates,
        column_bytes=_column_bytes(options, shape),
        several_nodes=options.address is not None,
        background_workers=_background_workers(options, shape),
        host_cpus=options.cpus_per_host,
        host_gpus=options.gpus_per_host,
        engine_cpus=options.cpus_per_engine,
        engine_gpus=options.gpus_per_engine,
        environment={
            **openmp_of(options),
            **environment.carried(),
            **logs.variables(options.log_format, options.log_level),
        },
        **{name: getattr(options, name) for name in SHARED_WITH_SPEC},
    )


def _background_workers(options: UpOptions, shape: "ModelShape") -> bool:
    """By default where one engine shares its cores with hosts and nobody else: two would starve each other."""
    if options.background_workers is not None:
        return options.background_workers
    return options.device == "cpu" and _most_engines(options) == 1 and bool(shape.moe_layers)


def _most_engines(options: UpOptions) -> int:
    return options.engines if options.most_engines is None else options.most_engines


def openmp_of(options: UpOptions, cores: int | None = None) -> Mapping[str, str]:
    """OpenMP's variables for the nodes' warm parents, and so for engines and expert hosts. `cores`: of this node."""
    if _most_engines(options) > 1:
        return warm.SEVERAL_ENGINES
    has_gateway = options.address is None  # else engines may be on nodes without one
    return warm.FEW_CORES if has_gateway and (cores or len(os.sched_getaffinity(0))) <= MOST_FEW_CORES else warm.OPENMP


def shares_weights(options: UpOptions) -> bool:
    """Whether the expert hosts of a node keep weights in memory that they share: by default on a CPU. StartError."""
    if options.share_weights and options.device != "cpu":
        raise StartError(f"--share-weights shares main memory, so it needs --device cpu, not {options.device}")
    return options.device == "cpu" if options.share_weights is None else options.share_weights


def num_hosts_and_replicas(options: UpOptions, num_experts: int) -> tuple[int, int]:
    """Expert hosts and replicas of each expert, where options leave them open. Raises PlacementError."""
    hosts, replicas = options.hosts, options.replicas
    if options.host_groups:
        hosts, replicas = sum(group.hosts for group in options.host_groups), replicas or 1
    per_host, capacity = options.experts_per_host, options.max_experts_per_host
    if hosts is None and per_host is None and num_experts:
        hosts = max(replicas or 1, min(2, num_experts))
    if replicas is None:
        is_free = shares_weights(options) and options.address is None and per_host is None and capacity is None
        replicas = hosts if is_free and num_experts and hosts is not None else 1
    num_hosts = num_hosts_for(num_experts, replicas, num_hosts=hosts, experts_per_host=per_host, capacity=capacity)
    return num_hosts, replicas


def check_experts(options: UpOptions, model_path: Path, shape: "ModelShape") -> None:
    """Raises StartError or PlacementError where experts cannot be had, or placed, as asked for."""
    num_hosts_and_replicas(options, shape.num_experts)
    _check_micro_batches(options)
    _check_expert_dtype(options, model_path, shape)
    _check_host_groups(options, shape)


def _check_micro_batches(options: UpOptions) -> None:
    others = {
        f"--device {options.device}": options.device != "cpu",
        "--compile": options.compiled,
        "--speculate": options.speculative_tokens > 0,
    }
    if options.micro_batch_from is not None and (found := [name for name, is_on in others.items() if is_on]):
        raise StartError(f"--micro-batch-from does not go with {found[0]}")


def _check_host_groups(options: UpOptions, shape: "ModelShape") -> None:
    """Raises PlacementError where host groups have no room for all experts."""
    if options.host_groups and shape.num_experts:
        size = _column_bytes(options, shape)
        most = options.max_experts_per_host
        host_groups.check_fit(options.host_groups, shape.num_experts, options.replicas or 1, size, most)


def _column_bytes(options: UpOptions, shape: "ModelShape") -> int:
    """About what an expert of every layer takes; where a budget decides, in the mean."""
    checkpoint_bytes = shape.expert_bytes * len(shape.moe_layers) * shape.num_experts
    size = expert_dtype.all_bytes(checkpoint_bytes, shape.dtype, options.expert_dtype)
    return size // max(1, shape.num_experts)


def _check_expert_dtype(options: UpOptions, model_path: Path, shape: "ModelShape") -> None:
    """Raises StartError where the model's experts cannot be had as asked for."""
    amx = expert_dtype.has_amx() if options.address is None else None
    try:
        expert_dtype.check(model_path, options.expert_dtype, dtype=options.dtype, device=options.device, amx=amx)
        _column_bytes(options, shape)
        if options.expert_loads is not None:
            _check_loads(options, shape)
    except ValueError as e:
        raise StartError(str(e)) from e


def _check_loads(options: UpOptions, shape: "ModelShape") -> None:
    """Raises ValueError."""
    assert options.expert_loads is not None
    if expert_choice.parse(options.expert_dtype) is None:
        raise ValueError(f"--expert-loads needs --expert-dtype auto:BUDGET, not {options.expert_dtype}")
    read_loads(options.expert_loads, shape.moe_layers, shape.num_experts)


def resolve_model(model: str, progress: Callable[[str, float], None]) -> "tuple[Path, ModelShape]":
    """The checkpoint folder and its shape; "demo" is made where it is not cached. Raises StartError."""
    if model == "demo":
        from folkmoot.cluster import demo_model

        path = demo_model.ensure(progress=progress)
    else:
        path = Path(model).expanduser().resolve()
        if not (path / "config.json").is_file():
            raise StartError(f"{path} is not a checkpoint folder: it has no config.json")
    from folkmoot.experts.vllm_api import describe

    try:
        return path, describe(path)
    except (OSError, ValueError, KeyError) as e:
        raise StartError(f"{path} cannot be read as a checkpoint: {e}") from e


def check_guarded(options: UpOptions) -> None:
    """Raises StartError where strangers could call: the gateway would not start either, but later."""
    is_guarded = options.require_keys or options.tls_client_ca is not None
    if not (is_local(options.listen) or is_guarded or options.insecure):
        raise StartError(f"--listen {options.listen}: {OPEN_WITHOUT_KEYS}")
