"""A safetensors checkpoint as Folkmoot sees it: which tensors are routed experts, of which layer, how large.

Two naming rules cover the published mixtures of experts. Either each expert has its own tensors, numbered in the name
(`...layers.3.mlp.experts.17.up_proj.weight`), or one fused tensor holds all experts of a layer, stacked along its first
dimension (`...layers.3.mlp.experts.gate_up_proj`). Shared experts are not routed and stay in the engine.
"""

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

if TYPE_CHECKING:
    import torch

_ROUTED = re.compile(r"(?<!shared_)experts\.(?:(\d+)\.)?")
_LAYER = re.compile(r"\.(\d+)\.")
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")
_BITS = {
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U8": 8,
    "I8": 8,
    "BOOL": 8,
    "F4": 4,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_BITS |= {"F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}


@dataclass(frozen=True)
class ModelShape:
    """What placement needs to know of a model. `moe_layers` is empty for a dense one.

    `expert_bytes` is the size of one routed expert in the checkpoint; a kernel's own layout may pad it a little.
    """

    architecture: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    dtype: str
    expert_bytes: int


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of routed experts in a checkpoint: of one expert, or of all of its layer where `expert` is None."""

    name: str
    file: Path
    layer: int
    expert: int | None
    shape: tuple[int, ...]
    size_bytes: int


def describe(checkpoint: Path) -> ModelShape:
    """The shape of the model in the folder `checkpoint`, from config.json and the safetensors headers alone.

    Raises ValueError where the experts are not laid out by one of the two naming rules, or layers differ in number.
    """
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    text = {**config, **config.get("text_config", {})}
    num_layers = int(text["num_hidden_layers"])
    by_layer = {layer: ts for layer, ts in expert_tensors(Path(checkpoint)).items() if layer < num_layers}
    counts = {layer: count_experts(ts) for layer, ts in by_layer.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{checkpoint}: layers hold different numbers of experts: {counts}")
    num_experts = next(iter(counts.values()), 0)
    total_bytes = sum(t.size_bytes for ts in by_layer.values() for t in ts)
    return ModelShape(
        architecture=str((config.get("architectures") or [""])[0]),
        num_layers=num_layers,
        moe_layers=tuple(sorted(by_layer)),
        num_experts=num_experts,
        top_k=_top_k(text) if num_experts else 0,
        hidden_size=int(text["hidden_size"]),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32").removeprefix("torch."),
        expert_bytes=total_bytes // (num_experts * len(by_layer)) if by_layer else 0,
    )


def is_routed(name: str) -> bool:
    """Whether a checkpoint tensor of this name belongs to routed experts."""
    return _ROUTED.search(name) is not None


def expert_tensors(checkpoint: Path) -> dict[int, list[ExpertTensor]]:
    """All tensors of routed experts by layer, from the headers alone."""
    by_layer: dict[int, list[ExpertTensor]] = {}
    for file in weight_files(checkpoint):
        for name, entry in _header(file).items():
            match = _ROUTED.search(name)
            layer = _LAYER.search(name)
            if match is None or layer is None:
                continue
            shape = tuple(entry["shape"])
            size_bytes = math.prod(shape) * _BITS[entry["dtype"]] // 8
            expert = None if match[1] is None else int(match[1])
            tensor = ExpertTensor(name, file, int(layer[1]), expert, shape, size_bytes)
            by_layer.setdefault(tensor.layer, []).append(tensor)
    return by_layer


def count_experts(tensors: Sequence[ExpertTensor]) -> int:
    """How many experts the tensors of one layer hold. ValueError where fused tensors disagree."""
    numbered = {t.expert for t in tensors if t.expert is not None}
    if numbered:
        return max(numbered) + 1
    stacked = {t.shape[0] for t in tensors if t.shape}
    if len(stacked) != 1:
        raise ValueError(f"fused expert tensors do not share a first dimension: {[(t.name, t.shape) for t in tensors]}")
    return stacked.pop()


def read_experts(tensors: Sequence[ExpertTensor], experts: Sequence[int]) -> "Iterator[tuple[str, torch.Tensor]]":
    """The tensors of one layer as a model of only `experts` would have them: slot i is experts[i].

    Numbered names are renumbered, fused tensors indexed. Nothing else is read from disk.
    """
    slot_of = {expert: slot for slot, expert in enumerate(experts)}
    by_file: dict[Path, list[ExpertTensor]] = {}
    for tensor in tensors:
        if tensor.expert is None or tensor.expert in slot_of:
            by_file.setdefault(tensor.file, []).append(tensor)
    for file, wanted in by_file.items():
        with safe_open(file, framework="pt") as reader:
            for tensor in wanted:
                if tensor.expert is not None:
                    slot = slot_of[tensor.expert]
                    yield _ROUTED.sub(f"experts.{slot}.", tensor.name, count=1), reader.get_tensor(tensor.name)
                elif tensor.shape:
                    yield tensor.name, _rows(reader.get_slice(tensor.name), experts)
                else:  # a scalar that all experts share
                    yield tensor.name, reader.get_tensor(tensor.name)


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder. FileNotFoundError where there is none."""
    index = checkpoint / "model.safetensors.index.json"
    if index.exists():
        return [checkpoint / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{checkpoint} holds no *.safetensors file")
    return files


def identity(checkpoint: Path) -> str:
    """Names the files that weights come from, as they are now: equal for two processes that load the same."""
    files = [checkpoint / "config.json", *weight_files(checkpoint)]
    facts = [(str(f.resolve()), (stat := f.stat()).st_size, stat.st_mtime_ns) for f in files]
    return json.dumps(facts)


def _rows(fused: Any, experts: Sequence[int]) -> "torch.Tensor":
    """Rows `experts` of a lazily read tensor; one contiguous read where they are consecutive."""
    import torch

    first, count = experts[0], len(experts)
    if list(experts) == list(range(first, first + count)):
        return torch.as_tensor(fused[first : first + count])
    return torch.cat([fused[e : e + 1] for e in experts])


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """The JSON header of a safetensors file: 8 bytes of length, little-endian, then the JSON itself."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header


def _top_k(text: Mapping[str, Any]) -> int:
    for name in _TOP_K_NAMES:
        if text.get(name):
            return int(text[name])
    raise ValueError(f"config.json names no experts per token (looked for {', '.join(_TOP_K_NAMES)})")
