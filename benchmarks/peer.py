"""A peer under the same fault: monolithic vLLM's own server, whose engine core is killed under the same steady load.

A supervisor such as Kubernetes is played here: the server is started again at once when its process has ended. Clients
ask again at once when a request has failed, which is the best they can do.
"""

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from openai import APIError, AsyncOpenAI

from benchmarks import clusters
from benchmarks.engines import prompts_of
from benchmarks.load import Question
from folkmoot.cluster import processes

START_TIMEOUT_S = 240.0
CORE = "EngineCore"
MAX_TOKENS = 96


@dataclass
class Seen:
    """What clients saw: when each piece came, and when requests failed (monotonic clock)."""

    pieces_s: list[float] = field(default_factory=list)
    failures_s: list[float] = field(default_factory=list)
    in_flight: int = 0


def measure(
    model: Path, window_s: float, clients: int = 8, max_tokens: int = 96
) -> tuple[list[object], dict[str, object]]:
    """A line for the table of failover.py, and flat figures of the same fault at the peer."""
    return asyncio.run(_measure(model, window_s, clients, max_tokens))


async def _measure(
    model: Path, window_s: float, clients: int, max_tokens: int
) -> tuple[list[object], dict[str, object]]:
    seen, prompts = Seen(), prompts_of(16, 16, 500)
    async with _server(model, "float32") as (server, address):
        tasks = [asyncio.create_task(_ask_on(address, prompts, seen)) for _ in range(clients)]
        await asyncio.sleep(3.0 + window_s)
        before = sum(t > time.monotonic() - window_s for t in seen.pieces_s)
        in_flight, at_s = seen.in_flight, time.monotonic()
        await asyncio.to_thread(clusters.kill, await asyncio.to_thread(_core_of, server))
        while not any(t > at_s + 1.0 for t in seen.pieces_s) and time.monotonic() < at_s + START_TIMEOUT_S:
            await asyncio.sleep(0.1)
        gap_s = min((t for t in seen.pieces_s if t > at_s + 1.0), default=float("nan")) - at_s
        await asyncio.sleep(max(0.0, at_s + window_s / 2 - time.monotonic()))
        around = sum(at_s - window_s / 2 <= t < at_s + window_s / 2 for t in seen.pieces_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    lost = min(in_flight, sum(t >= at_s for t in seen.failures_s))
    line: list[object] = [
        "demo, float32, vLLM's own server", f"kill its engine's core: {lost} of {in_flight} requests lost", 1,
        1e3 * gap_s, 1e3 * gap_s, "-", gap_s, around / before,
    ]  # fmt: skip
    return line, {"peer_vllm_gap_ms": 1e3 * gap_s, "peer_vllm_requests_lost": lost, "peer_vllm_in_flight": in_flight}


def reshuffled(model: Path, questions: Sequence[Question], clients: int, window_s: float) -> float:
    """The share of tokens that differ from those of each question asked alone, while so many clients ask the same ones
    again and again in a random order: only what is in a batch together changes."""
    return asyncio.run(_reshuffled(model, questions, clients, window_s))


async def _reshuffled(model: Path, questions: Sequence[Question], clients: int, window_s: float) -> float:
    rng = random.Random(0)
    async with (
        _server(model, "auto") as (_, address),
        AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120.0) as client,
    ):

        async def ask(question: Question) -> list[int]:
            options = dict(question.options)
            done = await client.completions.create(
                model="peer", prompt=list(question.token_ids), max_tokens=options["max_tokens"], temperature=0.0,
                extra_body={"ignore_eos": options["ignore_eos"], "return_token_ids": True},
            )  # fmt: skip
            return list((done.choices[0].model_extra or {})["token_ids"])

        owed = {question.key: await ask(question) for question in questions}
        until_s, counts = time.monotonic() + window_s, [0, 0]

        async def go_on() -> None:
            while time.monotonic() < until_s:
                question = rng.choice(questions)
                pairs = list(zip(owed[question.key], await ask(question), strict=True))
                counts[0] += sum(a != b for a, b in pairs)
                counts[1] += len(pairs)

        await asyncio.gather(*(go_on() for _ in range(clients)))
    return counts[0] / max(1, counts[1])


async def _ask_on(address: str, prompts: Sequence[Sequence[int]], seen: Seen) -> None:
    turn = 0
    async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60.0) as client:
        while True:
            turn += 1
            seen.in_flight += 1
            try:
                stream = await client.completions.create(
                    model="peer", prompt=list(prompts[turn % len(prompts)]), max_tokens=MAX_TOKENS, temperature=0.0,
                    stream=True, extra_body={"ignore_eos": True},
                )  # fmt: skip
                async for _ in stream:
                    seen.pieces_s.append(time.monotonic())
            except APIError:
                seen.failures_s.append(time.monotonic())
                await asyncio.sleep(0.1)
            finally:
                seen.in_flight -= 1


@asynccontextmanager
async def _server(model: Path, dtype: str) -> AsyncIterator[tuple["_Supervised", str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="fm-peer-") as name:
        server = _Supervised(model, dtype, port, Path(name) / "server.log")
        try:
            await asyncio.to_thread(server.wait_until_ready)
            yield server, f"http://127.0.0.1:{port}"
        finally:
            server.close()


class _Supervised:
    """vLLM's server, started again by a task whenever it has ended."""

    def __init__(self, model: Path, dtype: str, port: int, log: Path) -> None:
        self._port, self._log = port, log
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", dtype,
            "--served-model-name", "peer", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
            "--max-model-len", "512", "--max-num-seqs", "64", "--kv-cache-memory-bytes", str(1 << 30),
        ]  # fmt: skip
        self.process = self._start()
        self._task = asyncio.create_task(self._watch())

    def _start(self) -> "subprocess.Popen[bytes]":
        environment = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        return processes.start(self._command, self._log, environment)

    async def _watch(self) -> None:
        while True:
            if self.process.poll() is not None:
                self.process = self._start()
            await asyncio.sleep(0.1)

    def wait_until_ready(self) -> None:
        """Until it accepts connections. Raises TimeoutError."""

        def listens() -> bool:
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.connect(("127.0.0.1", self._port))
                return True
            return False

        clusters.eventually(listens, START_TIMEOUT_S)

    def close(self) -> None:
        """End the server and all that it started."""
        self._task.cancel()
        family = [self.process.pid, *processes.descendants(self.process.pid)]
        processes.stop(self.process, 5.0)
        processes.kill([pid for pid in family if processes.is_alive(pid) and pid != os.getpid()])


def _core_of(server: _Supervised) -> int:
    table = clusters.process_table(server.process.pid)
    return next(pid for pid, (_, command) in table.items() if CORE in command)
