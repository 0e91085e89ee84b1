"""The engine side: a vLLM that keeps attention, gates and shared experts, and whose routed experts are elsewhere.

`install` replaces vLLM's default model loader by one that builds, in place of every `RoutedExperts`, a subclass whose
parameters keep their real names and shapes (loaders look them up) but sit on the meta device, and whose quantisation
method hands rows to a dispatcher. The tensors of routed experts are never read from disk.
"""

from collections.abc import Callable, Generator
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from vllm.config import CompilationConfig, CompilationMode, ModelConfig, VllmConfig
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts, SharedExpertsOrder
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.model_executor.models.utils import extract_layer_index

from folkmoot.experts.vllm_api.checkpoint import is_routed
from folkmoot.experts.vllm_api.loader import replaced
from folkmoot.experts.vllm_api.runtime import rest_groups_of_one
from folkmoot.experts.vllm_api.text_only import overrides, text_weights

MOE_OPERATORS = ("vllm::moe_forward", "vllm::moe_forward_shared")


class Dispatch(Protocol):
    """What an engine needs of a dispatcher."""

    def forward(
        self,
        layer: int,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared: Callable[[], torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The routed output [T, hidden] of x [T, hidden], and what `shared`, run while rows are away, returned.

        topk_weights is float32 [T, k], topk_ids int32 [T, k], logical experts of this layer of the model.
        """


_dispatcher: Dispatch | None = None
_make_dispatcher: Callable[[], Dispatch] | None = None


def install(make_dispatcher: Callable[[], Dispatch]) -> None:
    """From now on, models this process loads send their routed experts' rows to make_dispatcher().

    It is called once, at the first forward pass. Calling `install` again replaces the dispatcher. Load formats other
    than those of vLLM's default loader (safetensors) are not affected.
    """
    global _dispatcher, _make_dispatcher
    _dispatcher, _make_dispatcher = None, make_dispatcher
    for load_format, loader in list(_LOAD_FORMAT_TO_MODEL_LOADER.items()):
        if loader is DefaultModelLoader:
            _LOAD_FORMAT_TO_MODEL_LOADER[load_format] = DispatchingLoader


def engine_arguments(device: str = "cpu") -> dict[str, Any]:
    """Arguments that vLLM's engine needs beside the user's own, as for `AsyncEngineArgs`.

    On an accelerator CUDA graphs must stop around the MoE operators, since a dispatcher cannot be captured. (Written
    from vLLM's source, never run: there was no GPU.)
    """
    arguments: dict[str, Any] = {"hf_overrides": overrides}
    if device == "cpu":
        return arguments
    return {**arguments, "compilation_config": {"splitting_ops": [*CompilationConfig._attention_ops, *MOE_OPERATORS]}}


class DispatchingLoader(DefaultModelLoader):
    """vLLM's default loader, for a model whose routed experts are elsewhere."""

    def create_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> torch.nn.Module:
        get_model_cls(model_config)  # importing it defines its own subclasses of RoutedExperts
        compiled = vllm_config.compilation_config.mode != CompilationMode.NONE
        opaque = replaced(MoERunner, _opaque) if compiled else nullcontext()
        with replaced(RoutedExperts, _dispatching), opaque:
            model: torch.nn.Module = super().create_model(vllm_config, model_config, prefix)
        rest_groups_of_one()
        return model

    def get_all_weights(
        self, model_config: ModelConfig, model: torch.nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Name and tensor of every weight; those of routed experts without their data, which stays on disk."""
        for name, tensor in text_weights(model_config, super().get_all_weights(model_config, model)):
            # One value an expert, such as a gate's correction bias that is stored beside them, belongs to the engine.
            elsewhere = is_routed(name) and tensor.ndim > 1
            yield name, torch.empty_like(tensor, device="meta") if elsewhere else tensor


def _dispatching(base: type[RoutedExperts]) -> type[RoutedExperts]:
    """A subclass of `base` that holds no weights."""

    def __init__(self: Any, layer_name: str, params_dtype: torch.dtype, moe_config: Any, *args: Any, **kw: Any) -> None:
        with torch.device("meta"):
            base.__init__(self, layer_name, params_dtype, moe_config, *args, **kw)
        moe_config.hidden_dim = moe_config.hidden_dim_unpadded  # rows travel unpadded: a host pads for its own kernel
        method = DispatchMethod(moe_config, extract_layer_index(layer_name), self.apply_router_weight_on_input)
        del self.quant_method  # it may be registered as a submodule, which an assignment could not replace
        self.quant_method = method

    return type(base.__name__, (base,), {"__init__": __init__})


def _opaque(base: type[MoERunner]) -> type[MoERunner]:
    """A subclass of `base` that enters the MoE layer through vLLM's custom operators, into which no compiler looks.

    On a CPU vLLM calls it directly; torch.compile would then trace the dispatcher once and never call it again.
    """

    def _select_forward(self: Any) -> Callable[..., Any]:
        operators = torch.ops.vllm
        return operators.moe_forward if self._shared_experts is None else operators.moe_forward_shared

    return type(base.__name__, (base,), {"_select_forward": _select_forward})


class DispatchMethod(FusedMoEMethodBase):
    """In place of a kernel: sends the rows of one layer away, and runs the shared experts meanwhile."""

    def __init__(self, moe: FusedMoEConfig, layer: int, weight_on_input: bool) -> None:
        super().__init__(moe)
        self.layer = layer
        self.weight_on_input = weight_on_input

    # What vLLM's runner asks before it calls `apply`.
    skip_forward_padding = True
    mk_can_overlap_shared_experts = True  # leaves the shared experts to us
    topk_indices_dtype = torch.int32

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the parameters already are on the meta device."""

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: SharedExperts | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.weight_on_input:  # top-1 models that scale rows before the expert, as Llama 4
            x = x * topk_weights.to(x.dtype)
            topk_weights = torch.ones_like(topk_weights)
        shared = None
        if shared_experts is not None:

            def shared() -> torch.Tensor:
                shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
                output: torch.Tensor = shared_experts._output[shared_experts._output_idx]  # the runner takes it later
                return output

        routed, _ = current_dispatcher().forward(self.layer, x, topk_weights, topk_ids, shared)
        return routed


def current_dispatcher() -> Dispatch:
    """The dispatcher of this process, made on first use. RuntimeError where `install` has not been called."""
    global _dispatcher
    if _dispatcher is None:
        if _make_dispatcher is None:
            raise RuntimeError("folkmoot.experts.vllm_api.install has not been called in this process")
        _dispatcher = _make_dispatcher()
    return _dispatcher
