"""Quantised experts: what the bytes mean, that both paths give the same bits, and a row none but its own."""

import math
from collections.abc import Iterator

import pytest
import torch

from folkmoot.experts.quantised import (
    KINDS,
    ExpertShape,
    QuantisedKernel,
    Weights,
    quantise,
    sampled_errors,
    use_vnni,
)

GROUP = 32
KINDS_OF_A_LAYER = [["int8"] * 4, ["int4"] * 4, ["bf16"] * 4, ["int4", "int8", "int8", "int4"], [*KINDS, "bf16"]]
SHAPES = {
    "silu": ExpertShape(128, 96),
    "odd sizes": ExpertShape(100, 72),  # padded to whole groups and blocks
    "swigluoai": ExpertShape(64, 128, "swigluoai", has_bias=True),
}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    use_vnni(1)


def random_weights(shape: ExpertShape, seed: int) -> Weights:
    g = torch.Generator().manual_seed(seed)
    w13 = torch.randn((2 * shape.intermediate, shape.hidden), generator=g) / math.sqrt(shape.hidden)
    w2 = torch.randn((shape.hidden, shape.intermediate), generator=g) / math.sqrt(shape.intermediate)
    if not shape.has_bias:
        return Weights(w13, w2)
    return Weights(w13, w2, torch.randn(len(w13), generator=g), torch.randn(len(w2), generator=g))


def expert(shape: ExpertShape, weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """One expert in float64, written down anew: what vLLM's kernels compute."""
    both = x.double() @ weights.w13.double().T + (0 if weights.b13 is None else weights.b13.double())
    if shape.activation == "swigluoai":
        gate, up = both[:, 0::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
        inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    else:
        gate, up = both.chunk(2, dim=1)
        inner = gate * torch.sigmoid(gate) * up
    return inner @ weights.w2.double().T + (0 if weights.b2 is None else weights.b2.double())


def kernel(shape: ExpertShape, kinds: list[str], dtype: torch.dtype = torch.bfloat16) -> QuantisedKernel:
    """A kernel whose slot i is random_weights(i) in kinds[i]."""
    blobs = [quantise(shape, kind, random_weights(shape, i))[0] for i, kind in enumerate(kinds)]
    return QuantisedKernel(shape, kinds, blobs, dtype)


def rows(shape: ExpertShape, num: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn((num, shape.hidden), generator=torch.Generator().manual_seed(99)).to(dtype)


def distance(seen: torch.Tensor, exact: torch.Tensor) -> float:
    return ((seen.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("kind", "most"), [("bf16", 0.005), ("int8", 0.025), ("int4", 0.2)])
def test_a_quantised_expert_is_near_the_exact_one(shape: ExpertShape, kind: str, most: float) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, run = rows(shape, 33, dtype), kernel(shape, [kind] * 3, dtype)
        for slot in range(3):
            seen = run(x, torch.full((33,), slot, dtype=torch.int32))
            assert seen.dtype == dtype
            right = [distance(seen, expert(shape, random_weights(shape, i), x)) for i in range(3)]
            assert right[slot] < most < 0.5 < min(right[i] for i in range(3) if i != slot)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_bytes_are_what_the_kernel_file_says(kind: str) -> None:
    """One weight at a time is read back out of its place: channel 16 v + l of block b, input k."""
    shape = ExpertShape(64, 32)
    weights = random_weights(shape, 0)
    blob, error = quantise(shape, kind, weights)
    steps, halves = 64 // 4, {"int8": 1, "int4": 2}[kind]
    codes = blob[: 64 * 64 // halves].view(2, steps // halves, 2, 16, 4)  # w13: block, step(s), vector, lane, input
    if kind == "int4":
        codes = torch.stack([codes & 15, codes >> 4], dim=2).view(2, steps, 2, 16, 4)
    values = codes.int() - {"int8": 128, "int4": 8}[kind]
    raw = blob[64 * 64 // halves :]
    if kind == "int8":
        scales = raw[: 64 * 4].view(torch.float32).view(2, 1, 2, 16, 1).float()
    else:
        scales = raw[: 2 * 64 * 2].view(torch.bfloat16).view(2, 2, 2, 16, 1).float().repeat_interleave(8, dim=1)
    back = (values * scales).permute(2, 0, 3, 1, 4).reshape(64, 64)  # vector 0: gate channels, 1: up channels
    off = (back - weights.w13).norm() / weights.w13.norm()
    assert off < {"int8": 0.01, "int4": 0.1}[kind]
    assert off.item() == pytest.approx(math.sqrt(error), rel=0.2)  # w2's error is in it, too


def test_weights_that_are_bfloat16_stay_as_they_are_in_16_bits() -> None:
    shape = SHAPES["silu"]
    weights = random_weights(shape, 0)
    rounded = Weights(weights.w13.bfloat16(), weights.w2.bfloat16())
    blob, error = quantise(shape, "bf16", rounded)
    assert error == 0
    held = blob.view(torch.bfloat16)[: 2 * 96 * 128].view(6, 128, 2, 16)  # w13: block, input, vector, lane
    assert torch.equal(held.permute(2, 0, 3, 1).reshape(2 * 96, 128), rounded.w13)
    x = rows(shape, 7, torch.float32)
    seen = QuantisedKernel(shape, ["bf16"], [blob], torch.float32)(x, torch.zeros(7, dtype=torch.int32))
    assert distance(seen, expert(shape, rounded, x)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_errors_are_told_from_some_of_the_channels(shape: ExpertShape) -> None:
    weights = random_weights(shape, 5)
    whole, some = sampled_errors(shape, weights, 1), sampled_errors(shape, weights, 3)
    for kind in KINDS:
        assert whole[kind] == pytest.approx(quantise(shape, kind, weights)[1], rel=1e-6)
        assert some[kind] == pytest.approx(whole[kind], rel=0.25) and some[kind] != whole[kind]
    assert whole["int4"] > 20 * whole["int8"] > 100 * whole["bf16"] > 0


def test_four_bits_are_better_than_rounding_to_the_largest_weight() -> None:
    shape = ExpertShape(256, 128)
    weights = random_weights(shape, 3)
    _, error = quantise(shape, "int4", weights)
    groups = torch.cat([weights.w13.flatten(), weights.w2.flatten()]).view(-1, GROUP)
    scale = groups.abs().amax(1, keepdim=True) / 7
    plain = ((groups / scale).round() * scale - groups).square().sum() / groups.square().sum()
    assert error < 0.75 * plain


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kinds", KINDS_OF_A_LAYER, ids="+".join)
def test_a_row_depends_on_nothing_but_itself(shape: ExpertShape, kinds: list[str]) -> None:
    run, x = kernel(shape, kinds), rows(shape, 50)
    slots = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    whole = run(x, slots)
    assert torch.equal(whole, torch.cat([run(x[i : i + 1], slots[i : i + 1]) for i in range(50)]))
    back = torch.arange(49, -1, -1)
    assert torch.equal(whole, run(x[back].contiguous(), slots[back].contiguous())[back])
    torch.set_num_threads(1)
    assert torch.equal(whole, run(x, slots))
    alone = QuantisedKernel(shape, [kinds[2]], [quantise(shape, kinds[2], random_weights(shape, 2))[0]], torch.bfloat16)
    mine = slots == 2
    assert mine.any() and torch.equal(whole[mine], alone(x[mine], torch.zeros(int(mine.sum()), dtype=torch.int32)))
    assert not torch.equal(whole[0], run(x[:1], (slots[:1] + 1) % 4)[0])  # another expert, another row


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_processor_without_vnni_computes_the_same_bits(shape: ExpertShape) -> None:
    if not use_vnni(1):
        pytest.skip("this processor has only the portable path")
    run, x = kernel(shape, list(KINDS), torch.float32), rows(shape, 25, torch.float32)
    slots = torch.arange(25, dtype=torch.int32) % 3
    quick = run(x, slots)
    assert use_vnni(0) == 0
    assert torch.equal(quick, run(x, slots))


def test_what_is_not_finite_stays_so_and_to_itself() -> None:
    shape = SHAPES["silu"]
    run, x = kernel(shape, ["int8", "int4", "bf16"]), rows(shape, 8)
    slots = torch.tensor([0, 1, 0, 1, 0, 1, 2, 2], dtype=torch.int32)
    sound = run(x, slots)
    x[1, 7], x[4, 99], x[6, 3] = float("nan"), float("inf"), float("nan")
    seen = run(x, slots)
    assert seen[[1, 4, 6]].isnan().all()
    assert torch.equal(seen[[0, 2, 3, 5, 7]], sound[[0, 2, 3, 5, 7]]) and sound.isfinite().all()
    zeros = torch.zeros((2, shape.hidden), dtype=torch.bfloat16)
    assert run(zeros, slots[:2]).count_nonzero() == 0


def test_what_cannot_be_is_refused() -> None:
    shape = SHAPES["silu"]
    run, x = kernel(shape, ["int8", "int4"]), rows(shape, 2)
    for wrong in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match=r"slots .* of a layer that holds 2 experts"):
            run(x, torch.tensor(wrong, dtype=torch.int32))
    with pytest.raises(ValueError, match="activation 'gelu'"):
        ExpertShape(64, 64, "gelu")
    blob, _ = quantise(shape, "int4", random_weights(shape, 0))
    with pytest.raises(ValueError, match="an int8 expert has"):
        QuantisedKernel(shape, ["int8"], [blob], torch.bfloat16)
    with pytest.raises(ValueError, match="multiple of 64 bytes"):
        QuantisedKernel(shape, ["int4"], [torch.empty(len(blob) + 1, dtype=torch.uint8)[1:]], torch.bfloat16)
    with pytest.raises(ValueError, match="is \\(96, 64\\), not \\(96, 128\\)"):
        quantise(shape, "int4", Weights(torch.zeros(192, 64), torch.zeros(64, 96)))
    assert run(x[:0], torch.zeros(0, dtype=torch.int32)).shape == (0, shape.hidden)
