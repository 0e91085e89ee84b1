"""Forced replay: a request whose engine died runs again from its prompt, and is made to choose the same tokens.

What a request is beyond its tokens (draws of its random generator, penalties, held-back text, stop strings) is then
what it was when the engine died, and it goes on exactly as it would have. vLLM's public interface for custom logits
processors carries it, with the tokens in `SamplingParams.extra_args`.
"""

from collections.abc import Callable, Sequence

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from folkmoot.gateway.pb import gateway_pb2 as pb

PROCESSOR = "folkmoot.cluster.replay:ForcedReplay"
"""As vLLM's engine argument `logits_processors` wants it."""

FORCED = "folkmoot_forced"
"""The key in `extra_args`: token ids, the first ones of the answer."""


class ReplayError(RuntimeError):
    """A replay did not repeat what is journalled: to go on would be wrong."""


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


class Repetition:
    """What of a replay has been journalled already, and is to be left out of what goes into the journal now."""

    def __init__(self, token_ids: Sequence[int] = (), text: str = "") -> None:
        self._token_ids, self._text = list(token_ids), text

    def cut(self, piece: pb.GenerateResponse) -> None:
        """Shorten a piece by what it repeats. Raises ReplayError where it is not what was journalled."""
        size = min(len(self._token_ids), len(piece.token_ids))
        length = min(len(self._text), len(piece.text))
        if piece.token_ids[:size] != self._token_ids[:size] or piece.text[:length] != self._text[:length]:
            raise ReplayError(f"forced {self._token_ids[:size]} {self._text[:length]!r}, got {piece}")
        del self._token_ids[:size], piece.token_ids[:size], piece.logprobs[:size]
        self._text, piece.text = self._text[length:], piece.text[length:]
