"""What a Ray of one's own goes without: the processes that `ray.init` starts beside its control service and its raylet.

The autoscaler's monitor, the log monitor, the dashboard (a part of it runs also where it is not wanted) and its agent
are Python processes that each import much of Ray: together some 6 s of a core and 430 MiB, and most of the time that
`ray.init` takes. Nobody here asks them for anything. Ray has no public option for that, so private functions of it,
whose version is pinned, are replaced while it starts. A Ray that is joined stays as others have made it.
"""

import contextlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOT_STARTED = ("start_monitor", "start_log_monitor", "start_api_server")
"""Methods of Ray's Node."""
AGENT = "--dashboard_agent_command="
"""How the raylet is told what agent to start. It does not go without one."""
IDLE_AGENT = (sys.executable, "-I", "-S", str(Path(__file__).with_name("ray_agent.py")))
NO_PORT = -1


@contextlib.contextmanager
def bare() -> Iterator[None]:
    """A Ray that is started within goes without them. Raises AttributeError or ImportError where it is another Ray."""
    from ray._private import services
    from ray._private.node import Node

    raylet: Any = importlib.import_module("ray._raylet")  # its stubs leave these names out
    ports = (raylet.METRICS_AGENT_PORT_NAME, raylet.METRICS_EXPORT_PORT_NAME, raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME)
    start_raylet, start_process = Node.start_raylet, services.start_ray_process
    agent = AGENT + subprocess.list2cmdline(IDLE_AGENT)

    def without_ports(node: Any, *args: Any, **kwargs: Any) -> None:
        for port in ports:  # the raylet waits until its agent has written them down
            raylet.persist_port(node._session_dir, node._node_id, port, NO_PORT)
        start_raylet(node, *args, **kwargs)

    def with_idle_agent(command: list[str], *args: Any, **kwargs: Any) -> Any:
        return start_process([agent if word.startswith(AGENT) else word for word in command], *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name in NOT_STARTED:
            stack.enter_context(_replaced(Node, name, lambda *args, **kwargs: None))
        stack.enter_context(_replaced(Node, "start_raylet", without_ports))
        stack.enter_context(_replaced(services, "start_ray_process", with_idle_agent))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
