"""The runs that nothing happens to, trained once for all tests of faults."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.sabotage import Sabotage
from tests.training import SHIPPED, Course, train_here, write_recipe

LONGER = ("--train.total_steps", "120", "--checkpoint.every_steps", "10")
"""So that a fault meets the training before it is done."""


@pytest.fixture(scope="session")
def plain(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Course:
    """In float32 and not compiled, for tests that start it often."""
    return _course(LONGER, data=tiny_data, folder=tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def shipped(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Course:
    """In bfloat16 and compiled, as the packaged recipes train."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler is installed")
    return _course((*LONGER, *SHIPPED), data=tiny_data, folder=tmp_path_factory.mktemp("shipped"))


@pytest.fixture(scope="session")
def short(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Course:
    """30 steps with a checkpoint every 5, for tests in this process."""
    return _course((), data=tiny_data, folder=tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="session")
def stopped(short: Course, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stopped at step 15 with train states at 10 and 15; not to be touched."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    short.train_here(run, "--train.stop_at_step", "15")
    return run


@pytest.fixture
def half(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(stopped, tmp_path / "half"))


@pytest.fixture(params=["shipped", pytest.param("plain", marks=pytest.mark.long)])
def course(request: pytest.FixtureRequest) -> Course:
    """Both of them, the shipped one always."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def sabotage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sabotage:
    """Faults planted into the processes that the test starts."""
    return Sabotage(tmp_path / "sabotage", monkeypatch)


def _course(words: tuple[str, ...], *, data: Path, folder: Path) -> Course:
    recipe = write_recipe(folder)
    train_here(recipe, folder / "undisturbed", data, *words)
    return Course(recipe=recipe, data=data, words=words, undisturbed=folder / "undisturbed")
