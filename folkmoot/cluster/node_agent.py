"""One warm parent a node: found where there is one, started by the node's agent where there is none.

On the node where `folkmoot up` runs, `up` itself starts the warm parent before Ray, so that its long import overlaps
Ray's start. Elsewhere the first expert actor or engine on a node asks for a `NodeAgent`, which starts one and holds it.
"""

import asyncio
from pathlib import Path
from subprocess import Popen

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from folkmoot.cluster import environment, warm_files
from folkmoot.cluster.spec import ClusterSpec
from folkmoot.experts import secret, warm
from folkmoot.experts.warm import WarmParent

WARM_TIMEOUT_S = 300.0
"""How long importing vLLM may take: about 15 s alone, several times that on a machine that is busy."""


async def warm_parent(spec: ClusterSpec) -> WarmParent:
    """This node's warm parent, ready to fork, with the cluster's secret beside it.

    Raises WarmParentError if it does not come up.
    """
    if not warm_files.is_started(spec.warm_socket):
        node = ray.get_runtime_context().get_node_id()
        agent = NodeAgent.options(  # type: ignore[attr-defined]
            name=f"NodeAgent-{node}",
            namespace=spec.namespace,
            lifetime="detached",
            get_if_exists=True,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote(spec)
        await agent.ensure.remote()
    secret.keep(spec.secret_file, spec.secret)
    return await asyncio.to_thread(warm.connect, spec.warm_socket, WARM_TIMEOUT_S)


@ray.remote(num_cpus=0, max_restarts=-1)
class NodeAgent:
    """Holds the warm parent of its node; the warm parent ends with it."""

    def __init__(self, spec: ClusterSpec) -> None:
        environment.enter(spec.environment, "node-agent")
        self._spec = spec
        self._process: Popen[bytes] | None = None

    def ensure(self) -> None:
        """Start the warm parent unless one runs: another agent has one where Ray has several nodes on a machine."""
        if self._process is not None:
            self._process.poll()  # takes note of one that has ended
        Path(self._spec.run_dir).mkdir(parents=True, exist_ok=True, mode=0o700)
        Path(self._spec.log_dir).mkdir(parents=True, exist_ok=True)
        self._process = warm_files.start_missing(self._spec.warm_socket, self._spec.warm_log) or self._process
