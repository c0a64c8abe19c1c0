"""What a save does when the disk takes the checkpoint but not its event, or takes neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from milepost.checkpoint.state import Progress
from milepost.config.schema import CheckpointSection, OptimizerSection
from milepost.core.errors import StorageError
from milepost.runs.events import EventWriter, read_history
from milepost.runs.layout import RunLayout
from milepost.train import saving
from milepost.train.optimizer import build_optimizer
from milepost.train.saving import Saver
from tests.tiny_models import tiny_model


@pytest.fixture
def saver(tmp_path: Path) -> Saver:
    """Of a run with train states of steps 1 and 2, all that retention keeps."""
    model, layout = tiny_model(), RunLayout(tmp_path)
    optimizer = build_optimizer(model, config=OptimizerSection(learning_rate=1e-3))
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    saver = Saver(
        layout=layout,
        run_id="ab",
        config=CheckpointSection(keep_train_state=2),
        model=model,
        optimizer=optimizer,
        model_files={"config.json": b"{}\n"},
        events=EventWriter(layout.events, segment=1),
        saved_step=0,
    )
    for step in (1, 2):
        saver.save(Progress(step=step))
    return saver


def fail_first(monkeypatch: pytest.MonkeyPatch, target: Any, name: str) -> list[Any]:
    """Lets the first call fail as on a full disk; returns a list that grows with each call."""
    calls: list[Any] = []
    really = getattr(target, name)

    def fail_once(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise StorageError("cannot write: no space left on device")
        return really(*arguments, **options)

    monkeypatch.setattr(target, name, fail_once)
    return calls


def recorded(saver: Saver, kind: str) -> list[int]:
    return [event["step"] for event in read_history(saver.layout.events).of_kind(kind)]


def test_a_save_that_fails_is_not_tried_again_where_nothing_was_freed(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fail_first(monkeypatch, saving, "save_checkpoint")
    with pytest.raises(StorageError, match="no space left"):
        saver.save(Progress(step=3))
    assert len(calls) == 1
    assert recorded(saver, "checkpoint_saved") == [1, 2]


def test_a_save_that_fails_is_tried_again_after_retention_freed_something(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.config = CheckpointSection(keep_train_state=1)
    calls = fail_first(monkeypatch, saving, "save_checkpoint")
    saver.save(Progress(step=3))
    assert len(calls) == 2
    assert recorded(saver, "checkpoint_saved") == [1, 2, 3]
    assert recorded(saver, "train_state_dropped") == [1, 2]


def test_a_checkpoint_whose_event_fails_is_recorded_later_and_not_written_again(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = []
    really = saving.save_checkpoint
    monkeypatch.setattr(
        saving, "save_checkpoint", lambda *a, **k: saves.append(a) or really(*a, **k)
    )
    fail_first(monkeypatch, EventWriter, "append")
    saver.save(Progress(step=3))
    assert len(saves) == 1
    assert recorded(saver, "checkpoint_saved") == [1, 2, 3]
    assert recorded(saver, "train_state_dropped") == [1]
    saver.save(Progress(step=4))
    assert len(saves) == 2
    assert recorded(saver, "checkpoint_saved") == [1, 2, 3, 4]
