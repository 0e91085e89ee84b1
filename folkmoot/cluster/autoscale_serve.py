"""Ray Serve's side of autoscaling: a custom policy, run by Serve's controller, that asks the expert router.

Serve calls the policy in its control loop, which must not wait: a thread asks, and the call answers with what was heard
last. While the router is away nothing changes. Serve pickles this module by value: keep it small, and import late.
"""

import threading
import time
import weakref
from typing import Any

ASK_EVERY_S = 0.5
ASK_TIMEOUT_S = 5.0
FRESH_S = 10.0


class _Heard:
    """What the thread shares with the policy; it does not hold the policy itself, which Serve drops at each change."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.engines: int | None = None
        self.at_s = 0.0


def _ask(heard: _Heard, router: str, namespace: str) -> None:
    import ray

    while not heard.stop.wait(ASK_EVERY_S):
        try:
            actor = ray.get_actor(router, namespace)
            engines = ray.get(actor.engines_wanted.remote(), timeout=ASK_TIMEOUT_S)
        except Exception:  # the router is away, or busy: what it said last stands for a while
            continue
        heard.engines, heard.at_s = engines, time.monotonic()


class EnginePolicy:
    """The number of engines that the expert router wants. `router`, `namespace`: of its actor."""

    def __init__(self, router: str, namespace: str) -> None:
        self._heard = _Heard()
        threading.Thread(target=_ask, args=(self._heard, router, namespace), name="engine-policy", daemon=True).start()
        weakref.finalize(self, self._heard.stop.set)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Serve's protocol: an AutoscalingContext in, replicas and a state to keep out."""
        heard = self._heard
        is_fresh = heard.engines is not None and time.monotonic() - heard.at_s < FRESH_S
        return (heard.engines if is_fresh and heard.engines is not None else context.target_num_replicas), {}
