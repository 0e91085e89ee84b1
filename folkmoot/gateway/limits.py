"""What one tenant may use, counted in the store so that it holds across gateways."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from folkmoot.gateway.errors import LimitReached


@dataclass(frozen=True)
class Limits:
    """Limits that a key carries; None: no limit but the queue's own. They are counted by tenant, not by key."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """prompt and answer: estimated when a request comes, put right when it has ended"""
    concurrent_requests: int | None = None
    """waiting and running, in each lane"""
    queue_share: float | None = None
    """part of the places of a model's lane that the tenant's waiting requests may take, above 0 and up to 1"""
    batch_lines: int | None = None
    """lines of one batch"""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None:
                continue
            if name == "queue_share":
                if not 0 < value <= 1:
                    raise ValueError(f"{name} must be above 0 and at most 1, is {value}")
            elif type(value) is not int or not 1 <= value < 2**53:
                raise ValueError(f"{name} must be a whole number of at least 1, is {value}")

    @property
    def packed(self) -> str:
        """As `over_limits` in access_scripts.py takes them: those that are checked with each request."""
        checked = self.requests_per_minute, self.tokens_per_minute, self.concurrent_requests, self.queue_share
        return " ".join(str(limit or 0) for limit in checked) if any(checked) else ""

    def check_batch(self, lines: int) -> None:
        """Raises LimitReached where a batch of so many lines is more than this allows."""
        if self.batch_lines is not None and lines > self.batch_lines:
            raise LimitReached("batch_lines", self.batch_lines, None, lines)

    def given(self) -> dict[str, Any]:
        """The limits that there are, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


NO_LIMITS = Limits()
