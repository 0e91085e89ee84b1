"""From a request of the queue to what vLLM takes: token ids and sampling parameters. Bad requests are told apart here.

The model's own tokenizer and chat template live in the engine, so only it can say how long a prompt is.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any

from vllm import SamplingParams, TokensPrompt
from vllm.exceptions import VLLMClientError
from vllm.renderers.params import ChatParams
from vllm.sampling_params import RequestOutputKind

from folkmoot.cluster.repetition import Repetition
from folkmoot.cluster.replay import FORCED
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import Lease, sampling_fields

ABORTED, INVALID_ARGUMENT = 10, 3
UNSEEN_PIECE = 32  # tokens in a piece where nobody waits for each (a line of a batch): each costs time on its whole way
MOST_IN_PIECES = 16  # journal entries that may end inside one character; longer is no text at all


def tokens_of_a_piece(lease: Lease) -> int:
    """How many tokens travel together. Of a request that has lost an engine each goes alone: attempts count until one
    has journalled something, and a request that moves on must not be given up for what kills its engines."""
    return UNSEEN_PIECE if lease.request.on_disconnect == pb.DETACH and lease.attempt == 1 else 1


class BadRequest(Exception):
    """The request cannot be served, by any engine: `code` is the gRPC status, the message names field and limit."""

    def __init__(self, message: str, code: int = INVALID_ARGUMENT) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Prepared:
    """What vLLM is asked to generate. `num_prompt` counts the client's own prompt, without tokens taken over.

    `repetition` is what of its output is journalled already. `is_complete`: all tokens are, only the finish is not.
    """

    prompt: TokensPrompt
    params: SamplingParams
    num_prompt: int
    repetition: Repetition
    is_complete: bool = False


class Preparer:
    """Prepares requests for one model. `llm` is vLLM's AsyncLLM; `can_replay`: it was given replay.PROCESSOR."""

    def __init__(self, llm: Any, has_tokenizer: bool, can_replay: bool) -> None:
        self._llm = llm
        self._has_tokenizer = has_tokenizer
        self._can_replay = can_replay
        self._max_model_len: int = llm.model_config.max_model_len
        self._vocab_size: int = llm.model_config.get_vocab_size()
        self._defaults: dict[str, Any] = llm.model_config.get_diff_sampling_param()

    async def prepare(self, lease: Lease) -> Prepared:
        """Raises BadRequest. A request taken over from another engine goes on after its journalled tokens."""
        token_ids = await self._tokens(lease.request)
        self._check_length(token_ids)
        params = self._sampling(lease.request, len(token_ids))
        params.stream_interval = tokens_of_a_piece(lease)
        if not lease.token_ids:
            return Prepared(TokensPrompt(prompt_token_ids=token_ids), params, len(token_ids), Repetition())
        params.prompt_logprobs = None  # they went out with the first piece
        assert params.max_tokens is not None
        is_complete = lease.offset >= params.max_tokens
        tokens, characters = self._whole(params, token_ids, lease)
        again = list(lease.token_ids[tokens:])
        params.max_tokens -= tokens
        params.min_tokens = max(0, params.min_tokens - tokens)
        if again:
            params.extra_args = {**(params.extra_args or {}), FORCED: again}
        prompt = TokensPrompt(prompt_token_ids=[*token_ids, *lease.token_ids[:tokens]])
        return Prepared(prompt, params, len(token_ids), Repetition(again, lease.text[characters:]), is_complete)

    def _whole(self, params: SamplingParams, token_ids: list[int], lease: Lease) -> tuple[int, int]:
        """How much of the answer so far, in tokens and characters, becomes part of the prompt, at the cost of one step:
        all where what comes next depends on the tokens alone. What is left is made again, a step a token.

        Raises BadRequest where something is left, and this engine cannot replay.
        """
        reasons = [name for name, is_set in _carried(params).items() if is_set]
        found = (0, 0) if reasons else self._last_whole(params, token_ids, lease)
        if found[0] < lease.offset and not self._can_replay:
            raise BadRequest(
                "the engine was lost in the middle of the answer, and a request with "
                f"{', '.join(reasons) or 'an incomplete character'} cannot go on in another one on this device; send "
                "it again",
                ABORTED,
            )
        return found

    def _last_whole(self, params: SamplingParams, token_ids: list[int], lease: Lease) -> tuple[int, int]:
        """Up to the last journal entry that ends with a whole character: of others vLLM holds text back, which the
        journal does not have."""
        tokens, characters = lease.offset, len(lease.text)
        for entry in islice(reversed(lease.entries), MOST_IN_PIECES):
            so_far = [*token_ids, *lease.token_ids[:tokens]]
            if not (self._has_tokenizer and self._ends_inside_character(so_far, params.skip_special_tokens)):
                return tokens, characters
            tokens, characters = tokens - entry[0], characters - entry[1]
        return 0, 0

    def _ends_inside_character(self, token_ids: list[int], skip_special_tokens: bool) -> bool:
        """Whether the text of these tokens ends with bytes that are no whole character yet, and so is held back."""
        text: str = self._llm.get_tokenizer().decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text.endswith("\N{REPLACEMENT CHARACTER}")

    async def _tokens(self, request: pb.GenerateRequest) -> list[int]:
        kind = request.WhichOneof("prompt")
        if kind == "tokens":
            token_ids = list(request.tokens.token_ids)
            if token_ids and max(token_ids) >= self._vocab_size:
                raise BadRequest(
                    f"tokens.token_ids: {max(token_ids)} is not below the vocabulary size {self._vocab_size}"
                )
            return token_ids
        if not self._has_tokenizer:
            raise BadRequest(f"{kind}: this model has no tokenizer, send token ids")
        if kind == "chat":
            return await self._chat(request.chat)
        try:
            (prompt,) = await self._llm.renderer.render_cmpl_async([{"prompt": request.text}])
        except (ValueError, VLLMClientError) as e:
            raise BadRequest(f"text: {e}") from e
        return list(prompt["prompt_token_ids"])

    async def _chat(self, chat: pb.ChatPrompt) -> list[int]:
        """With the model's own chat template."""
        messages = [{"role": m.role, "content": m.content} for m in chat.messages]
        go_on = chat.continue_final_message
        generate = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not go_on
        keywords = {"add_generation_prompt": generate, "continue_final_message": go_on, "tokenize": True}
        try:
            _, (prompt,) = await self._llm.renderer.render_chat_async(
                [messages], ChatParams(chat_template_kwargs=keywords)
            )
        except (ValueError, TypeError, KeyError, VLLMClientError) as e:
            raise BadRequest(f"chat: {e}") from e
        return list(prompt["prompt_token_ids"])

    def _check_length(self, token_ids: list[int]) -> None:
        limit = self._max_model_len - 1
        if not token_ids:
            raise BadRequest("prompt: it has no tokens, at least 1 is needed")
        if len(token_ids) > limit:
            raise BadRequest(
                f"prompt: {len(token_ids)} tokens exceed the limit of {limit} "
                f"(max_model_len {self._max_model_len}, less one token for the answer)"
            )

    def _sampling(self, request: pb.GenerateRequest, num_prompt: int) -> SamplingParams:
        """vLLM's own parameters: what the client left unset takes the model's default, and max_tokens all the room."""
        room = self._max_model_len - num_prompt
        fields = {**self._defaults, **sampling_fields(request)}
        fields["max_tokens"] = min(int(fields.get("max_tokens") or room), room)
        fields["output_kind"] = RequestOutputKind.DELTA
        fields["detokenize"] = self._has_tokenizer
        try:
            return SamplingParams(**fields)
        except (ValueError, TypeError) as e:
            raise BadRequest(f"sampling: {e}") from e


def _carried(params: SamplingParams) -> dict[str, bool]:
    """What a request carries along beside its tokens: the name of each option that brings it, and whether it is set."""
    return {
        "seed": params.seed is not None and params.temperature > 0,
        "presence_penalty": params.presence_penalty != 0,
        "frequency_penalty": params.frequency_penalty != 0,
        "stop": bool(params.stop),
        "bad_words": bool(params.bad_words),
        "spaces_between_special_tokens": not (params.spaces_between_special_tokens or params.skip_special_tokens),
    }
