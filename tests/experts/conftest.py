"""A warm parent without imports, and hosts around a known kernel."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from folkmoot.experts import warm
from folkmoot.experts.dispatcher import Dispatcher
from tests.experts.hosts import Hosts
from tests.experts.test_dispatcher import dispatcher


@pytest.fixture(scope="session")
def short_dir() -> Iterator[Path]:
    """A directory whose path is short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="fm-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def plain_parent(short_dir: Path) -> Iterator[warm.WarmParent]:
    """A warm parent that has not imported vLLM: enough for hosts around a known kernel."""
    process = warm.start(short_dir / "warm.sock", short_dir / "warm.log", modules=["tests.experts.hosts"])
    try:
        yield warm.connect(short_dir / "warm.sock", 60.0)
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def hosts(plain_parent: warm.WarmParent) -> Iterator[Hosts]:
    """A fresh set of hosts; ended at the end of the test."""
    with tempfile.TemporaryDirectory(prefix="fm-") as name:
        started = Hosts(Path(name), plain_parent)
        yield started
        started.close()


@pytest.fixture(scope="module")
def target(plain_parent: warm.WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """One host with every expert, for strangers to speak to."""
    hosts = Hosts(Path(tmp_path_factory.mktemp("target")), plain_parent)
    hosts.start("a", hosts.all_layers(range(8)))
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def healthy(target: Hosts) -> Iterator[Dispatcher]:
    """An engine that was there before, and stays."""
    d = dispatcher(target)
    yield d
    assert target.children["a"].is_alive()
    assert d._dead == set()
    d.close()
