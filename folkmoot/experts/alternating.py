"""Dispatch for two micro-batches (folkmoot.experts.turns)."""

from collections.abc import Callable

import torch

from folkmoot.experts import turns
from folkmoot.experts.dispatcher import Dispatcher


class Alternating:
    """A dispatcher for each of two halves of a step, since a link carries one request at a time; the second one has
    links of its own beside the first one's."""

    def __init__(self, first: Dispatcher) -> None:
        self._halves = first, Dispatcher(first.config, fused=first.fused, beside=first)

    def forward(
        self,
        layer: int,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared: Callable[[], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `Dispatcher.forward`, for the half whose turn it is."""
        return self._halves[turns.number()].forward(layer, x, topk_weights, topk_ids, shared)
