"""A budget's choice of dtypes is made once, from errors that lie beside the checkpoint and loads that a file gives."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from folkmoot.cluster.expert_precision import decided, read_loads
from folkmoot.cluster.host_groups import HostGroup
from folkmoot.cluster.placement import PlacementError
from folkmoot.cluster.spec import ClusterSpec
from folkmoot.experts.quantise_cache import ExpertCache
from folkmoot.experts.quantised import ExpertShape
from folkmoot.experts.vllm_api.checkpoint import identity

SHAPE = ExpertShape(64, 32)
ERRORS = {n: {"int4": [0.01] * 4, "int8": [1e-4] * 4, "bf16": [0.0] * 4} for n in (1, 3)}


@pytest.fixture
def spec(tmp_path: Path) -> ClusterSpec:
    """Of a checkpoint, which is no more than its names, whose experts have been measured."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text("{}")
    cache = ExpertCache(model, identity(model), "auto")
    cache.keep_errors(ERRORS)
    cache.keep_shapes(dict.fromkeys(ERRORS, SHAPE))
    return ClusterSpec(
        name="t", model_path=str(model), model="m", architecture="", moe_layers=(1, 3), num_experts=4, redis="",
        store_namespace="t", run_dir="", log_dir="", expert_dtype="auto:0.42",
    )  # fmt: skip


def nobody() -> NoReturn:
    raise AssertionError("nothing has to be measured")


def loads(folder: Path, **changes: Any) -> Path:
    rows = {"layers": [1, 3], "rows_total": [[0, 0, 0, 50], [40, 0, 0, 0]], "half_life_s": 60.0, **changes}
    (path := folder / "experts.json").write_text(json.dumps(rows))
    return path


def test_experts_with_more_rows_get_more_bits_and_the_second_time_nothing_is_measured(
    spec: ClusterSpec, tmp_path: Path
) -> None:
    told: list[str] = []
    found = decided(spec, loads(tmp_path), nobody, lambda text, part: told.append(text))
    choice = found.expert_choice
    assert choice is not None and choice.letters[1][3] == choice.letters[3][0] == "8"
    assert 2 <= choice.counts["int8"] < 8 and choice.bytes <= 0.42 * 8 * SHAPE.bytes("bf16")
    assert told == [f"experts: {choice}"]
    sizes = [sum(SHAPE.bytes(choice.kind(n, e)) for n in (1, 3)) for e in range(4)]
    assert found.column_bytes == max(sizes)
    assert replace(found, expert_choice=None, column_bytes=0) == spec
    alike = decided(spec, None, nobody, lambda text, part: None).expert_choice
    assert alike is not None and alike.counts == choice.counts and alike.relative_error > choice.relative_error


def test_other_dtypes_and_dense_models_leave_nothing_to_decide(spec: ClusterSpec) -> None:
    for other in (replace(spec, expert_dtype="int4"), replace(spec, moe_layers=())):
        assert decided(other, None, nobody, lambda text, part: None) is other


def test_what_does_not_fit_is_said(spec: ClusterSpec) -> None:
    with pytest.raises(ValueError, match=r"auto:0.02MiB: .* are less than the experts take in int4"):
        decided(replace(spec, expert_dtype="auto:0.02MiB"), None, nobody, lambda text, part: None)
    small = replace(spec, host_groups=(HostGroup(2, memory=2 * SHAPE.bytes("int4")),))
    with pytest.raises(PlacementError, match="has no room for one expert of every layer"):
        decided(small, None, nobody, lambda text, part: None)


def test_a_record_s_last_line_is_read(tmp_path: Path) -> None:
    path = loads(tmp_path)
    path.write_text(f"{json.dumps({'layers': [], 'rows_total': []})}\n{path.read_text()}\n")
    assert read_loads(path, (1, 3), 4) == {1: (0, 0, 0, 50), 3: (40, 0, 0, 0)}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (
            {"layers": [0, 1]},
            r"another model: layers \[0, 1\] of \[4\] experts, where this one has layers \[1, 3\] of 4",
        ),
        ({"rows_total": [[1] * 8, [1] * 8]}, r"another model: layers \[1, 3\] of \[8\] experts"),
        ({"rows_total": [[1] * 4]}, "not what `folkmoot experts --json` prints"),
        ({"rows_total": None}, "not what `folkmoot experts --json` prints"),
        ({"rows_total": [[0] * 4, [0] * 4]}, "no expert has had a row"),
        ({"rows_total": [[-1] * 4, [9] * 4]}, "or one fewer than none"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, changes: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        read_loads(loads(tmp_path, **changes), (1, 3), 4)


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "x").write_text("rows\n")
    with pytest.raises(ValueError, match="not what `folkmoot experts --json` prints"):
        read_loads(path, (1, 3), 4)
