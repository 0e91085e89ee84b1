"""What counts as left over."""

from benchmarks.snapshot import leaks

BEFORE = {"processes gateway": 2, "file descriptors of gateway": 30, "memory bytes": 1000, "segments folkmoot-link": 6}


def test_the_same_is_no_leak() -> None:
    assert leaks(BEFORE, BEFORE) == []
    assert leaks(BEFORE, {**BEFORE, "memory bytes": 1050, "file descriptors of gateway": 38}) == []


def test_what_there_is_more_of_is_named() -> None:
    after = {
        "processes gateway": 3,
        "file descriptors of gateway": 39,
        "memory bytes": 1200,
        "segments folkmoot-link": 7,
        "requests that are not done": 1,
    }
    assert [line.split(":")[0] for line in leaks(BEFORE, after)] == sorted(after)
