"""Logs of every process: one line an event, as text or as JSON, with the ids of what the line is about.

    logs.set_up("engine", engine="engine-x3")       # once a process
    logs.bind(request_id="r1", attempt=2)           # for the rest of this task, or thread
    log.info("ended: %s", why)                      # ... engine INFO ...: ended: lost [engine=engine-x3 request_id=r1]

A line never holds a prompt, an answer, a key or a secret: it names things by their ids. Environment variables carry the
settings to all processes that are started; options of the commands come before them.
"""

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

FORMAT_VARIABLE, LEVEL_VARIABLE = "FOLKMOOT_LOG_FORMAT", "FOLKMOOT_LOG_LEVEL"
FORMATS, LEVELS = ("text", "json"), ("debug", "info", "warning", "error")
DEFAULT_FORMAT, DEFAULT_LEVEL = "text", "info"

HELP = {
    "log_format": f"how log lines look: text or json (also by environment variable {FORMAT_VARIABLE}; default: text)",
    "log_level": f"the least that is logged (also by environment variable {LEVEL_VARIABLE}; default: info)",
}
"""Of the options --log-format and --log-level, which every command has that starts a process."""

_bound: ContextVar[Mapping[str, Any]] = ContextVar("log_fields", default=MappingProxyType({}))


def set_up(part: str, **fields: Any) -> None:
    """All that this process logs goes to standard error from now on, as the environment says. Called again, it replaces
    what was set up before: a forked process is another part.

    `part` says what kind of process it is; `fields` stand on each line. Raises ValueError for an unknown
    format or level.
    """
    wanted = _one_of(FORMATS, FORMAT_VARIABLE, DEFAULT_FORMAT)
    level = getattr(logging, _one_of(LEVELS, LEVEL_VARIABLE, DEFAULT_LEVEL).upper())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((JsonFormatter if wanted == "json" else TextFormatter)(part, fields))
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger().setLevel(max(level, logging.INFO))  # libraries are never asked for more
    logging.getLogger("folkmoot").setLevel(level)
    if wanted == "json":
        os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")  # read when vLLM is imported: its lines then come here


def variables(log_format: str | None, level: str | None) -> dict[str, str]:
    """What has a process log so, in its environment; None: as it would anyway."""
    given = {FORMAT_VARIABLE: log_format, LEVEL_VARIABLE: level}
    return {name: value for name, value in given.items() if value is not None}


def bind(**fields: Any) -> None:
    """These fields stand on each line of this task (or thread) from now on, and of the tasks that it starts."""
    _bound.set({**_bound.get(), **fields})


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """The same for the lines inside."""
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


class TextFormatter(logging.Formatter):
    """For people: time, part, level, logger, message, and the fields in brackets."""

    def __init__(self, part: str, fields: Mapping[str, Any]) -> None:
        super().__init__(f"%(asctime)s {part} %(levelname)s %(name)s: %(message)s")
        self._fields = fields

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without an exception's traceback."""
        line = super().formatMessage(record)
        fields = " ".join(f"{name}={_word(value)}" for name, value in _fields(self._fields))
        return f"{line} [{fields}]" if fields else line


class JsonFormatter(logging.Formatter):
    """For programs: one JSON object a line."""

    def __init__(self, part: str, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self._first = {"part": part, "pid": os.getpid()}
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        """Keys: time (UTC), level, part, pid, logger, message, the fields', and exception with its traceback."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            **self._first,
            "logger": record.name,
            "message": record.getMessage(),
            **dict(_fields(self._fields)),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def frames_of(error: BaseException) -> str:
    """An exception's kind and where it came from, without its message, which may quote what a client sent."""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    return f"{type(error).__name__}\n{frames}"


class Bounded(logging.Filter):
    """Of lines that strangers can cause: lets `most` a second pass. The next one says how many did not."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most, self._passed, self._dropped, self._second = most, 0, 0, 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this one passes."""
        if record.created - self._second >= 1.0:
            self._second, self._passed = record.created, 0
        if self._passed >= self._most:
            self._dropped += 1
            return False
        self._passed += 1
        if self._dropped:
            record.msg = f"{record.getMessage()} ({self._dropped} lines before it were dropped)"
            record.args, self._dropped = (), 0
        return True


def _fields(of_process: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is known, without what is empty."""
    for name, value in {**of_process, **_bound.get()}.items():
        if value not in (None, ""):
            yield name, value


def _word(value: Any) -> str:
    """So that nobody's name looks like another field, or another line."""
    text = str(value)
    return text if text.isprintable() and not set(text) & set(" []=") else repr(text)


def _one_of(choices: tuple[str, ...], variable: str, default: str) -> str:
    value = os.environ.get(variable, "") or default
    if value.lower() not in choices:
        raise ValueError(f"{variable} must be one of {', '.join(choices)}, is {value!r}")
    return value.lower()
