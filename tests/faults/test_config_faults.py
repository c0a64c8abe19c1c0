"""Rows 16, 25 and 30: settings that make training diverge, that changed, or that cannot be."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from milepost.checkpoint.store import verify_checkpoint
from milepost.config.problems import ConfigError
from milepost.config.recipe import load_recipe
from milepost.core.errors import DivergedError, UsageError
from milepost.runs.layout import RunLayout, checkpoint_folders
from tests.training import TINY_RECIPE, Course, environment, events, train_here


def check_finite_checkpoints(run: Path) -> int:
    """Every checkpoint is whole and no number of it is NaN or infinite; how many there are."""
    folders = checkpoint_folders(RunLayout(run))
    for step, folder in folders:
        verify_checkpoint(folder, run_id=None, step=step)
        for file in folder.rglob("*.safetensors"):
            assert all(bool(torch.isfinite(t).all()) for t in load_file(file).values()), file
    return len(folders)


@pytest.mark.parametrize(
    "options",
    [
        ("1e30", "--optimizer.clip_grad_norm", "1e6"),
        ("1e30", "--optimizer.weight_decay", "10", "--schedule.warmup_steps", "0"),
        ("1e6", "--optimizer.clip_grad_norm", "none", "--optimizer.weight_decay", "10"),
    ],
)
def test_a_learning_rate_that_diverges_ends_with_5_at_the_same_step_however_often_it_is_tried(
    options: tuple[str, ...], short: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ("--optimizer.learning_rate", *options, "--checkpoint.every_steps", "1")
    for attempt in range(2):
        with pytest.raises(DivergedError, match=r"^step \d+: loss .* not finite") as caught:
            short.train_here(run, *words)
        ended = events(run, "segment_ended")
        assert [event["reason"] for event in ended] == ["diverged"] * (attempt + 1)
        assert caught.value.message.startswith(f"step {ended[0]['step'] + 1}: ")
        assert check_finite_checkpoints(run) == ended[-1]["step"] == ended[0]["step"]


def test_a_diverged_training_says_the_step_and_exits_with_5(
    shipped: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = shipped.train(run, "--optimizer.learning_rate", "1e30", "--checkpoint.every_steps", "1")
    assert done.returncode == 5, done.stderr
    assert "error: step 2: loss " in done.stderr and "lower optimizer.learning_rate" in done.stderr
    assert "Traceback" not in done.stderr
    assert check_finite_checkpoints(run) == 1


CHANGES = {
    "learning rate": ("optimizer.learning_rate", "1e-4", "0.003", "0.0001"),
    "batch": ("train.global_batch_tokens", "512", "256", "512"),
    "total steps": ("train.total_steps", "60", "30", "60"),
    "seed": ("run.seed", "2", "1337", "2"),
    "warm-up": ("schedule.warmup_steps", "3", "5", "3"),
    "precision": ("train.precision", "bfloat16", "'float32'", "'bfloat16'"),
    "lanes": ("train.lanes", "4", "2", "4"),
    "rows of validation": ("validation.tokens", "500", "600", "500"),
}


@pytest.mark.parametrize(("field", "value", "old", "new"), CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_numbers_is_refused_with_both_values(
    field: str, value: str, old: str, new: str, short: Course, half: Path
) -> None:
    before = (half / "events.jsonl").read_bytes()
    with pytest.raises(UsageError, match="the recipe differs from the run's") as caught:
        short.train_here(half, f"--{field}", value)
    assert f"  {field}: the run has {old}, asked for {new}" in caught.value.message
    assert "--override" in str(caught.value.hint)
    assert (half / "events.jsonl").read_bytes() == before


def test_all_changes_are_listed_at_once(short: Course, half: Path) -> None:
    words = ("--optimizer.learning_rate", "1e-4", "--schedule.warmup_steps", "3")
    with pytest.raises(UsageError) as caught:
        short.train_here(half, *words)
    assert caught.value.message.count("the run has") == 2


@pytest.mark.parametrize(
    "option",
    [
        ("--model.rope_theta", "10000.0"),
        ("--model.hidden_size", "64"),
        ("--data.document_attention", "true"),
        ("--data.sequence_length", "64"),
    ],
)
def test_architecture_and_rows_never_change(
    option: tuple[str, str], short: Course, half: Path
) -> None:
    with pytest.raises(UsageError, match=f"{option[0][2:]}: the run has ") as caught:
        train_here(short.recipe, half, short.data, *option, override=True)
    assert "never change" in str(caught.value.hint)


def test_intervals_and_retention_may_change(short: Course, half: Path) -> None:
    words = ("--checkpoint.every_steps", "7", "--checkpoint.keep_train_state", "1")
    short.train_here(half, *words, "--validation.every_steps", "5")
    short.check(half)
    states = sorted(p.parent.name for p in half.glob("checkpoints/step-*/train_state"))
    assert states == ["step-00000030"]


OUT_OF_RANGE = [
    ("--train.lanes", "0", "train.lanes: 0: ", "at least 1, at most 1024"),
    ("--train.lanes", "-1", "train.lanes: -1: ", "at least 1"),
    ("--train.lanes", "3", "train.lanes: 3 is not a power of two", "choose 1, 2, 4"),
    ("--train.lanes", "2.0", "train.lanes: 2.0: ", "an integer"),
    ("--train.lanes", "٢", "train.lanes: '٢': ", "an integer"),
    ("--train.lanes", "True", "train.lanes: 'True': ", "an integer"),
    ("--train.lanes", "1" * 5000, "train.lanes: '1111", "an integer"),
    ("--train.total_steps", "9223372036854775808", "train.total_steps: 9223372036", "at most 1099"),
    ("--train.global_batch_tokens", "1e400", "train.global_batch_tokens: inf: ", "an integer"),
    ("--train.compile", "False", "train.compile: 'False': ", "true or false"),
    ("--train.microbatch_rows", "1048576", "train.microbatch_rows: 8 rows a step", "must be a"),
    ("--optimizer.learning_rate", "nan", "optimizer.learning_rate: nan: ", "above 0"),
    ("--optimizer.learning_rate", "inf", "optimizer.learning_rate: inf: ", "at most 1e+30"),
    ("--optimizer.learning_rate", "1e400", "optimizer.learning_rate: inf: ", "at most 1e+30"),
    ("--optimizer.learning_rate", "0", "optimizer.learning_rate: 0: ", "above 0"),
    ("--optimizer.learning_rate", "-1", "optimizer.learning_rate: -1: ", "above 0"),
    ("--optimizer.learning_rate", "true", "optimizer.learning_rate: True: ", "a number"),
    ("--optimizer.betas", "[0.9]", "optimizer.betas: ", "below 1"),
    ("--optimizer.betas", "[0.9, 1.0]", "optimizer.betas: 1.0: ", "below 1"),
    ("--model.num_attention_heads", "5", "5 heads do not divide hidden_size 32", "such as 4"),
    ("--model.num_key_value_heads", "3", "3 key/value heads do not divide 4", "such as 2"),
    ("--model.hidden_size", "36", "model.num_attention_heads: a head of 9 is odd", "even"),
    ("--model.attention_bias", "true", "model.attention_bias: True: ", "LLaMA has none"),
    ("--run.seed", "-1", "run.seed: -1: ", "at least 0"),
    ("--train.lane", "2", "train.lane: unknown key", "did you mean train.lanes?"),
    ("--trian.lanes", "2", "trian: unknown key", "did you mean train?"),
    ("--optimizer.lanes", "2", "optimizer.lanes: unknown key", "did you mean train.lanes?"),
    ("--train", "2", "unexpected argument '--train'", "--section.key VALUE"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.mark.parametrize(("option", "value", "what", "allowed"), OUT_OF_RANGE)
def test_a_value_that_cannot_be_is_named_with_what_can(
    option: str, value: str, what: str, allowed: str, recipe: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(str(recipe), overrides=[option, value])
    assert what in caught.value.message
    assert allowed in f"{caught.value.message}\n{caught.value.hint}"


FILES = {
    "a key twice": (b"[train]\nlanes = 2\nlanes = 4\n", "Cannot overwrite a value"),
    "a section twice": (b"[train]\n[train]\n", "Cannot declare"),
    "Unicode digits": ("[train]\nlanes = ٢\n".encode(), "is not TOML: Invalid value"),
    "5000 digits": (b"[train]\nlanes = " + b"1" * 5000, "is not TOML"),
    "nested too deep": (b"a = " + b"[" * 100_000, "is not TOML"),
    "not UTF-8": (b'[run]\nname = "caf\xe9"\n', "is not UTF-8 text"),
    "a NUL": (b"[train]\x00\n", "is not TOML"),
    "larger than any recipe": (b"#" * (1 << 20) + b"#", "is larger than any recipe"),
    "a section that is a number": (b"train = 1\n", "train: 1: input should be"),
    "nothing": (b"", "model: is required but not set"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_a_recipe_file_that_cannot_be_read_is_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_recipe(str(tmp_path / "a.toml"), overrides=["--train.lanes", "2"])
    assert message in caught.value.message


def test_all_problems_are_said_at_once(recipe: Path) -> None:
    words = ["--train.lanes", "3", "--optimizer.learning_rate", "-1", "--train.lane", "1"]
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(recipe), overrides=words)
    assert sorted(problem.where for problem in caught.value.problems) == [
        "optimizer.learning_rate",
        "train.lane",
        "train.lanes",
        "train.microbatch_rows",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("RECIPE", "--train.lanes", "0"), "train.lanes: 0: "),
        (("a" * 5000 + ".toml",), "file name too long"),
        (("deom",), "did you mean demo?"),
    ],
)
def test_the_command_refuses_it_within_seconds_before_it_makes_anything(
    words: tuple[str, ...], message: str, recipe: Path, tmp_path: Path
) -> None:
    given = [str(recipe) if word == "RECIPE" else word for word in words]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "milepost.cli.main", "train", *given, "--run", tmp_path / "run"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.lower() and "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 5
    assert not (tmp_path / "run").exists()
