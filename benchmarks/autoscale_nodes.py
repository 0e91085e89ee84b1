"""Engines on nodes that Ray's own autoscaler adds and takes away: fake nodes (more raylets) on this machine.

The head has room for expert hosts and not for an engine, so that each engine needs a node, as with KubeRay. Ray finds
the fake nodes by sessions and ports that all of a machine share, and stopping them means every Ray process in sight.
Therefore all of it runs in pid and mount namespaces of its own, with its own shared memory and temporary folder, and
ends with its first process.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.autoscale_real import Run, come_and_go
from benchmarks.checkpoints import tiny
from benchmarks.clusters import Cluster
from benchmarks.load import Faults
from folkmoot.gateway.embedded import EmbeddedStore

ENGINES = 2
IDLE_MINUTES = 0.1
TIMEOUT_S = 420.0
UNSHARE = ("unshare", "-m", "-p", "-f", "--mount-proc", "--kill-child")
INSIDE = 'set -e; mount -t tmpfs none /dev/shm; mount -t tmpfs none "$1"; shift; exec "$@"'
RAY = str(Path(sys.executable).with_name("ray"))
OPTIONS = (
    *("--dtype", "float32", "--max-model-len", "512", "--hosts", "2", "--max-num-seqs", "8", "--replicas", "2"),
    *("--engines", f"0..{ENGINES}", "--idle-s", "2", "--cpus-per-engine", "1", "--address", "auto"),
)


def why_not() -> str | None:
    """What keeps this machine from it; None: nothing."""
    missing = [tool for tool in ("unshare", "mount") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    tried = subprocess.run([*UNSHARE, "sh", "-c", "mount -t tmpfs none /dev/shm"], capture_output=True, text=True)
    return f"namespaces are not permitted: {tried.stderr.strip()}" if tried.returncode else None


def figures() -> dict[str, object]:
    """Run it in namespaces of its own. Raises RuntimeError with what it printed where it fails."""
    from benchmarks.autoscale import real

    with tempfile.TemporaryDirectory(prefix="fa-", dir="/tmp") as temp, tempfile.NamedTemporaryFile("r") as result:
        command = [*UNSHARE, "sh", "-c", INSIDE, "init", temp, sys.executable, "-m", "benchmarks.autoscale_nodes"]
        environment = {**os.environ, "TMPDIR": temp, "RAY_TMPDIR": temp, **_ray_settings()}
        done = subprocess.run(
            [*command, result.name], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the run on fake nodes failed:\n{done.stdout[-4000:]}")
        raw = json.loads(result.read())
    outcome = Run(**{**raw["run"], "faults": Faults(**raw["run"]["faults"])})
    print(f"\nnodes besides the head: at most {raw['most_nodes']}, {raw['nodes_s']:.0f} s after the last engine none")
    nodes = {"most": raw["most_nodes"], "gone_s": raw["nodes_s"]}
    return {**real("each on a node that Ray's autoscaler added", outcome), **nodes}


def _ray_settings() -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
    }


def cluster_config() -> dict[str, Any]:
    """For Ray's autoscaler: nodes with room for one engine."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    return {
        "cluster_name": "fake",
        "max_workers": ENGINES,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,  # all nodes have the address of this machine
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "engine": {
                "resources": {"CPU": 1, "object_store_memory": 80 << 20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": ENGINES,
            },
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        **{name: [] for name in ("initialization_commands", "setup_commands", "head_setup_commands")},
        **{name: [] for name in ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")},
        "file_mounts": {},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    }


@contextlib.contextmanager
def fake_cluster(folder: Path) -> Iterator[None]:
    """A head with the autoscaler. Everything of it ends with the namespace."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    config = folder / "autoscaling.json"
    config.write_text(json.dumps(cluster_config()))
    options = ["--head", "--num-cpus=1", f"--autoscaling-config={config}", f"--object-store-memory={80 << 20}"]
    names = ("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING")  # how the autoscaler tells nodes apart
    environment = {**os.environ, **dict.fromkeys(names, FAKE_HEAD_NODE_ID)}
    subprocess.run([RAY, "start", *options, "--disable-usage-stats"], env=environment, check=True)
    yield
    subprocess.run([RAY, "stop", "--force"], check=False)


async def _watch_nodes(seen: list[int]) -> None:
    import ray

    while True:
        seen.append(sum(node["Alive"] for node in ray.nodes()) - 1)
        await asyncio.sleep(0.5)


async def _run(cluster: Cluster) -> dict[str, Any]:
    seen: list[int] = []
    watching = asyncio.create_task(_watch_nodes(seen))
    outcome = await come_and_go(cluster.addresses, ENGINES)
    began_s = time.monotonic()
    while seen[-1]:
        if time.monotonic() - began_s > 90.0:
            raise TimeoutError(f"{seen[-1]} nodes are left")
        await asyncio.sleep(0.5)
    watching.cancel()
    return {"run": asdict(outcome), "most_nodes": max(seen), "nodes_s": time.monotonic() - began_s}


def main(result: Path) -> None:
    """Inside the namespaces."""
    import ray

    folder = Path(tempfile.mkdtemp())
    model = tiny("mixtral", folder / "tiny-mixtral", dtype="float32")
    with EmbeddedStore(folder / "store", port=None) as store, fake_cluster(folder):
        ray.init(address="auto", log_to_driver=False)
        url = store.tcp_url.replace("127.0.0.1", "localhost")  # the same from every node: they are all here
        with Cluster(model, (*OPTIONS, "--redis", url)) as cluster:
            result.write_text(json.dumps(asyncio.run(_run(cluster))))
        ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
