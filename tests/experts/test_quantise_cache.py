"""The cache of quantised experts: nothing half-written, spoilt or out of date is ever used."""

import logging
import os
from pathlib import Path

import pytest
import torch

from folkmoot.experts.quantise_cache import FOLDER, ExpertCache
from folkmoot.experts.quantised import ExpertShape, quantise
from tests.experts.test_quantised import random_weights

SHAPE = ExpertShape(64, 32)
BLOB, ERROR = quantise(SHAPE, "int4", random_weights(SHAPE, 0))


@pytest.fixture
def cache(tmp_path: Path) -> ExpertCache:
    found = ExpertCache(tmp_path, "files as they are", "auto")
    found.keep(SHAPE, "int4", 3, 17, BLOB, ERROR)
    return found


def test_an_expert_comes_back_as_it_was(cache: ExpertCache, tmp_path: Path) -> None:
    assert cache.folder.parent == tmp_path / FOLDER
    found = cache.read(SHAPE, "int4", 3, 17)
    assert found is not None and torch.equal(found[0], BLOB) and found[1] == ERROR
    assert found[0].data_ptr() % 64 == 0
    assert cache.read(SHAPE, "int8", 3, 17) is cache.read(SHAPE, "int4", 3, 18) is None
    assert (cache.count("int4"), cache.count("int8")) == (1, 0)
    assert [p.name for p in cache.path("int4", 3, 17).parent.iterdir()] == ["expert-17.int4"]  # nothing temporary


def test_shapes_come_back_as_they_were(cache: ExpertCache) -> None:
    assert cache.shapes() is None
    shapes = {0: SHAPE, 5: ExpertShape(64, 64, "swigluoai", True)}
    cache.keep_shapes(shapes)
    assert cache.shapes() == shapes


def test_errors_come_back_as_they_were(cache: ExpertCache, caplog: pytest.LogCaptureFixture) -> None:
    assert cache.errors() is None
    errors = {n: {"int4": (0.01, 0.02), "int8": (1e-4, 2e-4), "bf16": (0.0, 0.0)} for n in (0, 5)}
    cache.keep_errors(errors)
    assert cache.errors() == errors
    for spoilt in ("{", "[1]", '{"0": {"int4": [1]}}', '{"0": 5}'):
        (cache.folder / "errors.json").write_text(spoilt)
        assert cache.errors() is None
    assert caplog.text.count("errors.json is made again") == 4


def test_another_checkpoint_or_dtype_has_a_folder_of_its_own(cache: ExpertCache, tmp_path: Path) -> None:
    for other in (
        ExpertCache(tmp_path, "changed files", "auto"),
        ExpertCache(tmp_path, "files as they are", "float32"),
    ):
        assert other.folder != cache.folder and other.read(SHAPE, "int4", 3, 17) is None


@pytest.mark.parametrize("damage", ["cut short", "a byte changed", "other shape", "no JSON", "empty"])
def test_a_spoilt_file_is_named_and_not_used(cache: ExpertCache, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = cache.path("int4", 3, 17)
    data = path.read_bytes()
    changed = bytearray(data)
    changed[-100] ^= 1
    spoilt = {
        "cut short": data[:-1],
        "a byte changed": bytes(changed),
        "other shape": data.replace(b'"hidden": 64', b'"hidden": 32'),
        "no JSON": b"?" + data,
        "empty": b"",
    }[damage]
    assert spoilt != data
    path.write_bytes(spoilt)
    with caplog.at_level(logging.WARNING):
        assert cache.read(SHAPE, "int4", 3, 17) is None
    assert f"{path} is made again" in caplog.text
    cache.keep(SHAPE, "int4", 3, 17, BLOB, ERROR)
    found = cache.read(SHAPE, "int4", 3, 17)
    assert found is not None and torch.equal(found[0], BLOB)


def test_a_checkpoint_that_cannot_be_written_is_cached_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anything
    cache = ExpertCache(tmp_path / "model", "files", "auto")
    assert cache.folder.parent == tmp_path / "cache" / "folkmoot" / "experts"
    cache.keep(SHAPE, "int4", 0, 0, BLOB, ERROR)
    assert cache.read(SHAPE, "int4", 0, 0) is not None


def test_a_cache_without_room_is_said_once_and_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    cache = ExpertCache(tmp_path, "files", "auto")
    with caplog.at_level(logging.WARNING):
        for expert in (1, 2):
            cache.keep(SHAPE, "int4", 0, expert, BLOB, ERROR)
    assert caplog.text.count("are not kept for the next start") == 1
    assert cache.count("int4") == 0
