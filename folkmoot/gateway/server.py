"""A gateway process: the service with health and reflection, from its first request to its last."""

import asyncio
import logging
import secrets
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from folkmoot.gateway import batch_runner, metrics_server, readiness, tasks
from folkmoot.gateway.admin import AdminService
from folkmoot.gateway.api_keys import KeyRing, KeyStore
from folkmoot.gateway.auth import Door
from folkmoot.gateway.batch_service import BatchService
from folkmoot.gateway.batch_store import BatchStore
from folkmoot.gateway.dead_letters import DeadLetters
from folkmoot.gateway.journal import JournalReader
from folkmoot.gateway.listen import is_local
from folkmoot.gateway.metrics import GatewayCounts
from folkmoot.gateway.metrics_calls import Meter
from folkmoot.gateway.metrics_gateway import GatewayMetrics
from folkmoot.gateway.operations import Operations
from folkmoot.gateway.pb import (
    admin_pb2,
    admin_pb2_grpc,
    batches_pb2,
    batches_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
)
from folkmoot.gateway.queue import RequestQueue
from folkmoot.gateway.service import FolkmootService
from folkmoot.gateway.settings import GatewaySettings
from folkmoot.gateway.store import Store
from folkmoot.gateway.tls import Certificates

log = logging.getLogger(__name__)

MAX_METADATA_BYTES = 16 << 10
MAX_CONNECTIONS = 4096
HANDSHAKE_MS = 10_000
"""Who has not finished TLS and HTTP/2's greeting by then is cut off."""
CUT_S = 2.0  # for the last words to streams that did not finish in time
SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["Folkmoot"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
BATCHES = batches_pb2.DESCRIPTOR.services_by_name["Batches"].full_name
METHODS = frozenset(
    f"/{service.full_name}/{method.name}"
    for file in (gateway_pb2, admin_pb2, batches_pb2, health_pb2, reflection_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
READY = "ready"
"""The health service's name for: an engine can serve now. The other names say that this gateway lives."""


async def serve(
    settings: GatewaySettings,
    stop: asyncio.Event,
    on_listening: Callable[[str], None] = lambda address: None,
    on_metrics: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until `stop` is set; then refuse new calls, and let streams finish for `shutdown_s`.

    `on_listening` gets the address with the real port (for a `listen` that ends with :0), `on_metrics` the URL.
    The store may be away at the start: calls answer UNAVAILABLE until it is there. Raises RuntimeError where the
    address cannot be bound, TlsError where the certificates are unsound, MetricsAddressTaken.
    """
    certificates = Certificates(settings.tls) if settings.tls is not None else None
    store = Store(settings.redis, settings.namespace)
    queue = RequestQueue(store, settings.queue)
    batches = BatchStore(store, settings.batches, settings.queue.lease_s)
    letters = DeadLetters(queue, settings.max_request_s, settings.default_answer_tokens)
    keys = KeyRing(KeyStore(store)) if settings.require_keys else None
    counts, door = GatewayCounts(), Door(keys, settings.max_calls)
    meter = () if settings.metrics == metrics_server.OFF else (Meter(counts, METHODS),)
    server = grpc.aio.server(options=_options(settings), interceptors=(*meter, door))
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((SERVICE, ADMIN, BATCHES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        async with JournalReader(queue, f"gateway-{secrets.token_hex(6)}").running() as reader:
            service = FolkmootService(settings, queue, reader)
            gateway_pb2_grpc.add_FolkmootServicer_to_server(service, server)  # type: ignore[no-untyped-call]
            admin_pb2_grpc.add_AdminServicer_to_server(AdminService(Operations(store)), server)  # type: ignore[no-untyped-call]
            batches_pb2_grpc.add_BatchesServicer_to_server(BatchService(batches, letters), server)  # type: ignore[no-untyped-call]
            port = _bind(server, settings.listen, certificates)
            await server.start()
            _warn(settings)
            await _say(checks, health_pb2.HealthCheckResponse.SERVING)
            watching = asyncio.create_task(readiness.watch(queue, lambda is_ready: _say_ready(checks, is_ready)))
            on_listening(f"{settings.listen.rpartition(':')[0]}:{port}")
            text = GatewayMetrics(counts, store, certificates).text
            async with metrics_server.serving(settings.metrics, "gateway", text, settings.metrics_dir, on_metrics):
                async with batch_runner.running(queue, batches, reader.gateway, settings.default_answer_tokens):
                    await stop.wait()
                await tasks.cancel([watching])
                await _end(server, checks, reader, settings.shutdown_s)
    finally:
        await server.stop(0)
        await store.close()


async def _end(
    server: grpc.aio.Server, checks: health.aio.HealthServicer, reader: JournalReader, shutdown_s: float
) -> None:
    """Say that no call is taken any more, and let streams finish."""
    log.info("stopping: streams may finish for %g s", shutdown_s)
    await _say_ready(checks, False)
    await _say(checks, health_pb2.HealthCheckResponse.NOT_SERVING)
    ending = asyncio.create_task(server.stop(shutdown_s + CUT_S))
    await asyncio.wait((ending,), timeout=shutdown_s)
    reader.stop()
    await ending


def _bind(server: grpc.aio.Server, listen: str, certificates: Certificates | None) -> int:
    """The port that was taken."""
    if certificates is None:
        return int(server.add_insecure_port(listen))
    return int(server.add_secure_port(listen, certificates.credentials()))


def _warn(settings: GatewaySettings) -> None:
    """Say what is not as safe as it could be."""
    if settings.metrics != metrics_server.OFF and not is_local(settings.metrics):
        log.warning("metrics can be read by whoever reaches %s", settings.metrics)
    if is_local(settings.listen):
        return
    if not settings.is_guarded:
        log.warning("INSECURE: whoever reaches %s is served, and may change the cluster", settings.listen)
    if settings.tls is None:
        log.warning("no TLS: prompts, answers and keys can be read on their way to %s", settings.listen)


async def _say(checks: health.aio.HealthServicer, state: int) -> None:
    for name in ("", SERVICE):
        await checks.set(name, state)


async def _say_ready(checks: health.aio.HealthServicer, is_ready: bool) -> None:
    state = health_pb2.HealthCheckResponse
    await checks.set(READY, state.SERVING if is_ready else state.NOT_SERVING)


def _options(settings: GatewaySettings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", settings.max_calls_per_connection),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.so_reuseport", 1),  # several gateway processes may share one port
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]
