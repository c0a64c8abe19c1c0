"""`train.microbatch_rows = "auto"`: what is tried, chosen and remembered."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from milepost.config.recipe import load_recipe
from milepost.config.schema import Config
from milepost.core.errors import MilepostError
from milepost.train.forward_timing import ForwardTiming, has_run_out_of_memory
from milepost.train.microbatch import (
    choose_rows,
    fewest_as_fast,
    measure,
    recall,
    remember,
)
from tests.training import write_recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("row_seconds", "chosen"),
    [
        ({4: 1.0}, 4),
        ({1: 2.0, 2: 1.0, 4: 0.5}, 4),
        ({1: 1.0, 2: 1.5, 4: 2.0}, 1),
        ({2: 1.02, 4: 1.0, 8: 1.0}, 2),  # at 2 % it counts as equal
        ({2: 1.021, 4: 1.0, 8: 1.0}, 4),
    ],
)
def test_the_fewest_rows_within_two_percent_of_the_fastest_win(
    row_seconds: dict[int, float], chosen: int
) -> None:
    assert fewest_as_fast(row_seconds) == chosen


class Device:
    """Passes that take a second a row and run out of memory above some rows.

    `slow_turn` makes the n-th pass of each number of rows ten times slower.
    """

    def __init__(self, *, fits: int, seconds: float = 1e9, slow_turn: int | None = None) -> None:
        self.calls: list[int] = []
        self._fits = fits
        self._slow_turn = slow_turn
        self._left = seconds

    def pass_seconds(self, rows: int) -> float:
        self.calls.append(rows)
        if rows > self._fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        is_slow = self.calls.count(rows) == self._slow_turn
        seconds = rows * (10.0 if is_slow else 1.0)
        self._left -= seconds
        return seconds

    def seconds_left(self) -> float:
        return self._left

    def measure(self, candidates: list[int], *, num_tried: int = 4) -> dict[int, float]:
        return measure(
            candidates,
            num_tried=num_tried,
            pass_seconds=self.pass_seconds,
            seconds_left=self.seconds_left,
        )


def test_candidates_take_turns_after_they_were_warmed_up() -> None:
    device = Device(fits=100)
    assert device.measure([1, 2, 4]) == {1: 1.0, 2: 1.0, 4: 1.0}
    assert device.calls == [1, 1, 2, 2, 4, 4, 1, 2, 4, 1, 2, 4]


@pytest.mark.parametrize("slow_turn", [1, 2, 3, 4])
def test_one_disturbed_pass_does_not_show(slow_turn: int) -> None:
    assert Device(fits=100, slow_turn=slow_turn).measure([1, 2]) == {1: 1.0, 2: 1.0}


def test_the_largest_few_candidates_are_tried() -> None:
    assert list(Device(fits=100).measure([1, 2, 4, 8, 16, 32])) == [4, 8, 16, 32]
    assert list(Device(fits=100).measure([1, 2, 4], num_tried=3)) == [1, 2, 4]


@pytest.mark.parametrize(
    ("fits", "measured"), [(32, [4, 8, 16, 32]), (31, [4, 8, 16]), (4, [4]), (3, [2]), (1, [1])]
)
def test_running_out_of_memory_ends_the_search(fits: int, measured: list[int]) -> None:
    assert list(Device(fits=fits).measure([1, 2, 4, 8, 16, 32])) == measured


def test_where_not_one_row_fits_it_is_said_what_to_do() -> None:
    with pytest.raises(MilepostError, match="out of memory with the smallest") as caught:
        Device(fits=0).measure([1, 2, 4, 8, 16])
    assert "recompute" in caught.value.hint


def test_memory_that_is_gone_later_drops_the_candidate_and_those_above() -> None:
    device = Device(fits=4)

    def pass_seconds(rows: int) -> float:
        if len(device.calls) > 6:  # after the warm-up of three candidates
            device._fits = 1
        return device.pass_seconds(rows)

    found = measure(
        [1, 2, 4], num_tried=3, pass_seconds=pass_seconds, seconds_left=device.seconds_left
    )
    assert list(found) == [1]


def test_what_is_no_lack_of_memory_is_raised() -> None:
    def broken(_: int) -> float:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        measure([1, 2], num_tried=2, pass_seconds=broken, seconds_left=lambda: 1.0)


@pytest.mark.parametrize(("seconds", "measured"), [(0.5, [1]), (7.9, [1]), (8.1, [1, 2])])
def test_a_candidate_that_would_take_too_long_is_left_out(
    seconds: float, measured: list[int]
) -> None:
    assert list(Device(fits=100, seconds=seconds).measure([1, 2, 4, 8])) == measured


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_lack_of_memory_is_known_by_its_name(error: Exception, is_memory: bool) -> None:
    assert has_run_out_of_memory(error) == is_memory


KEY = {"device": "a CPU", "version": 1}


def test_what_was_measured_is_remembered(tmp_path: Path) -> None:
    file = tmp_path / "new" / "entry.json"
    assert recall(file, key=KEY, candidates=[1, 2, 4]) is None
    assert remember(file, key=KEY, rows=2, row_seconds={1: 0.3, 2: 0.2})
    assert recall(file, key=KEY, candidates=[1, 2, 4]) == 2


def _damage(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:20]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\xff\xfe\x00"),
        lambda file: (file.unlink(), file.mkdir()),
        _damage(lambda found: []),
        _damage(lambda found: found | {"key": {"device": "another"}}),
        _damage(lambda found: found | {"microbatch_rows": 3}),
        _damage(lambda found: found | {"microbatch_rows": "2"}),
        _damage(lambda found: found | {"microbatch_rows": [2]}),
        _damage(lambda found: {"key": found["key"]}),
    ],
)
def test_a_damaged_memory_is_said_and_not_believed(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "entry.json"
    remember(file, key=KEY, rows=2, row_seconds={2: 0.2})
    damage(file)
    assert recall(file, key=KEY, candidates=[1, 2, 4]) is None
    assert "measured again" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert not remember(tmp_path / "file" / "entry.json", key=KEY, rows=2, row_seconds={2: 0.2})
    assert "not remembered" in capsys.readouterr().err


def _write_many(file: Path, rows: int) -> None:
    for _ in range(100):
        remember(file, key=KEY, rows=rows, row_seconds={rows: 0.2})


def test_two_processes_that_write_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "entry.json"
    remember(file, key=KEY, rows=1, row_seconds={1: 0.2})
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(file, rows)) for rows in (2, 4)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(recall(file, key=KEY, candidates=[1, 2, 4]))
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert None not in seen
    assert recall(file, key=KEY, candidates=[1, 2, 4]) in (2, 4)
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def test_blocks_that_are_not_timed_count_as_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr("milepost.train.forward_timing.time.perf_counter", lambda: next(ticks))

    def seconds(num_blocks: int) -> float:
        words = ("--model.num_hidden_layers", str(num_blocks))
        with ForwardTiming(tiny(tmp_path, *words), device=CPU, ranks=1) as timing:
            return timing.pass_seconds(1)

    # The clock is read at both ends of the pass, and of the blocks forward and backward.
    assert [seconds(n) for n in (1, 2, 3, 6)] == [5, 5, 5 + 1, 5 + 4]


def tiny(folder: Path, *words: str) -> Config:
    return load_recipe(str(write_recipe(folder)), overrides=words)


def choose(config: Config, folder: Path, *, ranks: int = 1) -> int:
    return choose_rows(config, candidates=[1, 2, 4], device=CPU, ranks=ranks, folder=folder)


def test_another_kind_of_run_is_measured_anew(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    choose(tiny(tmp_path), cache)
    choose(tiny(tmp_path, "--train.total_steps", "99", "--run.seed", "3"), cache)
    assert len(list(cache.iterdir())) == 1, "neither length nor seed changes the speed"
    others = (
        ("--data.sequence_length", "16"),
        ("--model.hidden_size", "64"),
        ("--train.precision", "bfloat16"),
        ("--train.recompute", "block"),
        ("--finetune.template", "vicuna-1.1", "--lora.rank", "2"),
        ("--data.document_attention", "true"),
        ("--train.lanes", "1"),
    )
    for number, words in enumerate(others):
        choose(tiny(tmp_path, *words), cache)
        assert len(list(cache.iterdir())) == 2 + number, words


def test_what_is_remembered_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = choose(tiny(tmp_path), tmp_path / "cache")
    said = capsys.readouterr().err
    assert "microbatch:" in said and "probed in" in said and "remembered in" in said
    monkeypatch.setattr(ForwardTiming, "pass_seconds", None)
    assert choose(tiny(tmp_path), tmp_path / "cache") == rows
    assert "as remembered in" in capsys.readouterr().err


def test_one_candidate_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForwardTiming, "pass_seconds", None)
    config = tiny(tmp_path)
    assert choose_rows(config, candidates=[1], device=CPU, ranks=1, folder=tmp_path / "c") == 1
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--model.num_hidden_layers", "5"),
        ("--model.num_hidden_layers", "5", "--train.recompute", "4"),
        ("--model.num_hidden_layers", "1"),
        ("--finetune.template", "vicuna-1.1", "--lora.rank", "2"),
        ("--finetune.template", "vicuna-1.1"),
        ("--train.precision", "bfloat16", "--train.compile", "true"),
    ],
)
def test_every_kind_of_run_can_be_timed(words: tuple[str, ...], tmp_path: Path) -> None:
    state = torch.get_rng_state()
    with ForwardTiming(tiny(tmp_path, *words), device=CPU, ranks=2) as timing:
        assert timing.pass_seconds(2) > 0
        assert timing.pass_seconds(4) > 0
    assert torch.equal(torch.get_rng_state(), state), "the run's own draws are untouched"
