"""The weight segment: what hosts of a node share, what they cannot break, and that nothing half-loaded is ever used."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.checkpoints import tiny
from benchmarks.clusters import is_keeper
from benchmarks.engines import Bench, Pool
from folkmoot.experts import expert_map as em
from folkmoot.experts.dispatcher import DispatchConfig, Dispatcher
from folkmoot.experts.weights import Layout, SegmentError, WeightSegment

LAYOUT = Layout("a checkpoint", 8, {n: {"w": ("bfloat16", (64, 512)), "bias": ("float32", (5,))} for n in (0, 3)})
HIDDEN, EXPERTS, TOP_K = 128, 8, 2


def rows(experts: list[int]) -> dict[str, torch.Tensor]:
    """What an expert's parameters are: all its number."""
    numbers = torch.tensor(experts)
    return {
        "w": numbers.view(-1, 1, 1).expand(-1, 64, 512).to(torch.bfloat16),
        "bias": numbers.view(-1, 1).expand(-1, 5).to(torch.float32),
    }


def store(segment: WeightSegment, layer: int, experts: list[int]) -> None:
    with segment.locked(layer, wait=True):
        segment.write(layer, experts, rows(experts))
        segment.mark_present(layer, experts)


@pytest.fixture
def memory_fd() -> Iterator[int]:
    fd = os.memfd_create("folkmoot-weights", os.MFD_ALLOW_SEALING)
    yield fd
    os.close(fd)


def in_child(function: Callable[[], None]) -> int:
    """A forked process that runs `function`; its pid."""
    if (pid := os.fork()) == 0:
        try:
            function()
        finally:
            os._exit(0)
    return pid


def test_what_one_host_stores_another_one_sees(memory_fd: int) -> None:
    writer, reader = WeightSegment(memory_fd, LAYOUT), WeightSegment(memory_fd, LAYOUT)
    empty_bytes = os.fstat(memory_fd).st_blocks * 512
    assert reader.missing(3, [1, 5, 7]) == [1, 5, 7]
    store(writer, 3, [5, 1])
    assert reader.missing(3, [1, 5, 7]) == [7]
    assert reader.missing(0, [1, 5, 7]) == [1, 5, 7]
    seen = reader.tensors(3)
    assert seen["w"].shape == (8, 64, 512) and seen["bias"].shape == (8, 5)
    for expert in (1, 5):
        assert torch.equal(seen["w"][expert], rows([expert])["w"][0])
        assert torch.equal(seen["bias"][expert], rows([expert])["bias"][0])
    assert seen["w"][7].count_nonzero() == 0
    two_rows = 2 * 64 * 512 * 2
    assert os.fstat(memory_fd).st_size > 8 * two_rows / 2
    assert two_rows <= os.fstat(memory_fd).st_blocks * 512 - empty_bytes <= two_rows + (4 << 20)  # huge pages round up


def test_a_segment_of_other_weights_is_refused(memory_fd: int) -> None:
    WeightSegment(memory_fd, LAYOUT)
    with pytest.raises(SegmentError, match="another checkpoint"):
        WeightSegment(memory_fd, Layout("a changed checkpoint", 8, LAYOUT.layers))
    with pytest.raises(SegmentError, match="not \\['bias'\\]"):
        WeightSegment(memory_fd, LAYOUT).write(0, [1], {"bias": rows([1])["bias"]})


def test_the_size_of_a_segment_is_sealed(memory_fd: int) -> None:
    WeightSegment(memory_fd, LAYOUT)
    with pytest.raises(PermissionError):
        os.ftruncate(memory_fd, 0)


def test_a_stray_write_kills_the_writer_and_changes_nothing(memory_fd: int) -> None:
    segment = WeightSegment(memory_fd, LAYOUT)
    store(segment, 0, [2])

    def scribble() -> None:
        segment.tensors(0)["w"][2].fill_(9.0)

    pid = in_child(scribble)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV
    assert torch.equal(segment.tensors(0)["w"][2], rows([2])["w"][0])


def test_a_loader_killed_half_way_leaves_its_expert_absent_and_its_layer_free(memory_fd: int) -> None:
    segment = WeightSegment(memory_fd, LAYOUT)
    written, say = os.pipe()
    held, hold = os.pipe()  # the loader waits for this, and ends with this process

    def load_half() -> None:
        os.close(hold)
        loader = WeightSegment(memory_fd, LAYOUT)  # as in a host: with locks of its own
        with loader.locked(3, wait=True):
            loader.write(3, [4], {name: torch.full_like(r, 77) for name, r in rows([4]).items()})
            os.write(say, b"!")
            os.read(held, 1)

    pid = in_child(load_half)
    assert os.read(written, 1) == b"!"
    with segment.locked(3, wait=False) as is_held:
        assert not is_held  # it is still at work
    with segment.locked(0, wait=False) as is_held:
        assert is_held  # on another layer one can load meanwhile
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert segment.tensors(3)["w"][4].max() == 77  # the fault did happen: half of an expert lies there
    assert segment.missing(3, [4]) == [4]
    store(segment, 3, [4])
    assert torch.equal(segment.tensors(3)["w"][4], rows([4])["w"][0])
    for fd in (written, say, held, hold):
        os.close(fd)


def test_a_creator_killed_before_the_seal_is_replaced(memory_fd: int) -> None:
    os.ftruncate(memory_fd, 123)  # as it stands if the first host dies in the middle of laying out
    store(WeightSegment(memory_fd, LAYOUT), 0, [6])
    assert WeightSegment(memory_fd, LAYOUT).missing(0, [6, 7]) == [7]


# Real hosts, forked by a real warm parent that has imported vLLM.


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench() as bench:
        yield bench


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny("mixtral", tmp_path / "mixtral")


def answers(pool: Pool, only: str | None = None) -> torch.Tensor:
    """What the pool's experts (of one host, where named) make of fixed rows, in every layer."""
    if only is not None:
        for host in set(pool.expert_map.hosts) - {only}:
            pool.expert_map = em.remove_host(pool.expert_map, host)
    dispatcher = Dispatcher(DispatchConfig(**pool.dispatch()))  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    x = torch.randn((64, HIDDEN), generator=g).to(torch.bfloat16)
    ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOP_K] for _ in range(64)]).int()
    weights = torch.rand((64, TOP_K), generator=g)
    out = torch.stack([dispatcher.forward(n, x, weights, ids)[0] for n in pool.expert_map.layers])
    dispatcher.close()
    return out


def segment_memory(pid: int) -> dict[str, int]:
    """Bytes of a process's mapping of the weight segment, by the kernel's names; empty without one."""
    found: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            inside = "memfd:folkmoot-weights" in line
        elif inside and len(rest) == 2 and rest[1] == "kB":
            found[name.rstrip(":")] = found.get(name.rstrip(":"), 0) + int(rest[0]) * 1024
    return found


def segment_inode(pid: int) -> int | None:
    """The memory file that a process maps."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "memfd:folkmoot-weights" in line:
            return int(line.split()[4])
    return None


def holders(inode: int) -> set[int]:
    """The processes that hold or map a memory file, but for those that keep the memory of one which does."""
    return all_holders(inode, keepers=False)


def all_holders(inode: int, *, keepers: bool = True) -> set[int]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = {os.stat(fd).st_ino for fd in (process / "fd").iterdir() if "folkmoot-weights" in os.readlink(fd)}
            is_one = inode in held or segment_inode(int(process.name)) == inode
            if is_one and (keepers or not is_keeper(int(process.name))):
                found.add(int(process.name))
        except OSError:
            continue  # it has ended meanwhile
    return found


def test_hosts_share_pages_and_compute_the_same_rows(bench: Bench, checkpoint: Path, record_property: Callable) -> None:
    private = bench.pool(checkpoint, 2, 1, share_weights=False)
    expected = answers(private)
    assert not any(segment_memory(child.pid) for child in private.children.values())
    private.close()
    pool = bench.pool(checkpoint, 2, 2)
    record_property("load_s", pool.load_s)
    assert pool.bytes == private.bytes
    assert torch.equal(answers(pool), expected)
    first, second = (child.pid for child in pool.children.values())
    assert segment_inode(first) == segment_inode(second) is not None
    for host in ("h0", "h1"):
        assert torch.equal(answers(bench.pool(checkpoint, 2, 2), only=host), expected)
    for pid in (first, second):
        memory = segment_memory(pid)
        assert memory["Rss"] > 0 and memory["Private_Dirty"] == memory["Private_Clean"] == 0
        assert memory["Pss"] <= memory["Rss"] / 2


MIXED = {"expert_dtype": "auto:0.5", "expert_letters": {n: "44b84844"[n:] + "844"[:n] for n in range(4)}}


@pytest.mark.parametrize("dtypes", [{"expert_dtype": "int8"}, {"expert_dtype": "int4"}, MIXED], ids=str)
def test_quantised_experts_are_shared_and_compute_the_same_rows_anywhere(
    bench: Bench, checkpoint: Path, dtypes: dict[str, Any]
) -> None:
    private = bench.pool(checkpoint, 1, 1, share_weights=False, **dtypes)
    expected = answers(private)
    private.close()
    spoil(checkpoint)  # what comes now comes from the cache
    for num_hosts, replicas in ((2, 2), (4, 1)):
        pool = bench.pool(checkpoint, num_hosts, replicas, **dtypes)
        assert torch.equal(answers(pool), expected)
        assert pool.bytes == private.bytes < 0.53 * bench.pool(checkpoint).bytes
        inodes = {segment_inode(child.pid) for child in pool.children.values()}
        assert len(inodes) == 1 and None not in inodes
        assert all(segment_memory(child.pid)["Rss"] > 0 for child in pool.children.values())


def test_a_host_started_again_finds_its_experts_without_reading_the_checkpoint(
    bench: Bench, checkpoint: Path, record_property: Callable
) -> None:
    pool = bench.pool(checkpoint, 2, 2)
    expected = answers(pool)
    for child in pool.children.values():
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait(10)
    spoil(checkpoint)
    again = bench.pool(checkpoint, 2, 2)
    record_property("load_s", again.load_s)
    assert torch.equal(answers(again), expected)
    unreadable = bench.pool(checkpoint, 2, 2, share_weights=False)
    assert answers(unreadable).isnan().all()  # so it would have been noticed


def spoil(checkpoint: Path) -> None:
    """Overwrite every tensor of a checkpoint with NaN; names, sizes and times of its files stay."""
    for file in checkpoint.glob("*.safetensors"):
        before, data = file.stat(), bytearray(file.read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        data[begin:] = b"\xff" * (len(data) - begin)
        file.write_bytes(data)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_checkpoint_that_has_changed_is_loaded_and_not_shared(bench: Bench, checkpoint: Path) -> None:
    pool = bench.pool(checkpoint, 1, 1)
    before = answers(pool)
    pool.close()
    time.sleep(0.01)  # a later time for the files
    tiny("mixtral", checkpoint, seed=1)
    changed = bench.pool(checkpoint, 1, 1)
    assert segment_memory(changed.children["h0"].pid) == {}
    assert torch.equal(answers(changed), answers(bench.pool(checkpoint, 1, 1, share_weights=False)))
    assert not torch.equal(answers(changed), before)


@pytest.mark.slow
def test_a_segment_outlives_its_owner_only_in_its_hosts(checkpoint: Path) -> None:
    """The warm parent is SIGKILLed: its hosts go on, the next one's load anew, and nothing is left in the end."""
    with Bench() as bench:
        pool = bench.pool(checkpoint, 2, 2)
        expected = answers(pool)
        hosts = {child.pid for child in pool.children.values()}
        inode = segment_inode(min(hosts))
        assert inode is not None
        (owner,) = holders(inode) - hosts
        os.kill(owner, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while holders(inode) != hosts:
            assert time.monotonic() < deadline, holders(inode)
            time.sleep(0.01)
        assert torch.equal(answers(pool), expected)
        second = bench.pool(checkpoint, 2, 2, openmp={"GOMP_SPINCOUNT": "20001"})  # from another warm parent
        assert segment_inode(second.children["h0"].pid) != inode
        assert torch.equal(answers(second), expected)
        pool.close()
        deadline = time.monotonic() + 10
        while all_holders(inode):
            assert time.monotonic() < deadline, all_holders(inode)
            time.sleep(0.01)
