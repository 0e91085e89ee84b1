"""A password and a key that a gateway was given: searched for in all that others can see of it."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from folkmoot.gateway.api_keys import KeyStore
from folkmoot.gateway.client import AsyncClient, FolkmootError
from folkmoot.gateway.client_channel import Access
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.settings import GatewaySettings
from folkmoot.gateway.store import Store, StoreUrlError

PASSWORD = "hunter2" + secrets.token_hex(8)


@pytest.fixture
def mortal_server(tmp_path: Path) -> Iterator[EmbeddedStore]:
    """One kind of server is enough here."""
    with EmbeddedStore(tmp_path / "store") as server:
        yield server


class Gateway:
    """A gateway process that asks for keys, with all that it writes in one file."""

    def __init__(self, url: str, namespace: str, log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", "folkmoot.gateway", "--listen", "127.0.0.1:0", "--namespace", namespace]
        environment = {**os.environ, "FOLKMOOT_REDIS": url}
        with log.open("wb") as out:
            self.process = subprocess.Popen([*command, "--require-keys"], stdout=out, stderr=out, env=environment)
        while b"listening on " not in log.read_bytes():
            assert self.process.poll() is None, log.read_text()
        self.address = log.read_text().partition("listening on ")[2].split()[0]

    def shown(self) -> str:
        """What others can see: its log, and its command line."""
        return self._log.read_text() + Path(f"/proc/{self.process.pid}/cmdline").read_text()

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(30)


async def call_all(address: str, key: str) -> str:
    """Everything that a client hears of a few calls."""
    heard = []
    async with AsyncClient(address, api_key=key, reconnect_s=0.2) as client:
        for call in (client.models, client.status, lambda: client.request("x"), lambda: client.generate_text("x")):
            try:
                heard.append(repr(await call()))
            except FolkmootError as e:
                heard.append(f"{e!r} {e.code}")
    return " ".join(heard)


async def test_a_gateway_shows_neither_password_nor_key(
    mortal_server: EmbeddedStore, namespace: str, tmp_path: Path
) -> None:
    """While all is well, with a password that is refused, and when the store is away."""
    store = Store(mortal_server.tcp_url, namespace)
    _, key = await KeyStore(store).create("alice", ["generate", "status"])
    await store.command("CONFIG", "SET", "requirepass", PASSWORD)
    await store.close()
    port = mortal_server.port
    seen, words = [], []
    for name, password in (("right", PASSWORD), ("wrong", PASSWORD + "x")):
        gateway = Gateway(f"redis://:{password}@127.0.0.1:{port}", namespace, tmp_path / f"{name}.log")
        words.append(await call_all(gateway.address, key))
        if name == "wrong":
            mortal_server.kill()
            words.append(await call_all(gateway.address, key))
        seen.append(gateway.shown())
        gateway.end()
    assert "unknown request" in words[0] and "refused access" in words[1] and "does not answer" in words[2]
    everything = " ".join(seen + words)
    for what in (PASSWORD, key, key.split("_", 2)[2]):
        assert what not in everything


URLS = [
    f"http://:{PASSWORD}@store", f"redis://:{PASSWORD}/x@store", f"redis://:[{PASSWORD}@store:1", f"redis://{PASSWORD}:x",
    f"redis://:x@store:{PASSWORD}", f"redis://store?socket_timeout={PASSWORD}",
]  # fmt: skip


@pytest.mark.parametrize("url", URLS, ids=range(len(URLS)))
def test_an_url_that_cannot_be_read_is_not_shown(url: str) -> None:
    with pytest.raises(StoreUrlError) as refused:
        Store(url)
    assert PASSWORD not in str(refused.value) and refused.value.__suppress_context__
    environment = {**os.environ, "FOLKMOOT_REDIS": url}
    if url == URLS[1]:  # once as a process
        command = [sys.executable, "-m", "folkmoot.gateway", "--listen", "127.0.0.1:0"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "URL cannot be read" in done.stderr
        assert PASSWORD not in done.stdout + done.stderr


def test_settings_and_options_do_not_show_them() -> None:
    settings = GatewaySettings(redis=f"redis://:{PASSWORD}@store")
    assert PASSWORD not in repr(settings) + str(settings)
    with pytest.raises(ValueError) as refused:
        GatewaySettings(redis=f"redis://:{PASSWORD}@store", listen="0.0.0.0:1", max_request_s=-1)
    assert PASSWORD not in str(refused.value)
    assert PASSWORD not in repr(Access(api_key=PASSWORD))
    assert PASSWORD not in repr(Store(f"redis://:{PASSWORD}@store"))
