"""Start-up: from typing `folkmoot up` to the first token, over the time monolithic vLLM takes to load the same model.

The monolith is the quickest way to load vLLM here: one process that imports it and builds `LLM`. Both in turn, each in
fresh processes; medians.

    python -m benchmarks.startup --json startup.json
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report
from folkmoot.cluster import demo_model
from folkmoot.cluster.state_file import StateFolder
from folkmoot.gateway.client import Client

MONOLITH = """
import sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], enforce_eager=True, kv_cache_memory_bytes=1 << 30, max_num_seqs=64)
print("loaded", flush=True)
llm.generate(["Hello"], SamplingParams(max_tokens=1), use_tqdm=False)
print("token", flush=True)
"""


def monolith(checkpoint: Path) -> tuple[float, float]:
    """Seconds until vLLM has loaded, and until its first token, from the start of the process."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    began, times = time.monotonic(), {}
    with subprocess.Popen(
        [sys.executable, "-c", MONOLITH, str(checkpoint)], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() in ("loaded", "token"):
                times[line.strip()] = time.monotonic() - began
    return times["loaded"], times["token"]


def folkmoot(checkpoint: Path, state_dir: Path) -> float:
    """Seconds from `folkmoot up` to the first token at a client."""
    command = [sys.executable, "-m", "folkmoot.cluster.cli"]
    where = ["--name", "startup", "--state-dir", str(state_dir)]
    began = time.monotonic()
    subprocess.run(
        [*command, "up", "--detach", "--model", str(checkpoint), "--listen", "127.0.0.1:0", "--max-num-seqs", "64",
         *where],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        state = StateFolder("startup", state_dir).read()
        assert state is not None and state.gateway is not None
        with Client(state.gateway) as client:
            next(iter(client.generate("Hello", max_tokens=1)))
        return time.monotonic() - began
    finally:
        subprocess.run([*command, "down", *where], check=True, stdout=subprocess.DEVNULL)


def measure(checkpoint: Path, rounds: int = 3) -> dict[str, object]:
    """Both in turn; prints the table and returns the figures."""
    ours, loads, tokens = [], [], []
    with tempfile.TemporaryDirectory(prefix="fm-up-") as name:
        for _ in range(rounds):
            loaded, token = monolith(checkpoint)
            loads.append(loaded)
            tokens.append(token)
            ours.append(folkmoot(checkpoint, Path(name)))
    rows = [
        ["vllm, one process, loaded", statistics.median(loads)],
        ["vllm, one process, first token", statistics.median(tokens)],
        ["folkmoot up, first token at a client", statistics.median(ours)],
    ]
    print(report.table("Start-up (s)", ["what", "seconds"], rows))
    return {
        "startup_ratio": statistics.median(ours) / statistics.median(loads),
        "startup_s": statistics.median(ours),
        "startup_vllm_s": statistics.median(loads),
    }


def main() -> None:
    """Measure and report."""
    args = report.parser(__doc__).parse_args()
    report.finish(measure(demo_model.ensure(), rounds=1 if args.quick else 3), args.json)


if __name__ == "__main__":
    main()
