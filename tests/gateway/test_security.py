"""Who may call what: keys, roles, and tenants that cannot see each other. Real gateways, real stores."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import ValidationError

from folkmoot.gateway import api_keys, auth
from folkmoot.gateway.api_keys import ApiKey, Hash, KeyChanged, KeyRing, KeyStore, UnknownKey, with_secret
from folkmoot.gateway.client import AsyncClient, Busy, NotFound, PermissionDenied, Unauthenticated
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.errors import InvalidApiKey, StoreAway
from folkmoot.gateway.pb import admin_pb2, admin_pb2_grpc, gateway_pb2_grpc
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.queue import RequestQueue, Submission
from folkmoot.gateway.settings import GatewaySettings
from folkmoot.gateway.store import Store
from tests.gateway.conftest import QUICK, start_gateway, token_request, until
from tests.gateway.echo import MODEL, EchoEngine, answer

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
PERMISSION_DENIED = grpc.StatusCode.PERMISSION_DENIED
NOT_FOUND = grpc.StatusCode.NOT_FOUND

CALLS = {
    "/folkmoot.v1.Folkmoot/Generate": token_request(1),
    "/folkmoot.v1.Folkmoot/Follow": pb.FollowRequest(request_id="x"),
    "/folkmoot.v1.Folkmoot/GetRequest": pb.GetRequestRequest(request_id="x"),
    "/folkmoot.v1.Folkmoot/Cancel": pb.CancelRequest(request_id="x"),
    "/folkmoot.v1.Folkmoot/ListModels": pb.ListModelsRequest(),
    "/folkmoot.v1.Folkmoot/GetClusterStatus": pb.GetClusterStatusRequest(),
    "/folkmoot.v1.Admin/Scale": admin_pb2.ScaleRequest(target=admin_pb2.HOSTS, count=2),
    "/folkmoot.v1.Admin/GetOperation": admin_pb2.GetOperationRequest(request_id="x"),
    "/folkmoot.v1.NotThere/Anything": pb.ListModelsRequest(),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": reflection_pb2.ServerReflectionRequest(),
}


@pytest.fixture(scope="module")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """One kind of server is enough here: the scripts are tested on both in test_security_limits.py."""
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture
def keys(queue: RequestQueue) -> KeyStore:
    return KeyStore(queue.store)


@pytest.fixture
async def guarded(store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack) -> str:
    """The address of a gateway that asks for keys."""
    return await start_gateway(stack, store_server.url, namespace, queue=QUICK, shutdown_s=0.0, require_keys=True)


@pytest.fixture
async def channel(guarded: str, stack: AsyncExitStack) -> grpc.aio.Channel:
    return await stack.enter_async_context(grpc.aio.insecure_channel(guarded))


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def status_of(
    channel: grpc.aio.Channel, method: str, request: Message, metadata: Sequence[tuple[str, str]] = ()
) -> tuple[grpc.StatusCode, str, tuple[object, ...]]:
    """All that a client sees of how a call ends: status, words, trailing metadata."""
    call = channel.unary_stream(method)(request.SerializeToString(), metadata=metadata, timeout=10)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as e:
        return e.code(), e.details() or "", tuple(sorted(e.trailing_metadata() or ()))
    return grpc.StatusCode.OK, "", ()


BAD_KEYS = {
    "no key": (),
    "no bearer": (("authorization", "Basic abc"),),
    "nothing after bearer": (("authorization", "Bearer "),),
    "no key at all": bearer("let me in"),
    "unknown id": bearer(f"fmk_{'0' * 12}_{'A' * 43}"),
    "in another header": (("x-api-key", "fmk"),),
    "twelve thousand characters": bearer("A" * 12_000),
}


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("kind", BAD_KEYS)
async def test_without_a_good_key_nothing_is_open(channel: grpc.aio.Channel, method: str, kind: str) -> None:
    """Also what does not exist: only its holder learns that a key lacks something."""
    code, words, trailing = await status_of(channel, method, CALLS[method], BAD_KEYS[kind])
    assert code == UNAUTHENTICATED
    assert trailing == ()
    assert ("asks for an API key" if kind in ("no key", "no bearer", "in another header") else "") in words


async def test_keys_that_are_no_good_look_alike(channel: grpc.aio.Channel, keys: KeyStore) -> None:
    """Wrong, unknown, revoked, expired: the same words, byte for byte."""
    known, good = await keys.create("alice", ["generate"])
    _, expired = await keys.create("alice", ["generate"], expires_s=time.time() - 1)
    revoked_key, revoked = await keys.create("alice", ["generate"])
    await keys.revoke(revoked_key.id)
    wrong = f"fmk_{known.id}_{'A' * 43}"
    seen = set()
    for text in (wrong, f"fmk_{'0' * 12}_{'A' * 43}", expired, revoked, good[:-1], good + "A", good.upper()):
        seen.add(await status_of(channel, "/folkmoot.v1.Folkmoot/ListModels", pb.ListModelsRequest(), bearer(text)))
    assert seen == {(UNAUTHENTICATED, "the API key is not valid", ())}
    assert await _may(channel, "/folkmoot.v1.Folkmoot/ListModels", good)


async def _may(channel: grpc.aio.Channel, method: str, key: str) -> bool:
    code, words, _ = await status_of(channel, method, CALLS[method], bearer(key))
    assert code != UNAUTHENTICATED
    assert code != PERMISSION_DENIED or "needs an API key with the role" in words
    return code != PERMISSION_DENIED


OWN = ("Folkmoot/Follow", "Folkmoot/GetRequest", "Folkmoot/Cancel")
MAY = {
    "generate": ("Folkmoot/Generate", *OWN, "Folkmoot/ListModels"),
    "batch": (*OWN, "Folkmoot/ListModels"),
    "status": ("Folkmoot/ListModels", "Folkmoot/GetClusterStatus"),
    "admin": (
        *("Folkmoot/ListModels", "Folkmoot/GetClusterStatus", "Admin/Scale", "Admin/GetOperation"),
        *("NotThere/Anything", "ServerReflection/ServerReflectionInfo"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("role", MAY)
async def test_each_role_opens_its_calls_and_no_other(
    channel: grpc.aio.Channel, keys: KeyStore, engine: EchoEngine, role: str
) -> None:
    _, key = await keys.create("alice", [role])
    for method in CALLS:
        if method.startswith("/grpc.reflection"):
            continue
        name = method.partition("v1.")[2]
        assert await _may(channel, method, key) == (name in MAY[role]), (role, method)


async def test_health_is_open_and_reflection_is_not(channel: grpc.aio.Channel, keys: KeyStore) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    _, generate = await keys.create("alice", ["generate"])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.ServerReflectionInfo(iter([question]), metadata=bearer(generate)).read()
    assert refused.value.code() == PERMISSION_DENIED
    _, admin = await keys.create("alice", ["admin"])
    listed = await stub.ServerReflectionInfo(iter([question]), metadata=bearer(admin)).read()
    assert "folkmoot.v1.Admin" in [service.name for service in listed.list_services_response.service]


async def test_a_key_without_the_role_changes_nothing(
    channel: grpc.aio.Channel, keys: KeyStore, queue: RequestQueue
) -> None:
    _, key = await keys.create("alice", ["generate", "batch", "status"])
    request = admin_pb2.ScaleRequest(target=admin_pb2.HOSTS, count=2, request_id="mine")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await admin_pb2_grpc.AdminStub(channel).Scale(request, metadata=bearer(key))
    assert refused.value.code() == PERMISSION_DENIED
    assert await queue.store.command("EXISTS", queue.store.keys.operation("mine")) == 0


# Keys over time.


async def test_a_revoked_key_is_refused_within_the_stated_time(guarded: str, keys: KeyStore) -> None:
    key, text = await keys.create("alice", ["generate"])
    async with AsyncClient(guarded, api_key=text) as client:
        await client.models()
        await keys.revoke(key.id)
        revoked_s = time.monotonic()
        await until(lambda: _is_refused(client))
        assert time.monotonic() - revoked_s < api_keys.FRESH_S + 1
    with pytest.raises(UnknownKey):
        await keys.revoke(key.id)


async def _is_refused(client: AsyncClient) -> bool:
    try:
        await client.models()
    except Unauthenticated:
        return True
    return False


async def test_a_rotated_key(keys: KeyStore) -> None:
    """Old and new secret are both good for the overlap, at gateways that see the key for the first time too."""
    key, old = await keys.create("alice", ["generate"])
    rotated, new = await keys.rotate(key.id, overlap_s=3600.0)
    assert rotated.id == key.id and old != new
    ring = KeyRing(keys)
    assert (await ring.check(old)).tenant == (await ring.check(new)).tenant == "alice"
    _, newest = await keys.rotate(key.id, overlap_s=0.0)
    ring = KeyRing(keys)
    for text in (old, new):
        with pytest.raises(InvalidApiKey):
            await ring.check(text)
    assert (await ring.check(newest)).id == key.id
    with pytest.raises(UnknownKey):
        await keys.rotate("0" * 12)
    with pytest.raises(ValueError, match="overlap"):
        await keys.rotate(key.id, -1.0)


def test_secrets_end_with_their_overlap() -> None:
    """The clock is the caller's: pure."""
    key = ApiKey("0" * 12, "alice", ("generate",), (Hash(api_keys._hash("one")),))
    two = with_secret(key, api_keys._hash("two"), now_s=100.0, overlap_s=50.0)
    assert two.accepts("one", 149.9) and two.accepts("two", 149.9)
    assert not two.accepts("one", 150.0) and two.accepts("two", 1e9)
    three = with_secret(two, api_keys._hash("three"), now_s=120.0, overlap_s=50.0)
    assert three.accepts("one", 149.9) and not three.accepts("one", 150.0), "a second rotation does not lengthen it"
    assert three.accepts("two", 169.9) and not three.accepts("two", 170.0)
    assert len(with_secret(three, api_keys._hash("four"), now_s=1000.0, overlap_s=1.0).hashes) == 2
    assert not replace(two, expires_s=130.0).accepts("two", 130.0)


async def test_two_who_change_a_key_at_once(keys: KeyStore) -> None:
    key, _ = await keys.create("alice", ["generate"])
    stale = await keys._store.command("HGET", keys._key, key.id)
    await keys.rotate(key.id)
    with pytest.raises(KeyChanged):
        await keys._swap(key.id, stale, key.to_json())


async def test_only_hashes_are_kept(keys: KeyStore, queue: RequestQueue) -> None:
    key, text = await keys.create("alice", ["generate"], note="for the search page")
    secret = text.split("_", 2)[2]
    flat = await queue.store.command("HGETALL", queue.store.keys.api_keys)
    assert secret.encode() not in b"".join(flat)
    assert secret not in repr(key) and key.hashes[0].sha256 not in repr(key)
    assert (await keys.all()) == [key] and await keys.find(key.id) == key


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"id": 1}', "nonsense"])
async def test_a_record_that_cannot_be_read_lets_nobody_in(
    channel: grpc.aio.Channel, keys: KeyStore, queue: RequestQueue, record: str
) -> None:
    key, text = await keys.create("alice", ["generate"])
    await queue.store.command("HSET", queue.store.keys.api_keys, key.id, record)
    method = "/folkmoot.v1.Folkmoot/ListModels"
    code, words, _ = await status_of(channel, method, pb.ListModelsRequest(), bearer(text))
    assert code == grpc.StatusCode.INTERNAL and "record of an API key" in words


@pytest.mark.parametrize(
    ("tenant", "roles", "what"),
    [("", ["generate"], "tenant"), ("a/b", ["generate"], "tenant"), ("a", [], "roles"), ("a", ["root"], "roles")],
)
async def test_keys_that_cannot_be(keys: KeyStore, tenant: str, roles: list[str], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        await keys.create(tenant, roles)
    assert await keys.all() == []


async def test_guessing_does_not_fill_a_gateway(keys: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "MAX_CACHED", 50)
    ring = KeyRing(keys)
    for i in range(60):
        with pytest.raises(InvalidApiKey):
            await ring.check(f"fmk_{i:012x}_{'A' * 43}")
    assert len(ring._seen) == 50


async def test_a_store_that_is_away_lets_nobody_in(mortal_server: EmbeddedStore, namespace: str) -> None:
    store = Store(mortal_server.url, namespace)
    keys, now = KeyStore(store), [0.0]
    _, text = await keys.create("alice", ["generate"])
    ring = KeyRing(keys, clock=lambda: now[0])
    await ring.check(text)
    mortal_server.kill()
    assert (await ring.check(text)).tenant == "alice", "what it has seen lately still holds"
    now[0] += api_keys.FRESH_S + 0.1
    with pytest.raises(StoreAway):
        await ring.check(text)
    await store.close()


# Tenants.


@pytest.fixture
async def alice_and_bob(guarded: str, keys: KeyStore, stack: AsyncExitStack) -> list[AsyncClient]:
    made = [await keys.create(tenant, ["generate"]) for tenant in ("alice", "bob")]
    return [await stack.enter_async_context(AsyncClient(guarded, api_key=text, reconnect_s=2.0)) for _, text in made]


async def test_another_tenants_request_is_as_unknown_as_one_that_never_was(
    guarded: str, channel: grpc.aio.Channel, keys: KeyStore, engine: EchoEngine
) -> None:
    """GetRequest, Follow, Cancel: status, words and trailing metadata, byte for byte; also while it runs."""
    engine.step_s = 0.05
    (_, alice), (_, bob) = [await keys.create(tenant, ["generate"]) for tenant in ("alice", "bob")]
    stub = gateway_pb2_grpc.FolkmootStub(channel)
    running = stub.Generate(token_request(1, 2, max_tokens=60, request_id="id-1"), metadata=bearer(alice))
    assert (await running.read()).request_id == "id-1"
    for method in ("GetRequest", "Follow", "Cancel"):
        seen = []
        for request_id in ("id-1", "id-2"):
            request = {"GetRequest": pb.GetRequestRequest, "Follow": pb.FollowRequest, "Cancel": pb.CancelRequest}[
                method
            ]
            seen.append(
                await status_of(channel, f"/folkmoot.v1.Folkmoot/{method}", request(request_id=request_id), bearer(bob))
            )
        assert seen[0][0] == NOT_FOUND
        assert seen[0][1].replace("id-1", "id-2") == seen[1][1] and seen[0][2] == seen[1][2]
        assert "alice" not in repr(seen)
    status = await stub.GetRequest(pb.GetRequestRequest(request_id="id-1"), metadata=bearer(alice))
    assert (status.request_id, status.state, status.tenant) == ("id-1", pb.RUNNING, "alice"), "Cancel did nothing"
    running.cancel()


async def test_tenants_have_name_spaces_of_their_own(
    alice_and_bob: list[AsyncClient], engine: EchoEngine, queue: RequestQueue
) -> None:
    """The same id with other content: neither ALREADY_EXISTS nor each other's answer; and each can follow its own."""
    for client, prompt in zip(alice_and_bob, ([1], [2]), strict=True):
        chunks = [c async for c in client.generate(token_ids=prompt, max_tokens=4, request_id="same")]
        assert [t for c in chunks for t in c.token_ids] == answer(prompt, 4)
    for client, prompt in zip(alice_and_bob, ([1], [2]), strict=True):
        assert [t async for c in client.follow("same") for t in c.token_ids] == answer(prompt, 4)
        assert not await client.cancel("same")
    assert (await queue.status("alice/same")).tenant == "alice"
    assert (await queue.status("bob/same")).tenant == "bob"


async def test_nobody_reaches_another_tenant_by_a_slash(alice_and_bob: list[AsyncClient], engine: EchoEngine) -> None:
    alice, bob = alice_and_bob
    assert await alice.generate_text(token_ids=[1], max_tokens=2, request_id="secret")
    for name in ("alice/secret", "/alice/secret", "../alice/secret", "bob/../alice/secret"):
        with pytest.raises(Exception, match="request_id: must be"):
            await bob.request(name)
    with pytest.raises(NotFound, match="unknown request 'secret'"):
        await bob.request("secret")


async def test_the_tenant_is_the_keys(alice_and_bob: list[AsyncClient], engine: EchoEngine) -> None:
    alice, _ = alice_and_bob
    with pytest.raises(PermissionDenied, match="tenant"):
        await alice.generate_text(token_ids=[1], max_tokens=2, tenant="bob")
    assert engine.leases == []
    await alice.generate_text(token_ids=[1], max_tokens=2, tenant="alice")
    await alice.generate_text(token_ids=[1], max_tokens=2)
    assert [lease.request.tenant for lease in engine.leases] == ["alice", "alice"]


async def test_tenants_see_no_other_tenants_load(
    guarded: str, keys: KeyStore, queue: RequestQueue, stack: AsyncExitStack
) -> None:
    await queue.register("engine-1", MODEL, 60.0)
    for tenant in ("alice", "bob"):
        request = token_request(1, request_id="x", tenant=tenant)
        await queue.submit(Submission(f"{tenant}/x", MODEL.name, request, 8, 60.0, 0.0))

    async def seen_by(role: str) -> set[str]:
        _, text = await keys.create("alice", [role])
        client = await stack.enter_async_context(AsyncClient(guarded, api_key=text))
        (model,) = await client.models()
        return {load.tenant for lane in model.lanes for load in lane.tenants}

    assert await seen_by("generate") == {"alice"}
    assert await seen_by("status") == {"alice", "bob"}


# Addresses.


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "10.0.0.1:50051", "gateway.example:50051", "*:1"])
def test_an_open_address_needs_keys(listen: str) -> None:
    with pytest.raises(ValidationError, match="--require-keys"):
        GatewaySettings(listen=listen)
    GatewaySettings(listen=listen, insecure=True)
    GatewaySettings(listen=listen, require_keys=True)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.8.8.8:1", "[::1]:0", "localhost:0", "unix:/tmp/x.sock"])
def test_this_machine_alone_needs_none(listen: str) -> None:
    GatewaySettings(listen=listen)


# Calls under way.


async def test_calls_under_way_are_bounded(
    store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack, engine: EchoEngine
) -> None:
    engine.step_s = 0.05
    settings = {"queue": QUICK, "shutdown_s": 0.0, "max_calls": 3}
    address = await start_gateway(stack, store_server.url, namespace, **settings)
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
    stub = gateway_pb2_grpc.FolkmootStub(channel)
    running = [stub.Generate(token_request(i, max_tokens=100)) for i in range(3)]
    for call in running:
        await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.ListModels(pb.ListModelsRequest())
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "has 3 calls" in (refused.value.details() or "")
    assert ("retry-after-ms", "1000") in tuple(refused.value.trailing_metadata() or ())
    for call in running:
        call.cancel()
    async with AsyncClient(address, reconnect_s=5.0) as client:
        await until(lambda: _is_served(client))


async def test_nobody_holds_all_calls(
    store_server: EmbeddedStore,
    namespace: str,
    stack: AsyncExitStack,
    keys: KeyStore,
    engine: EchoEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither who has no key, by watching the health service, nor one tenant."""
    monkeypatch.setattr(auth, "MAX_OPEN_CALLS", 3)
    engine.step_s = 0.05
    settings = {"queue": QUICK, "shutdown_s": 0.0, "require_keys": True, "max_calls": 10}
    address = await start_gateway(stack, store_server.url, namespace, **settings)
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
    (_, alice), (_, bob) = [await keys.create(tenant, ["generate"]) for tenant in ("alice", "bob")]
    stub, health = gateway_pb2_grpc.FolkmootStub(channel), health_pb2_grpc.HealthStub(channel)

    watching, why = await _opened(lambda _: health.Watch(health_pb2.HealthCheckRequest()))
    assert (len(watching), why) == (3, grpc.StatusCode.RESOURCE_EXHAUSTED)
    running, why = await _opened(lambda i: stub.Generate(token_request(i, max_tokens=200), metadata=bearer(alice)))
    assert (len(running), why) == (5, grpc.StatusCode.RESOURCE_EXHAUSTED)
    await stub.ListModels(pb.ListModelsRequest(), metadata=bearer(bob))
    for call in (*watching, *running):
        call.cancel()
    await until(lambda: _may_check(health))


async def _opened(begin: Callable[[int], Any]) -> tuple[list[Any], grpc.StatusCode | None]:
    """Calls, one after the other, until one is refused; and with what status that was."""
    calls: list[Any] = []
    while len(calls) < 20:
        call = begin(len(calls))
        try:
            await call.read()
        except grpc.aio.AioRpcError as e:
            return calls, e.code()
        calls.append(call)
    return calls, None


async def _may_check(health: health_pb2_grpc.HealthStub) -> bool:
    try:
        await health.Check(health_pb2.HealthCheckRequest())
    except grpc.aio.AioRpcError:
        return False
    return True


async def _is_served(client: AsyncClient) -> bool:
    try:
        await client.models()
    except Busy:
        return False
    return True


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x12\x02\xff\xfe", b"\x0b" * 200])
async def test_what_is_no_message_is_the_callers_fault(
    channel: grpc.aio.Channel, keys: KeyStore, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes, lengths, UTF-8 and nesting that are none; without a traceback in the log for each."""
    _, key = await keys.create("alice", ["generate", "admin"])
    for method in ("/folkmoot.v1.Folkmoot/Generate", "/folkmoot.v1.Folkmoot/GetRequest", "/folkmoot.v1.Admin/Drain"):
        call = channel.unary_stream(method)(data, metadata=bearer(key))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT, method
    assert caplog.text == ""
