"""Experts that are quantised while they are loaded: vLLM's own loaders read them, quantised.c runs them.

An expert is looked for in the segment that the node's hosts share, then in the cache beside the checkpoint, and only
then read from the checkpoint and quantised. A model is built, on the meta device, only where something must be read.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config

from folkmoot.experts.expert_choice import Errors
from folkmoot.experts.quantise_cache import FORMAT, ExpertCache
from folkmoot.experts.quantised import KINDS, ExpertShape, QuantisedKernel, Weights, quantise, sampled_errors
from folkmoot.experts.vllm_api.checkpoint import count_experts, describe, expert_tensors, identity
from folkmoot.experts.vllm_api.loader import Loader, build
from folkmoot.experts.vllm_api.runtime import engine_config, register_eagerly, world_of_one
from folkmoot.experts.weights import Layout, WeightSegment

log = logging.getLogger(__name__)

KindOf = Callable[[int, int], str]
"""kind_of(layer, expert): its dtype, of quantised.KINDS."""

SAMPLED_CHANNELS = 64
"""Output channels of a matrix, at least, on which errors are measured."""
AT_ONCE = 8
"""Experts that are read together for that."""


class Quantiser:
    """One checkpoint's experts, quantised. A context: while it is open, what it needs of vLLM stays built."""

    def __init__(self, checkpoint: Path, config: VllmConfig, moe_layers: Sequence[int], dtype: str) -> None:
        """`dtype` is the option from which the configuration's follows."""
        self._config, self._moe_layers = config, moe_layers
        self._dtype: torch.dtype = config.model_config.dtype
        self._tensors = expert_tensors(checkpoint)
        self._cache = ExpertCache(checkpoint, identity(checkpoint), dtype)
        self._stack = ExitStack()
        self._built: Loader | None = None
        self._shapes: dict[int, ExpertShape] | None = None
        self.identity = f"{FORMAT} {dtype} {identity(checkpoint)}"

    def __enter__(self) -> "Quantiser":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._built = None

    @property
    def num_experts(self) -> int:
        """Of a layer of the checkpoint."""
        return count_experts(self._tensors[self._moe_layers[0]])

    @property
    def shapes(self) -> dict[int, ExpertShape]:
        """Of every MoE layer. ValueError where experts are of a kind that cannot be quantised here."""
        if self._shapes is None:
            self._shapes = self._cache.shapes()
        if self._shapes is None:
            self._shapes = {layer: _shape(module) for layer, module in self._loader.modules.items()}
            self._cache.keep_shapes(self._shapes)
        return self._shapes

    def experts(self, layer: int, wanted: Mapping[int, str]) -> dict[int, tuple[torch.Tensor, float]]:
        """Bytes and error of experts of a layer, each in its dtype, from the cache or made now and kept there."""
        shape = self.shapes[layer]
        cached = {e: self._cache.read(shape, kind, layer, e) for e, kind in wanted.items()}
        missing = [e for e, found in cached.items() if found is None]
        if missing:
            module = self._read(layer, missing)
            for slot, expert in enumerate(missing):
                made = quantise(shape, wanted[expert], _weights(module, shape, slot))
                self._cache.keep(shape, wanted[expert], layer, expert, *made)
                cached[expert] = made
            module.hold(0)
        return {e: found for e, found in cached.items() if found is not None}

    def errors(self, progress: Callable[[float], None]) -> Errors:
        """What each dtype costs each expert: from the cache, or measured now on some of its channels, and kept there.

        `progress` hears which part of them is done."""
        if (known := self._cache.errors()) is not None:
            return known
        found: dict[int, dict[str, list[float]]] = {n: {kind: [] for kind in KINDS} for n in self._moe_layers}
        chunks = [(n, e) for n in self._moe_layers for e in range(0, self.num_experts, AT_ONCE)]
        for done, (layer, first) in enumerate(chunks):
            progress(done / len(chunks))
            for errors in self._sampled(layer, range(first, min(first + AT_ONCE, self.num_experts))):
                for kind, error in errors.items():
                    found[layer][kind].append(error)
        errors_of = {n: {kind: tuple(errors) for kind, errors in by_kind.items()} for n, by_kind in found.items()}
        self._cache.keep_errors(errors_of)
        return errors_of

    def _sampled(self, layer: int, experts: Sequence[int]) -> list[dict[str, float]]:
        self._loader.read(layer, experts)
        module, shape = self._loader.modules[layer], self.shapes[layer]
        every = max(1, min(shape.hidden, shape.intermediate) // SAMPLED_CHANNELS)
        found = [sampled_errors(shape, _weights(module, shape, slot), every) for slot in range(len(experts))]
        module.hold(0)
        return found

    def kernel(self, layer: int, kinds: Sequence[str], blobs: Sequence[torch.Tensor]) -> QuantisedKernel:
        """A layer's kernel, whose slots are these."""
        return QuantisedKernel(self.shapes[layer], kinds, blobs, self._dtype)

    def _read(self, layer: int, experts: Sequence[int]) -> Any:
        log.info("layer %d: quantising %d experts", layer, len(experts))
        self._loader.read(layer, experts)
        return self._loader.modules[layer]

    @property
    def _loader(self) -> Loader:
        if self._built is None:
            self._stack.enter_context(set_current_vllm_config(self._config))
            self._stack.enter_context(world_of_one())
            counts = dict.fromkeys(self._moe_layers, 0)
            self._built = Loader(self._config, self._tensors, *build(self._config, counts, torch.device("cpu")))
        return self._built


def load_quantised(
    quantiser: Quantiser, wanted: Mapping[int, Sequence[int]], kind_of: KindOf, memory_fd: int | None
) -> dict[int, QuantisedKernel]:
    """A kernel a layer; slot i is the i-th of its experts. Weights are private without `memory_fd`."""
    kinds = {layer: [kind_of(layer, e) for e in experts] for layer, experts in wanted.items()}
    if memory_fd is None:
        blobs = {}
        for layer, experts in wanted.items():
            made = quantiser.experts(layer, dict(zip(experts, kinds[layer], strict=True)))
            blobs[layer] = [made[e][0] for e in experts]
    else:
        with closing(WeightSegment(memory_fd, _layout(quantiser, kind_of))) as segment:
            blobs = _from_segment(quantiser, segment, wanted, kinds)
    return {layer: quantiser.kernel(layer, kinds[layer], blobs[layer]) for layer in sorted(wanted)}


def measure_errors(
    checkpoint: Path, *, dtype: str = "auto", progress: Callable[[float], None] = lambda part: None
) -> tuple[Errors, dict[int, ExpertShape]]:
    """What each dtype would cost each expert of the checkpoint folder, and what experts of each layer are like.

    ValueError where experts are of a kind that cannot be quantised here."""
    shape = describe(checkpoint)
    register_eagerly(shape.architecture)
    config = engine_config(checkpoint, dtype=dtype)
    with Quantiser(checkpoint, config, shape.moe_layers, dtype) as quantiser, torch.inference_mode():
        return quantiser.errors(progress), quantiser.shapes


def _layout(quantiser: Quantiser, kind_of: KindOf) -> Layout:
    """An array for each layer and dtype that occurs in it; an expert takes up room only where it is."""
    experts, layers, chosen = range(quantiser.num_experts), {}, []
    for layer, shape in quantiser.shapes.items():
        kinds = [kind_of(layer, e) for e in experts]
        chosen += kinds
        for kind in sorted(set(kinds)):
            layers[_place(layer, kind)] = {kind: ("uint8", (shape.bytes(kind),))}
    return Layout(f"{quantiser.identity} {' '.join(chosen)}", quantiser.num_experts, layers)


def _place(layer: int, kind: str) -> int:
    """Under which number the segment has the experts of a layer in one dtype."""
    return layer * len(KINDS) + list(KINDS).index(kind)


def _from_segment(
    quantiser: Quantiser,
    segment: WeightSegment,
    wanted: Mapping[int, Sequence[int]],
    kinds: Mapping[int, Sequence[str]],
) -> dict[int, list[torch.Tensor]]:
    """Where the experts lie, after what nobody has put there has been put there. First go the layers at which no other
    host is at work: so hosts that start together share it."""
    dtypes = {layer: dict(zip(wanted[layer], kinds[layer], strict=True)) for layer in wanted}
    left = [(layer, kind) for layer in wanted for kind in sorted(set(kinds[layer]))]
    for wait in (False, True):
        for layer, kind in tuple(left):
            place = _place(layer, kind)
            with segment.locked(place, wait=wait) as is_held:
                if not is_held:
                    continue
                mine = [e for e, k in dtypes[layer].items() if k == kind]
                if missing := segment.missing(place, mine):
                    made = quantiser.experts(layer, dict.fromkeys(missing, kind))
                    segment.write(place, missing, {kind: torch.stack([made[e][0] for e in missing])})
                    segment.mark_present(place, missing)
                left.remove((layer, kind))
    arrays = {p: next(iter(segment.tensors(p).values())) for p in segment.layout.layers}
    return {layer: [arrays[_place(layer, kind)][e] for e, kind in ks.items()] for layer, ks in dtypes.items()}


def _shape(module: Any) -> ExpertShape:
    config = module.moe_config
    return ExpertShape(
        hidden=config.hidden_dim_unpadded,
        intermediate=config.intermediate_size_per_partition_unpadded,
        activation=str(module.activation.value),
        has_bias=getattr(module, "w13_bias", None) is not None,
    )


def _weights(module: Any, shape: ExpertShape, slot: int) -> Weights:
    """What the checkpoint has of the module's expert `slot`, without what vLLM pads it with."""
    w13, w2 = module.w13_weight[slot], module.w2_weight[slot]
    if w13.shape[0] != 2 * shape.intermediate or w2.shape[1] != shape.intermediate:
        raise ValueError(f"vLLM pads experts from {shape.intermediate} to {w2.shape[1]} channels: not known here")
    biases = (module.w13_bias[slot], module.w2_bias[slot][: shape.hidden]) if shape.has_bias else (None, None)
    return Weights(w13[:, : shape.hidden], w2[: shape.hidden], *biases)
