"""A real Prometheus scrapes a running cluster: its numbers are those of the work done, and no panel is empty."""

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.prometheus import Prometheus, find_program, panels, picture
from folkmoot.cluster.processes import is_alive
from folkmoot.gateway.batch_client import Batches
from folkmoot.gateway.client import Client
from tests.cluster.conftest import Cluster, eventually, processes_of
from tests.gateway.scrapes import Scrape

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def last(cluster: Cluster) -> Iterator[None]:
    """No module after this one uses the cluster: it would only take processor time from others."""
    yield
    cluster.down()


PROMPT = "Each expert knows one thing well."
LAYERS, TOP_K = 4, 2
NEWS = (
    *("folkmoot_gateway_tokens_total", "folkmoot_engine_generated_tokens_total", "folkmoot_engine_prompt_tokens_total"),
    *("folkmoot_engine_journalled_tokens_total", "folkmoot_engine_leases_total", "folkmoot_queue_ended_total"),
    *("vllm:generation_tokens_total", "vllm:prompt_tokens_total"),
    *("folkmoot_dispatch_calls_total", "folkmoot_dispatch_rows_total", "folkmoot_dispatch_host_rows_total"),
    *("folkmoot_host_rows_total", "folkmoot_dispatch_rows_again_total"),
)


def url_of(cluster: Cluster) -> str:
    url: str = json.loads((cluster.state_dir / cluster.name / "state.json").read_text())["metrics"]
    return url


def target_of(cluster: Cluster) -> str:
    return url_of(cluster).removeprefix("http://").partition("/")[0]


def scrape(cluster: Cluster) -> Scrape:
    with urllib.request.urlopen(url_of(cluster), timeout=30.0) as reply:
        return Scrape(reply.read().decode())


def generate(client: Client, tokens: int, **options: Any) -> int:
    """Tokens of the prompt."""
    *_, last = client.generate(PROMPT, temperature=0.0, max_tokens=tokens, ignore_eos=True, **options)
    assert last.completion_tokens == tokens
    return int(last.prompt_tokens)


def test_every_process_counts_the_same_work(cluster: Cluster, client: Client) -> None:
    """One answer of 20 tokens, seen by gateway, queue, engine, vLLM, dispatcher and hosts."""
    generate(client, 1)
    before = eventually(lambda: settled(cluster), 30.0, "nothing happens any more")
    prompt = generate(client, 20)
    # The first token comes of the whole prompt, which may be in the cache in part; each other one is a row of its own.
    now = eventually(lambda: s if (s := settled(cluster)) and grown(s, before, NEWS[0]) else None, 30.0, "it is told")
    assert [grown(now, before, name) for name in NEWS[:6]] == [20, 20, prompt, 20, 1, 1]
    assert grown(now, before, "vllm:generation_tokens_total") == 20
    assert grown(now, before, "vllm:prompt_tokens_total") == prompt
    rows = grown(now, before, "folkmoot_dispatch_rows_total")
    assert rows % (LAYERS * TOP_K) == 0 and 20 <= rows / (LAYERS * TOP_K) <= prompt + 19
    assert grown(now, before, "folkmoot_dispatch_calls_total") >= 20 * LAYERS
    assert grown(now, before, "folkmoot_dispatch_host_rows_total") == rows
    assert grown(now, before, "folkmoot_host_rows_total") == rows
    assert now.labels("host") == {"host-0", "host-1", "host-2", "host-3"} and now.labels("layer") == {*"0123"}
    (engine,) = now.labels("engine") - {"0"}  # vLLM's own label of that name is a number
    assert now.has("vllm:kv_cache_usage_perc", process=engine)


def settled(cluster: Cluster) -> Scrape | None:
    """A scrape, if nothing has changed for longer than a host takes to report."""
    first = scrape(cluster)
    time.sleep(1.2)
    second = scrape(cluster)
    return second if all(first(name) == second(name) for name in NEWS) else None


def grown(now: Scrape, before: Scrape, name: str) -> float:
    return now(name) - before(name)


def test_the_gateway_dies_and_the_others_still_answer_at_the_same_address(cluster: Cluster) -> None:
    (gateway,) = (pid for pid, command in processes_of(cluster.marker).items() if "-m folkmoot.gateway" in command)
    os.kill(gateway, signal.SIGKILL)
    eventually(lambda: not is_alive(gateway), 10.0, "the gateway died")

    def heard(*names: str) -> bool:
        try:
            now = scrape(cluster)
        except OSError:  # nobody has the address for a moment
            return False
        return all(map(now.has, names))

    eventually(lambda: heard("folkmoot_router_map_version", "folkmoot_host_calls_total"), 30.0, "others answer")
    eventually(lambda: heard("folkmoot_gateway_store_up", "folkmoot_router_map_version"), 30.0, "another gateway does")


def test_prometheus_answers_every_panel(cluster: Cluster, client: Client, tmp_path: Path) -> None:
    if find_program("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    begin_s = time.time()
    with Prometheus([target_of(cluster)], tmp_path / "prometheus") as prometheus:

        def unanswered() -> list[str]:
            generate(client, 8)
            queries = [(panel.title, query) for panel in panels() for query, _ in panel.queries]
            return [f"{title}: {query}" for title, query in queries if not prometheus.query(query)]

        lines = [
            {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": PROMPT, "max_tokens": 4}}
        ]
        batches = Batches(client)
        assert batches.wait(batches.create(lines).id, 120.0).completed == 1
        missing = unanswered()
        deadline_s = time.monotonic() + 60.0
        while missing and time.monotonic() < deadline_s:
            missing = unanswered()
        assert missing == []
        (up,) = prometheus.query("up")
        assert up.points[0][1] == 1.0
        counts = picture(prometheus, begin_s, time.time(), tmp_path / "panels.png")
    assert set(counts) == {f"{panel.row}: {panel.title}" for panel in panels()}
    assert [title for title, number in counts.items() if not number] == []
    assert (tmp_path / "panels.png").read_bytes().startswith(b"\x89PNG")


def test_the_configuration_that_up_writes_is_one_for_prometheus(cluster: Cluster) -> None:
    promtool = find_program("promtool")
    if promtool is None:
        pytest.skip("promtool is not at hand (Debian: apt-get install prometheus)")
    config = cluster.state_dir / "prometheus.yml"
    done = subprocess.run([promtool, "check", "config", str(config)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((cluster.state_dir / f"{cluster.name}.metrics.json").read_text())
    assert found["targets"] == [target_of(cluster)]
