"""Forced replay: a request whose engine died runs again, and is made to choose the same tokens.

What a request is beyond its tokens (draws of its random generator, penalties, stop strings; bytes held back inside a
character) is then what it was when the engine died, and it goes on exactly as it would have. From where it is replayed,
its prompt or the character, prompts.py decides. vLLM's public interface for custom logits processors carries it, with
the tokens in `SamplingParams.extra_args`.
"""

from collections.abc import Callable, Sequence

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

PROCESSOR = "folkmoot.cluster.replay:ForcedReplay"
"""As vLLM's engine argument `logits_processors` wants it."""

FORCED = "folkmoot_forced"
"""The key in `extra_args`: token ids, the first ones that vLLM is to make."""


class ForcedReplay(AdapterLogitsProcessor):
    """Leaves one token to choose for as long as the answer is shorter than what is forced; costs others nothing.

    Sampling goes on as always: the generator of a seeded request draws once a token whatever the logits are, and
    what comes after this processor (penalties, temperature, top-k) cannot revive a logit of minus infinity.
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[..., torch.Tensor] | None:
        forced = (params.extra_args or {}).get(FORCED)
        return _forcing(forced) if forced else None


def _forcing(forced: Sequence[int]) -> Callable[[Sequence[int], torch.Tensor], torch.Tensor]:
    def force(made: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        if len(made) < len(forced):
            logits.fill_(-float("inf"))
            logits[forced[len(made)]] = 0.0
        return logits

    return force
