"""The live part of benchmarks.balance: a hot set appears in a real cluster, and is levelled while it serves.

The model has one expert a token (top-1), and requests are prompts of one repeated token, whose hidden states are alike:
so one expert of each layer gets nearly all rows, and with one replica one of two hosts does all the work. The balancer
is on from the beginning, with a half-life that leaves time to measure before it acts.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.balance_eplb import eplb_global, time_of_busiest
from benchmarks.checkpoints import tiny
from benchmarks.clusters import Cluster, eventually
from folkmoot.cluster.balance import balance
from folkmoot.cluster.balance_layer import Hosts
from folkmoot.gateway.client import Client

SIZES = {"num_layers": 4, "num_experts": 8, "top_k": 1, "hidden_size": 1024, "intermediate_size": 2048}
OPTIONS = ("--hosts", "2", "--replicas", "1", "--max-model-len", "2048", "--dtype", "float32")
BALANCE = ("--rebalance", "on", "--spare-experts", "2", "--load-half-life-s", "90")
PROMPT_TOKENS, HOT_TOKEN, CLIENTS, BURSTS = 1000, 7, 2, 5


def measure() -> dict[str, object]:
    """Tokens/s before the balancer has acted and after, on the same cluster, and what the rows looked like."""
    with tempfile.TemporaryDirectory() as directory:
        model = tiny("mixtral", Path(directory) / "hot", dtype="float32", **SIZES)
        with Cluster(model, (*OPTIONS, *BALANCE)) as cluster, Client(cluster.addresses) as client:
            salt = iter(range(2, 500))
            _burst(client, salt)
            before = list(_before(cluster, client, salt))
            left = eventually(lambda: _balanced(cluster, client, salt), 240.0)
            after = [_burst(client, salt) for _ in range(BURSTS)]
            rows = np.array(json.loads(client.status(experts=True).experts_json)["rows_total"], float)
    return {
        "live_speed_gain": median(after) / median(before),
        "live_tokens_s_before": median(before),
        "live_tokens_s_after": median(after),
        "live_busiest_over_even_after": left,
        **_recorded(rows),
    }


def _before(cluster: Cluster, client: Client, salt: Iterator[int]) -> Iterator[float]:
    """Some bursts, of which none was under way when the balancer acted."""
    for number in range(BURSTS):
        speed = _burst(client, salt)
        status = cluster.status()
        if status["balance"]["times"]:
            if number < 2:
                raise RuntimeError("the balancer acted before there was anything to compare with: a longer half-life")
            return
        yield speed


def _burst(client: Client, salt: Iterator[int]) -> float:
    """Prompt tokens a second of a few requests at once. The first token differs, so that no cache knows the prompt."""

    def ask(first: int) -> int:
        (chunk,) = client.generate(token_ids=[first, *[HOT_TOKEN] * PROMPT_TOKENS], max_tokens=1, temperature=0.0)
        return len(chunk.token_ids)

    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        assert sum(pool.map(ask, [next(salt) for _ in range(CLIENTS)])) == CLIENTS
    return CLIENTS * PROMPT_TOKENS / (time.perf_counter() - began)


def _balanced(cluster: Cluster, client: Client, salt: Iterator[int]) -> float:
    """The busiest host over an even share, once hosts hold extra replicas and all is settled; 0.0 before."""
    _burst(client, salt)
    status = cluster.status()
    busy = any(h["extra_replicas"] for h in status["hosts"]) and not status["healing"]
    if not busy or not status["balance"]["reason"].startswith("nothing to gain"):
        return 0.0
    return float(status["balance"]["busiest_over_even"])


def _recorded(rows: np.ndarray) -> dict[str, object]:
    """The rows that this cluster has counted, given to both balancers: 2 hosts, 1 slot to spare on each."""
    hosts = Hosts.alike(2, rows.shape[1] // 2 + 1)
    plan = balance(rows, hosts)
    eplb = sum(time_of_busiest(one, eplb_global(one, 2, hosts.slots[0])) for one in rows)
    return {
        "recorded_over_eplb": plan.after / eplb,
        "recorded_over_bound": plan.after / sum(x.bound for x in plan.layers),
    }
