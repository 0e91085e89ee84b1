"""Whatever is too large, too many or too often is refused with a status that says so, and the gateway serves on."""

import asyncio
import struct
from collections.abc import Callable, Iterator

import grpc
import pytest

from benchmarks.fuzz_cases import PREFACE, frame
from folkmoot.gateway import server, store, validate
from folkmoot.gateway.client import AsyncClient
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.pb import admin_pb2, admin_pb2_grpc, gateway_pb2_grpc
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import RequestQueue
from folkmoot.gateway.settings import GatewaySettings
from tests.gateway.conftest import token_request
from tests.gateway.echo import MODEL, EchoEngine, answer

Stub = gateway_pb2_grpc.FolkmootStub
GOAWAY, SETTINGS, MAX_CONCURRENT_STREAMS, ENHANCE_YOUR_CALM = 7, 4, 3, 11


@pytest.fixture(scope="module")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """One kind of server is enough here."""
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as server:
        yield server


async def refusal(call: grpc.aio.UnaryStreamCall) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    return refused.value


def text(prompt: str, **sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=MODEL.name, text=prompt, sampling=pb.SamplingParameters(**sampling))  # type: ignore[arg-type]


def chat(*messages: tuple[str, str]) -> pb.GenerateRequest:
    made = [pb.ChatMessage(role=role, content=content) for role, content in messages]
    return pb.GenerateRequest(model=MODEL.name, chat=pb.ChatPrompt(messages=made))


TOO_LARGE: dict[str, tuple[pb.GenerateRequest, str]] = {
    "request_id": (token_request(1, request_id="x" * 129), "1 to 128 characters"),
    "tenant": (token_request(1, tenant="x" * 129), "at most 128 characters, has 129"),
    "model": (pb.GenerateRequest(model="x" * 1_000_000, text="x"), "at most 256 characters, has 1000000"),
    "text": (text("x" * (validate.MAX_TOKEN_CHARS * MODEL.max_model_len + 1)), "at most 4194304 characters"),
    "chat.messages": (chat(*[("user", "x")] * 4097), "at most 4096 entries, has 4097"),
    "chat.messages[0].role": (chat(("x" * 129, "x")), "at most 128 characters"),
    "tokens.token_ids": (token_request(*[1] * 4096), "leave no room"),
    "sampling.stop": (text("x", stop=["x"] * 65), "at most 64 entries, has 65"),
    "sampling.stop[0]": (text("x", stop=["x" * 1025]), "1 to 1024 characters, has 1025"),
    "sampling.bad_words": (text("x", bad_words=["x"] * 65), "at most 64 entries"),
    "sampling.stop_token_ids": (text("x", stop_token_ids=[1] * 4097), "at most 4096 entries, has 4097"),
    "sampling.allowed_token_ids": (text("x", allowed_token_ids=[1] * 1001), "at most 1000 entries, has 1001"),
    "sampling.max_tokens": (text("x", max_tokens=2**32 - 1), "at most the model length"),
    "sampling.logprobs": (text("x", logprobs=2**31), "at most 5"),
}


@pytest.mark.parametrize("field", TOO_LARGE)
async def test_a_field_that_is_too_large_is_named_with_its_limit(stub: Stub, engine: EchoEngine, field: str) -> None:
    request, words = TOO_LARGE[field]
    error = await refusal(stub.Generate(request))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"{field}: " in (error.details() or "") and words in (error.details() or "")
    assert len(error.details() or "") < 1000, "what was sent is not sent back"
    assert engine.leases == []


@pytest.mark.parametrize("request_id", ["", "x" * 129, "a/b", "a\nb", "ä", "x" * 1_000_000])
async def test_what_no_id_can_be(stub: Stub, request_id: str) -> None:
    for call in (
        stub.GetRequest(pb.GetRequestRequest(request_id=request_id)),
        stub.Cancel(pb.CancelRequest(request_id=request_id)),
        stub.Follow(pb.FollowRequest(request_id=request_id)).read(),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="request_id: must be 1 to 128 characters") as refused:
            await call
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_hundred_thousand_faults_fit_into_an_answer(stub: Stub, engine: EchoEngine) -> None:
    error = await refusal(stub.Generate(text("x", stop=[""] * 100_000)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "99985 faults like these" in (error.details() or "")


async def test_a_message_that_is_too_large(stub: Stub, gateway: str) -> None:
    limit = GatewaySettings().max_message_bytes
    for request in (text("x" * limit), pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=[2**32 - 1] * (limit // 5)))):
        error = await refusal(stub.Generate(request))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    admin = admin_pb2.DrainRequest(host="x" * limit)
    async with grpc.aio.insecure_channel(gateway) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await admin_pb2_grpc.AdminStub(channel).Drain(admin)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "make",
    [
        lambda n: [("x", "y" * n)],
        lambda n: [(f"x{i}", "y" * 50) for i in range(n // 80)],
        lambda n: [("x-bin", b"y" * n)],
    ],
    ids=["one", "many", "binary"],
)
async def test_metadata_that_is_too_large(stub: Stub, make: Callable[[int], list[tuple[str, str]]]) -> None:
    """Half of what is allowed is; twice as much is not."""
    await stub.ListModels(pb.ListModelsRequest(), metadata=make(server.MAX_METADATA_BYTES // 2))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.ListModels(pb.ListModelsRequest(), metadata=make(2 * server.MAX_METADATA_BYTES))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_pings_without_end_are_cut_off(gateway: str, engine: EchoEngine) -> None:
    """By HTTP/2's own "enhance your calm"; others are served. The gateway's greeting says how many streams it takes."""
    host, _, port = gateway.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(PREFACE + frame(SETTINGS, 0, 0, b"") + frame(6, 0, 0, b"12345678") * 30)
    frames = []
    async with asyncio.timeout(10):
        try:
            while True:
                head = await reader.readexactly(9)
                size = int.from_bytes(head[:3], "big")
                frames.append((head[3], await reader.readexactly(size)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # cut off
    writer.close()
    goaway = next(payload for kind, payload in frames if kind == GOAWAY)
    assert struct.unpack(">I", goaway[4:8]) == (ENHANCE_YOUR_CALM,)
    greeting = next(payload for kind, payload in frames if kind == SETTINGS and payload)
    pairs = dict(struct.unpack(">HI", greeting[i : i + 6]) for i in range(0, len(greeting), 6))
    assert pairs[MAX_CONCURRENT_STREAMS] == GatewaySettings().max_calls_per_connection
    async with AsyncClient(gateway) as client:
        tokens = [t async for c in client.generate(token_ids=[1], max_tokens=3) for t in c.token_ids]
    assert tokens == answer([1], 3)


async def test_a_crowd_does_not_take_all_of_the_stores_connections(queue: RequestQueue) -> None:
    """The store takes a number of clients in all, engines and other gateways among them."""

    async def clients() -> int:
        info: bytes = await queue.store.command("INFO", "clients")
        return int(info.partition(b"connected_clients:")[2].split()[0])

    before = await clients()
    answers = await asyncio.gather(*(queue.store.command("PING") for _ in range(4 * store.MAX_CONNECTIONS)))
    assert len(answers) == 4 * store.MAX_CONNECTIONS
    assert await clients() - before <= store.MAX_CONNECTIONS
