"""The probe on a real gateway, and by TLS with the certificate that the script for Kubernetes makes."""

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from folkmoot.gateway.probe import ask
from tests.gateway.echo import EchoEngine

SECRETS = Path(__file__).parents[2] / "k8s/secrets.sh"


async def test_it_says_whether_a_gateway_lives_and_can_serve(gateway: str, engine: EchoEngine) -> None:
    async def state(service: str) -> str:
        return await asyncio.to_thread(ask, gateway, service)

    assert await state("") == "SERVING"
    assert await state("ready") == "NOT_SERVING", "the echo engine does not say that it is ready"
    assert (await state("steady")).startswith("NOT_FOUND")

    async def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "folkmoot.gateway.probe", *arguments]
        return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)

    assert (await run("--address", gateway)).returncode == 0
    refused = await run("--address", gateway, "--service", "ready")
    assert refused.returncode == 1 and "NOT_SERVING" in refused.stderr
    away = await run("--address", "127.0.0.1:1")
    assert away.returncode == 1 and "UNAVAILABLE" in away.stderr


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_it_trusts_the_certificate_of_the_script_and_no_other(tmp_path: Path, name: str) -> None:
    made = [subprocess.run([SECRETS, "tls"], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    ours, other = (yaml.safe_load(text)["stringData"] for text in made)
    server = grpc.server(ThreadPoolExecutor(2))
    checks = health.HealthServicer()
    checks.set("ready", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    pair = (ours["tls.key"].encode(), ours["tls.crt"].encode())
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        for file, data in (("ours", ours), ("other", other)):
            (tmp_path / file).write_text(data["ca.crt"])
        assert ask(f"{name}:{port}", "ready", tmp_path / "ours") == "SERVING"
        assert ask(f"{name}:{port}", "ready", tmp_path / "other", 2.0).startswith("UNAVAILABLE")
        assert ask(f"{name}:{port}", "ready", None, 2.0).startswith("UNAVAILABLE")
    finally:
        server.stop(0)
