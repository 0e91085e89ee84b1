"""How quick an expert host is: rows/s by the number of rows in a call, measured where it stands, with its own experts.

Calls go through the layers in turn, as an engine's do, so that weights come from memory. What counts of each layer is
its quickest call: other work on the machine only ever makes one slower.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from folkmoot.experts.host import Kernel

ROWS = (4, 16, 64)
"""Rows of a call."""
EXPERTS = 4
"""... spread over so many experts, where there are as many."""
LAYERS = 4
SECONDS = 0.2
"""For each number of rows, once each layer has had a call to warm up and one that counts."""


def measure(kernels: "Mapping[int, Kernel]", slots: Mapping[int, int]) -> dict[int, float]:
    """Rows/s for each number of rows; `slots`: experts that each layer's kernel holds. Empty without kernels."""
    some = {n: kernels[n] for n in sorted(kernels)[:LAYERS]}
    return {rows: _rows_s(some, slots, rows) for rows in ROWS} if some else {}


def touch(kernels: "Mapping[int, Any]", slots: Mapping[int, int]) -> None:
    """Call every expert once, so that its weights are mapped and its kernels made when rows come."""
    for layer, kernel in kernels.items():
        ids = torch.arange(slots[layer], dtype=torch.int32)
        kernel(torch.zeros(slots[layer], kernel.hidden_size, dtype=kernel.dtype), ids)


def _rows_s(kernels: "Mapping[int, Any]", slots: Mapping[int, int], rows: int) -> float:
    calls = {}
    for layer, kernel in kernels.items():
        x = torch.linspace(-1, 1, rows * kernel.hidden_size).view(rows, -1).to(kernel.dtype)
        ids = torch.arange(rows, dtype=torch.int32) % min(EXPERTS, slots[layer])
        calls[layer] = kernel, x, ids, torch.empty_like(x)
        kernel(x, ids, out=calls[layer][3])
    best = dict.fromkeys(calls, float("inf"))
    until = time.perf_counter() + SECONDS
    while True:
        for layer, (kernel, x, ids, out) in calls.items():
            began = time.perf_counter()
            kernel(x, ids, out=out)
            best[layer] = min(best[layer], time.perf_counter() - began)
        if time.perf_counter() > until:
            return rows * len(best) / sum(best.values())
