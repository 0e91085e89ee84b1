"""Seeds: warm parents forked from one import of vLLM."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from folkmoot.cluster.processes import descendants, is_alive, wait_gone
from folkmoot.experts import warm, warm_seed
from folkmoot.experts.warm_seed import Seeds

ENTRY = "tests.experts.entries:surroundings"


def test_seeds_end_with_who_gives_them_out(short_dir: Path) -> None:
    """SIGKILL: not one is left, also while it imports."""
    program = (
        "import os, time\nfrom pathlib import Path\nfrom folkmoot.experts import warm_seed\n"
        f"with warm_seed.Seeds(Path({str(short_dir)!r}) / 'killed') as seeds:\n"
        "    os.environ['FOLKMOOT_WARM_SEEDS'] = str(seeds.path)\n    warm_seed._ask(seeds.path)\n"
        "    print(*(process.pid for _, process in seeds.started.values()), flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        seed = int(holder.stdout.readline())
        assert is_alive(seed)
        holder.kill()
    assert not wait_gone([seed], 60.0)


def test_where_nobody_gives_out_seeds_an_error_says_so(short_dir: Path) -> None:
    with pytest.raises(warm.WarmParentError, match=r"FOLKMOOT_WARM_SEEDS: nobody gives out seeds at .*/nobody"):
        warm_seed.follow(short_dir / "nobody", short_dir / "never.sock")


@pytest.mark.slow
def test_warm_parents_of_one_seed(
    seeds: Seeds, short_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is in its own surroundings, and ends with who asked for it; what it forked stays with its own owner."""
    monkeypatch.setenv("VLLM_TEST_OF_SEEDS", "1")  # a seed of their own
    paths = [short_dir / name for name in ("one.sock", "two.sock")]
    started = []
    folders = [Path.cwd(), tmp_path]
    for path, folder in zip(paths, folders, strict=True):
        monkeypatch.setenv("FOLKMOOT_TEST_NAME", path.stem)
        monkeypatch.chdir(folder)
        started.append(warm.start(path, path.with_suffix(".log")))
        warm.connect(path)
    try:
        parents = [warm.WarmParent(path) for path in paths]
        socket_path, seed = list(seeds.started.values())[-1]
        assert socket_path.with_suffix(".log").read_text().count("warm_seed:serve") == len(paths)
        children = [one.spawn(ENTRY, {"modules": ["vllm"]}, short_dir / "log") for one in parents]
        for path, folder, child in zip(paths, folders, children, strict=True):
            assert child.receive(10) == {"name": path.stem, "folder": str(folder), "imported": ["vllm"]}
            assert child.pid in descendants(seed.pid)
        os.kill(started[0].pid, signal.SIGKILL)
        started[1].terminate()
        assert [process.wait(10) for process in started] == [-signal.SIGKILL, 0]
        assert not wait_gone(set(descendants(seed.pid)) - {child.pid for child in children}, 5.0)
        assert all(child.is_alive() for child in children)
        for child in children:
            child.close()
        assert not wait_gone([child.pid for child in children], 5.0)
        assert seed.poll() is None
    finally:
        for process in started:
            process.kill()
            process.wait()
