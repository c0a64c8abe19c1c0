"""A tiny model in training that saves beside it, and what holds a save back or makes it fail."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost.checkpoint.state import Progress
from milepost.checkpoint.store import load_train_state, verify_checkpoint
from milepost.config.schema import CheckpointSection, OptimizerSection
from milepost.core.errors import StorageError
from milepost.runs.events import EventWriter, read_history
from milepost.runs.layout import RunLayout
from milepost.train.optimizer import build_optimizer, moments_by_name
from milepost.train.saving import CheckpointWriter, Saver
from tests.tiny_models import tiny_model

RUN_ID = "ab"


class TinyRun:
    """A tiny model in training, and what saves it."""

    def __init__(self, root: Path, *, keep: int = 2) -> None:
        self.layout = RunLayout(root)
        self.model = tiny_model()
        self.optimizer = build_optimizer(self.model, config=OptimizerSection(learning_rate=1e-3))
        self.writer = CheckpointWriter(
            layout=self.layout,
            run_id=RUN_ID,
            config=CheckpointSection(keep_train_state=keep),
            model_files={"config.json": b"{}\n"},
            events=EventWriter(self.layout.events, segment=1),
            good_step=0,
        )
        self.saver = Saver(self.writer, model=self.model, optimizer=self.optimizer, saved_step=0)

    def train(self) -> dict[str, torch.Tensor]:
        """One update; returns a copy of all that a train state holds."""
        for parameter in self.model.parameters():
            parameter.grad = parameter.detach().clone()
        self.optimizer.step()
        moments, _ = moments_by_name(self.model, optimizer=self.optimizer)
        return {name: t.clone() for name, t in (self.model.state_dict() | moments).items()}

    def save(self, step: int) -> None:
        self.saver.save(Progress(step=step))

    def save_all(self, *steps: int) -> None:
        """Trains to each step, saves it and waits."""
        for step in steps:
            self.train()
            self.save(step)
            self.saver.finish()

    def saved(self, step: int) -> dict[str, torch.Tensor]:
        """What the verified checkpoint of a step holds."""
        folder = self.layout.checkpoint(step)
        verify_checkpoint(folder, run_id=RUN_ID, step=step)
        state = load_train_state(folder)
        return state.weights | state.moments

    def recorded(self, kind: str) -> list[int]:
        return [event["step"] for event in read_history(self.layout.events).of_kind(kind)]

    def train_states(self) -> list[int]:
        """Steps whose folder has a train state."""
        return train_states(self.layout.root)


def train_states(run: Path) -> list[int]:
    """Steps whose folder has a train state."""
    found = (run / "checkpoints").glob("step-*/train_state")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


class Gate:
    """Holds a function's calls back until it is opened; counts those that came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: Any, name: str) -> None:
        self.num_calls = 0
        self._arrived, self._open = threading.Event(), threading.Event()
        really = getattr(target, name)

        def wait(*arguments: Any, **options: Any) -> Any:
            self.num_calls += 1
            self._arrived.set()
            assert self._open.wait(timeout=30)
            return really(*arguments, **options)

        monkeypatch.setattr(target, name, wait)

    def wait_until_met(self) -> None:
        assert self._arrived.wait(timeout=30)

    def open(self) -> None:
        self._open.set()


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
