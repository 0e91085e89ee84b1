"""The command line: help that teaches, errors that say what to do, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from folkmoot.cluster import bench, cli_up, status_view
from folkmoot.cluster.cli import main
from folkmoot.cluster.state_file import AlreadyRunning, ClusterState, StateFolder
from folkmoot.cluster.up_options import StartError, UpOptions, check_experts, num_hosts_and_replicas, openmp_of
from folkmoot.experts.vllm_api import ModelShape
from folkmoot.gateway.api_keys import KEY
from folkmoot.gateway.embedded import EmbeddedStore
from tests.cluster.conftest import Cluster, eventually, processes_of
from tests.gateway.certs import Authority

COMMANDS = [
    *("up", "down", "status", "chat", "generate", "bench", "demo", "scale", "drain", "replicate", "roll", "keys"),
    *("batch", "simulate"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 5


def test_the_group_lists_all_commands() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    assert all(f"  {command} " in output for command in COMMANDS)


def test_options_that_exclude_each_other() -> None:
    result = CliRunner().invoke(main, ["up", "--model", "demo", "--hosts", "2", "--experts-per-host", "4"])
    assert result.exit_code == 2
    assert "exclude each other" in result.output


@pytest.mark.parametrize("command", [["generate", "hello"], ["status"], ["bench"], ["chat"], ["scale", "hosts", "2"]])
def test_without_a_cluster_it_says_how_to_start_one(no_cluster: Cluster, command: list[str]) -> None:
    done = no_cluster.run(*command)
    assert done.returncode == 1
    assert "folkmoot up" in done.stderr


def test_down_without_a_cluster_is_no_error(no_cluster: Cluster) -> None:
    done = no_cluster.run("down")
    assert done.returncode == 0
    assert "no cluster" in done.stdout


def test_a_folder_that_is_no_checkpoint(no_cluster: Cluster, tmp_path: Path) -> None:
    done = no_cluster.run("up", "--model", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_more_replicas_than_hosts(no_cluster: Cluster, mixtral: Path) -> None:
    done = no_cluster.run("up", "--model", str(mixtral), "--hosts", "2", "--replicas", "3")
    assert done.returncode == 1
    assert "3 replicas need 3 expert hosts" in done.stderr


def test_a_second_cluster_of_the_same_name_is_refused(tmp_path: Path) -> None:
    first, second = StateFolder("x", tmp_path), StateFolder("x", tmp_path)
    first.acquire()
    first.write(ClusterState("x", "ready", os.getpid(), gateway="127.0.0.1:1"))
    with pytest.raises(AlreadyRunning, match=rf"process {os.getpid()}, gateway 127\.0\.0\.1:1.*folkmoot down --name x"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_stale_state_is_cleared(tmp_path: Path) -> None:
    folder = StateFolder("x", tmp_path)
    folder.path.mkdir()
    folder.write(ClusterState("x", "ready", 2**22 + 1, gateway="127.0.0.1:1"))
    assert not folder.is_held()
    folder.acquire()
    assert folder.read() is None
    folder.release()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (2, 2)),
        ({"hosts": 4}, (4, 4)),
        ({"hosts": 4, "replicas": 1}, (4, 1)),
        ({"replicas": 3}, (3, 3)),
        ({"hosts": 4, "share_weights": False}, (4, 1)),
        ({"hosts": 4, "device": "cuda"}, (4, 1)),
        ({"hosts": 4, "address": "auto"}, (4, 1)),
        ({"experts_per_host": 2}, (4, 1)),
    ],
)
def test_replicas_that_cost_no_memory_are_the_default(options: dict[str, Any], expected: tuple[int, int]) -> None:
    assert num_hosts_and_replicas(UpOptions("model", **options), num_experts=8) == expected


def test_weights_are_not_shared_on_a_gpu() -> None:
    with pytest.raises(StartError, match="needs --device cpu, not cuda"):
        num_hosts_and_replicas(UpOptions("model", device="cuda", share_weights=True), num_experts=8)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"device": "cuda", "share_weights": False}, "--device cuda"),
        ({"compiled": True}, "--compile"),
        ({"speculative_tokens": 2}, "--speculate"),
    ],
)
def test_micro_batches_are_refused_beside(options: dict[str, Any], found: str) -> None:
    shape = ModelShape("MixtralForCausalLM", 2, (0, 1), 8, 2, 64, "bfloat16", 1 << 20)
    with pytest.raises(StartError, match=f"--micro-batch-from does not go with {found}"):
        check_experts(UpOptions("model", micro_batch_from=4, **options), Path("model"), shape)


def test_openmps_workers_spin_only_where_there_is_one_engine_and_long_where_cores_are_its_own() -> None:
    spins = [
        int(openmp_of(options, cores)["GOMP_SPINCOUNT"])
        for options, cores in (
            (UpOptions("model"), 64),
            (UpOptions("model", address="10.0.0.1:6379"), 2),
            (UpOptions("model"), 2),
        )
    ]
    assert spins[0] == spins[1] > spins[2] > 0
    for several in (UpOptions("model", engines=2), UpOptions("model", engines=1, most_engines=3)):
        assert openmp_of(several) == {"GOMP_SPINCOUNT": "0"}


def test_a_dense_model_has_no_hosts() -> None:
    assert num_hosts_and_replicas(UpOptions("model"), num_experts=0) == (0, 1)


def test_ranges() -> None:
    assert status_view.ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert status_view.ranges([]) == ""


def test_bench_figures() -> None:
    timings = [bench.Timing(0.1, [0.01] * 98 + [0.5, 0.9], 101), bench.Timing(0.3, [], 1)]
    figures = bench.figures(timings, wall_s=2.0)
    assert figures["tokens_per_s"] == 51
    assert (figures["ttft_p50_ms"], figures["ttft_p99_ms"]) == (100, 300)
    assert (figures["itl_p50_ms"], figures["itl_p99_ms"]) == (10, 500)


@pytest.mark.slow
@pytest.mark.parametrize("started", ["experts.warm", "raylet", "ExpertRouter"])
def test_an_interrupted_start_leaves_nothing_behind(no_cluster: Cluster, mixtral: Path, started: str) -> None:
    command = no_cluster.command("up", "--model", str(mixtral), "--listen", "127.0.0.1:0")
    process = subprocess.Popen(command, env=no_cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    eventually(lambda: any(started in c for c in processes_of(no_cluster.marker).values()), 90.0, f"{started} started")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60.0)
    eventually(
        lambda: not processes_of(no_cluster.marker), 10.0, f"gone: {processes_of(no_cluster.marker)}\n{output!r}"
    )
    assert b"Traceback" not in output
    assert process.returncode == 0


@pytest.mark.slow
def test_generate_status_and_bench_on_a_running_cluster(cluster: Cluster) -> None:
    done = cluster.run("generate", "Each expert", "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    again = cluster.run("generate", "Each expert", "--max-tokens", "8")
    assert done.stdout == again.stdout != "\n"
    document = json.loads(cluster.run("status", "--json").stdout)
    assert document["model"] == "tiny-mixtral"
    assert "host-0" in cluster.run("status").stdout
    figures = json.loads(
        cluster.run("bench", "--requests", "4", "--concurrency", "2", "--max-tokens", "8", "--json").stdout
    )
    assert figures["generated_tokens"] == 32
    assert figures["tokens_per_s"] > 0


@pytest.mark.slow
def test_chat_keeps_the_conversation_and_ends_with_an_empty_line(cluster: Cluster) -> None:
    done = cluster.run("chat", "--max-tokens", "4", stdin="hello\nand again\n\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("you:") == 3


@pytest.mark.slow
def test_errors_of_the_engine_reach_the_terminal_without_a_traceback(cluster: Cluster) -> None:
    done = cluster.run("generate", "word " * 2000)
    assert done.returncode == 1
    assert "INVALID_ARGUMENT" in done.stderr and "512" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_up_refuses_a_second_cluster(cluster: Cluster, mixtral: Path) -> None:
    for detach in ([], ["--detach"]):
        done = cluster.run("up", "--model", str(mixtral), *detach)
        assert done.returncode == 1
        assert "runs already" in done.stderr


# Who may call.


def test_an_open_address_without_keys_is_refused_before_anything_starts(no_cluster: Cluster) -> None:
    done = no_cluster.run("up", "--model", "demo", "--listen", "0.0.0.0:0")
    assert done.returncode == 1
    assert "--require-keys" in done.stderr and "--insecure" in done.stderr
    assert not (no_cluster.state_dir / "default").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "listens on loopback only"),
        ({"require_keys": True, "listen": "0.0.0.0:0"}, "need an API key"),
        ({"require_keys": True, "listen": "0.0.0.0:0"}, "no TLS"),
        ({"insecure": True, "listen": "0.0.0.0:0"}, "INSECURE: whoever reaches 0.0.0.0:0"),
    ],
)
def test_up_says_who_may_call(options: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli_up._say_who_may_call(UpOptions("demo", **options))
    assert words in capsys.readouterr().out


def test_the_stores_url_is_not_handed_on_in_the_command_line() -> None:
    words = ["up", "--redis", "redis://:hunter2@store", "--model", "demo", "--redis=redis://:hunter2@other"]
    assert cli_up.without_redis(words) == ["up", "--model", "demo"]
    assert "hunter2" not in repr(UpOptions("demo", redis="redis://:hunter2@store"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(tmp_path / "store") as store:
        yield store


def keys(store: EmbeddedStore, *arguments: str, code: int = 0) -> str:
    """A `folkmoot keys` command on this store."""
    done = CliRunner().invoke(main, ["keys", *arguments], env={"FOLKMOOT_REDIS": store.url})
    assert done.exit_code == code, done.output
    return done.output if code else done.stdout


def test_keys_are_shown_once(store: EmbeddedStore) -> None:
    """Made, listed, rotated, revoked: the secret stands in what made it, and nowhere else."""
    limits = ("--requests-per-minute", "60", "--queue-share", "0.5")
    key = keys(store, "create", "--tenant", "search", "--role", "generate", *limits, "--expires-in", "7d").strip()
    assert KEY.fullmatch(key)
    listed = keys(store, "list", "--json")
    (facts,) = json.loads(listed)
    assert facts["tenant"] == "search" and facts["limits"] == {"requests_per_minute": 60, "queue_share": 0.5}
    assert 6.9 < (facts["expires_s"] - facts["created_s"]) / 86400 < 7.1
    secret = key.split("_", 2)[2]
    assert secret not in listed and secret not in keys(store, "list")
    rotated = json.loads(keys(store, "rotate", facts["id"], "--overlap", "1h", "--json"))
    assert rotated["id"] == facts["id"] and rotated["key"] != key and len(rotated["secrets_until_s"]) == 2
    assert "revoked" in keys(store, "revoke", facts["id"])
    assert json.loads(keys(store, "list", "--json")) == []
    assert "no API key has the id" in keys(store, "revoke", facts["id"], code=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tenant", "a/b", "--role", "generate"], "tenant must be"),
        (["--tenant", "a", "--role", "root"], "root"),
        (["--tenant", "a"], "--role"),
        (["--tenant", "a", "--role", "admin", "--expires-in", "soon"], "not a duration"),
        (["--tenant", "a", "--role", "admin", "--queue-share", "2"], "queue-share"),
    ],
)
def test_keys_that_cannot_be(store: EmbeddedStore, arguments: list[str], words: str) -> None:
    code = 1 if "a/b" in arguments else 2
    assert words in keys(store, "create", *arguments, code=code)


def test_keys_without_a_store_say_what_to_give(no_cluster: Cluster) -> None:
    done = CliRunner().invoke(main, ["keys", "list", "--state-dir", str(no_cluster.state_dir)])
    assert done.exit_code == 1
    assert "FOLKMOOT_REDIS" in done.output


def test_a_key_file_that_holds_none(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("hunter2 and more")
    where = ["--gateway", "127.0.0.1:1", "--api-key-file"]
    done = CliRunner().invoke(main, ["status", *where, str(tmp_path / "key")])
    assert done.exit_code == 1 and "holds no API key" in done.output and "hunter2" not in done.output
    done = CliRunner().invoke(main, ["status", *where, str(tmp_path / "nothing")])
    assert done.exit_code == 1 and "no file that can be read" in done.output


def test_commands_send_the_key_and_speak_tls(store: EmbeddedStore, tmp_path: Path) -> None:
    """Against a real gateway: by environment or file, with what each may do; and who speaks plain text is told."""
    ca = Authority(tmp_path)
    pair = ca.issue("gateway")
    command = [sys.executable, "-m", "folkmoot.gateway", "--listen", "127.0.0.1:0", "--require-keys"]
    command += ["--tls-cert", str(pair.cert), "--tls-key", str(pair.key)]
    environment = {**os.environ, "FOLKMOOT_REDIS": store.url}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as gateway:
        assert gateway.stdout is not None
        where = ["--gateway", gateway.stdout.readline().split()[-1], "--tls-ca", str(ca.cert)]
        key = keys(store, "create", "--tenant", "search", "--role", "status").strip()
        (tmp_path / "key").write_text(key + "\n")

        def run(*arguments: str, **environment: str) -> tuple[int, str]:
            done = CliRunner().invoke(main, arguments, env=environment)
            return done.exit_code, done.output

        assert run("status", "--json", *where, FOLKMOOT_API_KEY=key)[0] == 0
        assert run("status", "--json", *where, "--api-key-file", str(tmp_path / "key"))[0] == 0
        for arguments, environment, words in (
            (["status", *where], {}, "UNAUTHENTICATED"),
            (["generate", "x", *where], {"FOLKMOOT_API_KEY": key}, "PERMISSION_DENIED"),
            (["scale", "hosts", "2", *where], {"FOLKMOOT_API_KEY": key}, "role admin"),
            (["status", *where[:2]], {"FOLKMOOT_API_KEY": key}, "speaks TLS"),
        ):
            code, output = run(*arguments, **environment)
            assert code == 1 and words in output and key not in output, output
        gateway.terminate()
