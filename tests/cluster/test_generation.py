"""How much an engine leases: interactive requests up to all its slots, batch ones up to their share of what is left.
And how it journals them."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folkmoot.cluster.generation import Generator
from folkmoot.cluster.prompts import UNSEEN_PIECE, tokens_of_a_piece
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import Lease, Room


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


def test_a_request_that_lost_an_engine_is_journalled_token_by_token() -> None:
    """Else a line of a batch could lose three engines before it has 32 tokens, and be given up."""
    detached = pb.GenerateRequest(on_disconnect=pb.DETACH)
    attempts = [Lease("r", n, n, detached, 0, 60.0, 0.0, 1) for n in (1, 2, 3)]
    assert [tokens_of_a_piece(one) for one in attempts] == [UNSEEN_PIECE, 1, 1]
    assert tokens_of_a_piece(lease(1, pb.INTERACTIVE, 1)) == 1
