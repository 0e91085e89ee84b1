"""What a gateway can be told. Unknown names and values that do not parse stop the start."""

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from folkmoot.gateway.queue import QueueSettings

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class GatewaySettings(BaseModel):
    """One gateway process. The queue's own settings must be alike in all gateways and engines of a deployment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: Annotated[str, Field(pattern=r"^(unix:.+|.+:\d{1,5})$")] = "127.0.0.1:50051"
    redis: Annotated[str, Field(repr=False)] = "redis://127.0.0.1:6379"  # may hold a password
    namespace: str = "folkmoot"
    queue: QueueSettings = QueueSettings()
    max_message_bytes: Annotated[int, Field(ge=1024)] = 8 << 20
    max_request_s: Positive = 3600.0  # the longest any request may take, waiting included
    grace_s: Positive = 30.0  # how long a request outlives its connection, and its gateway
    default_answer_tokens: Annotated[int, Field(ge=1)] = 512  # admission's estimate where max_tokens is not given
    accept_after_s: Positive = 0.05  # the first message goes out after so long even if there is no token yet
    shutdown_s: Annotated[float, Field(ge=0)] = 20.0  # on SIGTERM streams may finish for so long


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
