"""A replay is cut where the journal ends, however vLLM hands its steps over; one that differs is refused."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folkmoot.cluster.repetition import Repetition, ReplayError
from folkmoot.gateway.pb import gateway_pb2 as pb

STEPS = [(token, text) for token, text in enumerate(["a", "", "", "\N{EURO SIGN}", "bc", "", "d", "e", "", "f"])]


def pieces(cuts: list[int]) -> list[pb.GenerateResponse]:
    """The steps, joined between the cuts, as vLLM joins them where its reader is late."""
    bounds = [0, *sorted(set(cuts)), len(STEPS)]
    made = []
    for start, end in itertools.pairwise(bounds):
        tokens, texts = zip(*STEPS[start:end], strict=True)
        logprobs = [pb.TokenLogprobs(entries=[pb.Logprob(token_id=token)]) for token in tokens]
        made.append(pb.GenerateResponse(token_ids=tokens, text="".join(texts), logprobs=logprobs))
    made[-1].finish.reason = pb.LENGTH
    return made


@given(st.lists(st.integers(1, len(STEPS) - 1)), st.integers(0, len(STEPS)))
def test_what_is_left_is_what_was_not_journalled(cuts: list[int], journalled: int) -> None:
    tokens, texts = [token for token, _ in STEPS], [text for _, text in STEPS]
    repetition = Repetition(tokens[:journalled], "".join(texts[:journalled]))
    left = pieces(cuts)
    for piece in left:
        repetition.cut(piece)
        assert [one.entries[0].token_id for one in piece.logprobs] == list(piece.token_ids)
    assert [token for piece in left for token in piece.token_ids] == tokens[journalled:]
    assert "".join(piece.text for piece in left) == "".join(texts[journalled:])


@pytest.mark.parametrize(
    ("tokens", "text"),
    [([0, 2], "a"), ([0, 1], "b"), (list(range(11)), "a"), (list(range(10)), "a\N{EURO SIGN}bcdefg")],
)
def test_a_replay_that_differs_is_refused(tokens: list[int], text: str) -> None:
    repetition = Repetition(tokens, text)
    (whole,) = pieces([])
    with pytest.raises(ReplayError):
        repetition.cut(whole)
