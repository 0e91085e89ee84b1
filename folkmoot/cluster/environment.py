"""Environment variables that hold for the whole cluster: how its processes log, where their spans go to, how long their
OpenMP workers spin.

`folkmoot up` hands them on as any parent does. Actors on other nodes are nobody's children, so that the spec carries
them there; what a node says itself comes first.
"""

import os
from collections.abc import Mapping
from typing import Any

from folkmoot import logs

PREFIXES = ("FOLKMOOT_LOG_", "OTEL_", "GOMP_SPINCOUNT")


def carried() -> dict[str, str]:
    """Those of this process."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)}


def enter(environment: Mapping[str, str], part: str, **fields: Any) -> None:
    """In an actor's process, at its start: take them over, and log as they say."""
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    logs.set_up(part, **fields)
