"""A whole cluster behind TLS and keys, on a store with a password: who gets in, and what can be seen of the secrets."""

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from folkmoot.gateway.client import Client, FolkmootError, Unauthenticated
from folkmoot.gateway.embedded import EmbeddedStore
from tests.cluster.conftest import FLOAT32, Cluster, processes_of, running
from tests.gateway.certs import Authority, Pair

pytestmark = pytest.mark.slow

PASSWORD = "hunter2" + secrets.token_hex(8)
ENVIRONMENT_NAME = b"FOLKMOOT_REDIS"


@dataclass
class Guarded:
    """A cluster, and what its users and its owner know."""

    cluster: Cluster
    ca: Path
    server: Pair
    key: str

    def client(self, key: str | None) -> Client:
        """One that trusts the CA."""
        return Client(f"https://{self.cluster.address}", api_key=key, tls_ca=self.ca, reconnect_s=1.0)


@pytest.fixture(scope="module")
def guarded(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    authority = Authority(folder)
    server = authority.issue("gateway")
    tls = ("--require-keys", "--tls-cert", str(server.cert), "--tls-key", str(server.key))
    with (
        EmbeddedStore(folder / "store", password=PASSWORD) as store,
        running(folder / "state", "--model", str(mixtral), *tls, *FLOAT32, FOLKMOOT_REDIS=store.tcp_url) as cluster,
    ):
        made = cluster.run("keys create", "--tenant", "search", "--role", "generate", "--role", "status")
        assert made.returncode == 0, made.stderr
        yield Guarded(cluster, authority.cert, server, made.stdout.split()[0])


def ask(client: Client) -> str:
    """One short answer."""
    with client:
        return client.generate_text("Each expert knows one thing well.", temperature=0.0, max_tokens=4)


def test_who_has_a_key_is_served_and_nobody_else(guarded: Guarded) -> None:
    assert ask(guarded.client(guarded.key))
    for key in (None, guarded.key[:-1] + ("A" if guarded.key[-1] != "A" else "B"), "fmk_none_" + "x" * 43):
        with pytest.raises(Unauthenticated):
            ask(guarded.client(key))
    with pytest.raises(FolkmootError) as plain:
        ask(Client(guarded.cluster.address, api_key=guarded.key, reconnect_s=1.0))
    assert plain.value.code == "UNAVAILABLE"


def test_no_secret_can_be_seen(guarded: Guarded) -> None:
    """Not the password, a key or the private key of TLS: in no command line, log (Ray's too), state file or answer. The
    password is in an environment only where the variable is that it was given in."""
    cluster = guarded.cluster
    ask(guarded.client(guarded.key))
    with guarded.client(guarded.key) as client:
        document = client.status().json
    pem = guarded.server.key.read_text().splitlines()[1:-1]
    hidden = [text.encode() for text in (PASSWORD, guarded.key, guarded.key.split("_", 2)[2], *pem)]
    run_dir = Path(json.loads((cluster.state_dir / cluster.name / "state.json").read_text())["run_dir"])
    pids = processes_of(cluster.marker)
    files = [f for root in (run_dir, cluster.state_dir) for f in root.rglob("*") if f.is_file()]
    assert len(pids) > 10 and any(f.name.startswith("engine-") for f in files)
    assert any("raylet" in f.name for f in files)
    seen: list[tuple[str, Callable[[], bytes]]] = [("status", document.encode)]
    seen += [(str(f), f.read_bytes) for f in files]
    seen += [(f"command line of {pid}", Path(f"/proc/{pid}/cmdline").read_bytes) for pid in pids]
    seen += [(f"environment of {pid}", lambda pid=pid: _environment(pid)) for pid in pids]
    given = b"%s=" % ENVIRONMENT_NAME
    assert any(one.startswith(given) and PASSWORD.encode() in one for pid in pids for one in _variables(pid)), (
        "this search finds what is there"
    )
    for what, read in seen:
        with contextlib.suppress(OSError):  # a process that has ended
            assert not [secret for secret in hidden if secret in read()], what


def _environment(pid: int) -> bytes:
    return b"\0".join(one for one in _variables(pid) if not one.startswith(ENVIRONMENT_NAME + b"="))


def _variables(pid: int) -> list[bytes]:
    """None of a process that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []
