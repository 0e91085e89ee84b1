"""`folkmoot demo`: real English out of experts in other processes, and the same tokens after one of them is killed.

A cluster of its own with 2 replicas of each expert; three questions one at a time, greedy; then the third again, and in
the middle of its answer an expert host and its Ray actor are killed with SIGKILL. Equal tokens are to be expected
because hosts return one row for each (token, expert) and the engine sums them in a fixed order, so that the answer does
not depend on which replica computed a row; and because one request at a time makes equal batches.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from folkmoot.cluster import interrupts, processes, status_view
from folkmoot.cluster.launch import Supervisor
from folkmoot.cluster.up_options import UpOptions
from folkmoot.gateway.client import Client

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Explain in a few sentences why the sky is blue.",
)
MAX_TOKENS = 96
KILL_AFTER_TOKENS = 20
SETTLE_S = 15.0


@dataclass
class Answer:
    """What came back, and when: one arrival a piece, in seconds."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    arrivals_s: list[float] = field(default_factory=list)

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between pieces."""
        return [b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


def run(console: Console, hosts: int, state_dir: Path | None) -> bool:
    """The whole demo; whether the host died and the tokens stayed the same. Leaves no process behind."""
    options = UpOptions(
        "demo",
        name="demo",
        hosts=hosts,
        replicas=2,
        listen="127.0.0.1:0",
        max_model_len=1024,
        dtype="float32",  # the same answers on every machine: in bf16 this small model has near ties that rounding tips
        state_dir=state_dir,
    )
    began = time.monotonic()
    spinner = console.status("starting") if console.is_terminal else None

    def tell(message: str) -> None:
        text = f"{time.monotonic() - began:5.1f} s  {message}"
        if spinner is not None:
            spinner.update(text)
        else:
            console.print(text)

    supervisor = Supervisor(options, tell)
    failure: str | None = "it ended unexpectedly"
    try:
        with spinner or interrupts.nothing():
            state = supervisor.start()
        console.print(f"{hosts} expert hosts, 2 replicas of each expert: ready after {time.monotonic() - began:.1f} s")
        assert state.gateway is not None
        with Client(state.gateway) as client:
            succeeded = _play(console, client)
        failure = None
    finally:
        interrupts.ignore_signals()
        console.print("cleaning up")
        supervisor.stop(failure)
    return succeeded


def _play(console: Console, client: Client) -> bool:
    answers = [_ask(console, client, question) for question in QUESTIONS]
    time.sleep(1.5)  # hosts say once a second what they have done
    document = status_view.fetch(client)
    console.print(
        status_view.hosts_table(document["hosts"], "rows = (token, expert) pairs that each expert actor's host ran")
    )
    victim = max((h for h in document["hosts"] if h["alive"]), key=lambda h: h["rows"])
    console.print(f"\nThe last question again; after {KILL_AFTER_TOKENS} tokens {victim['host']} is killed.")
    again, killed_at_s = _ask_and_kill(console, client, QUESTIONS[-1], [victim["pid"], victim["actor_pid"]])
    left = processes.wait_gone([victim["pid"], victim["actor_pid"]], timeout_s=5.0)
    _wait_until_healed(client, victim)
    console.print(status_view.hosts_table(status_view.fetch(client)["hosts"], "after"))
    return _verdict(console, answers[-1], again, killed_at_s, victim, left)


def _ask(console: Console, client: Client, question: str) -> Answer:
    console.print(f"\n[bold]{question}[/]")
    answer = Answer()
    for chunk in _stream(client, question):
        _take(console, answer, chunk)
    console.print()
    return answer


def _ask_and_kill(console: Console, client: Client, question: str, pids: list[int]) -> tuple[Answer, float | None]:
    """Kill these processes once KILL_AFTER_TOKENS tokens have come; when that was (None: the answer ended before)."""
    console.print(f"\n[bold]{question}[/]")
    answer, killed_at_s = Answer(), None
    for chunk in _stream(client, question):
        _take(console, answer, chunk)
        if killed_at_s is None and len(answer.token_ids) >= KILL_AFTER_TOKENS and chunk.finish_reason is None:
            processes.kill(pids)
            killed_at_s = time.monotonic()
            console.print("[bold red]<killed>[/]", end="")
    console.print()
    return answer, killed_at_s


def _stream(client: Client, question: str) -> Any:
    messages = [{"role": "user", "content": question}]
    return client.generate(messages=messages, temperature=0.0, max_tokens=MAX_TOKENS)


def _take(console: Console, answer: Answer, chunk: Any) -> None:
    answer.arrivals_s.append(time.monotonic())
    answer.token_ids += chunk.token_ids
    answer.text += chunk.text
    console.print(chunk.text, end="", markup=False)


def _wait_until_healed(client: Client, victim: dict[str, Any]) -> None:
    """Until the router has started another process in the place of the dead one."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        hosts = status_view.fetch(client).get("hosts", [])
        if any(h["host"] == victim["host"] and h["alive"] and h["pid"] != victim["pid"] for h in hosts):
            return
        time.sleep(0.2)


def _verdict(
    console: Console, first: Answer, again: Answer, killed_at_s: float | None, victim: dict[str, Any], left: list[int]
) -> bool:
    """Say what happened; False unless the host really died in the middle of the answer and the tokens are the same."""
    if killed_at_s is None or left:
        console.print(
            f"[bold red]the kill did not happen[/]: answer of {len(again.token_ids)} tokens, still alive: {left}"
        )
        return False
    usual_ms, longest_ms = 1e3 * statistics.median(again.gaps_s), 1e3 * max(again.gaps_s)
    after = sum(t > killed_at_s for t in again.arrivals_s)
    console.print(f"{victim['host']} (process {victim['pid']}) and its actor (process {victim['actor_pid']}) are dead.")
    console.print(
        f"{after} pieces of the answer came after that; longest gap between two {longest_ms:.0f} ms, "
        f"usual one {usual_ms:.0f} ms, longest without the kill {1e3 * max(first.gaps_s):.0f} ms."
    )
    if again.token_ids == first.token_ids:
        console.print(f"[bold green]The same {len(first.token_ids)} tokens.[/]")
        return True
    differing = next(
        (i for i, (a, b) in enumerate(zip(first.token_ids, again.token_ids, strict=False)) if a != b),
        min(len(first.token_ids), len(again.token_ids)),
    )
    console.print(f"[bold red]The answers differ from token {differing} on.[/]")
    return False
