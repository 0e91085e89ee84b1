"""The model of which hosts take experts: vLLM's own classes and loaders, on the meta device, and any experts of it.

The whole model is built on the meta device, where it costs nothing, except that each `RoutedExperts` is told that its
layer has only the experts held here (so layers of one host may hold different numbers of them), and is built on the
real device. The model's own `load_weights` then gets the tensors of those experts under their local numbers. No code
here knows any architecture.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.utils import get_model_cls, initialize_model
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import set_default_torch_dtype

from folkmoot.experts.vllm_api.checkpoint import ExpertTensor, read_experts
from folkmoot.experts.vllm_api.text_only import text_weights

# Names under which Hugging Face configurations keep the number of routed experts.
_COUNT_NAMES = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")


@dataclass
class Loader:
    """Reads and prepares experts of one layer at a time, under a current vLLM configuration and a world."""

    config: VllmConfig
    tensors: Mapping[int, list[ExpertTensor]]
    model: Any
    modules: dict[int, Any]

    def load(self, layer: int, experts: Sequence[int]) -> None:
        """Let the layer hold just these experts, ready to run. Without any, it is ready but for its weights."""
        self.read(layer, experts)
        module = self.modules[layer]
        module.quant_method.process_weights_after_loading(module)
        module._ensure_moe_quant_config_init()

    def read(self, layer: int, experts: Sequence[int]) -> None:
        """Let the layer hold just these experts, as the checkpoint has them."""
        self.modules[layer].hold(len(experts))
        if experts:
            with _expert_count(self.config, len(experts)):
                weights = read_experts(self.tensors[layer], experts)
                self.model.load_weights(text_weights(self.config.model_config, weights))


def build(config: VllmConfig, counts: Mapping[int, int], device: torch.device) -> tuple[Any, dict[int, Any]]:
    """The model on the meta device, and its RoutedExperts on `device` where `counts` names their layer."""
    model_class = get_model_cls(config.model_config)  # importing it defines its own subclasses of RoutedExperts
    modules: dict[int, Any] = {}
    with (
        replaced(RoutedExperts, lambda base: _holding(base, counts, device, modules)),
        set_default_torch_dtype(config.model_config.dtype),
        torch.device("meta"),
    ):
        model = initialize_model(config, model_class=model_class)
    missing = sorted(set(counts) - set(modules))
    if missing:
        raise ValueError(f"{config.model_config.model}: vLLM builds no routed experts in layers {missing}")
    return model, modules


def _holding(
    base: type[RoutedExperts], counts: Mapping[int, int], device: torch.device, modules: dict[int, Any]
) -> type[RoutedExperts]:
    """A subclass of `base` that believes its layer has only the experts held, and stands on the real device.

    It can be made anew for another number of experts by `hold`; `count` changes only what it believes.
    """

    def __init__(self: Any, layer_name: str, params_dtype: torch.dtype, moe_config: Any, *args: Any, **kw: Any) -> None:
        layer = extract_layer_index(layer_name)
        if layer not in counts:
            base.__init__(self, layer_name, params_dtype, moe_config, *args, **kw)
            return
        kw["apply_router_weight_on_input"] = False  # the dispatcher's side has done it

        def count(num: int) -> None:
            moe_config.num_experts = moe_config.num_local_experts = moe_config.num_logical_experts = num
            self.local_num_experts = self.global_num_experts = num

        def hold(num: int) -> None:
            count(num)
            with device, set_default_torch_dtype(params_dtype):
                base.__init__(self, layer_name, params_dtype, moe_config, *args, **kw)
            self.count, self.hold = count, hold
            count(num)

        hold(counts[layer])
        modules[layer] = self

    return type(base.__name__, (base,), {"__init__": __init__})


@contextmanager
def replaced(root: type[Any], make: Callable[[type[Any]], type[Any]]) -> Iterator[None]:
    """While open, vLLM builds make(C) for the pluggable layer C = `root`, and each subclass that is defined by now."""
    before = dict(op_registry_oot)
    try:
        for base in family(root):
            op_registry_oot[base.__name__] = make(base)
        yield
    finally:
        op_registry_oot.clear()
        op_registry_oot.update(before)


def family(root: type[Any]) -> list[type[Any]]:
    """`root` and all its subclasses that vLLM defines (ours come and go)."""
    found = [root]
    for child in root.__subclasses__():
        if child.__module__.startswith("vllm."):
            found += family(child)
    return found


@contextmanager
def _expert_count(config: VllmConfig, count: int) -> Iterator[None]:
    """While open, the model's configuration says that it has `count` experts: some loaders reshape by that number."""
    text = config.model_config.hf_text_config
    before = {name: getattr(text, name) for name in _COUNT_NAMES if isinstance(getattr(text, name, None), int)}
    try:
        for name in before:
            setattr(text, name, count)
        yield
    finally:
        for name, value in before.items():
            setattr(text, name, value)
