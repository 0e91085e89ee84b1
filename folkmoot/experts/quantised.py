"""Experts of 8 and 4 bits a weight on a CPU: made from weights of more bits, and run by quantised.c. Beside them in a
layer there may be experts of 16 bits.

vLLM's own kernels of these dtypes need AMX, know one activation and take no biases, so that many processors and models
have none. Here every expert is one run of bytes, so experts of one layer may differ in dtype, lie in a file or in
memory that hosts share, and need nothing done to them before they run.

int8: one scale a channel, the largest weight over 127. int4: one scale for 32 weights, chosen for the least squared
error. Rows are rounded to 8 bits on their way in and between the two matrices, each 32 values with a scale of their
own. bf16: weights in bfloat16, rows as they are.
"""

import ctypes
import importlib.util
from collections.abc import Sequence
from ctypes import c_char_p, c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

KINDS = {"int4": 4, "int8": 8, "bf16": 16}
"""What an expert can be made into, and bits a weight."""
ACTIVATIONS = {"silu": 0, "swigluoai": 1}
"""Those of vLLM's names that quantised.c knows."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ALIGN = 64


class _Shape(ctypes.Structure):
    """`struct shape` in quantised.h."""

    _fields_ = (("hidden", c_int32), ("intermediate", c_int32), ("activation", c_int32), ("has_bias", c_int32))


class _Experts(ctypes.Structure):
    """`struct experts` in quantised.c."""

    _fields_ = (("shape", _Shape), ("num_slots", c_int32), ("pad", c_int32), ("blobs", c_void_p), ("kinds", c_char_p))


def _load() -> ctypes.CDLL:
    spec = importlib.util.find_spec("folkmoot.experts._quantised")
    if spec is None or spec.origin is None:
        raise ImportError(
            "folkmoot.experts._quantised is not built: install Folkmoot again where a C compiler is at hand"
        )
    return ctypes.CDLL(spec.origin)  # after torch, whose OpenMP it then shares


def _function(name: str, restype: Any, *argtypes: Any) -> Any:
    function = getattr(_library, name)
    function.restype, function.argtypes = restype, argtypes
    return function


_library = _load()
_expert_bytes = _function("fm_expert_bytes", c_int64, c_void_p, c_int32)
_pack_expert = _function("fm_pack_expert", c_double, c_void_p, c_int32, *[c_void_p] * 7)
_squared_error = _function("fm_squared_error", c_double, c_void_p, c_int64, c_int64, c_int32)
_scratch_bytes = _function("fm_scratch_bytes", c_int64, c_void_p, c_int64)
_run_experts = _function("fm_run_experts", c_int32, *[c_void_p] * 4, c_int64, c_int32, c_int32, c_void_p)
use_vnni = _function("fm_vnni", c_int32, c_int32)
"""use_vnni(allow) -> whether AVX-512 VNNI is used from now on; without it the same bits are computed slowly."""
use_vnni(1)


@dataclass(frozen=True)
class ExpertShape:
    """What all experts of a layer have in common. ValueError for an activation that is not known here."""

    hidden: int
    intermediate: int
    activation: str = "silu"
    """vLLM's name: silu, or swigluoai (whose gate and up channels alternate in w13)"""
    has_bias: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"experts with the activation {self.activation!r} cannot be quantised here, "
                f"only those with {' or '.join(ACTIVATIONS)}"
            )

    def bytes(self, kind: str) -> int:
        """Of one expert in a dtype of KINDS."""
        size: int = _expert_bytes(ctypes.byref(self.raw), KINDS[kind])
        return size

    @property
    def raw(self) -> _Shape:
        """As quantised.c reads it."""
        return _Shape(self.hidden, self.intermediate, ACTIVATIONS[self.activation], self.has_bias)


@dataclass(frozen=True)
class Weights:
    """One expert as a checkpoint has it, of any floating dtype: w13 [2 * intermediate, hidden], w2 [hidden,
    intermediate], b13 [2 * intermediate], b2 [hidden]."""

    w13: torch.Tensor
    w2: torch.Tensor
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None


def quantise(shape: ExpertShape, kind: str, weights: Weights) -> tuple[torch.Tensor, float]:
    """An expert's bytes, uint8 [shape.bytes(kind)], and its error: |w - w'|^2 / |w|^2 over all its weights."""
    gate, up, down = _matrices(shape, weights)
    biases: list[torch.Tensor] = []
    if shape.has_bias:
        if weights.b13 is None or weights.b2 is None:
            raise ValueError("an expert with biases needs b13 and b2")
        biases = [*_halves(shape, weights.b13), weights.b2.float().contiguous()]
    blob = torch.empty(shape.bytes(kind), dtype=torch.uint8)
    inputs = [t.data_ptr() for t in (gate, up, down, *biases)] + [None] * (3 - len(biases))
    squared: float = _pack_expert(ctypes.byref(shape.raw), KINDS[kind], *inputs, blob.data_ptr())
    total = sum(float(t.double().square().sum()) for t in (gate, up, down))
    return blob, squared / total if total else 0.0


def sampled_errors(shape: ExpertShape, weights: Weights, every: int) -> dict[str, float]:
    """Of each of KINDS about the error that `quantise` would give: measured on one output channel in `every`."""
    squared, total = dict.fromkeys(KINDS, 0.0), 0.0
    for matrix in _matrices(shape, weights, every):
        total += float(matrix.double().square().sum())
        for kind, bits in KINDS.items():
            squared[kind] += _squared_error(matrix.data_ptr(), *matrix.shape, bits)
    return {kind: error / total if total else 0.0 for kind, error in squared.items()}


def _matrices(shape: ExpertShape, weights: Weights, every: int = 1) -> tuple[torch.Tensor, ...]:
    """Gate, up and down [output channels, inputs], float32; one channel in `every`."""
    gate, up = _halves(shape, weights.w13, every)
    down = weights.w2[::every].float().contiguous()
    wanted = ((shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
    for got, (channels, inputs) in zip((gate, down), wanted, strict=True):
        if tuple(got.shape) != (want := (-(-channels // every), inputs)):
            raise ValueError(f"a matrix of the expert is {tuple(got.shape)}, not {want}")
    return gate, up, down


def _halves(shape: ExpertShape, both: torch.Tensor, every: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up of what vLLM keeps in one tensor, float32; one channel in `every`."""
    gate, up = (both[0::2], both[1::2]) if shape.activation == "swigluoai" else both.chunk(2)
    return gate[::every].float().contiguous(), up[::every].float().contiguous()


class QuantisedKernel:
    """The held experts of one layer as one function of rows (`folkmoot.experts.host.Kernel`). Not for two threads at
    once; computes with as many threads as torch."""

    def __init__(
        self, shape: ExpertShape, kinds: Sequence[str], blobs: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> None:
        """Slot i is blobs[i], of dtype kinds[i]; the memory may be read-only. `dtype`: of rows in and out."""
        if dtype not in DTYPES:
            raise ValueError(f"rows of {dtype} are not known here")
        for kind, blob in zip(kinds, blobs, strict=True):
            if blob.dtype != torch.uint8 or blob.numel() != shape.bytes(kind):
                raise ValueError(f"an {kind} expert has {shape.bytes(kind)} bytes here, not {blob.nbytes}")
            if blob.data_ptr() % ALIGN or not blob.is_contiguous():
                raise ValueError(f"an expert must lie at a multiple of {ALIGN} bytes")
        self.hidden_size, self.dtype, self.num_slots = shape.hidden, dtype, len(blobs)
        self.bytes = sum(blob.nbytes for blob in blobs)
        self._blobs = tuple(blobs)  # keeps them alive
        self._pointers = (c_void_p * len(blobs))(*[blob.data_ptr() for blob in blobs])
        self._kinds = bytes(KINDS[kind] for kind in kinds)
        self._raw = _Experts(shape.raw, len(blobs), 0, ctypes.addressof(self._pointers), self._kinds)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def __call__(self, x: torch.Tensor, slots: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Row p of the result is expert slots[p] applied to x[p], without any routing weight.

        x is [P, hidden_size] of `dtype`, slots int32 [P] with values below num_slots, both contiguous; `out`, where
        given, is like x, is written and returned, and does not share memory with x. The result of a row does not depend
        on the other rows. ValueError for a slot out of range.
        """
        if out is None:
            out = torch.empty_like(x)
        if (rows := x.shape[0]) == 0:
            return out
        size = _scratch_bytes(ctypes.byref(self._raw), rows)
        if size > self._scratch.numel():
            self._scratch = torch.empty(2 * size, dtype=torch.uint8)
        wrong = _run_experts(
            *(ctypes.byref(self._raw), x.data_ptr(), slots.data_ptr(), out.data_ptr()),
            *(rows, DTYPES[self.dtype], torch.get_num_threads(), self._scratch.data_ptr()),
        )
        if wrong:
            low, high = torch.aminmax(slots)
            raise ValueError(f"slots {low.item()}..{high.item()} of a layer that holds {self.num_slots} experts")
        return out
