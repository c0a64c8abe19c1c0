"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Whoever runs the tests may ignore these (nohup, a job in the background), and what is ignored
# here would be ignored by every process that a test starts and stops.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The developers' data folder beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the developers' data folder is not beside this checkout")
    return SHARED_DATA


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the long tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    skip = pytest.mark.skip(reason="long: runs with ./run test --all")
    for item in items:
        if "long" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave the user's caches alone."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test; its folder, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "milepost"


@pytest.fixture(autouse=True)
def no_training_left_behind() -> Iterator[None]:
    """Ends trainings that a failed test did not."""
    yield
    from tests.training import kill_started

    kill_started()


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that lose no power and write many small folders, which would wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small made-up benchmarks as files, to be read only."""
    from tests.benchmark_rows import write_rows

    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of made-up English: 512 tokens of vocabulary, training and validation."""
    from milepost.data.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny")
    for name, seed, num_documents in (("train", 1, 40), ("validation", 2, 4)):
        (folder / name).mkdir()
        for number in range(num_documents):
            text = made_up_text(seed=1000 * seed + number, num_words=400)
            (folder / name / f"{number:03d}.txt").write_text(text)
    out = folder / "data"
    prepare(
        [folder / "train"],
        out=out,
        tokenizer="train:512",
        val_sources=[folder / "validation"],
        workers=1,
    )
    return out


COMMON_WORDS = (
    "the of and to in a that it was he for on are with as his they at be this from have or by "
    "one had not but what all were when we there can an your which their said if do will each "
    "about how up out them then she many some so these would other into has more her two like "
    "him see time could no make than first been its who now people my made over did down only "
    "way find use may water long little very after words called just where most"
)


def made_up_text(*, seed: int, num_words: int) -> str:
    """Sentences of common words in random order, the same for the same seed."""
    words = COMMON_WORDS.split()
    source = random.Random(seed)
    sentences = []
    while num_words > 0:
        length = source.randint(4, 14)
        chosen = [source.choice(words) for _ in range(length)]
        sentences.append(" ".join(chosen).capitalize() + ".")
        num_words -= length
    return " ".join(sentences)
