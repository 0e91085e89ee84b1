"""When an expert host that has not answered is late, and when it counts as stalled. Pure functions and one small clock,
no I/O.

A short fixed deadline would drop healthy hosts under a large prompt, a long one makes clients wait. So there are two,
and both follow the work: `hedge_s` or `stall_s`, and some times what a host has lately needed for as many rows, up to a
ceiling. What was measured counts the wait behind other engines' calls too, rises at once and falls slowly.

- Past the first one the host is *late*: its rows are asked of a replica as well, and it is asked for nothing until it
  has answered, which may be in some later layer. (Hedged requests: Dean and Barroso, The Tail at Scale, CACM 56(2),
  2013.) Being wrong about it costs the work of these rows once more.
- Past the second one it is *stalled*, and dropped. Being wrong about it costs a host.

Three rules keep an overloaded machine, or one that was suspended, from losing healthy hosts:

- Time counts only while this process itself runs: a wait is made of slices, and one that took longer than it should
  have, because we were not scheduled, counts as two.
- A host's deadlines count only if each expert it was asked for has another replica that is neither dropped nor past its
  own. The last one gets the ceiling. If all are late at once, none is dropped before that.
- When a host answers after a deadline, the others get theirs again: what delayed one has likely delayed them all.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SLICE_S, LOOK_S = 0.05, 0.001
MARGIN = 4.0
"""How many times slower than lately a host may be."""
DECAY = 0.9
"""How much of an older, longer measurement stays after each call."""


class Pace(NamedTuple):
    """How slow a host has lately been: seconds a row, and seconds a call of any size."""

    row_s: float
    call_s: float


def measured(pace: Pace | None, rows: int, took_s: float) -> Pace:
    """The pace after one more call of `rows` rows."""
    if pace is None:
        return Pace(took_s / rows, took_s)
    return Pace(max(took_s / rows, DECAY * pace.row_s), max(took_s, DECAY * pace.call_s))


def allowed_s(pace: Pace | None, rows: int, grace_s: float, ceiling_s: float) -> float:
    """How long a host may take for `rows` rows; `grace_s`: hedge_s or stall_s. The ceiling before anything is measured:
    the first call may be slow."""
    if pace is None:
        return ceiling_s
    return min(ceiling_s, grace_s + MARGIN * max(pace.call_s, rows * pace.row_s))


def next_look_s(left_s: Iterable[float], *, is_one_done: bool) -> float:
    """How long to wait until the next look at the hosts that have not answered, which have so much of their time left.

    A slice; less where one is late before, but only once another has answered: else all of them are perhaps held up,
    and those whose time ends a little later are to be late as well by then.
    """
    return max(LOOK_S, min([SLICE_S, *(left for left in left_s if is_one_done and left > 0.0)]))


def stalled(rows: int, allowed_s: float) -> str:
    """Why a host is dropped."""
    return f"stalled: no answer for {rows} rows within {allowed_s:.3f} s"


def replaceable(index: int, experts: Collection[int], table: np.ndarray, unfit: Collection[int]) -> bool:
    """Whether each of `experts`, asked of link `index`, has a replica on a link that is not in `unfit`.

    table: int32 [experts, replicas, 2] of (link index, slot), link index -1 for none.
    """
    others = [link for link in np.unique(table[:, :, 0]).tolist() if link not in (-1, index, *unfit)]
    return bool(np.isin(table[list(experts), :, 0], others).any(axis=1).all())


@dataclass
class Waited:
    """How long a call has waited, counted only while this process ran: in all, and since a late answer last came."""

    total_s: float = 0.0
    recent_s: float = 0.0

    def add(self, elapsed_s: float) -> None:
        """One slice is over."""
        counted = min(elapsed_s, 2 * SLICE_S)
        self.total_s += counted
        self.recent_s += counted

    def late_answer(self) -> None:
        """A host answered after its deadline."""
        self.recent_s = 0.0
