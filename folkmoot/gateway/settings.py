"""What a gateway can be told. Unknown names and values that do not parse stop the start."""

import math
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from folkmoot.gateway.batch_store import BatchSettings
from folkmoot.gateway.listen import OPEN_WITHOUT_KEYS, is_local
from folkmoot.gateway.queue import QueueSettings
from folkmoot.gateway.tls import TlsFiles

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class GatewaySettings(BaseModel):
    """One gateway process. The queue's own settings must be alike in all gateways and engines of a deployment."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)  # may hold a password

    listen: Annotated[str, Field(pattern=r"^(unix:.+|.+:\d{1,5})$")] = "127.0.0.1:50051"
    redis: Annotated[str, Field(repr=False)] = "redis://127.0.0.1:6379"  # may hold a password
    namespace: str = "folkmoot"
    queue: QueueSettings = QueueSettings()
    batches: BatchSettings = BatchSettings()
    max_message_bytes: Annotated[int, Field(ge=1024)] = 8 << 20
    max_request_s: Positive = 3600.0  # the longest any request may take, waiting included
    grace_s: Positive = 30.0  # how long a request outlives its connection, and its gateway
    default_answer_tokens: Annotated[int, Field(ge=1)] = 512  # admission's estimate where max_tokens is not given
    accept_after_s: Positive = 0.05  # the first message goes out after so long even if there is no token yet
    max_calls: Annotated[int, Field(ge=1)] = 10_000  # calls under way at once, streams included
    max_calls_per_connection: Annotated[int, Field(ge=1)] = 1_000
    require_keys: bool = False  # every call but health checks needs an API key
    insecure: bool = False  # listen on an open address without keys or client certificates all the same
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # who shows no certificate of this CA is not let in
    metrics: Annotated[str, Field(pattern=r"^(off|.+:\d{1,5})$")] = "127.0.0.1:0"  # where Prometheus may ask
    metrics_dir: Path | None = None  # processes of this node that share that address find each other there
    shutdown_s: Annotated[float, Field(ge=0)] = 20.0  # on SIGTERM streams may finish for so long

    @property
    def tls(self) -> TlsFiles | None:
        """The files of the certificates; None: plain text."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_client_ca)

    @property
    def is_guarded(self) -> bool:
        """Whether strangers are kept out, wherever they come from."""
        return self.require_keys or self.tls_client_ca is not None

    @model_validator(mode="after")
    def _is_consistent(self) -> "GatewaySettings":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if not (is_local(self.listen) or self.is_guarded or self.insecure):
            raise ValueError(f"listen {self.listen}: {OPEN_WITHOUT_KEYS}")
        return self


def parse_weights(text: str) -> dict[str, float]:
    """NAME=WEIGHT,... as a mapping. Raises ValueError for a weight that is not a finite number above 0."""
    weights = {}
    for part in filter(None, text.split(",")):
        name, _, weight = part.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ValueError(f"expected NAME=WEIGHT, got {part!r}") from None
        if not 0 < weights[name] < math.inf:
            raise ValueError(f"the weight of {name!r} must be a finite number above 0, is {weight}")
    return weights
