"""What the tests of whole runs share: the tiny recipe, and a run of it that has ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.training import SHORT, train_here, write_recipe


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of 30 steps, as a file."""
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def finished(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it on one rank; to be read only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train_here(recipe, run, tiny_data)["status"] == "done"
    return run


@pytest.fixture(scope="session")
def trained(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps on one rank; checkpoints of 3, 6, 9 and 12, the last two with a train state.

    To be read only.
    """
    run = tmp_path_factory.mktemp("trained") / "run"
    train_here(recipe, run, tiny_data, *SHORT)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that may be changed."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"
