"""The gateway as a process of its own: `python -m folkmoot.gateway --redis URL --listen HOST:PORT`.

It needs a Redis 7+ or Valkey server, which it shares with the engines, and nothing else. Start several on the same
store (and the same port, if you like) to serve more; a client may be cut off from one and go on at another.

  python -m folkmoot.gateway                                    # on 127.0.0.1:50051, store on 127.0.0.1:6379
  FOLKMOOT_REDIS=redis://:PASSWORD@store python -m folkmoot.gateway      # keeps the password out of `ps`
  python -m folkmoot.gateway --listen 0.0.0.0:50051 --require-keys --tls-cert tls.crt --tls-key tls.key

On an address that others can reach it does not start without --require-keys or --tls-client-ca, unless --insecure.

SIGTERM or Ctrl-C: health says NOT_SERVING, new calls are refused, streams may finish for --shutdown-s seconds.
"""

import argparse
import asyncio
import os
import signal
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from folkmoot import logs
from folkmoot.gateway import tracing
from folkmoot.gateway.batch_store import BatchSettings
from folkmoot.gateway.metrics_server import MetricsAddressTaken
from folkmoot.gateway.queue import QueueSettings
from folkmoot.gateway.server import serve
from folkmoot.gateway.settings import GatewaySettings, parse_weights
from folkmoot.gateway.store import StoreUrlError
from folkmoot.gateway.tls import TlsError

HELP = {
    "listen": "address to serve on; port 0 takes a free one",
    "redis": "the request store: redis://, rediss:// or unix:// (also by environment variable FOLKMOOT_REDIS)",
    "namespace": "prefix of all keys; a second one is a second Folkmoot in the same store",
    "max_message_bytes": "largest request",
    "max_request_s": "the longest a request may take, waiting included",
    "grace_s": "how long a request outlives a broken connection",
    "default_answer_tokens": "admission's estimate for a request without max_tokens",
    "accept_after_s": "send the request id after so long, if there is no token yet",
    "max_calls": "calls under way at once, streams included; more are refused",
    "max_calls_per_connection": "the same on one connection; more wait at the client",
    "require_keys": "ask for an API key with every call but health checks; `folkmoot keys` makes them",
    "insecure": "serve whoever comes, also admin calls, on an address that others can reach",
    "tls_cert": "PEM file with the certificate chain: serve TLS; read again when it changes",
    "tls_key": "PEM file with its private key",
    "tls_client_ca": "PEM file with the CA of clients' certificates: mutual TLS, others are not let in",
    "metrics": "address for Prometheus (GET /metrics); port 0 takes a free one, which is printed; off: no metrics",
    "metrics_dir": "folder in which the processes of a node share one such address; `folkmoot up` gives it",
    "shutdown_s": "how long streams may finish on SIGTERM",
    "lease_s": "an engine that is silent for so long loses its requests (alike in gateways and engines)",
    "max_attempts": "a request is given up after so many attempts without a token (alike in gateways and engines)",
    "retention_s": "how long a finished answer can be read again",
    "max_waiting_requests": "queue limit per model and lane",
    "max_waiting_tokens": "queue limit per model and lane, in estimated tokens",
    "queue_timeout_s": "an interactive request that no engine took ends after so long",
    "retry_after_ms": "the hint that goes with a refusal",
    "max_batch_lines": "most lines of a batch",
    "max_batch_bytes": "largest file of a batch",
    "max_line_bytes": "a longer line of a batch goes to its error file",
    "max_completion_window_s": "the longest completion window of a batch",
    "batch_retention_s": "how long a batch and its results are kept after its end",
    "batch_window_tokens": "estimated tokens of a batch in the queue at once, or twice what runs where that is more",
    "max_running_batches": "batches that this gateway runs at once",
    "tenant_weights": "shares of each lane, as NAME=WEIGHT,...; 1 for who is not named (alike in all gateways)",
}


def main() -> None:
    """Command line."""
    parser = _parser()
    options = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    os.environ.update(logs.variables(options.pop("log_format", None), options.pop("log_level", None)))
    try:
        logs.set_up("gateway")
    except ValueError as e:
        parser.error(str(e))
    tracing.start("folkmoot-gateway", f"gateway-{os.getpid()}")
    if "redis" not in options and "FOLKMOOT_REDIS" in os.environ:
        options["redis"] = os.environ["FOLKMOOT_REDIS"]
    queue = {name: options.pop(name) for name in list(options) if name in QueueSettings.__dataclass_fields__}
    batches = {name: options.pop(name) for name in list(options) if name in BatchSettings.__dataclass_fields__}
    try:
        settings = GatewaySettings(**options, queue=QueueSettings(**queue), batches=BatchSettings(**batches))
    except ValidationError as e:
        parser.error("; ".join(": ".join((*map(str, fault["loc"]), fault["msg"])) for fault in e.errors()))
    try:
        asyncio.run(_run(settings))
    finally:
        tracing.stop()


async def _run(settings: GatewaySettings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await serve(
            settings,
            stop,
            lambda address: print(f"listening on {address}", flush=True),
            lambda url: print(f"metrics at {url}", flush=True),
        )
    except TlsError as e:
        raise SystemExit(f"tls_cert, tls_key, tls_client_ca: {e}") from None
    except MetricsAddressTaken as e:
        raise SystemExit(f"metrics: {e}") from None
    except StoreUrlError as e:
        raise SystemExit(f"redis: {e}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m folkmoot.gateway", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = GatewaySettings()
    for name in GatewaySettings.model_fields:
        if name not in ("queue", "batches"):
            _add(parser, name, getattr(defaults, name))
    group = parser.add_argument_group("queue")
    for name in QueueSettings.__dataclass_fields__:
        _add(group, name, getattr(defaults.queue, name))
    group = parser.add_argument_group("batches")
    for name in BatchSettings.__dataclass_fields__:
        _add(group, name, getattr(defaults.batches, name))
    group = parser.add_argument_group("logs")
    for name, choices in (("log_format", logs.FORMATS), ("log_level", logs.LEVELS)):
        group.add_argument(f"--{name.replace('_', '-')}", choices=choices, help=logs.HELP[name])
    return parser


def _add(to: "argparse.ArgumentParser | argparse._ArgumentGroup", name: str, default: Any) -> None:
    option = f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        to.add_argument(option, action="store_true", default=None, help=HELP[name])
    elif default is None:
        to.add_argument(option, type=Path, metavar="FILE", help=HELP[name])
    else:
        text = HELP[name] if default == {} else f"{HELP[name]} (default: {default})"
        kind = parse_weights if default == {} else type(default)
        to.add_argument(option, type=kind, metavar=name.upper(), help=text)


if __name__ == "__main__":
    main()
