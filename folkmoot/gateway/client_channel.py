"""How a client reaches a gateway: plain or TLS, with which certificates, and with which API key."""

import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from folkmoot.gateway import tracing

HTTPS = "https://"
PROBE_S = 1.0


@dataclass(frozen=True)
class Access:
    """Who the client is, and whom it trusts. Files are PEM. TLS is spoken where a file is given, or to "https://..."."""

    api_key: str | None = field(default=None, repr=False)
    tls_ca: str | Path | None = None
    """CA of the gateway's certificate; None: those that gRPC comes with"""
    tls_cert: str | Path | None = None
    tls_key: str | Path | None = None
    """certificate and key of the client's own, where the gateway asks for one"""
    credentials: grpc.ChannelCredentials | None = field(default=None, repr=False)
    """instead of the files"""

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with each call: who calls, and the trace that the caller is in."""
        key = () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)
        return (*key, *tracing.of_caller())

    def is_tls(self, address: str) -> bool:
        """Whether TLS is spoken to this address."""
        return address.startswith(HTTPS) or any((self.tls_ca, self.tls_cert, self.credentials))

    def channel(self, address: str, options: Any = ()) -> grpc.Channel:
        """A channel that blocks. Raises OSError where a file cannot be read."""
        if (credentials := self._credentials(address)) is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address.removeprefix(HTTPS), credentials, options=options)

    def aio_channel(self, address: str, options: Any = ()) -> grpc.aio.Channel:
        """A channel for asyncio. Raises OSError where a file cannot be read."""
        if (credentials := self._credentials(address)) is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address.removeprefix(HTTPS), credentials, options=options)

    def _credentials(self, address: str) -> grpc.ChannelCredentials | None:
        if not self.is_tls(address):
            return None
        if self.credentials is not None:
            return self.credentials
        ca, cert, key = (
            None if p is None else Path(p).read_bytes() for p in (self.tls_ca, self.tls_cert, self.tls_key)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)

    def hint(self, address: str) -> str:
        """What may be the reason that a gateway does not answer; empty where nothing is to be said. Blocks a second."""
        if self.is_tls(address) or not _speaks_tls(address):
            return ""
        return f"; {address} speaks TLS: call it {HTTPS}{address}, or give the CA of its certificate"


def _speaks_tls(address: str) -> bool:
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is only asked what it speaks
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PROBE_S) as plain, context.wrap_socket(plain):
            return True
    except (OSError, ValueError):
        return False
