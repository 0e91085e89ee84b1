"""The host side: any set of routed experts, loaded by vLLM's own loader and run by vLLM's own kernels.

loader.py builds the model and reads experts into it. Experts that are quantised while they are loaded take another way,
and other kernels (quantised.py).

Weights are private to this process, or lie in the segment that all hosts of a node share (weights.py): then only what
nobody has loaded yet is loaded, prepared and copied there, and the kernels see the whole layer, read-only.
"""

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from folkmoot.experts.expert_choice import KINDS
from folkmoot.experts.expert_dtype import CHECKPOINT, ON_CPU, ON_CUDA
from folkmoot.experts.quantised import QuantisedKernel
from folkmoot.experts.vllm_api.checkpoint import (
    ExpertTensor,
    ModelShape,
    count_experts,
    describe,
    expert_tensors,
    identity,
)
from folkmoot.experts.vllm_api.loader import Loader, build
from folkmoot.experts.vllm_api.quantised import KindOf, Quantiser, load_quantised
from folkmoot.experts.vllm_api.runtime import engine_config, prepare_cpu, register_eagerly, world_of_one
from folkmoot.experts.weights import Layout, SegmentError, WeightSegment

log = logging.getLogger(__name__)


class LayerKernel:
    """The held experts of one layer as one function of rows. Not safe to call from two threads at once.

    `hidden_size` is the model's, `num_slots` the number of experts held, `dtype` that of rows in and out.
    """

    def __init__(
        self, module: RoutedExperts, hidden_size: int, dtype: torch.dtype, experts: Sequence[int] | None = None
    ) -> None:
        """`experts`: which of the module's experts the slots are; None: all of them, in order."""
        self.hidden_size = hidden_size
        count: int = module.moe_config.num_local_experts
        self.num_slots = count if experts is None else len(experts)
        self.dtype = dtype
        held = _parameters(module).values()
        self.device = next(iter(held)).device
        self.bytes = sum(p.nbytes for p in held) * self.num_slots // count
        renumbered = experts is not None and list(experts) != list(range(count))
        self._experts = torch.tensor(experts, dtype=torch.int32, device=self.device) if renumbered else None
        self._padded_size: int = module.moe_config.hidden_dim
        self._ones = torch.ones(256, 1, dtype=torch.float32, device=self.device)
        self._write = _direct_kernel(module)
        self._apply = _general_kernel(module)

    def __call__(self, x: torch.Tensor, slots: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Row p of the result is expert slots[p] applied to x[p], without any routing weight.

        x is [P, hidden_size] of `dtype`, slots int32 [P] with values below num_slots, both contiguous; `out`, where
        given, is like x, is written and returned, and may share memory with other processes, but not with x.
        The result of a row does not depend on the other rows. ValueError for a slot out of range.
        """
        rows = x.shape[0]
        if out is None:
            out = torch.empty_like(x)
        if rows == 0:
            return out
        self._check(slots)
        if rows > self._ones.shape[0]:
            self._ones = torch.ones(2 * rows, 1, dtype=torch.float32, device=self.device)
        if self._experts is not None:
            slots = self._experts.index_select(0, slots)
        weights, ids = self._ones[:rows], slots.unsqueeze(1)
        if self._write is not None:
            self._write(out, x, weights, ids)
            return out
        if self._padded_size != self.hidden_size:
            x = torch.nn.functional.pad(x, (0, self._padded_size - self.hidden_size))
        return out.copy_(self._apply(x, weights, ids)[:, : self.hidden_size])

    def _check(self, slots: torch.Tensor) -> None:
        """The kernels index unchecked, so a wrong slot would read foreign memory."""
        low, high = torch.aminmax(slots)
        if low.item() < 0 or high.item() >= self.num_slots:
            raise ValueError(f"slots {low.item()}..{high.item()} of a layer that holds {self.num_slots} experts")


@dataclass(frozen=True)
class HostedExperts:
    """The experts one host holds: a kernel a layer, and the bytes of their weights, of which some may be shared."""

    layers: Mapping[int, LayerKernel | QuantisedKernel]
    bytes: int
    shared_bytes: int = 0


def load_experts(
    checkpoint: Path,
    experts: Mapping[int, Sequence[int]],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    memory_fd: int | None = None,
    expert_dtype: str = CHECKPOINT,
    expert_letters: Mapping[int, str] | None = None,
) -> HostedExperts:
    """Load `experts` (logical experts by layer; slot i of a layer is its i-th) of the checkpoint folder.

    `dtype` is "auto" (the checkpoint's), "bfloat16", "float16" or "float32". Layers without experts may be left out.
    Only the tensors of these experts are read. `memory_fd` is the memory file of the segment that this node's hosts
    share; where the kernels' layout does not allow it, weights are private, and the log says so. `expert_dtype`: what
    the experts are quantised to (expert_dtype.py); `expert_letters`: where that is left to a budget, of each layer a
    letter an expert (expert_choice.py). ValueError for a layer or an expert that the checkpoint does not have, and for
    experts that cannot be had in that dtype.
    """
    checkpoint = Path(checkpoint)
    tensors = expert_tensors(checkpoint)
    wanted = {layer: tuple(ids) for layer, ids in experts.items() if len(ids)}
    _check_wanted(checkpoint, wanted, tensors)
    shape = describe(checkpoint)
    register_eagerly(shape.architecture)
    if device == "cpu":
        prepare_cpu()
    online = ON_CUDA.get(expert_dtype) if device != "cpu" else None
    config = engine_config(checkpoint, dtype=dtype, quantization=online)
    if (kind_of := _kind_of(expert_dtype, expert_letters, shape)) and device == "cpu" and not config.quant_config:
        return _quantised(Quantiser(checkpoint, config, shape.moe_layers, dtype), wanted, kind_of, memory_fd)
    with set_current_vllm_config(config), world_of_one(), torch.inference_mode():
        counts = {layer: len(wanted.get(layer, ())) for layer in shape.moe_layers}
        loader = Loader(config, tensors, *build(config, counts, torch.device(device)))
        is_shared = memory_fd is not None and device == "cpu" and _share(loader, wanted, memory_fd, checkpoint)
        if not is_shared:
            for layer, ids in wanted.items():
                loader.load(layer, ids)
    rows = config.model_config.dtype
    kernels = {
        layer: LayerKernel(loader.modules[layer], shape.hidden_size, rows, ids if is_shared else None)
        for layer, ids in sorted(wanted.items())
    }
    del loader
    gc.collect()
    size = sum(k.bytes for k in kernels.values())
    return HostedExperts(kernels, size, size if is_shared else 0)


def _kind_of(expert_dtype: str, letters: Mapping[int, str] | None, shape: ModelShape) -> KindOf | None:
    """Into what experts are made here; None where vLLM's own kernels are to run them."""
    if letters is None:
        return (lambda _layer, _expert: expert_dtype) if expert_dtype in ON_CPU else None
    wrong = any(set(row) - set(KINDS) or len(row) != shape.num_experts for row in letters.values())
    if wrong or set(letters) != set(shape.moe_layers):
        raise ValueError(f"expert_letters: {shape.num_experts} of {''.join(KINDS)} for each of {shape.moe_layers}")
    return lambda layer, expert: KINDS[letters[layer][expert]]


def _quantised(
    quantiser: Quantiser, wanted: Mapping[int, Sequence[int]], kind_of: KindOf, memory_fd: int | None
) -> HostedExperts:
    with quantiser, torch.inference_mode():
        kernels = load_quantised(quantiser, wanted, kind_of, memory_fd)
    gc.collect()
    size = sum(k.bytes for k in kernels.values())
    return HostedExperts(kernels, size, 0 if memory_fd is None else size)


def _share(loader: Loader, wanted: Mapping[int, Sequence[int]], memory_fd: int, checkpoint: Path) -> bool:
    """Run `wanted` from the node's segment, and load there what is missing; whether that can be done."""
    try:
        for layer in loader.modules:
            loader.load(layer, ())
        with closing(WeightSegment(memory_fd, _layout(loader, checkpoint))) as segment:
            _load_missing(loader, wanted, segment)
    except Exception as e:  # a kernel that cannot be prepared without experts fails as it likes
        log.warning("expert weights are not shared with other hosts: %s: %s", type(e).__name__, e)
        return False
    return True


def _layout(loader: Loader, checkpoint: Path) -> Layout:
    """Of modules that hold no experts: each parameter must have the experts as its first dimension, here 0."""
    num_experts = count_experts(next(iter(loader.tensors.values())))
    layers = {}
    for layer, module in loader.modules.items():
        parameters = _parameters(module)
        if odd := [name for name, p in parameters.items() if p.ndim == 0 or p.shape[0] != 0]:
            raise SegmentError(f"layer {layer}: parameters {odd} are not stacked by expert")
        layers[layer] = {n: (str(p.dtype).removeprefix("torch."), tuple(p.shape[1:])) for n, p in parameters.items()}
    return Layout(identity(checkpoint), num_experts, layers)


def _load_missing(loader: Loader, wanted: Mapping[int, Sequence[int]], segment: WeightSegment) -> None:
    """Attach every layer, and load what it lacks.

    First the layers at which no other host is loading, then the others: so hosts that start together share the work.
    """
    left = list(wanted)
    for wait in (False, True):
        for layer in tuple(left):
            with segment.locked(layer, wait=wait) as is_held:
                if not is_held:
                    continue
                if missing := segment.missing(layer, wanted[layer]):
                    _load_into(segment, loader, layer, missing)
                _attach(loader.modules[layer], segment, layer)
                left.remove(layer)


def _load_into(segment: WeightSegment, loader: Loader, layer: int, experts: Sequence[int]) -> None:
    """Load experts and copy them into the segment. SegmentError where the kernel does not compute the same from there.

    That would be one that keeps more than the module's parameters, of which nothing else could tell.
    """
    module = loader.modules[layer]
    loader.load(layer, experts)
    before = _probe(module, 0)
    segment.write(layer, experts, _parameters(module))
    _attach(module, segment, layer)
    if not torch.equal(before, _probe(module, experts[0])):
        raise SegmentError(f"layer {layer}: its kernel keeps weights beside its parameters")
    segment.mark_present(layer, experts)


def _probe(module: Any, expert: int) -> torch.Tensor:
    """A fixed row through one of the module's experts, as bytes."""
    hidden, dtype = module.moe_config.hidden_dim_unpadded, module.moe_config.in_dtype
    row = LayerKernel(module, hidden, dtype, [expert])(
        torch.linspace(-1, 1, hidden).to(dtype).unsqueeze(0), torch.zeros(1, dtype=torch.int32)
    )
    return row.view(torch.uint8)


def _attach(module: Any, segment: WeightSegment, layer: int) -> None:
    """Let a module that has been prepared with some experts, or none, see all of the segment's."""
    for name, tensor in segment.tensors(layer).items():
        module.get_parameter(name).data = tensor  # the same object: kernels keep some of them
    module.count(segment.layout.num_experts)


def _parameters(module: RoutedExperts) -> dict[str, torch.Tensor]:
    """A module's own parameters by name; a gate's bias may be listed there too, on meta."""
    return {name: p for name, p in module.named_parameters() if not p.is_meta}


def _check_wanted(
    checkpoint: Path, wanted: Mapping[int, Sequence[int]], tensors: Mapping[int, list[ExpertTensor]]
) -> None:
    for layer, ids in wanted.items():
        if layer not in tensors:
            raise ValueError(f"{checkpoint}: layer {layer} has no routed experts")
        count = count_experts(tensors[layer])
        if min(ids) < 0 or max(ids) >= count or len(set(ids)) != len(ids):
            raise ValueError(f"{checkpoint}: layer {layer} has experts 0..{count - 1}, each to be held once: {ids}")


def _direct_kernel(module: RoutedExperts) -> Callable[..., None] | None:
    """vLLM's kernel as write(out, x, weights, ids), where it takes plain rows, needs no workspace, and pads nothing."""
    kernel = getattr(module.quant_method, "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    if experts is None or not getattr(experts, "expects_unquantized_inputs", False):
        return None
    config = module.moe_config
    hidden, count = config.hidden_dim, config.num_local_experts
    shapes = experts.workspace_shapes(1, 2 * hidden, hidden, 1, count, count, None, module.activation)
    if shapes != ((0,), (0,), (1, hidden)) or hidden != config.hidden_dim_unpadded:
        return None
    apply, w13, w2, activation = experts.apply, module.w13_weight, module.w2_weight, module.activation
    empty = torch.empty(0, device=w2.device)

    def write(out: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        apply(out, x, w13, w2, weights, ids, activation, count, None, None, None, empty, empty, None, False)

    return write


def _general_kernel(module: RoutedExperts) -> Callable[..., torch.Tensor]:
    """vLLM's quantisation method itself, which allocates its result."""

    def apply(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = module.quant_method.apply(
            layer=module, x=x, topk_weights=weights, topk_ids=ids, shared_experts=None, shared_experts_input=None
        )
        return rows

    return apply
