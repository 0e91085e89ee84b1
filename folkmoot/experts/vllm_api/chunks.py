"""Prompts computed in chunks on a CPU.

vLLM samples a token for every request of a step, also for one whose prompt has not been computed to its end, and drops
it. Where the request is seeded it takes the draw back by setting its generator's offset back, which a CPU's generator
has not (it raises, and the engine's core ends). Here such a request draws from another generator meanwhile.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

_SAMPLE_TOKENS = CPUModelRunner.sample_tokens


class Spare(torch.Generator):
    """A generator whose draws are of no matter, and that lets itself be set back."""

    def get_offset(self) -> int:
        """Nothing is kept."""
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Nothing is set back."""
        return self


def allow_chunks() -> None:
    """From now on, engines that this process runs or forks may compute the prompts of seeded requests in chunks."""
    CPUModelRunner.sample_tokens = _sample_tokens


def _sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
    with spared(self):
        return _SAMPLE_TOKENS(self, *args, **kwargs)


def _unfinished(runner: Any) -> list[int]:
    """Indices of the requests of this step whose sampled token is dropped."""
    found: list[int] = np.nonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])[0].tolist()
    return found


@contextmanager
def spared(runner: Any) -> Iterator[None]:
    """The generators of unfinished prompts stay as they are."""
    generators = runner.input_batch.generators
    kept = {i: generators[i] for i in _unfinished(runner) if i in generators}
    generators.update({i: Spare() for i in kept})
    try:
        yield
    finally:
        generators.update(kept)
