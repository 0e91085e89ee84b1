"""How vLLM's CPU kernel rounds where it adds up a token's expert rows, which the dispatcher does in its place.

The build that vLLM loads on processors with AVX-512 adds by fused multiply-adds; the one for AVX2 rounds each product
first. So the same checkpoint gives other last bits there, and the dispatcher must do as the kernel beside it would.
"""

import functools

import torch
from vllm import _custom_ops as ops

TOKENS, EXPERTS, HIDDEN = 8, 4, 32


@functools.cache
def fuses_multiply_add() -> bool:
    """Whether it does, found by asking it; True where there is no such kernel, or it does neither. Uses OpenMP."""
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        return True
    some = torch.Generator().manual_seed(0)
    gates = ops.cpu_prepack_moe_weight(torch.randn(EXPERTS, 2 * HIDDEN, HIDDEN, generator=some), "vec")
    downs = ops.cpu_prepack_moe_weight(torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=some), "vec")
    x = torch.randn(TOKENS, HIDDEN, generator=some)
    weights = torch.rand(TOKENS, 2, generator=some)
    experts = torch.tensor([[t % EXPERTS, (t + 1) % EXPERTS] for t in range(TOKENS)], dtype=torch.int32)

    def run(ids: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        ids, factors = ids.contiguous(), factors.contiguous()
        ops.cpu_fused_moe(out, x, gates, downs, None, None, factors, ids, "silu", "vec", False)
        return out

    first, second = (run(experts[:, k : k + 1], torch.ones(TOKENS, 1)) for k in range(2))
    rounded = first * weights[:, :1] + second * weights[:, 1:]
    return not torch.equal(run(experts, weights), rounded)
