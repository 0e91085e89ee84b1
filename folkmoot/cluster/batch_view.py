"""How batches look to a person, and to a program: the same fields as OpenAI's batch object, and a few more."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from folkmoot.gateway.pb import batches_pb2 as pb

ENDED = frozenset({pb.BATCH_FAILED, pb.COMPLETED, pb.EXPIRED, pb.BATCH_CANCELLED})
TOLD_EVERY_S = 2.0


def status_name(batch: pb.Batch) -> str:
    """As OpenAI calls it."""
    return pb.BatchStatus.Name(batch.status).lower().removeprefix("batch_")


def as_json(batch: pb.Batch) -> dict[str, Any]:
    """OpenAI's batch object: times in Unix seconds, null where there is none."""
    name = status_name(batch)
    ended = {f"{one}_at": _seconds(batch.ended_ms) if name == one else None
             for one in ("completed", "failed", "expired", "cancelled")}  # fmt: skip
    errors = [
        {"code": e.code, "message": e.message, "param": e.param or None, "line": e.line or None} for e in batch.errors
    ]
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint or None,
        "status": name,
        "errors": {"object": "list", "data": errors} if errors else None,
        "completion_window_s": batch.completion_window_s,
        "created_at": _seconds(batch.created_ms),
        "expires_at": _seconds(batch.deadline_ms),
        "in_progress_at": _seconds(batch.in_progress_ms),
        "finalizing_at": _seconds(batch.finalizing_ms),
        "cancelling_at": _seconds(batch.cancelling_ms),
        **ended,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": dict(batch.metadata) or None,
        "tenant": batch.tenant or None,
        "usage": {"prompt_tokens": batch.prompt_tokens, "completion_tokens": batch.completion_tokens},
        "estimated_tokens": batch.estimated_tokens,
        "tokens_per_s": batch.tokens_per_s,
        "eta_s": batch.eta_s if batch.HasField("eta_s") else None,
        "forgotten_at": _seconds(batch.expires_ms),
    }


def show(console: Console, batch: pb.Batch) -> None:
    """One batch as lines of text."""
    lines = [
        f"{batch.id}  {status_name(batch)}",
        f"  {_counts(batch)}{_pace(batch)}",
        f"  {batch.prompt_tokens} prompt tokens, {batch.completion_tokens} completion tokens",
        f"  created {_clock(batch.created_ms)}, to be done by {_clock(batch.deadline_ms)}",
    ]
    if batch.ended_ms:
        lines.append(f"  ended {_clock(batch.ended_ms)}, kept until {_clock(batch.expires_ms)}")
    for error in batch.errors:
        where = f"line {error.line}: " if error.line else ""
        lines.append(f"  {where}{error.code}: {error.message}")
    console.print(Text("\n".join(lines)))


def show_list(console: Console, batches: Sequence[pb.Batch]) -> None:
    """A table."""
    rows = []
    for b in batches:
        left = _duration(b.eta_s) if b.HasField("eta_s") else ""
        speed = f"{b.tokens_per_s:.0f}" if b.tokens_per_s else ""
        counts = (str(b.total), str(b.completed), str(b.failed))
        rows.append((b.id, status_name(b), *counts, speed, left, _clock(b.created_ms)))
    _table(console, ("batch", "status", "lines", "done", "failed", "tokens/s", "left", "created"), rows)


def show_letters(console: Console, letters: Sequence[pb.DeadLetter]) -> None:
    """A table."""
    rows = [(one.id, one.request_id, one.model, str(one.attempts), _clock(one.time_ms), one.error) for one in letters]
    _table(console, ("id", "request", "model", "attempts", "when", "error"), rows)


def _table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Names are shown as they are, whatever markup or emoji they spell."""
    table = Table(*header, box=None)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


class Watch:
    """Progress of one batch: a bar on a terminal, elsewhere a line when something has changed, not too often."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
        )
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task: TaskID | None = None
        self._told, self._told_s = "", 0.0

    def __enter__(self) -> "Watch":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, batch: pb.Batch, now_s: float) -> None:
        """How it is now."""
        pace = f"{batch.failed} failed{_pace(batch)}"
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(status_name(batch), total=batch.total, pace=pace)
            done = batch.completed + batch.failed
            self._bar.update(self._task, completed=done, description=status_name(batch), pace=pace)
            return
        text = f"{status_name(batch)}: {_counts(batch)}"
        if text != self._told and (now_s - self._told_s > TOLD_EVERY_S or batch.status in ENDED):
            self._told, self._told_s = text, now_s
            self._console.print(Text(f"{text}{_pace(batch)}"))


def _counts(batch: pb.Batch) -> str:
    return f"{batch.completed} of {batch.total} lines answered, {batch.failed} failed"


def _pace(batch: pb.Batch) -> str:
    if batch.status in ENDED or not batch.tokens_per_s:
        return ""
    left = f", {_duration(batch.eta_s)} left" if batch.HasField("eta_s") else ""
    return f", {batch.tokens_per_s:.0f} tokens/s{left}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _clock(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _seconds(ms: int) -> int | None:
    return ms // 1000 if ms else None
