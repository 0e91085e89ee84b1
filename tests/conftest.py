"""Fixtures for all tests, and which of the slow ones stay together where two run at once."""

import pytest

pytest_plugins = ["tests.fixtures_demo"]

ONE_CLUSTER = ("tests/cluster/test_cli.py", "tests/cluster/test_cluster.py")
"""They share a cluster, but for tests that start their own."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup`, tests that share a fixture go to one worker."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(_group(item)))


def _group(item: pytest.Item) -> str:
    path = item.nodeid.partition("::")[0]
    if path.endswith("test_quick.py") or "no_cluster" in getattr(item, "fixturenames", ()):
        return item.nodeid
    return "cluster" if path in ONE_CLUSTER else path
