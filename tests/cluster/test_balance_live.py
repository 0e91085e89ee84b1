"""Hot experts get replicas while requests run: answers stay, and a host that is killed meanwhile comes back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from folkmoot.gateway.client import Client
from tests.cluster.changes import is_healed, kill, tokens
from tests.cluster.conftest import FLOAT32, Cluster, eventually, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uneven(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """4 hosts with 2 of 8 experts each, 1 replica, and room for one more; loads are forgotten within seconds."""
    options = ("--model", str(mixtral), "--hosts", "4", "--replicas", "1", *FLOAT32)
    balance = ("--rebalance", "on", "--spare-experts", "1", "--load-half-life-s", "2")
    with running(tmp_path_factory.mktemp("state"), *options, *balance) as cluster:
        yield cluster


def heat(client: Client, token: int, salt: int) -> None:
    """Hidden states of equal tokens are alike, so nearly all their rows go to the same two experts of each layer. The
    first token differs each time, or vLLM would remember the rest."""
    (chunk,) = client.generate(token_ids=[salt % 500 + 2, *[token] * 400], temperature=0.0, max_tokens=1)
    assert len(chunk.token_ids) == 1


def heated_until(cluster: Cluster, client: Client, token: int, check: Any, what: str) -> dict[str, Any]:
    """Work for the hot experts until the status passes `check`; every answer beside it is the usual one."""
    expected, salt = tokens(client), 0

    def look() -> Any:
        nonlocal salt
        salt += 1
        heat(client, token, salt)
        if salt % 8 == 0:
            assert tokens(client) == expected
        return now if check(now := cluster.status()) else None

    found: dict[str, Any] = eventually(look, 60.0, what)
    assert tokens(client) == expected
    return found


def extras(status: dict[str, Any]) -> dict[str, int]:
    return {h["host"]: h["extra_replicas"] for h in status["hosts"]}


def test_hot_experts_get_replicas_and_a_host_killed_meanwhile_has_its_own_again(uneven: Cluster) -> None:
    with uneven.client() as client:
        before = uneven.status()
        assert before["balance"]["on"] and not any(extras(before).values())
        found = heated_until(uneven, client, 7, lambda s: any(extras(s).values()), "extra replicas are served")
        assert found["map"]["version"] > before["map"]["version"]
        assert found["map"]["missing"] == 0 and [h["experts"] for h in found["hosts"]] == [
            h["experts"] for h in before["hosts"]
        ], "what was asked for stays where it is"
        victim = next(h for h in found["hosts"] if h["extra_replicas"])
        kill(victim["pid"])

        def is_back(status: dict[str, Any]) -> bool:
            host = next(h for h in status["hosts"] if h["host"] == victim["host"])
            return bool(host["alive"] and host["pid"] != victim["pid"] and host["extra_replicas"])

        heated_until(uneven, client, 7, is_back, "the host lives again, with extra replicas")
        settled = heated_until(
            uneven, client, 7, lambda s: s["balance"]["reason"].startswith("nothing to gain"), "all is level"
        )
        assert sum(extras(settled).values()) == settled["balance"]["extra_replicas"] > 4
        eventually(lambda: is_healed(uneven), 20.0, "and healed")
