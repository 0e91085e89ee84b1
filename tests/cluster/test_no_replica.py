"""An expert without any live replica, in a real engine (vLLM, Valkey, gRPC; real hosts, no Ray): what clients see, that
the engine survives, and that what comes afterwards is right."""

import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from folkmoot.experts import expert_map as em
from folkmoot.experts import secret, vllm_api, warm
from folkmoot.experts.expert_map import ExpertMap, HostAddress
from folkmoot.gateway.client import Cancelled, Client, ServerError
from folkmoot.gateway.embedded import EmbeddedStore
from tests.cluster.conftest import eventually

pytestmark = pytest.mark.slow

PATIENCE_S = 1.5
PROMPT = "Each expert knows one thing well, and all of them together know a little more than that."


@dataclass
class Bench:
    """One engine process, and hosts that come and go."""

    folder: Path
    parent: warm.WarmParent
    model: Path
    address: str = ""
    map: ExpertMap = field(init=False)
    engine: warm.Child = field(init=False)
    hosts: dict[str, warm.Child] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = vllm_api.describe(self.model)
        self.layers, self.num_experts, self.architecture = shape.moe_layers, shape.num_experts, shape.architecture
        self.map = em.empty(self.layers, self.num_experts)

    def start_engine(self, redis: str, namespace: str) -> None:
        spec = {
            "engine": "engine-1", "model_path": str(self.model), "model": "tiny", "architecture": self.architecture,
            "redis": redis, "store_namespace": namespace, "feed": str(self.folder / "engine.feed"), "dtype": "float32",
            "device": "cpu", "max_model_len": 512, "max_num_seqs": 8, "max_batch_seqs": None,
            "batch_rows": 1, "batch_prompt_tokens": 256, "seed": 0, "kv_cache_gib": 0.1,
            "batch_invariant": None, "prefix_caching": True, "compiled": False, "speculative_tokens": 0,
            "prefill_chunk": None, "micro_batch_from": None,
            "transport": "auto", "combine": "rows", "background_workers": False, "hedge_s": 0.05, "stall_s": 1.0,
            "no_replica_timeout_s": PATIENCE_S, "grace_s": 1.0, "metrics_dir": None,
            "secret_file": str(secret.keep(self.folder / "secret")),
        }  # fmt: skip
        self.engine = self.parent.spawn("folkmoot.cluster.engine_process:main", spec, self.folder / "engine.log")
        self.publish()
        event: dict[str, Any] = {}
        while event.get("event") != "ready":
            event = self.engine.receive(120.0) or {"event": "late"}
            assert event["event"] in ("load", "rows", "ready"), event
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        """As its owner would: read what the engine says."""
        try:
            while True:
                self.engine.receive()
        except (EOFError, OSError):
            pass

    def start_host(self, name: str) -> None:
        """A real host with every expert, and a map that names it."""
        self.add_host(self.load_host(name))

    def load_host(self, name: str) -> HostAddress:
        """A real host with every expert, that no map names yet."""
        spec = {
            "host": name, "incarnation": time.time_ns(), "checkpoint": str(self.model), "dtype": "float32",
            "experts": {str(n): list(range(self.num_experts)) for n in self.layers},
            "unix_path": str(self.folder / f"{name}.sock"),
            "secret_file": str(secret.keep(self.folder / "secret")),
        }  # fmt: skip
        self.hosts[name] = child = self.parent.spawn("folkmoot.experts.host:main", spec, self.folder / f"{name}.log")
        ready = child.receive(60.0)
        assert ready is not None and ready["event"] == "ready", ready
        return HostAddress(**ready["address"])

    def add_host(self, address: HostAddress) -> None:
        """A map that names it too."""
        self.map = em.add_host(self.map, address, {n: range(self.num_experts) for n in self.layers})

    def kill_host(self, name: str) -> None:
        """SIGKILL; as the router would, take it out of the map."""
        self.hosts[name].kill()
        assert self.hosts[name].wait(5)
        self.map = em.remove_host(self.map, name)

    def publish(self) -> None:
        self.engine.send({"map": json.loads(self.map.to_json())})

    def close(self) -> None:
        for child in (self.engine, *self.hosts.values()):
            child.kill()
            assert child.wait(10)


@pytest.fixture(scope="module")
def bench(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = Path(f"/tmp/fb-{secrets.token_hex(4)}")
    folder.mkdir(mode=0o700)
    namespace = f"t{secrets.token_hex(4)}"
    process = warm.start(folder / "warm.sock", folder / "warm.log")
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as store:
        gateway = subprocess.Popen(
            [sys.executable, "-m", "folkmoot.gateway", "--listen", "127.0.0.1:0", "--namespace", namespace,
             "--redis", store.url],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert gateway.stdout is not None
        bench = Bench(folder, warm.connect(folder / "warm.sock", 200.0), mixtral)
        try:
            bench.address = gateway.stdout.readline().removeprefix("listening on ").strip()
            bench.start_host("first")
            bench.start_engine(store.url, namespace)
            yield bench
        finally:
            bench.close()
            gateway.kill()
            gateway.wait(5)
            process.terminate()
            process.wait(10)
            subprocess.run(["rm", "-r", str(folder)], check=True)


def tokens(client: Client, max_tokens: int = 60, prompt: str = PROMPT) -> list[int]:
    chunks = client.generate(prompt, temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return [token for chunk in chunks for token in chunk.token_ids]


def test_life_without_a_replica(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with Client(bench.address) as client:
        expected = tokens(client, 300)
        stream = client.generate(PROMPT, temperature=0.0, max_tokens=300, ignore_eos=True)
        got = [token for _ in range(20) for token in next(stream).token_ids]

        # The only replica dies; a replacement comes within the bound: the answer goes on as if nothing had been. (It is
        # loaded beforehand, since a slow machine may take longer to load than the bound.)
        second = bench.load_host("second")
        bench.kill_host("first")
        bench.publish()
        time.sleep(PATIENCE_S / 5)
        bench.add_host(second)
        published_s = time.monotonic()
        bench.publish()
        got += next(stream).token_ids
        resumed_s = time.monotonic() - published_s
        got += [token for chunk in stream for token in chunk.token_ids]
        assert got == expected

        # It dies again, and none comes: who cancels is free at once, who waits gets a clear error after the bound.
        waiting = client.generate(PROMPT, temperature=0.0, max_tokens=300, ignore_eos=True)
        leaving = client.generate(f"{PROMPT} ", temperature=0.0, max_tokens=300, ignore_eos=True, request_id="leaving")
        got = [token for _ in range(20) for token in next(waiting).token_ids]
        assert next(leaving).token_ids
        bench.kill_host("second")
        bench.publish()
        killed_s = time.monotonic()
        assert client.cancel("leaving")
        with pytest.raises(Cancelled):
            list(leaving)
        cancelled_s = time.monotonic() - killed_s
        assert cancelled_s < PATIENCE_S, "it did not wait out what others wait for"
        reason = r"expert \d has no replica .* waited 1.5 s .* send the request again"
        with pytest.raises(ServerError, match=reason) as e:
            got.extend(token for chunk in waiting for token in chunk.token_ids)
        failed_s = time.monotonic() - killed_s
        assert e.value.code == "ABORTED"
        assert got == expected[: len(got)], "nothing wrong was delivered"
        assert failed_s >= PATIENCE_S

        # The engine is still there. What it cached in the pass that it gave up is forgotten.
        assert bench.engine.is_alive()
        bench.start_host("third")
        bench.publish()
        eventually(lambda: tokens(client, 300) == expected, 30.0, "the same engine serves the right answer")
        assert bench.engine.is_alive()
    with capsys.disabled():
        print(
            f"\nnext token {resumed_s * 1e3:.0f} ms after the map with the replacement; cancelled after "
            f"{cancelled_s * 1e3:.0f} ms; error after {failed_s:.2f} s with a bound of {PATIENCE_S} s"
        )
