"""What several unit tests read: a tokenizer, and a run folder that can be scored."""

from __future__ import annotations

from pathlib import Path

import pytest

from milepost.runs.layout import RunLayout
from milepost.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    """The packaged one."""
    return load_tokenizer("gpt2")


@pytest.fixture
def tiny_run(tmp_path: Path) -> RunLayout:
    """Checkpoints of steps 100 and 200; the models are tiny and differ."""
    from tests.tiny_models import write_tiny_run

    return write_tiny_run(tmp_path / "run", 100, 200)
