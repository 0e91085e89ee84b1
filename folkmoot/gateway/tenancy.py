"""Who calls, and whose a request id is. The ids of each tenant are a name space of their own: in the store a request
is called `tenant/id`, so that no call can reach, or meet, a request of another tenant, whatever id it names.

A client's own ids have no slash (validate.REQUEST_ID), and tenants neither.
"""

from contextvars import ContextVar
from dataclasses import dataclass

from folkmoot.gateway.limits import NO_LIMITS, Limits


@dataclass(frozen=True)
class Caller:
    """Who makes a call. Without a tenant (keys are not asked for) all ids are in one name space."""

    tenant: str = ""
    roles: frozenset[str] = frozenset()
    limits: Limits = NO_LIMITS
    key_id: str = ""

    def scoped(self, request_id: str) -> str:
        """What an id of the caller's is called in the store."""
        return f"{self.tenant}/{request_id}" if self.tenant else request_id


_caller: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Who makes the call that is being served; only inside one."""
    return _caller.get()


def set_caller(who: Caller) -> None:
    """For the rest of the task that serves a call."""
    _caller.set(who)
