"""A whole cluster on a tiny model: real Ray, vLLM, Valkey and gRPC. Two of its four hosts are killed on the way."""

import contextlib
import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from benchmarks.checkpoints import tiny
from folkmoot.cluster.processes import is_alive
from folkmoot.experts import secret
from folkmoot.gateway.batch_client import Batches
from folkmoot.gateway.client import Cancelled, Client, DeadlineExceeded, InvalidRequest
from tests.cluster.changes import stopped
from tests.cluster.conftest import FLOAT32, Cluster, eventually, processes_of, temp_of
from tests.otlp import Collector

pytestmark = pytest.mark.slow

PROMPT = "Each expert knows one thing well."


def tokens(client: Client, prompt: str | None = PROMPT, **options: Any) -> list[int]:
    options = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **options}
    options = {name: value for name, value in options.items() if value is not None}
    answer: list[int] = []
    for chunk in client.generate(prompt, **options):
        if chunk.token_ids:
            assert chunk.offset == len(answer), "tokens come once and in order"
        answer += chunk.token_ids
    return answer


def test_generate_streams_the_same_greedy_answer_again(client: Client) -> None:
    first = tokens(client)
    assert len(first) == 24
    assert tokens(client) == first


def test_the_last_piece_has_reason_and_usage(client: Client) -> None:
    *_, last = client.generate(PROMPT, temperature=0.0, max_tokens=5, ignore_eos=True)
    assert (last.finish_reason, last.completion_tokens) == ("length", 5)
    assert last.prompt_tokens > 0


def test_text_of_the_pieces_is_the_text_of_the_tokens(client: Client, mixtral: Path) -> None:
    from transformers import AutoTokenizer

    chunks = list(client.generate(PROMPT, temperature=0.0, max_tokens=24, ignore_eos=True))
    ids = [token for chunk in chunks for token in chunk.token_ids]
    expected = AutoTokenizer.from_pretrained(mixtral).decode(ids, skip_special_tokens=True)
    assert "".join(chunk.text for chunk in chunks) == expected


def test_the_clusters_secret_is_nowhere_but_in_its_file(cluster: Cluster, client: Client) -> None:
    """Not in a command line, an environment, a log (Ray's too) or the status document; and rows were exchanged."""
    assert tokens(client)
    state = json.loads((cluster.state_dir / cluster.name / "state.json").read_text())
    run_dir = Path(state["run_dir"])
    path = run_dir / "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    shared = secret.read(path)
    pids = processes_of(cluster.marker)
    assert len(pids) > 10
    places = [Path(f"/proc/{pid}/{name}") for pid in pids for name in ("cmdline", "environ")]
    files = [f for root in (run_dir, cluster.state_dir) for f in root.rglob("*") if f.is_file() and f != path]
    assert any(f.name.startswith("engine-") for f in files) and any("raylet" in f.name for f in files)
    for place in (*places, *files):
        with contextlib.suppress(OSError):  # a process that has ended
            assert shared not in place.read_bytes(), place
    assert shared.decode() not in json.dumps(cluster.status())


def test_its_ray_has_neither_monitors_nor_a_dashboard(cluster: Cluster) -> None:
    """They would be Python programs in Ray's own folder, or call themselves so."""
    lines = []
    for pid in processes_of(cluster.marker):
        with contextlib.suppress(OSError):  # one that has ended
            lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " "))
    assert any("/raylet " in line for line in lines) and any("ray_agent.py" in line for line in lines)
    extras = ("/dashboard.py", "/monitor.py", "/log_monitor.py", "ray::Dashboard")
    assert not [line for line in lines if any(extra in line for extra in extras)]


def test_chat_goes_through_the_models_own_template(client: Client, mixtral: Path) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokenizer = AutoTokenizer.from_pretrained(mixtral)
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokens(client, None, messages=messages) == tokens(client, None, token_ids=rendered)


def test_logprobs_name_the_chosen_token_first(client: Client) -> None:
    chunks = list(client.generate(PROMPT, temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=2))
    chosen = [token for chunk in chunks for token in chunk.token_ids]
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [entry[0].token_id for entry in entries] == chosen
    assert all(entry[0].rank == 1 and entry[0].logprob <= 0 for entry in entries)


def test_seeded_sampling_repeats_itself(client: Client) -> None:
    drawn = [tokens(client, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_stop_string_ends_the_answer(client: Client) -> None:
    text = client.generate_text(PROMPT, temperature=0.0, max_tokens=24, ignore_eos=True)
    stop = text[6:9]
    *_, last = client.generate(PROMPT, temperature=0.0, max_tokens=24, ignore_eos=True, stop=[stop])
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)


def test_a_batch_answers_and_scores_as_the_same_requests_alone(client: Client) -> None:
    greedy = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    messages = [{"role": "user", "content": "What is an expert?"}]
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "text": ("completions", {"prompt": PROMPT, "return_token_ids": True, **greedy}),
        "chat": ("chat/completions", {"messages": messages, "return_token_ids": True, **greedy}),
        "score": ("completions", {"prompt": PROMPT, "echo": True, "logprobs": 2, "max_tokens": 0}),
        "ids": ("completions", {"prompt": [7, 8, 9], "prompt_logprobs": 1, "max_tokens": 0}),
        "long": ("completions", {"prompt": "word " * 2000}),
    }
    lines = [{"custom_id": name, "method": "POST", "url": f"/v1/{path}", "body": body}
             for name, (path, body) in bodies.items()]  # fmt: skip
    batches = Batches(client)
    done = batches.wait(batches.create(lines).id, 120.0)
    assert (done.completed, done.failed) == (4, 1)
    (error,) = map(json.loads, batches.results(done.id, errors=True))
    assert (error["custom_id"], error["response"]["status_code"]) == ("long", 400)
    choices = {row["custom_id"]: row["response"]["body"]["choices"][0]
               for row in map(json.loads, batches.results(done.id))}  # fmt: skip
    assert choices["text"]["token_ids"] == tokens(client, max_tokens=8)
    assert choices["chat"]["token_ids"] == tokens(client, None, messages=messages, max_tokens=8)
    scored = next(iter(client.generate(PROMPT, temperature=0.0, max_tokens=1, prompt_logprobs=2))).prompt_logprobs
    logprobs = choices["score"]["logprobs"]
    assert choices["score"]["text"] == PROMPT == "".join(logprobs["tokens"])
    assert logprobs["token_logprobs"] == [None, *(pytest.approx(entry[0].logprob) for entry in scored[1:])]
    assert all(1 <= len(top) <= 2 for top in logprobs["top_logprobs"][1:]), "two tokens may spell the same"
    first, second, third = choices["ids"]["prompt_logprobs"]
    assert first is None and "8" in second and "9" in third and choices["ids"]["text"] == ""


def test_a_request_is_one_trace_from_the_caller_to_vllm(client: Client, collector: Collector) -> None:
    time.sleep(0.5)  # the question before this one may still be in a step
    provider = TracerProvider(ALWAYS_ON)
    with trace.use_span(provider.get_tracer("caller").start_span("question")) as question:
        answer = tokens(client, max_tokens=60, request_id=(request_id := f"traced-{secrets.token_hex(4)}"))
    above = question.get_span_context()
    call, lease, inside = collector.wait(lambda span: span.trace_id == f"{above.trace_id:032x}", 3)
    assert [span.name for span in (call, lease, inside)] == ["folkmoot.v1.Folkmoot/Generate", "lease", "llm_request"]
    assert (call.parent_id, lease.parent_id) == (f"{above.span_id:016x}", call.span_id)
    assert inside.parent_id == lease.span_id
    assert call.attributes["folkmoot.request_id"] == lease.attributes["folkmoot.request_id"] == request_id
    assert lease.attributes["gen_ai.usage.output_tokens"] == len(answer) == 60
    assert inside.attributes["gen_ai.usage.completion_tokens"] == 60
    dispatch = {name.removeprefix("folkmoot.dispatch."): value for name, value in lease.attributes.items()}
    assert 4 <= dispatch["calls"] <= 4 * 61, "a call a layer and step, from the first look to the last one"
    assert dispatch["rows"] >= 2 * dispatch["calls"] and 1 <= dispatch["hosts"] <= 4
    assert dispatch["slowest_host"].startswith("host-") and dispatch["slowest_host_s"] > 0
    assert inside.attributes["gen_ai.latency.time_in_model_inference"] > 0


def test_log_lines_have_ids_and_hold_no_prompt_and_no_answer(cluster: Cluster, client: Client) -> None:
    """One line of each kind of process; those about a request say which; what was asked and said is in none."""
    secret_words, request_id = f"hunter{secrets.token_hex(6)}", f"logged-{secrets.token_hex(4)}"
    said = client.generate_text(secret_words, temperature=0.0, max_tokens=24, ignore_eos=True)
    with pytest.raises(InvalidRequest):
        client.generate_text(f"{secret_words} " * 500, request_id=request_id)
    with pytest.raises(InvalidRequest):
        client.generate_text(secret_words, temperature=-1.0, request_id=f"{request_id}-too")

    def logged() -> list[dict[str, Any]] | None:  # a line may come after the answer that it is about
        found = cluster.log_lines()
        gateway = {line.get("request_id") for line in found if line["part"] == "gateway"}
        return found if {request_id, f"{request_id}-too"} <= gateway else None

    lines = eventually(logged, 10.0, "the gateway's lines are there")
    assert {line["part"] for line in lines} >= {"up", "warm", "gateway", "router", "engine", "host", "expert-actor"}
    about = {line.get("request_id"): line for line in lines if line["part"] == "gateway"}
    assert about[request_id]["trace_id"] and about[request_id]["message"].startswith("ended with INVALID_ARGUMENT")
    assert about[f"{request_id}-too"]["message"] == "ended with INVALID_ARGUMENT: sampling.temperature"
    assert any(line["part"] == "engine" and line.get("request_id") == request_id for line in lines)
    logs = cluster.state_dir / cluster.name / "logs"
    everything = "".join(f.read_text(errors="replace") for f in logs.glob("*.log")) + json.dumps(lines)
    assert secret_words not in everything and said not in everything


def test_many_at_once_get_what_each_gets_alone(client: Client) -> None:
    prompts = [f"{PROMPT} {n}" for n in range(16)]
    alone = [tokens(client, prompt) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda prompt: tokens(client, prompt), prompts)) == alone


def test_a_prompt_beyond_the_models_length_is_refused_with_its_limit(client: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt.*512|512.*prompt"):
        tokens(client, "word " * 2000)
    with pytest.raises(InvalidRequest, match="512"):
        tokens(client, None, token_ids=[7] * 512)


def test_a_prompt_may_fill_all_but_one_position(client: Client) -> None:
    assert len(tokens(client, None, token_ids=[7] * 511, max_tokens=None)) == 1


def test_a_chat_that_the_template_cannot_render_is_the_clients_fault(client: Client) -> None:
    with pytest.raises(InvalidRequest):
        list(client.generate(messages=[], max_tokens=2))


def running(cluster: Cluster) -> int:
    return sum(engine.get("running", 0) for engine in cluster.status()["engines"])


def test_cancelling_frees_the_engine(cluster: Cluster, client: Client) -> None:
    request_id = f"cancel-{secrets.token_hex(4)}"
    stream = client.generate(PROMPT, max_tokens=400, ignore_eos=True, request_id=request_id)
    assert next(stream).token_ids
    assert client.cancel(request_id)
    with pytest.raises(Cancelled):
        list(stream)
    eventually(lambda: running(cluster) == 0, 10.0, "the engine dropped it")
    assert client.request(request_id).num_tokens < 400


def test_a_deadline_ends_the_request(cluster: Cluster, client: Client) -> None:
    with pytest.raises(DeadlineExceeded):
        tokens(client, max_tokens=400, timeout_s=0.3)
    eventually(lambda: running(cluster) == 0, 10.0, "the engine dropped it")


def test_status_says_what_is_where_and_who_worked(cluster: Cluster, client: Client) -> None:
    tokens(client)
    status = cluster.status()
    assert status["map"]["missing"] == 0
    assert status["map"]["replicas_least"] == 3
    assert len(status["hosts"]) == 4
    assert sorted(e for h in status["hosts"] for e in h["experts"]) == sorted([*range(8)] * 3)
    assert all(h["alive"] and is_alive(h["pid"]) and h["rows"] > 0 for h in status["hosts"])
    (engine,) = status["engines"]
    assert engine["phase"] == "ready" and is_alive(engine["pid"]) and engine["generated_tokens"] > 0


def test_rows_of_each_expert_are_counted(cluster: Cluster, client: Client) -> None:
    """4 layers, top-2: each token that passes brings each layer 2 rows; the last token of an answer is never input."""

    def counted() -> list[int]:
        done = cluster.run("experts", "--json")
        return [sum(rows) for rows in json.loads(done.stdout)["rows_total"]] if done.returncode == 0 else [0] * 4

    tokens(client)
    before, since = counted(), time.monotonic()
    while time.monotonic() - since < 4.0:  # longer than counts take from an engine to a gateway
        if (now := counted()) != before:
            before, since = now, time.monotonic()
    tokens(client, None, token_ids=[7] * 11, max_tokens=30)
    expected = [n + 2 * (11 + 29) for n in before]
    eventually(lambda: counted() == expected, 20.0, f"{expected} rows were counted")


def ray_pid(cluster: Cluster, name: str) -> int | None:
    """The process of a Ray actor, by the title that Ray gives it."""
    from tests.cluster.conftest import processes_of

    return next((pid for pid, command in processes_of(cluster.marker).items() if name in command), None)


def test_a_killed_router_comes_back_and_finds_the_same_hosts(cluster: Cluster, client: Client) -> None:
    before = cluster.status()
    expected = tokens(client)
    pid = ray_pid(cluster, "ExpertRouter")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_alive(pid), 5.0, "the router died")
    assert tokens(client) == expected, "engines go on with the map they have"

    def is_back() -> bool:
        now = cluster.status()
        return (
            now["time_s"] > before["time_s"] and ray_pid(cluster, "ExpertRouter") not in (None, pid) and now["engines"]
        )

    eventually(is_back, 30.0, "the router is back")
    after = eventually(lambda: s if len((s := cluster.status())["hosts"]) == 4 else None, 10.0, "it knows all hosts")
    assert [(h["host"], h["pid"], h["incarnation"]) for h in after["hosts"]] == [
        (h["host"], h["pid"], h["incarnation"]) for h in before["hosts"]
    ]
    assert after["map"]["missing"] == 0
    assert tokens(client) == expected


def alive(status: dict[str, Any]) -> int:
    return sum(h["alive"] for h in status["hosts"])


@pytest.mark.parametrize("with_actor", [False, True], ids=["host", "host-and-actor"])
def test_a_host_killed_in_mid_answer_changes_no_token(
    cluster: Cluster, client: Client, collector: Collector, with_actor: bool
) -> None:
    eventually(lambda: alive(cluster.status()) == 4, 30.0, "the router has heard of all")
    time.sleep(2.0)  # hosts say what they have done once a second
    earlier = {h["pid"]: h["rows"] for h in cluster.status()["hosts"]}
    expected = tokens(client, max_tokens=400)
    time.sleep(2.0)
    before = cluster.status()
    # Of a host that once had most rows, but none of this question's, the engine might not miss a thing.
    victim = max(before["hosts"], key=lambda h: h["rows"] - earlier.get(h["pid"], h["rows"]))
    answer: list[int] = []  # so long that the engine is still at it when we have seen 40 tokens
    after_kill = 0
    request_id = f"failover-{secrets.token_hex(4)}"
    router = ray_pid(cluster, "ExpertRouter")
    assert router is not None
    with stopped(router):  # else its next map may come before the engine's next call, which then misses nothing
        for chunk in client.generate(PROMPT, temperature=0.0, max_tokens=400, ignore_eos=True, request_id=request_id):
            answer += chunk.token_ids
            if len(answer) >= 40 and not after_kill:
                os.kill(victim["pid"], signal.SIGKILL)
                if with_actor:
                    os.kill(victim["actor_pid"], signal.SIGKILL)
            after_kill += len(answer) >= 40
    assert not is_alive(victim["pid"])
    assert after_kill > 10, "most of the answer came after the kill"
    assert answer == expected
    (lease,) = collector.wait(lambda span: span.attributes.get("folkmoot.request_id") == request_id and
                              span.name == "lease")  # fmt: skip
    assert [(name, about["folkmoot.host"]) for name, about in lease.events] == [("expert host dropped", victim["host"])]
    assert any(line["part"] == "engine" and f"expert host {victim['host']} " in line["message"]
               and "dropped" in line["message"] for line in cluster.log_lines())  # fmt: skip

    def is_replaced() -> bool:
        now = cluster.status()
        host = next(h for h in now["hosts"] if h["host"] == victim["host"])
        is_newer = now["map"]["version"] > before["map"]["version"]
        return host["alive"] and host["pid"] != victim["pid"] and is_newer and now["map"]["replicas_least"] == 3

    eventually(is_replaced, 60.0, "another process has taken its place, with all its replicas")


RAY_HEAD = """
import sys, time, ray
context = ray.init(include_dashboard=False, num_cpus=2, object_store_memory=80 << 20, _temp_dir=sys.argv[1])
print(context.address_info["address"], flush=True)
sys.stdin.read()
print(sorted(a["name"] for a in ray.util.list_named_actors(all_namespaces=True)), flush=True)
"""


def test_joining_a_running_ray_and_leaving_it_as_it_was(no_cluster: Cluster, mixtral: Path) -> None:
    head = subprocess.Popen(
        [sys.executable, "-c", RAY_HEAD, f"{temp_of(no_cluster.marker)}/ray"],
        env=no_cluster.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert head.stdout is not None
        address = head.stdout.readline().strip()
        no_cluster.up("--model", str(mixtral), "--address", address, "--replicas", "2", *FLOAT32)
        with no_cluster.client() as client:
            assert len(tokens(client)) == 24
        assert no_cluster.run("down", timeout_s=90.0).returncode == 0
        left, _ = head.communicate("", timeout=30.0)
    finally:
        head.kill()
    assert left.split("\n")[-2] == "['SERVE_CONTROLLER_ACTOR']", "Serve stays, since others may use it"


def test_a_dense_model_runs_without_hosts_and_down_leaves_nothing(no_cluster: Cluster, tmp_path: Path) -> None:
    dense = tiny("llama", tmp_path / "tiny-llama", dtype="float32")
    no_cluster.up("--model", str(dense), *FLOAT32)
    try:
        with no_cluster.client() as client:
            assert len(tokens(client)) == 24
        status = no_cluster.status()
        assert status["hosts"] == []
        assert status["map"]["layers"] == 0
    finally:
        no_cluster.down()
