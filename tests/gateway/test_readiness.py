"""Readiness from an engine's word in the store to what a probe of the gateway hears."""

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from folkmoot.gateway.pb import gateway_pb2 as pb
from folkmoot.gateway.pb import gateway_pb2_grpc
from folkmoot.gateway.queue import RequestQueue
from folkmoot.gateway.readiness import READY_S, keep_saying, ready_engines
from folkmoot.gateway.tasks import cancel
from tests.gateway.conftest import MODEL, until
from tests.gateway.echo import EchoEngine


async def probe(address: str, service: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_the_probe_follows_what_the_engine_says(
    gateway: str, queue: RequestQueue, engine: EchoEngine, stub: gateway_pb2_grpc.FolkmootStub
) -> None:
    (name,) = await queue.engines()
    can_serve = True
    await until(lambda: probe(gateway, ""))
    assert not await probe(gateway, "ready"), "an engine that says nothing is not ready"
    saying = asyncio.create_task(keep_saying(queue, name, lambda: can_serve))
    await until(lambda: probe(gateway, "ready"))
    assert await ready_engines(queue) == {name: MODEL.name}
    (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
    assert (model.num_engines, model.num_ready_engines) == (1, 1)
    can_serve = False

    async def is_unready() -> bool:
        return not await probe(gateway, "ready")

    await until(is_unready)
    assert await probe(gateway, "folkmoot.v1.Folkmoot"), "the gateway itself lives"
    can_serve = True
    await until(lambda: probe(gateway, "ready"))
    await cancel([saying])
    assert await ready_engines(queue) == {}, "an engine that stops takes its word back"


async def test_the_word_of_a_killed_engine_expires(queue: RequestQueue, engine: EchoEngine) -> None:
    (name,) = await queue.engines()
    saying = asyncio.create_task(keep_saying(queue, name, lambda: True))

    async def is_ready() -> bool:
        return name in await ready_engines(queue)

    await until(is_ready)
    left_ms = await queue.store.command("PTTL", queue.store.keys.ready(name))
    assert 0 < left_ms <= READY_S * 1000
    await cancel([saying])
