"""The warm parent: children, their control channels, and that none outlives its owner."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from folkmoot.experts import warm
from folkmoot.experts.warm import Child, WarmParent, WarmParentError


def ended(pid: int, within_s: float = 5.0) -> bool:
    """Whether a process is gone, or is, soon."""
    deadline = time.monotonic() + within_s
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_messages_go_both_ways(plain_parent: WarmParent, tmp_path: Path) -> None:
    child = plain_parent.spawn("tests.experts.entries:echo", {"a": [1]}, tmp_path / "log")
    assert child.receive(10) == {"spec": {"a": [1]}}
    large = {"text": "x" * 300_000}
    child.send(large)
    assert child.receive(10) == {"back": large}
    assert child.receive(0.05) is None
    assert child.is_alive()
    child.control.close()
    assert child.wait(5)


def test_an_error_is_told_and_logged(plain_parent: WarmParent, tmp_path: Path) -> None:
    child = plain_parent.spawn("tests.experts.entries:fail", {"what": "this"}, tmp_path / "log")
    assert child.receive(10) == {"event": "error", "message": "ValueError: cannot use this"}
    assert child.wait(5)
    assert "cannot use this" in (tmp_path / "log").read_text()
    with pytest.raises(EOFError):
        child.receive(1)


def test_a_child_ends_with_its_owner(plain_parent: WarmParent, tmp_path: Path) -> None:
    """The owner is SIGKILLed: end-of-file reaches a child that computes."""
    owner = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from folkmoot.experts import warm\n"
        f"child = warm.connect(Path({str(plain_parent.socket_path)!r})).spawn("
        f"'tests.experts.entries:sleep', {{}}, Path({str(tmp_path / 'log')!r}))\n"
        "assert child.receive(10)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        process.kill()
    assert ended(pid)


def test_last_words_are_said_and_hold_nothing_up(plain_parent: WarmParent, tmp_path: Path) -> None:
    child = plain_parent.spawn("tests.experts.entries:last_words", {"path": str(tmp_path / "words")}, tmp_path / "log")
    assert child.receive(10) == {"event": "ready"}
    child.control.close()
    assert child.wait(5)
    assert (tmp_path / "words").read_text() == "said"


def test_an_offer_never_waits_for_who_does_not_read() -> None:
    """What does not go whole is kept or dropped; what went can be read, and all that is sent afterwards."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
    sender, reader = warm.Control(ours), warm.Control(theirs)
    went = [number for number in range(2000) if sender.offer({"number": number, "text": "x" * 1000})]
    assert 0 < len(went) < 2000, "it was full"
    threading.Timer(0.1, sender.send, ({"number": "the end"},)).start()
    got = []
    while not got or got[-1] != "the end":
        message = reader.receive(10)
        assert message is not None
        got.append(message["number"])
    assert got == [*went, "the end"]
    assert sender.offer({"number": "more"})
    assert reader.receive(10) == {"number": "more"}
    for control in (sender, reader):
        control.close()


def test_kill_is_seen_at_once(plain_parent: WarmParent, tmp_path: Path) -> None:
    child = plain_parent.spawn("tests.experts.entries:sleep", {}, tmp_path / "log")
    assert child.receive(10) == {"event": "ready"}
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(EOFError):
        child.receive(5)
    assert child.wait(5)
    assert not child.is_alive()
    child.kill()  # of a dead one: nothing


@pytest.mark.parametrize(
    "line", [b"\n", b"[]\n", b"{}\n", b"\xff\xff\n", b'{"entry": 1}\n', b'{"entry": "a:b", "spec": 3}\n']
)
def test_nonsense_is_refused_and_harmless(plain_parent: WarmParent, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(plain_parent.socket_path))
        sock.sendall(line)
        sock.settimeout(10)
        assert "error" in json.loads(sock.makefile().readline())


def test_who_has_given_up_gets_no_child(short_dir: Path, tmp_path: Path) -> None:
    """It may have turned to another parent, whose child has the place that this one would take."""
    with warm.start(short_dir / "slow.sock", tmp_path / "warm.log", modules=["tests.experts.entries"]) as process:
        parent = warm.connect(short_dir / "slow.sock", 30)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(WarmParentError, match=r"no answer within 0\.3 s"):
            parent.spawn("tests.experts.entries:sleep", {}, tmp_path / "late", 0.3)
        process.send_signal(signal.SIGCONT)
        child = parent.spawn("tests.experts.entries:sleep", {}, tmp_path / "log")
        assert child.receive(10) == {"event": "ready"}
        child.close()
        process.terminate()
    assert (tmp_path / "warm.log").read_text().count("forked") == 1


def test_the_next_parent_finds_the_memory_files_of_a_dead_one(short_dir: Path, tmp_path: Path) -> None:
    """As long as a child of the dead one lives; another socket, or another name, is another file."""

    def held(parent: WarmParent, name: str, text: str) -> tuple[Child, str]:
        child = parent.spawn("tests.experts.entries:remember", {"text": text}, tmp_path / "log", memory=name)
        answer = child.receive(10)
        assert answer is not None
        return child, answer["held"]

    def start(name: str) -> "subprocess.Popen[bytes]":
        return warm.start(short_dir / name, tmp_path / "warm.log", modules=["tests.experts.entries"])

    with start("kept.sock") as first, start("other.sock") as stranger:
        parent = warm.connect(short_dir / "kept.sock", 30)
        living, nothing = held(parent, "weights", "of the first")
        assert nothing == ""
        first.kill()
        first.wait(10)
        with start("kept.sock") as second:
            parent = warm.connect(short_dir / "kept.sock", 30)
            children = [held(parent, "weights", "of the second"), held(parent, "else", "x")]
            children += [held(warm.connect(short_dir / "other.sock", 30), "weights", "y")]
            assert [found for _, found in children] == ["of the first", "", ""]
            for child in (living, *(child for child, _ in children)):
                child.kill()
                assert child.wait(5)
            second.kill()
            second.wait(10)
        with start("kept.sock") as third:
            child, found = held(warm.connect(short_dir / "kept.sock", 30), "weights", "z")
            assert found == "", "nobody has it any more"
            child.kill()
            third.terminate()
        stranger.terminate()


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(WarmParentError, match="no warm parent listens"):
        warm.connect(tmp_path / "none.sock", 0.1)
    with pytest.raises(WarmParentError, match="could not start"):
        WarmParent(tmp_path / "none.sock").spawn("a:b", {}, tmp_path / "log")


def test_the_parent_ends_with_its_starter(tmp_path: Path, short_dir: Path) -> None:
    """And takes its socket with it."""
    path = short_dir / "other.sock"
    starter = (
        "import time\nfrom pathlib import Path\nfrom folkmoot.experts import warm\n"
        f"p = warm.start(Path({str(path)!r}), Path({str(tmp_path / 'log')!r}), modules=['json'])\n"
        f"warm.connect(Path({str(path)!r}), 30)\nprint(p.pid, flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    assert ended(pid)
    assert not path.exists()
