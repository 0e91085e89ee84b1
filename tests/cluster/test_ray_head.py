"""A Ray that goes without its side processes: what stands in for the agent ends by itself, and Ray is as it was."""

import subprocess
import sys

import pytest

from folkmoot.cluster import ray_head
from folkmoot.cluster.processes import is_alive
from tests.cluster.conftest import eventually

PARENT = """
import subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(1000)
"""


def test_the_idle_agent_lives_as_long_as_its_raylet() -> None:
    command = [sys.executable, "-c", PARENT, *ray_head.IDLE_AGENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as raylet:
        assert raylet.stdout is not None
        agent = int(raylet.stdout.readline())
        with pytest.raises(AssertionError):
            eventually(lambda: not is_alive(agent), 0.5, "it ends before its raylet")
        raylet.kill()
    eventually(lambda: not is_alive(agent), 10.0, "it ends after it")


def test_ray_is_as_it_was_afterwards() -> None:
    services = pytest.importorskip("ray._private.services")
    node = pytest.importorskip("ray._private.node").Node
    names = (*ray_head.NOT_STARTED, "start_raylet")
    before = [getattr(node, name) for name in names], services.start_ray_process
    with ray_head.bare():
        assert all(getattr(node, name) is not was for name, was in zip(names, before[0], strict=True))
        assert services.start_ray_process is not before[1]
    assert ([getattr(node, name) for name in names], services.start_ray_process) == before
