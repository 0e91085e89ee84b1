"""The demo checkpoint as a fixture, made once and kept in the user's cache for all sessions."""

from __future__ import annotations

from pathlib import Path

import pytest

from folkmoot.cluster import demo_model


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """Folder of the demo model (8 experts, top-4, bf16). Takes 25 s where the cache is cold. Do not write into it."""
    return demo_model.ensure()
