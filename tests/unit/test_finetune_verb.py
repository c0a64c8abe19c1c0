"""`milepost finetune` at the command line: where its words may stand, and what is said once."""

from __future__ import annotations

from pathlib import Path

import pytest

from milepost.cli import finetune as verb
from milepost.cli.main import run
from milepost.config.schema import Config
from milepost.core.errors import UsageError
from tests.finetuning import TEMPLATE, Tuning


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs of what would be started, in the place of starting it."""
    found: list[Config] = []

    def launch_ranks(load: object, **_: object) -> None:
        assert callable(load)
        found.append(load())

    monkeypatch.setattr(verb, "launch_ranks", launch_ranks)
    return found


LENGTH = ["--data.sequence_length", "64"]
ORDERS = {
    "last": "BASE RECIPE --data DATA --run RUN LENGTH BATCH",
    "between": "BASE RECIPE --data DATA LENGTH --run RUN BATCH",
    "before-the-recipe": "BASE LENGTH RECIPE BATCH --data DATA --run RUN",
    "first": "LENGTH BATCH --data DATA --run RUN BASE RECIPE",
    "around": "LENGTH BASE BATCH --run RUN RECIPE --data DATA",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("with_recipe", [True, False])
def test_fields_may_stand_anywhere_with_and_without_a_recipe(
    tmp_path: Path,
    configs: list[Config],
    monkeypatch: pytest.MonkeyPatch,
    order: str,
    with_recipe: bool,
) -> None:
    tuning = Tuning(tmp_path)
    if not with_recipe:
        monkeypatch.setattr(
            "milepost.config.recipe.recipe_text", lambda _: tuning.recipe.read_text()
        )
    words = {
        "BASE": [str(tuning.base)],
        "RECIPE": [str(tuning.recipe)] if with_recipe else [],
        "DATA": [str(tuning.data)],
        "RUN": [str(tmp_path / "run")],
        "LENGTH": LENGTH,
        "BATCH": ["--train.global_batch_tokens=256"],
    }
    line = [word for name in order.split() for word in words.get(name, [name])]
    assert run(["finetune", *line]) == 0
    (config,) = configs
    assert (config.data.sequence_length, config.train.global_batch_tokens) == (64, 256)
    assert config.finetune.data == str(tuning.data)


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--sequence_length", "64"], "unexpected argument '--sequence_length'", "--data.sequence"),
        (["--datas.x", "1"], "datas", ""),
        (["a.toml", "b.toml"], "unexpected argument 'b.toml'", "--section.key VALUE"),
        (["--train.compile", "sft-alpaca"], "train.compile", ""),
    ],
)
def test_a_slip_of_the_pen_is_named(
    tmp_path: Path,
    configs: list[Config],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
    hint: str,
) -> None:
    tuning = Tuning(tmp_path)
    given = ["finetune", str(tuning.base), "--data", str(tuning.data), "--run", "run", *words]
    assert run(given) == UsageError.exit_code
    said = capsys.readouterr().err
    assert message in said
    assert hint in said
    assert configs == []


def test_the_help_says_what_a_newcomer_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["finetune", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("--data", "--run", "--full", "--section.key VALUE", "--data.sequence_length 512"):
        assert word in shown
    assert "[default: sft-alpaca]" in " ".join(shown.replace("│", "").split())


def test_rows_longer_than_the_context_are_refused_without_advice_to_change_the_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning = Tuning(tmp_path)
    given = ["finetune", str(tuning.base), str(tuning.recipe), "--data", str(tuning.data)]
    words = ["--data.sequence_length", "512", "--train.global_batch_tokens", "2048"]
    assert run([*given, "--run", str(tmp_path / "run"), *words]) == 2
    said = capsys.readouterr().err
    assert "hint: set data.sequence_length to at most 128\n" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--finetune.held_out_fraction", "0.9999999"], "all 6 conversations"),
        (["--data.sequence_length", "16"], "none of 6 conversations fits a row of 16 tokens"),
        (["--finetune.template", "HIDES"], "would never learn to stop"),
        (["--finetune.template", "REFUSES"], "the chat template refuses.jinja refuses"),
    ],
)
def test_what_is_wrong_with_the_data_is_said_before_a_rank_is_started(
    tmp_path: Path,
    configs: list[Config],
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    tuning = Tuning(tmp_path)
    hides, refuses = tmp_path / "hides.jinja", tmp_path / "refuses.jinja"
    hides.write_text(TEMPLATE.replace(" + eos_token", ""))
    refuses.write_text("{{ raise_exception('no') }}")
    files = {"HIDES": str(hides), "REFUSES": str(refuses)}
    given = ["finetune", str(tuning.base), str(tuning.recipe), "--data", str(tuning.data)]
    changes = [files.get(word, word) for word in changes]
    assert run([*given, "--run", str(tmp_path / "run"), *changes]) in (2, 3)
    assert message in capsys.readouterr().err
    assert configs == []
    assert not (tmp_path / "run").exists()
