"""TLS on the gateway's port, with certificates that are read again when their files change.

With a client CA it is mutual: who shows no certificate of that CA is not let in at all.
"""

import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

log = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int], ...]


class TlsError(ValueError):
    """The files are no certificate and key that belong together. The message names the file."""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the certificate chain and its key; the CA of clients' certificates where those are asked for."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that there are."""
        return (self.cert, self.key, *((self.client_ca,) if self.client_ca else ()))


class Certificates:
    """What the server shows in a handshake: as the files are, and where those are unsound as they were before."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises TlsError."""
        self._files = files
        self.reads = {"sound": 0, "unsound": 0}
        """times that files which had changed were read, by outcome"""
        self._stamp = _stamp(files)
        self._first = _read(files)

    def credentials(self) -> grpc.ServerCredentials:
        """For the server's port."""
        is_mutual = self._files.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(self._first, self.changed, is_mutual)  # type: ignore[arg-type]

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """New certificates, where the files have changed. gRPC asks before each handshake, from a thread of its own."""
        try:
            stamp = _stamp(self._files)
            if stamp == self._stamp:
                return None
            configuration = _read(self._files)
        except TlsError as e:  # half written, perhaps; the next handshake looks again
            log.error("the certificates stay as they were: %s", e)
            self.reads["unsound"] += 1
            return None
        self._stamp = stamp
        self.reads["sound"] += 1
        log.info("new certificates from %s", self._files.cert)
        return configuration


def _stamp(files: TlsFiles) -> Stamp:
    """What changes when a file does, also where a symbolic link to it is moved. Raises TlsError."""
    try:
        found = [os.stat(path) for path in files.paths]
    except OSError as e:
        raise TlsError(str(e)) from e
    return tuple((s.st_ino, s.st_mtime_ns, s.st_size) for s in found)


def _read(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    """Raises TlsError also where certificate and key are each sound, but do not belong together."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.cert, files.key, password="")
    except (OSError, ssl.SSLError) as e:
        raise TlsError(f"{files.cert} and {files.key} are no certificate with its key: {e}") from e
    if files.client_ca is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(files.client_ca)
        except (OSError, ssl.SSLError) as e:
            raise TlsError(f"{files.client_ca} has no CA certificates: {e}") from e
    pairs = [(files.key.read_bytes(), files.cert.read_bytes())]
    roots = files.client_ca.read_bytes() if files.client_ca is not None else None
    return grpc.ssl_server_certificate_configuration(pairs, roots)
