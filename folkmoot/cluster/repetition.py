"""What of a replayed answer (replay.py) is journalled already: it is checked, and left out."""

from collections.abc import Sequence

from folkmoot.gateway.pb import gateway_pb2 as pb


class ReplayError(RuntimeError):
    """A replay did not repeat what is journalled: to go on would be wrong."""


class Repetition:
    """What of a replay has been journalled already, and is to be left out of what goes into the journal now."""

    def __init__(self, token_ids: Sequence[int] = (), text: str = "") -> None:
        self._token_ids, self._text = list(token_ids), text

    def cut(self, piece: pb.GenerateResponse) -> None:
        """Shorten a piece by what it repeats. Raises ReplayError where it repeats something else, or too little."""
        size = min(len(self._token_ids), len(piece.token_ids))
        length = min(len(self._text), len(piece.text))
        if piece.token_ids[:size] != self._token_ids[:size] or piece.text[:length] != self._text[:length]:
            raise ReplayError(f"journalled {self._token_ids[:size]} {self._text[:length]!r}, made again {piece}")
        del self._token_ids[:size], piece.token_ids[:size], piece.logprobs[:size]
        self._text, piece.text = self._text[length:], piece.text[length:]
        if piece.HasField("finish") and (self._token_ids or self._text):
            raise ReplayError(f"it ended before {self._token_ids} {self._text!r}")
