"""TLS on the gateway's port: who is let in, certificates that change, what plain text gets."""

import asyncio
import contextlib
import logging
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from pydantic import ValidationError

from folkmoot.gateway.admin_client import AdminClient
from folkmoot.gateway.client import AsyncClient, Unavailable
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.settings import GatewaySettings
from folkmoot.gateway.tls import Certificates, TlsError, TlsFiles
from tests.gateway.certs import Authority, Pair
from tests.gateway.conftest import QUICK, start_gateway
from tests.gateway.echo import EchoEngine, answer


@pytest.fixture(scope="module")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """One kind of server is enough here."""
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def pair(ca: Authority) -> Pair:
    return ca.issue("gateway-one")


async def start(stack: AsyncExitStack, store: EmbeddedStore, namespace: str, pair: Pair, **more: object) -> str:
    settings = {"tls_cert": pair.cert, "tls_key": pair.key, "queue": QUICK, "shutdown_s": 0.0, **more}
    return await start_gateway(stack, store.url, namespace, **settings)


@pytest.fixture
async def gateway(store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack, pair: Pair) -> str:
    return await start(stack, store_server, namespace, pair)


async def shown_by(address: str, ca: Authority) -> str:
    """Common name of the certificate that the gateway shows to a new connection, which must be one of the CA's."""

    def ask() -> str:
        context = ssl.create_default_context(cafile=str(ca.cert))
        context.set_alpn_protocols(["h2"])
        host, _, port = address.rpartition(":")
        with (
            socket.create_connection((host, int(port)), 5) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as wrapped,
        ):
            subject = wrapped.getpeercert()["subject"]  # type: ignore[index]
            return str(subject[0][0][1])  # type: ignore[index]

    return await asyncio.to_thread(ask)


async def test_an_answer_over_tls(gateway: str, ca: Authority, engine: EchoEngine) -> None:
    async with AsyncClient(gateway, tls_ca=ca.cert) as client:
        chunks = [c async for c in client.generate(token_ids=[1, 2], max_tokens=5)]
    assert [t for c in chunks for t in c.token_ids] == answer([1, 2], 5)


async def test_a_gateway_that_is_not_trusted(gateway: str, tmp_path: Path) -> None:
    """By another CA, and by the CAs of the world."""
    for options in ({"tls_ca": Authority(tmp_path, "other").cert}, {}):
        async with AsyncClient(f"https://{gateway}", reconnect_s=0.5, **options) as client:
            with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
                await client.models()


async def test_plain_text_is_refused_and_the_client_told_why(gateway: str) -> None:
    async with AsyncClient(gateway, reconnect_s=0.3) as client:
        with pytest.raises(Unavailable, match="speaks TLS: call it https://"):
            await client.models()

    def scale() -> None:
        with AdminClient(gateway, reconnect_s=0.3) as admin:
            admin.scale("hosts", 2)

    with pytest.raises(Unavailable, match="speaks TLS: call it https://"):
        await asyncio.to_thread(scale)
    async with grpc.aio.insecure_channel(gateway) as channel:
        call = channel.unary_unary("/folkmoot.v1.Folkmoot/ListModels")(pb.ListModelsRequest().SerializeToString())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_tls_to_a_plain_port(store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack) -> None:
    address = await start_gateway(stack, store_server.url, namespace, queue=QUICK, shutdown_s=0.0)
    async with AsyncClient(f"https://{address}", reconnect_s=0.3) as client:
        with pytest.raises(Unavailable, match=r"(?i)ssl|tls|handshake"):
            await client.models()


async def test_mutual_tls(
    store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack, ca: Authority, pair: Pair, tmp_path: Path
) -> None:
    clients = Authority(tmp_path, "clients")
    address = await start(stack, store_server, namespace, pair, tls_client_ca=clients.cert)
    known, stranger = clients.issue("known"), ca.issue("stranger")  # the gateway's own CA is not the clients'
    async with AsyncClient(address, tls_ca=ca.cert, tls_cert=known.cert, tls_key=known.key) as client:
        assert await client.models() == []
    for options in ({}, {"tls_cert": stranger.cert, "tls_key": stranger.key}):
        async with AsyncClient(address, tls_ca=ca.cert, reconnect_s=0.3, **options) as client:
            with pytest.raises(Unavailable):
                await client.models()


async def test_new_certificates_without_a_restart(
    gateway: str, ca: Authority, pair: Pair, engine: EchoEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream goes on meanwhile; half-written files change nothing."""
    engine.step_s = 0.02
    async with AsyncClient(gateway, tls_ca=ca.cert) as client:
        chunks = client.generate(token_ids=[1], max_tokens=150)
        assert (await anext(chunks)).token_ids
        assert await shown_by(gateway, ca) == "gateway-one"
        ca.issue("gateway-two", into=pair)
        assert await shown_by(gateway, ca) == "gateway-two"
        key = pair.key.read_bytes()
        pair.key.write_bytes(key[:40])
        with caplog.at_level(logging.ERROR):
            assert await shown_by(gateway, ca) == "gateway-two"
        assert "certificates stay as they were" in caplog.text
        pair.key.unlink()
        assert await shown_by(gateway, ca) == "gateway-two"
        ca.issue("gateway-three", into=pair)
        assert await shown_by(gateway, ca) == "gateway-three"
        assert sum([len(c.token_ids) async for c in chunks]) == 149


async def test_certificates_as_kubernetes_swaps_them(
    store_server: EmbeddedStore, namespace: str, stack: AsyncExitStack, ca: Authority, tmp_path: Path
) -> None:
    """The files are symbolic links into a folder that is itself a link, which is moved."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        ca.issue(name, into=Pair(tmp_path / name / "tls.crt", tmp_path / name / "tls.key"))
    data = tmp_path / "..data"
    data.symlink_to("one")
    pair = Pair(tmp_path / "tls.crt", tmp_path / "tls.key")
    pair.cert.symlink_to("..data/tls.crt")
    pair.key.symlink_to("..data/tls.key")
    address = await start(stack, store_server, namespace, pair)
    assert await shown_by(address, ca) == "one"
    new = tmp_path / "..new"
    new.symlink_to("two")
    new.rename(data)
    assert await shown_by(address, ca) == "two"


async def test_silent_and_babbling_connections_are_cut_off(gateway: str, ca: Authority) -> None:
    """Garbage at once; meanwhile others are served."""
    host, _, port = gateway.rpartition(":")
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes(range(256)) * 8):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(text)
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                while await reader.read(4096):
                    pass
        writer.close()
    assert await shown_by(gateway, ca) == "gateway-one"


def test_files_that_are_no_certificates(ca: Authority, pair: Pair, tmp_path: Path) -> None:
    other = ca.issue("other")
    with pytest.raises(TlsError, match="no certificate with its key"):
        Certificates(TlsFiles(pair.cert, other.key))
    with pytest.raises(TlsError, match="nowhere"):
        Certificates(TlsFiles(tmp_path / "nowhere", pair.key))
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(TlsError, match="no CA"):
        Certificates(TlsFiles(pair.cert, pair.key, tmp_path / "empty"))


def test_settings_that_do_not_go_together(pair: Pair) -> None:
    with pytest.raises(ValidationError, match="together"):
        GatewaySettings(tls_cert=pair.cert)
    with pytest.raises(ValidationError, match="needs tls_cert"):
        GatewaySettings(tls_client_ca=pair.cert)


def test_a_gateway_process_says_what_is_wrong_with_its_files(tmp_path: Path, pair: Pair) -> None:
    arguments = ["--listen", "127.0.0.1:0", "--tls-cert", str(pair.cert), "--tls-key", str(tmp_path / "nowhere")]
    done = subprocess.run([sys.executable, "-m", "folkmoot.gateway", *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert "nowhere" in done.stderr and "Traceback" not in done.stderr
