"""How much an engine leases: interactive requests up to all its slots, batch ones up to their share of what is left.
And how it journals them."""

import logging
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folkmoot.cluster.generation import Generator
from folkmoot.cluster.prompts import UNSEEN_PIECE, Prepared, Preparer, tokens_of_a_piece
from folkmoot.cluster.replay import FORCED
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import Held, Lease, Room


def lease(number: int, lane: "pb.Lane", cost: int) -> Lease:
    return Lease(f"r{number}", 1, 1, pb.GenerateRequest(lane=lane), 0, 60.0, 0.0, cost)


@given(st.integers(0, 8), st.lists(st.integers(1, 50), max_size=6))
def test_batch_requests_never_keep_interactive_ones_out(interactive: int, batch_costs: list[int]) -> None:
    nothing: Any = None
    generator = Generator(nothing, nothing, 8, Room(6, 100), Room(8, 150), lambda: True)
    held = [lease(i, pb.INTERACTIVE, 5) for i in range(interactive)]
    held += [lease(10 + i, pb.BATCH, cost) for i, cost in enumerate(batch_costs)]
    generator._leases = {(one.request_id, one.epoch): one for one in held}
    room, batch = generator._rooms()
    most = Room(6, 100) if interactive else Room(8, 150)
    assert room == 8 - interactive
    assert batch.requests == max(0, min(most.requests, room) - len(batch_costs))
    assert batch.tokens == max(0, most.tokens - sum(batch_costs))


def test_for_a_minute_after_an_interactive_request_room_is_kept_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Any = None
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    generator = Generator(nothing, nothing, 8, Room(6, 100), Room(8, 150), lambda: True)
    generator._leases = {("r0", 1): lease(0, pb.INTERACTIVE, 5)}
    assert generator._rooms() == (7, Room(6, 100))
    generator._leases = {}
    now[0] += 59.0
    assert generator._rooms() == (8, Room(6, 100))
    now[0] += 2.0
    assert generator._rooms() == (8, Room(8, 150))


def test_of_every_lease_that_ended_elsewhere_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Also where the answer was whole here, and only its finish came too late."""
    nothing: Any = None
    generator = Generator(nothing, nothing, 8, Room(6, 100), Room(8, 150), lambda: True)
    with caplog.at_level(logging.INFO):
        generator.on_ended(lease(1, pb.INTERACTIVE, 5), Held.LOST)
    assert [record.getMessage() for record in caplog.records] == ["r1 ended: lost"]


def test_a_request_that_lost_an_engine_is_journalled_token_by_token() -> None:
    """Else a line of a batch could lose three engines before it has 32 tokens, and be given up."""
    detached = pb.GenerateRequest(on_disconnect=pb.DETACH)
    attempts = [Lease("r", n, n, detached, 0, 60.0, 0.0, 1) for n in (1, 2, 3)]
    assert [tokens_of_a_piece(one) for one in attempts] == [UNSEEN_PIECE, 1, 1]
    assert tokens_of_a_piece(lease(1, pb.INTERACTIVE, 1)) == 1


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8, and the model that has it, as far as preparing asks."""

    model_config: Any = None

    def __init__(self) -> None:
        self.model_config = self
        self.max_model_len = 512

    def get_vocab_size(self) -> int:
        return 256

    def get_diff_sampling_param(self) -> dict[str, Any]:
        return {}

    def get_tokenizer(self) -> "Bytes":
        return self

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(token_ids).decode(errors="replace")


async def taken_over(answer: bytes, pieces: list[str], **sampling: Any) -> Prepared:
    """A request whose engine died after this answer, a token an entry; what each entry said."""
    request = pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=b"ask"), sampling=pb.SamplingParameters(**sampling))
    entries = tuple((1, len(piece)) for piece in pieces)
    one = Lease("r", 2, 2, request, len(answer), 60.0, 0.0, 1, tuple(answer), "".join(pieces), entries)
    return await Preparer(Bytes(), has_tokenizer=True, can_replay=True).prepare(one)


@pytest.mark.parametrize(
    ("answer", "pieces", "forced"),
    [
        (b"abc", ["a", "b", "c"], []),
        ("ab\N{EURO SIGN}".encode(), ["a", "b", "", "", "\N{EURO SIGN}"], []),
        ("ab\N{EURO SIGN}".encode()[:-1], ["a", "b", "", ""], list("\N{EURO SIGN}".encode()[:-1])),
        (b"a" + 20 * b"\x80", ["a", *20 * [""]], [97, *20 * [128]]),
    ],
)
async def test_an_answer_that_ends_inside_a_character_goes_on_from_before_it(
    answer: bytes, pieces: list[str], forced: list[int]
) -> None:
    """Only its bytes are made again, a step each, and not the whole answer."""
    prepared = await taken_over(answer, pieces, temperature=0.0, max_tokens=50, min_tokens=10)
    whole = len(answer) - len(forced)
    assert prepared.prompt["prompt_token_ids"] == [*b"ask", *answer[:whole]]
    assert (prepared.params.max_tokens, prepared.params.min_tokens) == (50 - whole, max(0, 10 - whole))
    assert (prepared.params.extra_args or {}).get(FORCED, []) == forced
    assert prepared.num_prompt == 3
    piece = pb.GenerateResponse(token_ids=[*forced, 33], text="".join(pieces[whole:]) + "!")
    prepared.repetition.cut(piece)
    assert (list(piece.token_ids), piece.text) == ([33], "!")


async def test_an_answer_that_carries_more_than_its_tokens_is_made_again_from_its_prompt() -> None:
    prepared = await taken_over(b"abc", ["a", "b", "c"], temperature=1.0, seed=3, max_tokens=50)
    assert prepared.prompt["prompt_token_ids"] == [*b"ask"]
    assert (prepared.params.extra_args or {})[FORCED] == [*b"abc"]
