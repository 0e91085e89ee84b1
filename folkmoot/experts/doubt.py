"""Rows that are not finite: a host that lies, or the truth?

A host with broken memory or weights may answer in time, in the right shape, and wrongly. Most wrong numbers cannot be
told from right ones; an infinity or a NaN can. But an expert may truly overflow, and then every replica says the same:
dropping them all would let one request kill the cluster. So a row that is not finite, though its token's x is, is
asked for again from another replica. Finite there: the first host is dropped, and all that it said in this call is
asked for anew. Not finite there either: accepted as the truth. Without another replica it is accepted, counted and
logged: there is nobody to compare with, and waiting for one would let one request hold up all others.

The rule costs nothing while all is finite, since `fm_combine` sees on its way whether a sum is not, and a sum is not
where a row is not.
"""

import logging
import time
from dataclasses import dataclass

import numpy as np

from folkmoot.experts.call import Call

log = logging.getLogger(__name__)

LOG_EVERY_S = 1.0


@dataclass
class Tally:
    """What became of rows that were not finite, so far: confirmed by another replica, refuted, or without another."""

    confirmed: int = 0
    refuted: int = 0
    alone: int = 0
    logged_at: float = 0.0


def settle(call: Call, tally: Tally) -> bool:
    """Apply the rule above to a call whose rows are all there. Returns whether rows have changed."""
    settled, changed = np.zeros(call.pairs, np.bool_), False
    while (open_ := call.whole_sums(call.doubtful()) & ~settled).any():
        first = call.host.copy()
        avoid = {e: set(first[open_ & (call.experts == e)].tolist()) for e in set(call.experts[open_].tolist())}
        alone = call.whole_sums(open_ & ~call.has_replica(avoid))
        settled |= alone
        tally.alone += int(alone.sum())
        asked = open_ & ~alone
        if asked.any() and call.ask_again(asked, avoid):
            changed, second = True, call.host.copy()
            wrong = refuted(asked, call.whole_sums(call.doubtful()), call.tokens_of_pairs, first)
            settled |= asked & ~wrong
            tally.refuted += int(wrong.sum())
            tally.confirmed += int((asked & ~wrong).sum())
            for number in liars(first[wrong], second[wrong]):
                call.distrust(number, "wrong rows: not finite where another replica's are")
    _log(call.layer, tally)
    return changed


def refuted(asked: np.ndarray, still: np.ndarray, tokens: np.ndarray, first: np.ndarray) -> np.ndarray:
    """bool [pairs]: of those asked again, the ones whose first answer was wrong, since no second one is like it.

    still: bool [pairs], not finite in the second answer either; tokens and first (who answered first): int [pairs].
    Pairs of one token that the same host answered first may have come as one sum, so they are judged as one.
    """
    key = tokens.astype(np.int64) << 32 | first
    return asked & ~np.isin(key, key[asked & still])


def liars(accused: np.ndarray, witnesses: np.ndarray) -> list[int]:
    """Which of the accused to drop, of pairs (accused[i], witnesses[i]): a witness that is dropped itself proves
    nothing, so that hosts which accuse each other are never all dropped."""
    dropped: list[int] = []
    for number in np.unique(accused).tolist():
        if not set(witnesses[accused == number].tolist()) <= set(dropped):
            dropped.append(number)
    return dropped


def _log(layer: int, tally: Tally) -> None:
    if time.monotonic() - tally.logged_at > LOG_EVERY_S:
        tally.logged_at = time.monotonic()
        counts = f"{tally.confirmed} confirmed, {tally.refuted} refuted, {tally.alone} without another replica"
        log.warning("layer %d: rows that are not finite; so far %s", layer, counts)
