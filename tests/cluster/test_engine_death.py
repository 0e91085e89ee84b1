"""Engines die in the middle of answers, and no client is told: real vLLM in float32, two engines, SIGKILL.

A request that another engine took over must give what it gives undisturbed, token by token and character by character,
whatever its sampling options are.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from folkmoot.cluster.processes import descendants, is_alive
from folkmoot.gateway.client import Chunk, NotFound
from folkmoot.gateway.pb import gateway_pb2 as pb
from tests.cluster.changes import stopped
from tests.cluster.conftest import Cluster, eventually, processes_of, temp_of

pytestmark = pytest.mark.slow

PROMPT = "Each expert knows one thing well."
ARGUMENTS = ("--dtype", "float32", "--max-model-len", "2048", "--hosts", "2", "--replicas", "2", "--engines", "2")
LENGTH = 240
PLAIN = {"temperature": 0.0, "max_tokens": LENGTH, "ignore_eos": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": PLAIN,
    "seeded": {**PLAIN, "temperature": 1.0, "seed": 11},
    "seeded-top": {**PLAIN, "temperature": 0.8, "seed": 5, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "logprobs": 2},
    "penalties": {**PLAIN, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    "seeded-penalties": {**PLAIN, "temperature": 1.0, "seed": 3, "frequency_penalty": 0.5, "min_tokens": 100},
    "bad-words": {**PLAIN, "bad_words": ["the", " a", "e"], "prompt_logprobs": 1},
    "biased": {**PLAIN, "logit_bias": {65: 5.0, 70: -5.0}, "repetition_penalty": 1.2},
}


@pytest.fixture(scope="module")
def cluster(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two engines on two hosts, each with all experts."""
    cluster = Cluster(tmp_path_factory.mktemp("state"), secrets.token_hex(4))
    cluster.up("--model", str(mixtral), *ARGUMENTS)
    yield cluster
    cluster.down()
    shutil.rmtree(temp_of(cluster.marker))


@dataclass
class Answer:
    """What one client has of its answer; `done` when the stream has ended."""

    request_id: str
    chunks: list[Chunk] = field(default_factory=list)
    done: "Future[None]" = field(default_factory=Future)

    @property
    def tokens(self) -> list[int]:
        tokens: list[int] = []
        for chunk in list(self.chunks):
            assert not chunk.token_ids or chunk.offset == len(tokens), "tokens come once and in order"
            tokens += chunk.token_ids
        return tokens

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in list(self.chunks))

    @property
    def logprobs(self) -> list[tuple[int, float]]:
        entries = [entry for chunk in self.chunks for entry in chunk.logprobs]
        return [(one.token_id, one.logprob) for entry in entries for one in entry]


def ask(cluster: Cluster, options: dict[str, Any], token_ids: list[int] | None = None) -> Answer:
    """Send a request, and read its answer in a thread."""
    prompt = PROMPT if token_ids is None else None
    answer = Answer(f"r-{secrets.token_hex(4)}")

    def read() -> None:
        try:
            with cluster.client() as client:
                for chunk in client.generate(prompt, token_ids=token_ids, request_id=answer.request_id, **options):
                    answer.chunks.append(chunk)
        except BaseException as e:
            answer.done.set_exception(e)
        else:
            answer.done.set_result(None)

    threading.Thread(target=read, daemon=True).start()
    return answer


def ready_engines(cluster: Cluster) -> dict[str, dict[str, Any]]:
    engines = {e["engine"]: e for e in cluster.status()["engines"] if e["phase"] == "ready"}
    return {name: e for name, e in engines.items() if is_alive(e["pid"])}


def two_engines(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Wait until both engines serve (those that died have successors)."""
    return eventually(lambda: found if len(found := ready_engines(cluster)) == 2 else None, 90.0, "two engines")  # type: ignore[no-any-return]


def all_on_one(
    cluster: Cluster, options: list[dict[str, Any]], least: int = 40
) -> tuple[dict[str, Any], dict[str, Any], list[Answer]]:
    """Requests that all run on the first engine, each with so many tokens; that engine, and the other one."""
    for _ in range(5):  # the other one may have had its hand out already when it was stopped
        victim, other = two_engines(cluster).values()
        with stopped(other["pid"]):
            answers = [ask(cluster, one) for one in options]
            eventually(lambda: all(len(a.tokens) >= least for a in answers), 60.0, "every answer has begun")  # noqa: B023
        with cluster.client() as client:
            if {client.request(a.request_id).engine for a in answers} == {victim["engine"]}:
                return victim, other, answers
        finish(cluster, answers)
    raise AssertionError("the requests went to both engines, five times")


def finish(cluster: Cluster, answers: list[Answer]) -> list[Any]:
    """Wait for all answers; the gateway's account of each request."""
    for answer in answers:
        answer.done.result(120.0)
    with cluster.client() as client:
        return [client.request(a.request_id) for a in answers]


def core_of(engine: dict[str, Any]) -> int:
    """vLLM's core, which runs the model: the engine process's child."""
    return next(pid for pid in descendants(engine["pid"]) if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes())


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[str, Answer]:
    """What each kind of request answers when nothing dies; one of them ends with a stop string."""
    answers = {name: ask(cluster, options) for name, options in OPTIONS.items()}
    finish(cluster, list(answers.values()))
    text = answers["greedy"].text
    stop = next(text[i : i + 4] for i in range(len(text) * 3 // 4, len(text)) if text.find(text[i : i + 4]) == i)
    OPTIONS["stop"] = {**PLAIN, "stop": [stop, "never this"]}
    answers["stop"] = ask(cluster, OPTIONS["stop"])
    finish(cluster, [answers["stop"]])
    assert 100 < len(answers["stop"].tokens) < LENGTH
    return answers


def assert_same(answers: dict[str, Answer], undisturbed: dict[str, Answer]) -> None:
    for name, answer in answers.items():
        expected = undisturbed[name]
        assert answer.tokens == expected.tokens, name
        assert answer.text == expected.text, name
        assert [token for token, _ in answer.logprobs] == [token for token, _ in expected.logprobs], name
        values = [value for _, value in expected.logprobs]  # a prefill's are not a decode's to the last bit
        assert [value for _, value in answer.logprobs] == pytest.approx(values, abs=1e-3), name
        last, other = answer.chunks[-1], expected.chunks[-1]
        assert (last.finish_reason, last.stop_reason) == (other.finish_reason, other.stop_reason)
        assert (last.prompt_tokens, last.completion_tokens) == (other.prompt_tokens, other.completion_tokens)


@pytest.mark.parametrize("part", ["process", "core", "replica"])
def test_an_engine_dies_and_every_answer_goes_on_exactly(
    cluster: Cluster, undisturbed: dict[str, Answer], part: str
) -> None:
    victim, other, begun = all_on_one(cluster, list(OPTIONS.values()))
    answers = dict(zip(OPTIONS, begun, strict=True))
    pid = {"process": victim["pid"], "core": core_of(victim), "replica": victim["actor_pid"]}[part]
    os.kill(pid, signal.SIGKILL)
    had = {name: len(a.tokens) for name, a in answers.items()}
    killed_s = time.monotonic()
    eventually(lambda: not is_alive(victim["pid"]), 20.0, "the engine process is gone")
    assert all(size < len(undisturbed[name].tokens) for name, size in had.items()), "killed in the middle"
    eventually(lambda: all(len(a.tokens) > had[name] for name, a in answers.items()), 60.0, "all go on")
    print(f"\n{part}: all {len(answers)} answers go on {time.monotonic() - killed_s:.2f} s after the kill")
    requests = finish(cluster, begun)
    assert_same(answers, undisturbed)
    assert {r.engine for r in requests} == {other["engine"]}
    assert {r.attempts for r in requests} == ({1} if part == "replica" else {2})


def test_a_zombie_writes_nothing_and_has_its_room_back(cluster: Cluster, undisturbed: dict[str, Answer]) -> None:
    """An engine that stands still beyond its lease wakes up with tokens that another one has made meanwhile."""
    zombie, other, begun = all_on_one(cluster, list(OPTIONS.values()))
    with stopped(zombie["pid"]):
        stopped_s = time.monotonic()
        sizes = [len(a.tokens) for a in begun]
        eventually(lambda: all(len(a.tokens) > n for a, n in zip(begun, sizes, strict=True)), 60.0, "all go on")
        print(f"\nall answers go on {time.monotonic() - stopped_s:.2f} s after the stop")
        requests = finish(cluster, begun)
    assert {(r.engine, r.attempts) for r in requests} == {(other["engine"], 2)}
    log = Path(zombie["log"])
    eventually(lambda: all(f"{a.request_id} ended: lost" in log.read_text() for a in begun), 20.0, "it lost them")
    assert_same(dict(zip(OPTIONS, begun, strict=True)), undisturbed)
    eventually(lambda: ready_engines(cluster)[zombie["engine"]]["running"] == 0, 20.0, "its counters are right")
    with stopped(other["pid"]):
        again = [ask(cluster, PLAIN) for _ in range(4)]
        served = finish(cluster, again)
    assert {(r.engine, r.attempts) for r in served} == {(zombie["engine"], 1)}
    assert all(a.tokens == undisturbed["greedy"].tokens for a in again)
    with cluster.client() as client:
        (model,) = client.models()
        assert (model.load.running_requests, model.load.waiting_requests) == (0, 0)


@pytest.mark.parametrize("is_stuck", [False, True], ids=["finishes", "hands-over"])
def test_an_engine_that_is_told_to_stop_loses_nothing(
    cluster: Cluster, undisturbed: dict[str, Answer], is_stuck: bool
) -> None:
    """It finishes what it can within its grace period; what it cannot goes to the other, and counts as no attempt."""
    # The shortest answer has some hundred tokens; what is left then takes a small part of the grace period.
    leaving, other, begun = all_on_one(cluster, list(OPTIONS.values()), least=40 if is_stuck else 100)
    if is_stuck:
        os.kill(core_of(leaving), signal.SIGSTOP)
    os.kill(leaving["pid"], signal.SIGTERM)
    new = ask(cluster, PLAIN)
    requests = finish(cluster, begun)
    assert_same(dict(zip(OPTIONS, begun, strict=True)), undisturbed)
    assert {(r.engine, r.attempts) for r in requests} == {((other if is_stuck else leaving)["engine"], 1)}
    assert finish(cluster, [new])[0].engine == other["engine"], "it leases no more"
    eventually(lambda: not is_alive(leaving["pid"]), 30.0, "it ends")


def test_many_long_seeded_prompts_at_once_end_no_core(cluster: Cluster) -> None:
    """More prompt tokens than a step takes: vLLM cannot prefill a seeded request in parts on a CPU."""
    two_engines(cluster)
    options = {**PLAIN, "temperature": 1.0, "seed": 7, "max_tokens": 8}
    prompts = [[5 + (i + j) % 400 for j in range(500 + i)] for i in range(16)]
    together = [ask(cluster, options, prompt) for prompt in prompts]
    assert {r.attempts for r in finish(cluster, together)} == {1}
    alone = ask(cluster, options, prompts[0])
    finish(cluster, [alone])
    assert together[0].tokens == alone.tokens


def test_an_answer_that_grows_outlives_its_engines(cluster: Cluster) -> None:
    """Four die under it, as many as end a request that does not move on."""
    two_engines(cluster)
    undisturbed = ask(cluster, {**PLAIN, "max_tokens": 1900})
    finish(cluster, [undisturbed])
    answer = ask(cluster, {**PLAIN, "max_tokens": 1900})
    killed: list[str] = []
    seen = 0
    with cluster.client() as client:

        def has_moved_on() -> bool:
            return len(answer.tokens) > seen and client.request(answer.request_id).attempts == len(killed) + 1

        for _ in range(4):
            eventually(has_moved_on, 90.0, f"attempt {len(killed) + 1}")
            seen = len(answer.tokens)
            engine = client.request(answer.request_id).engine
            eventually(lambda name=engine: name in ready_engines(cluster), 10.0, "it is known")
            pid = ready_engines(cluster)[engine]["pid"]
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: not is_alive(pid), 10.0, "it is dead")
            killed.append(engine)
    (request,) = finish(cluster, [answer])
    assert len(set(killed)) == 4, "an engine that is started again has another name"
    assert request.attempts == 5
    assert answer.tokens == undisturbed.tokens
    assert dead_letters(cluster) == []
    two_engines(cluster)


def dead_letters(cluster: Cluster) -> list[tuple[str, str]]:
    """Ids and reasons in the dead-letter stream of the cluster's own store."""
    import asyncio

    from folkmoot.gateway.store import Store

    async def read() -> list[tuple[str, str]]:
        store = Store(f"unix://{cluster.state_dir / cluster.name / 'store' / 'store.sock'}")
        try:
            (model,) = await store.command("HKEYS", store.keys.models)
            rows = await store.command("XRANGE", store.keys.dead(model.decode()), "-", "+")
        finally:
            await store.close()
        return [(fields[1].decode(), fields[3].decode()) for _, fields in rows]

    return asyncio.run(read())


def kill_all(pids: Iterable[int]) -> list[int]:
    """SIGKILL to each that is alive; those that were."""
    alive = [pid for pid in pids if is_alive(pid)]
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return alive


def test_everything_is_killed_and_started_again(cluster: Cluster, mixtral: Path) -> None:
    """As a power cut does it: the queue is found, and a client that knows its request gets the whole answer. It
    leaves another cluster under the name."""
    chosen = {"greedy": "greedy", "seeded": "seeded", "waits": "penalties"}
    options = {name: {**OPTIONS[kind], "max_tokens": 2 * LENGTH} for name, kind in chosen.items()}
    undisturbed = {name: ask(cluster, one) for name, one in options.items()}
    finish(cluster, list(undisturbed.values()))
    engines = two_engines(cluster).values()
    # Found beforehand, since looking takes as long as a short answer.
    everything = [pid_of_supervisor(cluster), *processes_of(cluster.marker)]
    assert len(everything) > 8
    begun = {name: ask(cluster, {**options[name], "detach": True}) for name in ("greedy", "seeded")}
    eventually(lambda: all(len(a.tokens) >= 40 for a in begun.values()), 60.0, "two of them have begun")
    with stopped(*(engine["pid"] for engine in engines)):  # who does not run leases nothing
        begun["waits"] = ask(cluster, {**options["waits"], "detach": True})
        eventually(lambda: state_of(cluster, begun["waits"]) == pb.QUEUED, 20.0, "the third one waits")
        kill_all(everything)
    eventually(lambda: not kill_all(processes_of(cluster.marker)), 20.0, "nothing is left")
    assert all(len(a.tokens) < 2 * LENGTH for a in begun.values()), "killed in the middle"
    assert not begun["waits"].tokens
    cluster.up("--model", str(mixtral), *ARGUMENTS)
    with cluster.client() as client, ThreadPoolExecutor() as pool:
        read = pool.map(lambda a: list(client.follow(a.request_id)), begun.values())
        found = {name: Answer("", chunks) for name, chunks in zip(begun, read, strict=True)}
        assert_same(found, undisturbed)
        for name in ("greedy", "seeded"):
            assert begun[name].tokens == undisturbed[name].tokens[: len(begun[name].tokens)]
            assert client.request(begun[name].request_id).attempts == 2


def test_a_killed_supervisor_takes_everything_with_it(cluster: Cluster) -> None:
    """The last one here: it leaves no cluster."""
    assert pid_of_supervisor(cluster) in processes_of(cluster.marker)
    os.kill(pid_of_supervisor(cluster), signal.SIGKILL)

    def gone() -> bool:
        # Ray's own agent tries for a minute to tell a Ray that is gone; all others must be quick.
        left = processes_of(cluster.marker).values()
        return all(c.startswith("ray::RuntimeEnvAgent") for c in left)

    eventually(gone, 20.0, "processes gone")
    kill_all(processes_of(cluster.marker))
    done = cluster.run("status")
    assert done.returncode == 1
    assert "no cluster runs" in done.stderr


def pid_of_supervisor(cluster: Cluster) -> int:
    pid: int = json.loads((cluster.state_dir / cluster.name / "state.json").read_text())["pid"]
    return pid


def state_of(cluster: Cluster, answer: Answer) -> int:
    """The request's, as the gateway knows it; 0 where it does not know it yet."""
    with cluster.client() as client, contextlib.suppress(NotFound):
        return int(client.request(answer.request_id).state)
    return 0
