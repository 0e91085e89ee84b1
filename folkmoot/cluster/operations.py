"""What an operator asked for, against the router's state: what to wish for, and how far it has got. Pure functions."""

from dataclasses import dataclass, replace

from folkmoot.cluster.autoscale import Limits
from folkmoot.cluster.healing import is_settled, phase_of, troubles
from folkmoot.cluster.router_state import RouterState
from folkmoot.cluster.wish import Wish
from folkmoot.gateway.operations import Command

INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION, ABORTED = 3, 5, 9, 10
MAX_ENGINES = 64


class Refused(Exception):
    """The cluster cannot be as asked. `code` is a gRPC status code; the message names the limit."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Progress:
    """Whether a command is carried out, and if not what is being waited for."""

    done: bool
    message: str = ""


def decide(command: Command, state: RouterState, capacity: int | None) -> Wish:
    """The wish that the command makes of the present one; `capacity` is the most columns of a host. Raises Refused."""
    wish = state.wish
    match command.kind, command.target:
        case "scale", "engines":
            if (most := max(command.count, command.most)) > MAX_ENGINES:
                raise Refused(INVALID_ARGUMENT, f"count: must be at most {MAX_ENGINES} engines, is {most}")
            return replace(wish, engines=command.count, most_engines=command.most or None)
        case "roll", _:
            return replace(wish, engine_version=wish.engine_version + 1)
    if not state.num_columns:
        raise Refused(FAILED_PRECONDITION, "the model is dense: it has no experts, and needs no expert hosts")
    match command.kind, command.target:
        case "scale", "hosts":
            limits = Limits(command.count, command.most or command.count)
            following = resized(state, limits.clip(len(wish.open_hosts)), capacity)
            return replace(following, host_limits=(limits.least, limits.most) if command.most else None)
        case "scale", "replicas":
            following = replace(wish, replicas=command.count)
            _check_replicas(command.count, wish)
        case "replicate", _:
            if command.expert >= state.num_columns:
                limit = f"must be below {state.num_columns}, the model's number of experts a layer"
                raise Refused(INVALID_ARGUMENT, f"expert: {limit}, is {command.expert}")
            _check_replicas(command.count, wish)
            following = wish.with_column(command.expert, command.count)
        case "drain", _:
            return _drained(command, state, capacity)
        case _:
            raise Refused(INVALID_ARGUMENT, f"unknown command {command.kind!r}")
    _check_room(sum(following.wanted(state.num_columns)), following, state, capacity)
    return following


def resized(state: RouterState, hosts: int, capacity: int | None) -> Wish:
    """The wish with so many expert hosts. Raises Refused."""
    _check_hosts(hosts, state)
    following = state.wish.with_hosts(hosts)
    _check_room(sum(following.wanted(state.num_columns)), following, state, capacity)
    return following


def _check_hosts(count: int, state: RouterState) -> None:
    most, least = sum(state.wanted), max(state.wanted)
    if count > most:
        raise Refused(FAILED_PRECONDITION, f"count: {count} hosts are more than {most} replicas can fill")
    if count < least:
        raise Refused(
            FAILED_PRECONDITION,
            f"count: {least} replicas of an expert need {least} hosts, since two on one host would die together; "
            f"scale the replicas down first",
        )


def _check_replicas(count: int, wish: Wish) -> None:
    if count > (hosts := len(wish.open_hosts)):
        raise Refused(
            FAILED_PRECONDITION, f"replicas: {count} need as many hosts, there are {hosts}; scale the hosts up first"
        )


def _check_room(needed: int, wish: Wish, state: RouterState, capacity: int | None) -> None:
    if capacity is None:
        return
    hosts = len(wish.open_hosts)
    if needed > (room := min(capacity, state.num_columns) * hosts):
        raise Refused(
            FAILED_PRECONDITION, f"{needed} replicas in all do not fit on {hosts} hosts with room for {room} in all"
        )


def _drained(command: Command, state: RouterState, capacity: int | None) -> Wish:
    wish, host = state.wish, command.host
    if host not in wish.places:
        known = ", ".join(wish.open_hosts)
        raise Refused(NOT_FOUND, f"host: there is no expert host {host!r}; there are {known}")
    following = wish.without_host(host, forced=command.force)
    if command.force or host not in wish.open_hosts:
        return following
    if not following.open_hosts:
        raise Refused(FAILED_PRECONDITION, f"{host} is the only expert host: without it no expert has a replica")
    _check_room(state.num_columns, following, state, capacity)
    return following


def progress(command: Command, state: RouterState) -> Progress:
    """How far the command has got. Raises Refused (ABORTED) where a later one overtook it."""
    wish = state.wish
    match command.kind, command.target:
        case "scale", "engines":
            asked = Limits(command.count, command.most or command.count)
            _still(wish.engine_limits == asked, "the number of engines")
            return _engines(state)
        case "roll", _:
            return _engines(state)
        case "scale", "hosts":
            asked_hosts = (command.count, command.most) if command.most else None
            is_within = command.count <= len(wish.open_hosts) <= max(command.count, command.most)
            _still(is_within and wish.host_limits == asked_hosts, "the number of hosts")
        case "scale", "replicas":
            _still(wish.replicas == command.count, "the number of replicas")
        case "replicate", _:
            _still(state.wanted[command.expert] == command.count, f"the replicas of expert {command.expert}")
        case "drain", _:
            _still(command.host not in wish.open_hosts, f"host {command.host}")
            if command.host not in state.hosts:
                return Progress(True, f"{command.host} has left")
            host = state.hosts[command.host]
            return Progress(False, f"{command.host}: {phase_of(host, state)}, until other hosts have its experts")
    if is_settled(state):
        return Progress(True, f"{len(state.wish.open_hosts)} hosts, {state.wish.replicas} replicas of each expert")
    waiting = "; ".join(f"{t.host} {t.state}".strip() for t in troubles(state)) or "hosts change over"
    return Progress(False, waiting)


def _still(holds: bool, what: str) -> None:
    if not holds:
        raise Refused(ABORTED, f"a later operation changed {what}")


def _engines(state: RouterState) -> Progress:
    """Whether as many engines of the wished version are ready as there should be, and no other lives. Within limits it
    does not matter which of them are just coming or going."""
    wish, limits = state.wish, state.wish.engine_limits
    current = [e for e in state.engines.values() if e.info.get("version", 0) == wish.engine_version]
    ready = sum(e.phase == "ready" for e in current)
    others = sum(e.phase != "dead" for e in state.engines.values()) - ready
    if limits.least != limits.most:
        old = sum(e.phase != "dead" for e in state.engines.values()) - sum(e.phase != "dead" for e in current)
        text = f"{ready} engines ready, {limits.least} to {limits.most} as work comes and goes"
        return Progress(limits.least <= ready <= limits.most and not old, text)
    done = ready == limits.most and not others
    return Progress(done, f"{ready} of {limits.most} engines ready" + (f", {others} coming or going" if others else ""))
