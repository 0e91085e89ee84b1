"""The private names of vLLM (and torch) that this package relies on, and a check that says which of them broke.

When vLLM moves: set VLLM_VERSION, run `python -m folkmoot.experts.vllm_api.private`, mend what it names, run the tests.
"""

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

VLLM_VERSION = "0.32.0"

_MOE = "vllm.model_executor.layers.fused_moe"
_LOADER = "vllm.model_executor.model_loader"
_STATE = "vllm.distributed.parallel_state"
_SCHED = "vllm.v1.core.sched"


@dataclass(frozen=True)
class PrivateName:
    """One name relied on, and how: `parameters` it must take, in this order; `members` its class or instances have."""

    path: str
    parameters: tuple[str, ...] = ()
    members: tuple[str, ...] = ()


PRIVATE_NAMES = (
    PrivateName("vllm.envs", members=("VLLM_CPU_ATTN_SPLIT_KV", "VLLM_BATCH_INVARIANT")),
    PrivateName("vllm.model_executor.custom_op.op_registry_oot"),
    PrivateName("vllm.model_executor.custom_op.PluggableLayer"),
    PrivateName(
        f"{_MOE}.routed_experts.RoutedExperts.__init__",
        ("layer_name", "params_dtype", "moe_config", "apply_router_weight_on_input"),
    ),
    PrivateName(
        f"{_MOE}.routed_experts.RoutedExperts",
        members=(
            "quant_method",
            "moe_config",
            "activation",
            "local_num_experts",
            "apply_router_weight_on_input",
            "_ensure_moe_quant_config_init",
        ),
    ),
    PrivateName(
        f"{_MOE}.config.FusedMoEConfig",
        members=(
            *("num_experts", "num_local_experts", "num_logical_experts", "hidden_dim", "hidden_dim_unpadded"),
            "intermediate_size_per_partition_unpadded",
        ),
    ),
    PrivateName(
        f"{_MOE}.fused_moe_method_base.FusedMoEMethodBase.apply",
        ("layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"),
    ),
    PrivateName(
        f"{_MOE}.fused_moe_method_base.FusedMoEMethodBase",
        members=(
            "moe_kernel",
            "is_monolithic",
            "skip_forward_padding",
            "mk_can_overlap_shared_experts",
            "topk_indices_dtype",
            "create_weights",
            "get_fused_moe_quant_config",
            "process_weights_after_loading",
        ),
    ),
    PrivateName(f"{_MOE}.modular_kernel.FusedMoEKernel", members=("fused_experts",)),
    PrivateName(
        f"{_MOE}.modular_kernel.FusedMoEExpertsModular.apply",
        (
            *("output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts"),
            *("expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta"),
            "apply_router_weight_on_input",
        ),
    ),
    PrivateName(
        f"{_MOE}.modular_kernel.FusedMoEExpertsModular.workspace_shapes",
        (*("M", "N", "K", "topk", "global_num_experts", "local_num_experts", "expert_tokens_meta"), "activation"),
    ),
    PrivateName(f"{_MOE}.modular_kernel.FusedMoEExpertsModular", members=("expects_unquantized_inputs",)),
    PrivateName(f"{_MOE}.runner.shared_experts.SharedExperts.forward", ("shared_experts_input", "order")),
    PrivateName(f"{_MOE}.runner.shared_experts.SharedExperts", members=("_output", "_output_idx")),
    PrivateName(f"{_MOE}.runner.shared_experts.SharedExpertsOrder", members=("MK_INTERNAL_OVERLAPPED",)),
    PrivateName(f"{_LOADER}._LOAD_FORMAT_TO_MODEL_LOADER"),
    PrivateName(f"{_LOADER}.default_loader.DefaultModelLoader.create_model", ("vllm_config", "model_config", "prefix")),
    PrivateName(f"{_LOADER}.default_loader.DefaultModelLoader.get_all_weights", ("model_config", "model")),
    PrivateName(f"{_LOADER}.utils.get_model_cls", ("model_config",)),
    PrivateName(f"{_LOADER}.utils.initialize_model", ("vllm_config", "model_class")),
    PrivateName("vllm.model_executor.models.utils.extract_layer_index", ("layer_name",)),
    PrivateName("vllm.model_executor.models.ModelRegistry", members=("models",)),
    PrivateName("vllm.model_executor.models.registry._RegisteredModel", members=("from_model_cls", "model_cls")),
    PrivateName("vllm.model_executor.models.registry._LazyRegisteredModel", members=("load_model_cls",)),
    PrivateName("vllm.utils.torch_utils.set_default_torch_dtype", ("dtype",)),
    PrivateName(
        f"{_STATE}.init_distributed_environment",
        ("world_size", "rank", "distributed_init_method", "local_rank", "backend"),
    ),
    PrivateName(f"{_STATE}.initialize_model_parallel", ("tensor_model_parallel_size", "pipeline_model_parallel_size")),
    PrivateName(f"{_STATE}.model_parallel_is_initialized"),
    PrivateName(f"{_STATE}._groups"),
    PrivateName(f"{_STATE}.GroupCoordinator", members=("world_size", "ranks", "device_group", "cpu_group")),
    PrivateName("torch.testing._internal.distributed.fake_pg.FakeStore"),
    PrivateName(f"{_STATE}.destroy_model_parallel"),
    PrivateName(f"{_STATE}.destroy_distributed_environment"),
    PrivateName("vllm.engine.arg_utils.EngineArgs.create_engine_config"),
    PrivateName(
        "vllm.engine.arg_utils.EngineArgs",
        members=("enforce_eager", "skip_tokenizer_init", "max_num_seqs", "quantization"),
    ),
    PrivateName(f"{_MOE}.activation.MoEActivation", members=("SILU", "SWIGLUOAI")),
    PrivateName("vllm.config.set_current_vllm_config", ("vllm_config",)),
    PrivateName("vllm.config.CompilationConfig", members=("_attention_ops", "splitting_ops")),
    PrivateName(f"{_MOE}.runner.moe_runner.MoERunner", members=("_select_forward", "_shared_experts")),
    PrivateName(f"{_MOE}.runner.moe_runner._moe_forward"),  # behind torch.ops.vllm.moe_forward
    PrivateName(f"{_MOE}.runner.moe_runner._moe_forward_shared"),
    PrivateName(
        f"{_SCHED}.scheduler.Scheduler",
        members=(
            *("schedule", "running", "waiting", "current_step", "vllm_config", "scheduler_config", "kv_cache_config"),
            *(
                "kv_cache_manager",
                "block_size",
                "max_num_scheduled_tokens",
                "max_num_active_reqs",
                "prev_step_scheduled_req_ids",
            ),
        ),
    ),
    PrivateName(f"{_SCHED}.scheduler.Scheduler._preempt_request", ("request", "timestamp")),
    PrivateName(f"{_SCHED}.scheduler.Scheduler._request_blocks_can_be_freed", ("request",)),
    PrivateName(f"{_SCHED}.async_scheduler.AsyncScheduler"),
    PrivateName(f"{_SCHED}.request_queue.PriorityRequestQueue.peek_request"),
    PrivateName(
        "vllm.v1.request.Request",
        members=(
            *("request_id", "priority", "arrival_time", "num_tokens", "num_tokens_with_spec", "num_computed_tokens"),
            *("num_output_placeholders", "next_decode_eligible_step"),
        ),
    ),
    PrivateName("vllm.v1.worker.cpu_model_runner.CPUModelRunner.sample_tokens", ("grammar_output",)),
    PrivateName("vllm.v1.worker.cpu_model_runner.CPUModelRunner", members=("discard_request_mask", "input_batch")),
    PrivateName("vllm.v1.worker.cpu_model_runner.CPUModelRunner.__init__", ("vllm_config", "device")),
    PrivateName(
        "vllm.v1.worker.cpu_model_runner.CPUModelRunner._determine_batch_execution_and_padding",
        ("num_reqs", "allow_microbatching"),
    ),
    PrivateName(
        "vllm.v1.worker.cpu_model_runner.CPUModelRunner._model_forward",
        ("input_ids", "positions", "intermediate_tensors", "inputs_embeds"),
    ),
    PrivateName("vllm.config.ParallelConfig", members=("ubatch_size", "num_ubatches", "use_ubatching")),
    PrivateName("vllm.forward_context.create_forward_context", ("attn_metadata", "vllm_config", "slot_mapping")),
    PrivateName(
        "vllm.forward_context.ForwardContext",
        members=("attn_metadata", "slot_mapping", "ubatch_slices", "is_padding"),
    ),
    PrivateName("vllm.forward_context.override_forward_context", ("forward_context",)),
    PrivateName("vllm.v1.worker.gpu_input_batch.InputBatch", members=("generators", "num_reqs")),
    PrivateName("vllm.v1.engine.async_llm.AsyncLLM", members=("observability_config", "output_processor")),
    PrivateName("vllm.v1.engine.output_processor.OutputProcessor", members=("tracing_enabled",)),
    PrivateName("vllm.config.ObservabilityConfig", members=("otlp_traces_endpoint",)),
    PrivateName("vllm.v1.core.block_pool.BlockPool.get_num_free_blocks"),
    PrivateName(
        "vllm._custom_ops.cpu_fused_moe",
        ("out", "input", "w13", "w2", "w13_bias", "w2_bias", "topk_weights", "topk_ids", "act", "isa", "skip_weighted"),
    ),
    PrivateName("vllm._custom_ops.cpu_prepack_moe_weight", ("weight", "isa")),
    PrivateName("torch.cpu._is_amx_tile_supported"),
    PrivateName("torch.cpu._init_amx"),
)


def broken_names(names: Sequence[PrivateName] = PRIVATE_NAMES) -> list[str]:
    """One line for each name that is gone or changed, and for a vLLM that is not the pinned one. Empty: all is well."""
    import vllm

    problems = []
    if vllm.__version__.split("+")[0] != VLLM_VERSION:
        problems.append(f"vLLM is {vllm.__version__}, pinned is {VLLM_VERSION}")
    for name in names:
        try:
            target = _resolve(name.path)
        except (ImportError, AttributeError) as error:
            problems.append(f"{name.path}: gone ({error})")
            continue
        problems += [f"{name.path}: has no member {m!r}" for m in name.members if not _has_member(target, m)]
        if name.parameters:
            problems += _wrong_parameters(name, target)
    return problems


def _resolve(path: str) -> Any:
    """The object at a dotted path: the longest importable module, then attributes."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            target = getattr(target, part)
        return target
    raise ImportError(f"no module {parts[0]}")


def _has_member(target: Any, member: str) -> bool:
    """Whether a class or object has the member: as an attribute, a dataclass field, or assigned to self in its code."""
    if hasattr(target, member) or (is_dataclass(target) and member in {f.name for f in fields(target)}):
        return True
    classes = target.__mro__ if isinstance(target, type) else ()
    return any(f"self.{member}" in inspect.getsource(c) for c in classes if c.__module__.startswith("vllm"))


def _wrong_parameters(name: PrivateName, target: Any) -> list[str]:
    actual = list(inspect.signature(target).parameters)
    if [p for p in actual if p in name.parameters] == list(name.parameters):
        return []
    return [f"{name.path}: takes ({', '.join(actual)}), relied on ({', '.join(name.parameters)}) in this order"]


def main() -> None:
    problems = broken_names()
    print("\n".join(problems) or f"all {len(PRIVATE_NAMES)} private names are as in vLLM {VLLM_VERSION}")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
