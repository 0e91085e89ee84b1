"""How much an engine leases: interactive requests up to all its slots, batch ones up to their share of what is left."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from folkmoot.cluster.generation import Generator
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import Lease, Room


def lease(number: int, lane: "pb.Lane", cost: int) -> Lease:
    return Lease(f"r{number}", 1, 1, pb.GenerateRequest(lane=lane), 0, 60.0, 0.0, cost)


@given(st.integers(0, 8), st.lists(st.integers(1, 50), max_size=6))
def test_batch_requests_never_keep_interactive_ones_out(interactive: int, batch_costs: list[int]) -> None:
    nothing: Any = None
    generator = Generator(nothing, nothing, 8, Room(6, 100), lambda: True)
    held = [lease(i, pb.INTERACTIVE, 5) for i in range(interactive)]
    held += [lease(10 + i, pb.BATCH, cost) for i, cost in enumerate(batch_costs)]
    generator._leases = {(one.request_id, one.epoch): one for one in held}
    room, batch = generator._rooms()
    assert room == 8 - interactive
    assert batch.requests == max(0, min(6, room) - len(batch_costs))
    assert batch.tokens == max(0, 100 - sum(batch_costs))
