"""Log lines: what they look like, that they carry ids, and what is never in them."""

import json
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from folkmoot import logs
from folkmoot.gateway.api_keys import KeyStore
from folkmoot.gateway.client import AsyncClient, FolkmootError
from folkmoot.gateway.embedded import EmbeddedStore
from folkmoot.gateway.pb import gateway_pb2_grpc
from folkmoot.gateway.queue import RequestQueue
from folkmoot.gateway.store import Store
from tests.gateway.conftest import token_request
from tests.gateway.echo import EchoEngine
from tests.gateway.test_resume import vanish


@pytest.fixture(scope="session")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """One kind of server is enough here."""
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as server:
        yield server


def record(message: str, *args: object, level: int = logging.INFO, error: BaseException | None = None) -> Any:
    made = logging.LogRecord("folkmoot.x", level, "x.py", 1, message, args, None)
    if error is not None:
        made.exc_info = (type(error), error, error.__traceback__)
    return made


def test_text_has_the_fields_of_process_and_task_in_brackets() -> None:
    formatter = logs.TextFormatter("engine", {"engine": "e1"})
    assert formatter.format(record("ended: %s", "lost")).endswith("engine INFO folkmoot.x: ended: lost [engine=e1]")
    with logs.bound(request_id="r1", attempt=2, tenant=""):
        assert formatter.format(record("x")).endswith("x [engine=e1 request_id=r1 attempt=2]")
    assert formatter.format(record("x")).endswith("x [engine=e1]")


def test_a_name_cannot_look_like_another_field_or_line() -> None:
    with logs.bound(tenant="a attempt=9]\n2026 gateway INFO x: all is well"):
        text = logs.TextFormatter("gateway", {}).format(record("x"))
        parsed = json.loads(logs.JsonFormatter("gateway", {}).format(record("x")))
    assert "\n" not in text and "[tenant='a attempt=9]" in text
    assert parsed["tenant"].startswith("a attempt=9]\n")


def test_json_is_an_object_a_line_with_tracebacks_inside() -> None:
    try:
        raise ValueError("no\nway")
    except ValueError as e:
        text = logs.JsonFormatter("host", {"host": "host-0"}).format(record("failed", level=logging.ERROR, error=e))
    assert "\n" not in text
    line = json.loads(text)
    assert (line["part"], line["host"], line["level"], line["message"]) == ("host", "host-0", "error", "failed")
    assert line["pid"] == os.getpid() and line["exception"].endswith("ValueError: no\nway")
    assert line["time"][10] == "T" and line["time"].endswith("Z")


def test_frames_say_where_and_not_what() -> None:
    prompt = f"prompt-{secrets.token_hex(4)}"
    with pytest.raises(ValueError, match=prompt) as raised:
        int(prompt)
    text = logs.frames_of(raised.value)
    assert text.startswith("ValueError\n") and "test_logs.py" in text and prompt not in text


def test_lines_that_strangers_cause_are_bounded() -> None:
    bounded = logs.Bounded(2)
    records = [record("x %d", i) for i in range(6)]
    for i, one in enumerate(records):
        one.created = 1000.0 if i < 5 else 1001.0
    assert [bounded.filter(one) for one in records] == [True, True, False, False, False, True]
    assert records[-1].getMessage() == "x 5 (3 lines before it were dropped)"


@pytest.mark.parametrize(("variable", "value"), [("FOLKMOOT_LOG_FORMAT", "xml"), ("FOLKMOOT_LOG_LEVEL", "loud")])
def test_a_setting_that_is_none(variable: str, value: str) -> None:
    command = [sys.executable, "-m", "folkmoot.gateway", "--listen", "127.0.0.1:0"]
    done = subprocess.run(command, env={**os.environ, variable: value}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"{variable} must be one of" in done.stderr and value in done.stderr


class Gateway:
    """A gateway process that asks for keys and logs all it has, as JSON, into a file."""

    SAID = ("listening on ", "metrics at ")

    def __init__(self, url: str, namespace: str, log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", "folkmoot.gateway", "--listen", "127.0.0.1:0", "--namespace", namespace]
        command += ["--require-keys", "--log-format", "json", "--log-level", "debug"]
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "FOLKMOOT_REDIS": url})
        while "listening on " not in self.text():
            assert self.process.poll() is None, self.text()
        self.address = self.text().partition("listening on ")[2].split()[0]

    def text(self) -> str:
        return self._log.read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines() if not line.startswith(self.SAID)]

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(30)


async def test_a_gateway_says_whom_it_refused_and_nothing_that_they_sent(
    store_server: EmbeddedStore, queue: RequestQueue, namespace: str, tmp_path: Path
) -> None:
    """All lines are JSON with the ids of the call; planted prompts, answers, keys and wrong keys are nowhere."""
    _, key = await KeyStore(Store(store_server.tcp_url, namespace)).create("alice", ["generate"])
    prompt, wrong = f"prompt-{secrets.token_hex(8)}", f"fmk_wrong_{secrets.token_hex(12)}"
    gateway = Gateway(store_server.tcp_url, namespace, tmp_path / "log")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with EchoEngine(queue), AsyncClient(gateway.address, api_key=key, reconnect_s=0.2) as client:
        answer = await client.generate_text(prompt, request_id="good")
        for options in ({"stop": [prompt * 99]}, {"model": prompt}, {"tenant": prompt}):
            with pytest.raises(FolkmootError):
                await client.generate_text(prompt, request_id="bad", **options)
        with pytest.raises(FolkmootError):
            await client.request("unknown-id")
        async with AsyncClient(gateway.address, api_key=wrong, reconnect_s=0.2) as stranger:
            with pytest.raises(FolkmootError):
                await stranger.generate_text(prompt)
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            metadata = (("authorization", f"Bearer {key}"), ("traceparent", parent))
            call = gateway_pb2_grpc.FolkmootStub(channel).Generate(
                token_request(5000, request_id="traced"), metadata=metadata
            )
            with pytest.raises(grpc.aio.AioRpcError):
                await call.read()
    gateway.end()
    lines = gateway.lines()
    generate = {"method": "/folkmoot.v1.Folkmoot/Generate", "part": "gateway", "level": "info"}
    refusals = [line for line in lines if line["logger"] == "folkmoot.gateway.calls"]
    assert all(generate.items() <= line.items() for line in refusals if "Generate" in line["method"])
    assert [(line["message"], line.get("request_id"), line.get("tenant")) for line in refusals] == [
        ("ended with INVALID_ARGUMENT: sampling.stop", "bad", "alice"),
        ("ended with INVALID_ARGUMENT: model", "bad", "alice"),
        ("ended with PERMISSION_DENIED", "bad", "alice"),
        ("ended with NOT_FOUND", "unknown-id", "alice"),
        ("ended with UNAUTHENTICATED", None, None),
        ("ended with INVALID_ARGUMENT: tokens.token_ids", "traced", "alice"),
    ]
    assert refusals[-1]["trace_id"] == parent[3:35]
    for planted in (prompt, answer.strip(), key, key.split("_", 2)[2], wrong):
        assert planted not in gateway.text()


async def test_an_engine_says_what_it_took_over_and_gave_back(
    queue: RequestQueue, gateway: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With the ids that the line is about, whatever task writes it."""
    caplog.set_level(logging.INFO)
    caplog.handler.setFormatter(logs.JsonFormatter("engine", {}))
    async with AsyncClient(gateway) as client:
        first = await EchoEngine(queue, "engine-1", step_s=0.01).__aenter__()
        chunks = []
        async for chunk in client.generate(token_ids=[9], max_tokens=60, request_id="moved", tenant="bob"):
            chunks.append(chunk)
            if len(chunks) == 15:
                vanish(first)
                second = await EchoEngine(queue, "engine-2", step_s=0.01).__aenter__()
            elif len(chunks) == 40:
                await second.__aexit__(None, None, None)
                third = await EchoEngine(queue, "engine-3").__aenter__()
        await third.__aexit__(None, None, None)
    lines = [json.loads(text) for text in caplog.text.splitlines()]
    about = [line for line in lines if line["logger"] == "folkmoot.gateway.holder"]
    assert all(line["request_id"] == "moved" and line["tenant"] == "bob" for line in about)
    offset = second.leases[0].offset
    assert [(line["level"], line["message"], line["attempt"]) for line in about] == [
        ("warning", f"taken over from another engine, after {offset} tokens", 2),
        ("info", "given back (requeued)", 2),
        ("warning", f"taken over from another engine, after {third.leases[0].offset} tokens", 2),
    ]
