"""Fixtures for all tests."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from folkmoot.experts import warm, warm_seed

pytest_plugins = ["tests.fixtures_demo"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As where a shell runs the tests in the background. What they start would inherit that, and miss their Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def seeds() -> Iterator[warm_seed.Seeds]:
    """All clusters of the session are forked from one import of vLLM, or a few."""
    with tempfile.TemporaryDirectory(prefix="fm-") as name, warm_seed.Seeds(Path(name)) as seeds:
        os.environ[warm.SEEDS] = str(seeds.path)
        yield seeds
        del os.environ[warm.SEEDS]
