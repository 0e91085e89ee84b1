"""Entry points that test_warm.py has forked."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from folkmoot.experts.warm import Control, exit_with_owner


def echo(spec: dict[str, Any], control: Control) -> None:
    """Say the spec, then every message back."""
    control.send({"spec": spec})
    while True:
        message = control.receive()
        if message is not None:
            control.send({"back": message})


def fail(spec: dict[str, Any], control: Control) -> None:
    """Die of an error."""
    raise ValueError(f"cannot use {spec['what']}")


def sleep(spec: dict[str, Any], control: Control) -> None:
    """Busy elsewhere: only the watching thread can see that the owner is gone."""
    exit_with_owner(control)
    control.send({"event": "ready"})
    time.sleep(600)


def remember(spec: dict[str, Any], control: Control) -> None:
    """Say what the memory file holds, and write the spec's text into it."""
    exit_with_owner(control)
    held = os.pread(spec["memory_fd"], 100, 0).decode()
    os.pwrite(spec["memory_fd"], spec["text"].encode(), 0)
    control.send({"held": held})
    time.sleep(600)


def last_words(spec: dict[str, Any], control: Control) -> None:
    """Do something before the end, and fail at it."""

    def before_exit() -> None:
        Path(spec["path"]).write_text("said")
        raise RuntimeError("and it went wrong")

    exit_with_owner(control, before_exit=before_exit)
    control.send({"event": "ready"})
    time.sleep(600)


def surroundings(spec: dict[str, Any], control: Control) -> None:
    """Say where it is, and which of these modules had been imported before."""
    imported = [name for name in spec["modules"] if name in sys.modules]
    exit_with_owner(control)
    control.send({"name": os.environ["FOLKMOOT_TEST_NAME"], "folder": os.getcwd(), "imported": imported})
    time.sleep(600)
