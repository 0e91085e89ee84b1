"""The secret that a cluster's engines and expert hosts share: in a file that only its user can read.

It is made with the cluster, and comes to each node with what Ray hands to the cluster's actors. Here, and in what
processes are told, it is only ever a path: a secret in a command line, an environment or a log can be read by others.
"""

import os
import secrets
import stat
from pathlib import Path

SECRET_BYTES = 32


class SecretError(RuntimeError):
    """There is no secret that can be trusted. The message names the file."""


def new() -> str:
    """A secret: 256 random bits, in hexadecimal digits."""
    return secrets.token_hex(SECRET_BYTES)


def keep(path: Path, secret: str | None = None) -> Path:
    """Write a secret (None: a new one) unless the file is there; its path. Several processes may do so at once."""
    if not path.exists():
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(secret or new())
        temporary.rename(path)
    return path


def read(path: str | Path) -> bytes:
    """The secret. Raises SecretError also where others could have read or written it."""
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            secret = file.read(1024)
    except OSError as e:
        raise SecretError(f"the cluster's secret cannot be read: {e}") from e
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise SecretError(f"{path} must be this user's own, and nobody else may have access to it (mode 0600)")
    if len(secret) < 2 * SECRET_BYTES:
        raise SecretError(f"{path} is too short for a secret: {len(secret)} bytes, at least {2 * SECRET_BYTES}")
    return secret
