"""How a run starts: what is refused beforehand, and what others make of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from milepost.core.errors import DataError, UsageError
from tests.training import (
    command,
    environment,
    events,
    logged_steps,
    train_here,
)


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_trained(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    prompts = '["' + "word " * 100 + '"]'
    options = ("--samples.prompts", prompts, "--samples.every_steps", "10")
    with pytest.raises(UsageError, match=r"tokens, the context .* has 64"):
        train_here(recipe, tmp_path / "run", tiny_data, *options)
    assert events(tmp_path / "run", "step") == []


def test_a_run_that_is_a_file_is_refused(recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UsageError, match="is not a folder"):
        train_here(recipe, tmp_path / "run", tiny_data)


def test_a_folder_with_something_else_in_it_is_left_alone(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"holds no run \(it has thesis.tex\)"):
        train_here(recipe, tmp_path, tiny_data)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_vocabulary_that_does_not_fit_is_said_with_both_sizes(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"vocabulary of 512.* is 600"):
        train_here(recipe, tmp_path / "run", tiny_data, "--model.vocab_size", "600")
    assert not (tmp_path / "run").exists()


def test_torchrun_starts_the_ranks_too(
    recipe: Path, tiny_data: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # Without `--`, torchrun takes --run for a shortened --run-path of its own.
    stop = ("--train.stop_at_step", "6")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, "--no-python", "--", *command(recipe, run, tiny_data, *stop)],
        env=environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert logged_steps(run) == {s: v for s, v in logged_steps(finished).items() if s <= 6}


def test_transformers_loads_a_checkpoint_folder_as_it_lies(finished: Path, tiny_data: Path) -> None:
    import torch

    transformers = pytest.importorskip("transformers")
    from milepost.inference.load import load_model

    folder = finished / "checkpoints" / "step-00000030"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(finished)
    ids = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        hidden = ours.model(ids)
        torch.testing.assert_close(hidden @ ours.model.head_weight.t(), expected, atol=1e-5, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == ours.tokenizer.end_of_text_id
