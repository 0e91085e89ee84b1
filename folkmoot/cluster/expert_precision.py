"""Which dtype each expert has where `--expert-dtype auto:BUDGET` leaves that to a budget.

It is decided once, when a cluster is started, and part of its spec: so all replicas of an expert have one dtype,
whatever is healed, moved or started again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from folkmoot.cluster import host_groups
from folkmoot.cluster.spec import ClusterSpec
from folkmoot.experts.expert_choice import LETTERS, Errors, choose, parse
from folkmoot.experts.warm import WarmParent

ENTRY = "folkmoot.experts.measure:main"
POLL_S = 0.2

Rows: TypeAlias = Mapping[int, Sequence[float]]
"""Of each MoE layer the rows that each expert has had."""
Measured: TypeAlias = tuple[Errors, dict[int, dict[str, int]]]
"""Errors of all experts; bytes of an expert of each layer, by dtype."""
Tell: TypeAlias = Callable[[str, float | None], None]


class MeasureError(RuntimeError):
    """What each dtype costs each expert could not be measured. The message names the log."""


def read_loads(path: Path, moe_layers: Sequence[int], num_experts: int) -> Rows:
    """What `folkmoot experts --json` has printed, or the last line of what `--record` has written.

    ValueError where it is something else, of another model, or counts nothing.
    """
    try:
        document = json.loads(path.read_text().strip().splitlines()[-1])
        pairs = zip(document["layers"], document["rows_total"], strict=True)
        rows = {int(n): tuple(map(float, row)) for n, row in pairs}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise ValueError(f"--expert-loads {path}: not what `folkmoot experts --json` prints: {e!r}") from e
    if set(rows) != set(moe_layers) or any(len(row) != num_experts for row in rows.values()):
        found = sorted({len(row) for row in rows.values()})
        raise ValueError(
            f"--expert-loads {path}: of another model: layers {sorted(rows)} of {found} experts, "
            f"where this one has layers {sorted(moe_layers)} of {num_experts}"
        )
    every = [count for row in rows.values() for count in row]
    if not (sum(every) > 0 and min(every) >= 0):
        raise ValueError(f"--expert-loads {path}: no expert has had a row, or one fewer than none")
    return rows


def decided(spec: ClusterSpec, loads: Path | None, warm_parent: Callable[[], WarmParent], tell: Tell) -> ClusterSpec:
    """The spec with the dtype of each expert, where a budget decides it. `tell` hears what is done, and how much of it.

    What each dtype costs is read from beside the checkpoint, or measured by a process that is forked from
    `warm_parent()`. Raises ValueError (PlacementError) where experts do not fit in the budget (in hosts' memory), and
    MeasureError.
    """
    budget = parse(spec.expert_dtype)
    if budget is None or not spec.moe_layers:
        return spec
    rows = None if loads is None else read_loads(loads, spec.moe_layers, spec.num_experts)
    measured = _known(spec) or measure(spec.model_path, spec.dtype, warm_parent(), spec.log("measure"), tell)
    choice = choose(*measured, budget, rows)
    tell(f"experts: {choice}", None)
    if spec.host_groups:
        most = spec.max_experts_per_host
        host_groups.check_fit(spec.host_groups, spec.num_experts, spec.replicas, choice.largest, most)
    return replace(spec, expert_choice=choice, column_bytes=choice.largest)


def _known(spec: ClusterSpec) -> Measured | None:
    """As it lies beside the checkpoint."""
    from folkmoot.experts.quantise_cache import ExpertCache
    from folkmoot.experts.vllm_api import checkpoint

    path = Path(spec.model_path)
    cache = ExpertCache(path, checkpoint.identity(path), spec.dtype)
    errors, shapes = cache.errors(), cache.shapes()
    return None if errors is None or shapes is None else (errors, _sizes(shapes))


def measure(checkpoint: str, dtype: str, parent: WarmParent, log: Path, tell: Tell) -> Measured:
    """What each dtype costs each expert of the checkpoint folder, loaded in `dtype` (an option's value), by a process
    forked from `parent` that writes to `log`. Raises MeasureError."""
    from folkmoot.experts.quantised import ExpertShape

    part = 0.0
    child = parent.spawn(ENTRY, {"checkpoint": checkpoint, "dtype": dtype}, log)
    try:
        while (message := child.receive(POLL_S)) is None or message["event"] == "progress":
            part = part if message is None else float(message["part"])
            tell("measuring what fewer bits cost each expert", part)
    except EOFError:
        message = {"event": "error", "message": "it died"}
    finally:
        child.close()
    if message["event"] != "measured":
        raise MeasureError(f"measuring what fewer bits cost each expert: {message['message']} (log: {log})")
    shapes = {int(n): ExpertShape(**shape) for n, shape in message["shapes"].items()}
    return {int(n): by_kind for n, by_kind in message["errors"].items()}, _sizes(shapes)


def _sizes(shapes: Mapping[int, Any]) -> dict[int, dict[str, int]]:
    """Bytes of an expert of each layer, by dtype; of `ExpertShape`s."""
    return {n: {kind: shape.bytes(kind) for kind in LETTERS} for n, shape in shapes.items()}
