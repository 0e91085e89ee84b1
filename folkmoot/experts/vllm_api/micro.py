"""Two micro-batches: one half of a step's tokens is in attention while the rows of the other one are at the experts.

vLLM has the parts of it, for kernels on a GPU ("dual batch overlap"): it splits attention metadata and KV slots, and
knows when a step must stay whole, since one half would read what the other one has not written yet. Here it does so on
a CPU, and the halves take turns on one thread (folkmoot.experts.turns): each gives way once its rows are posted.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import create_forward_context, get_forward_context, override_forward_context
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from folkmoot.experts import turns

MICRO_BATCHES = 2
_INIT, _DETERMINE, _FORWARD = (
    CPUModelRunner.__init__,
    CPUModelRunner._determine_batch_execution_and_padding,
    CPUModelRunner._model_forward,
)
SHOULD_SPLIT = 2
"""Where in what `_determine_batch_execution_and_padding` returns stands whether the step is split."""


def use_micro_batches(least_requests: int) -> None:
    """From now on, engines that this process runs or forks split steps of at least so many requests (2 or more)."""

    def init(self: Any, vllm_config: VllmConfig, device: torch.device) -> None:
        _INIT(self, vllm_config, device)
        # A copy, since vLLM checks the engine's own again, and knows micro-batches for kernels on a GPU only.
        self.parallel_config = copy.copy(self.parallel_config)
        self.parallel_config.ubatch_size = MICRO_BATCHES

    def determine(self: Any, *args: Any, allow_microbatching: bool = False, **kwargs: Any) -> Any:
        found = list(_DETERMINE(self, *args, allow_microbatching=allow_microbatching, **kwargs))
        found[SHOULD_SPLIT] = allow_microbatching and kwargs["num_reqs"] >= least_requests
        return tuple(found)

    CPUModelRunner.__init__ = init
    CPUModelRunner._determine_batch_execution_and_padding = determine
    CPUModelRunner._model_forward = _model_forward


def _model_forward(self: Any, **inputs: Any) -> Any:
    """The model over the whole step, or over each half of its tokens."""
    whole = get_forward_context()
    if whole.ubatch_slices is None:
        return _FORWARD(self, **inputs)
    tokens = [half.token_slice for half in whole.ubatch_slices]
    contexts = [
        create_forward_context(
            whole.attn_metadata[i],
            self.vllm_config,
            slot_mapping=whole.slot_mapping[i],
            is_padding=None if whole.is_padding is None else whole.is_padding[tokens[i]],
        )
        for i in range(len(tokens))
    ]
    halves: list[Callable[[], Any]] = [
        partial(_FORWARD, self, **{name: _of(half, value) for name, value in inputs.items()}) for half in tokens
    ]

    def around(number: int) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = override_forward_context(contexts[number])
        return context

    return torch.cat(turns.run(halves, around))


def _of(tokens: slice, value: Any) -> Any:
    """Some tokens of an input of the model: [tokens], [tokens, ...] or, of three positions each, [3, tokens]."""
    if not isinstance(value, torch.Tensor):
        return value
    return value[:, tokens] if value.ndim == 2 and value.dtype == torch.int64 else value[tokens]
