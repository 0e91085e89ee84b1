"""A request on its whole way, through a real gateway, store and (echoing) engine."""

from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import gateway_pb2_grpc
from tests.gateway.conftest import token_request
from tests.gateway.echo import EchoEngine, answer, text_of


async def test_streams_the_answer(stub: gateway_pb2_grpc.FolkmootStub, engine: EchoEngine) -> None:
    pieces = [piece async for piece in stub.Generate(token_request(1, 2, 3, max_tokens=7))]
    tokens = [token for piece in pieces for token in piece.token_ids]
    assert tokens == answer([1, 2, 3], 7)
    assert "".join(piece.text for piece in pieces) == text_of(tokens)
    assert pieces[0].request_id
    assert pieces[-1].finish.reason == pb.LENGTH
    assert (pieces[-1].usage.prompt_tokens, pieces[-1].usage.completion_tokens) == (3, 7)
