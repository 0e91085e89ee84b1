"""For the tests of clusters that change: answers to compare, a load that runs meanwhile, processes to kill."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from folkmoot.cluster.processes import is_alive
from folkmoot.gateway.client import Client
from tests.cluster.conftest import Cluster, eventually, processes_of

PROMPT = "Each expert knows one thing well."
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


def tokens(client: Client, prompt: str = PROMPT, max_tokens: int = 24) -> list[int]:
    """A greedy answer."""
    return [token for chunk in client.generate(prompt, max_tokens=max_tokens, **GREEDY) for token in chunk.token_ids]


def kill(*pids: int) -> None:
    """SIGKILL, and assert that it worked."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, pids)), 5.0, f"{pids} died")


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that do not run for a while."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGCONT)


def tokens_with_kill(client: Client, pids: list[int], after: int = 40, max_tokens: int = 120) -> list[int]:
    """A greedy answer, in the middle of which these processes are killed; asserts that tokens came after that."""
    answer: list[int] = []
    killed_at: int | None = None
    for chunk in client.generate(PROMPT, max_tokens=max_tokens, **GREEDY):
        assert chunk.offset == len(answer) or not chunk.token_ids, "tokens come once and in order"
        answer += chunk.token_ids
        if len(answer) >= after and killed_at is None:
            kill(*pids)
            killed_at = len(answer)
    assert killed_at is not None and len(answer) - killed_at > 10, "most of the answer came after the kill"
    return answer


def ray_pid(cluster: Cluster, name: str) -> int | None:
    """The process of a Ray actor, by the title that Ray gives it."""
    return next((pid for pid, command in processes_of(cluster.marker).items() if name in command), None)


def kill_router(cluster: Cluster) -> int:
    """The pid that it had."""
    pid = ray_pid(cluster, "ExpertRouter")
    assert pid is not None
    kill(pid)
    return pid


def host(cluster: Cluster, name: str) -> dict[str, Any]:
    """What the status says of one expert host; empty where it says nothing."""
    hosts: list[dict[str, Any]] = cluster.status()["hosts"]
    return next((h for h in hosts if h["host"] == name), {})


def is_healed(cluster: Cluster) -> bool:
    """Whether the status knows of nothing that is being mended, and of no replica that is missing."""
    status = cluster.status()
    return not status["healing"] and status["map"]["missing"] == 0 and all(h["alive"] for h in status["hosts"])


def is_ready(cluster: Cluster, service: str = "ready") -> bool:
    """What an orchestrator's probe hears."""
    with grpc.insecure_channel(cluster.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=5.0)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class Load:
    """Requests one after the other on several threads; at the end each answer must be the one that was expected."""

    def __init__(self, cluster: Cluster, threads: int = 3) -> None:
        self._cluster = cluster
        self._prompts = [f"{PROMPT} {n}" for n in range(threads)]
        self._stop = threading.Event()
        self._answers: list[tuple[str, list[int]]] = []
        self._failures: list[Exception] = []
        self.longest_s = 0.0

    def __enter__(self) -> "Load":
        with self._cluster.client() as client:
            self._expected = {prompt: tokens(client, prompt) for prompt in self._prompts}
        self._threads = [threading.Thread(target=self._run, args=(prompt,)) for prompt in self._prompts]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        """After the block: no request failed, and the tokens are those of a quiet cluster."""
        assert self._failures == []
        assert len(self._answers) >= len(self._prompts)
        for prompt, answer in self._answers:
            assert answer == self._expected[prompt]

    def _run(self, prompt: str) -> None:
        with self._cluster.client() as client:
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    self._answers.append((prompt, tokens(client, prompt)))
                except Exception as e:
                    self._failures.append(e)
                self.longest_s = max(self.longest_s, time.monotonic() - began)
