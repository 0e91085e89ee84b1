"""Which of several Ray clusters on one store answers for them all: writes the status, and carries out operations.

Usually there is one. While an upgrade runs there are two, which share queue and requests; the newer one takes charge
once it can serve. Who is in charge says so once a second, and is so for CHARGE_S after its last word at most: so the
older one takes over again if the newer one comes to nothing. Two may believe it until each has said so once more.
"""

import json
import logging
from typing import Any

from folkmoot.cluster.spec import ClusterSpec
from folkmoot.gateway.store import Store

log = logging.getLogger(__name__)

CHARGE_S = 10.0


class Charge:
    """One cluster's claim."""

    def __init__(self, store: Store, spec: ClusterSpec) -> None:
        self.is_ours = False
        self._store = store
        self._claim: dict[str, Any] = {"run": spec.run_dir, "started_s": spec.started_s}

    async def claim(self, *, can_serve: bool) -> bool:
        """Claim it, if nobody is in charge, or an older cluster is and this one can serve; whether it is ours now.

        Raises StoreError: then it is as it was.
        """
        text = await self._store.command("GET", self._store.keys.charge)
        holder: dict[str, Any] = json.loads(text) if text else self._claim
        was_ours = self.is_ours
        self.is_ours = holder["run"] == self._claim["run"] or (
            can_serve and holder["started_s"] < self._claim["started_s"]
        )
        if self.is_ours:
            await self._store.command(
                "SET", self._store.keys.charge, json.dumps(self._claim), "PX", int(CHARGE_S * 1000)
            )
        if self.is_ours != was_ours:
            log.info("in charge: %s", (self._claim if self.is_ours else holder)["run"])
        return self.is_ours
