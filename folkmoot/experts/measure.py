"""A process that measures what each dtype would cost each expert of a checkpoint, forked from a warm parent.

It says how far it is, {"event": "progress", "part"}, and in the end {"event": "measured", "errors", "shapes"}, both by
layer. What it finds is kept beside the checkpoint, too (quantise_cache.py).
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from setproctitle import setproctitle

from folkmoot import logs
from folkmoot.experts import vllm_api
from folkmoot.experts.warm import Control, exit_with_owner

ENTRY = "folkmoot.experts.measure:main"
TITLE = "folkmoot::ExpertErrors"


def main(spec: dict[str, Any], control: Control) -> None:
    """Entry point. `spec` has the checkpoint folder, and the dtype in which it is loaded (an option's value)."""
    logs.set_up("measure")
    exit_with_owner(control)
    setproctitle(TITLE)
    errors, shapes = vllm_api.measure_errors(
        Path(spec["checkpoint"]),
        dtype=spec["dtype"],
        progress=lambda part: control.send({"event": "progress", "part": part}),
    )
    control.send({"event": "measured", "errors": errors, "shapes": {n: asdict(s) for n, s in shapes.items()}})
