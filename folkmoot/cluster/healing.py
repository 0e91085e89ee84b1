"""What keeps a cluster from what is wished for, and what is being done about it, in words. Pure functions."""

from dataclasses import dataclass

from folkmoot.cluster.placement import shortfall
from folkmoot.cluster.router_state import HostState, RouterState

ROOM_WAIT_S = 60.0
"""How long `folkmoot up` waits for room in Ray."""


@dataclass(frozen=True)
class Trouble:
    """One thing that is not as it should be. `host` is empty where it concerns no host alone."""

    host: str
    state: str
    detail: str


def phase_of(host: HostState, state: RouterState) -> str:
    """A host's phase for people: "ready", "starting", "loading", "loaded", "draining", "quarantined", "waiting" (for
    room in Ray), or "gone" for a moment before its next life."""
    if host in state.leaving:
        return "draining"
    if host.serving is not None:
        return "ready"
    if host.is_quarantined(state.now_s):
        return "quarantined"
    if host.pending is not None:
        return str(host.pending.phase)
    return "waiting" if host.node is None else "gone"


def troubles(state: RouterState) -> tuple[Trouble, ...]:
    """Everything that is being mended, or waits."""
    found = (trouble for h in sorted(state.hosts.values(), key=lambda h: h.host) if (trouble := _of_host(h, state)))
    return (*found, *_of_columns(state))


def start_error(state: RouterState) -> str | None:
    """Why a cluster that was never complete does not get there by waiting: Ray has no room."""
    waiting = [h.host for h in state.hosts.values() if h.node is None and state.now_s - h.waiting_since_s > ROOM_WAIT_S]
    if state.was_complete or not waiting:
        return None
    return f"expert hosts could not be placed: Ray has had no room for {', '.join(waiting)} for {ROOM_WAIT_S:.0f} s"


def is_settled(state: RouterState) -> bool:
    """Whether all hosts are as they ought to be, and nothing is under way."""
    wanted = set(state.wish.open_hosts)
    return set(state.hosts) == wanted and all(_is_settled(h) for h in state.hosts.values())


def _is_settled(host: HostState) -> bool:
    if not host.columns:
        return not host.lives
    life = host.serving
    if len(host.lives) != 1 or life is None:
        return False
    return life.columns == host.columns and life.extras == host.extras_beside(host.columns)


def _of_host(host: HostState, state: RouterState) -> Trouble | None:
    phase = phase_of(host, state)
    if phase == "ready":
        if host.pending is None:
            return None
        more = f" and {len(host.pending.extras)} extra replicas" if host.pending.extras else ""
        text = f"a successor with experts {list(host.pending.columns)}{more} takes over"
        return Trouble(host.host, "changing", text)
    if not host.columns and phase == "gone":
        return None  # it ought to hold nothing
    return Trouble(host.host, phase, _why(host, phase, state))


def _why(host: HostState, phase: str, state: RouterState) -> str:
    match phase:
        case "draining":
            return "leaves as soon as no expert needs it, and no engine waits for it"
        case "quarantined":
            seconds = host.not_before_s - state.now_s
            return f"failed {host.failures} times in a row, tried again in {seconds:.0f} s: {host.reason}"
        case "waiting":
            return f"Ray has had no room for it for {state.now_s - host.waiting_since_s:.0f} s"
    return f"comes back; before: {host.reason}" if host.reason else "comes up"


def _of_columns(state: RouterState) -> tuple[Trouble, ...]:
    """Replicas for which there is no host, or no room on one."""
    usable = [h for h in state.hosts.values() if state.is_usable(h) and h not in state.leaving]
    lacking = shortfall(state.wanted, {h.host: h.columns for h in usable})
    if not state.has_slots or not lacking:
        return ()
    room = "no host has room for them" if len(usable) >= max(state.wanted) else f"only {len(usable)} hosts can be used"
    detail = f"{sum(lacking.values())} replicas of experts {sorted(lacking)} cannot be placed: {room}"
    return (Trouble("", "no capacity", detail),)
