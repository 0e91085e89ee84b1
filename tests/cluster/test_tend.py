"""`folkmoot up` tends to what Ray does not watch: a real request store that does not start again, a warm parent."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from folkmoot.cluster import warm_files
from folkmoot.cluster.launch import Supervisor
from folkmoot.cluster.up_options import UpOptions
from folkmoot.gateway.embedded import EmbeddedStore
from tests.cluster.conftest import eventually


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(tmp_path / "store", port=0) as store:
        yield store


def test_a_store_that_cannot_start_is_tried_again_and_ends_nothing(tmp_path: Path, store: EmbeddedStore) -> None:
    told: list[str] = []
    supervisor = Supervisor(UpOptions("demo", state_dir=tmp_path), told.append)
    supervisor._store = store
    manifest = next(store.data_dir.rglob("*.manifest"))
    sound = manifest.read_text()
    store.kill()
    manifest.write_text("no manifest\n")
    supervisor.tend()
    assert store.pid is None, "the fault happened"
    assert told[0] == "the request store died; starting it again"
    assert told[1].startswith("next attempt in 1 s: the store did not start (exit code 1); its log ends with:")
    supervisor.tend()
    assert len(told) == 2, "it is not tried again at once"
    manifest.write_text(sound)
    eventually(lambda: supervisor.tend() or store.pid, 20.0, "it is back")
    store.kill()
    supervisor.tend()
    assert store.pid is not None


def test_of_those_who_see_a_warm_parent_missing_one_starts_it(tmp_path: Path) -> None:
    socket, log = tmp_path / "warm.sock", tmp_path / "warm.log"
    for _ in range(2):  # the first one, and one that died
        with ThreadPoolExecutor(4) as pool:
            started = [p for p in pool.map(lambda _: warm_files.start_missing(socket, log), range(4)) if p is not None]
        assert len(started) == 1
        assert warm_files.is_started(socket)
        started[0].kill()
        started[0].wait()
        assert not warm_files.is_started(socket)
