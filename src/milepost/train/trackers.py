"""Live trackers: TensorBoard, trackio and wandb behind one small interface.

Opened in the process of `tracking_process` only, never in a rank: these packages print, start
threads and processes, and may hang. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from milepost.core.errors import UsageError

STEP = "step"
"""The axis of every chart in wandb, whose own steps are rows and only go up."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it is opened.

    Attributes:
        run_id: of the manifest; the same in every segment.
        name: for people.
        folder: the tracker's own, inside the run folder.
        config: the hyperparameters, section to field to plain value.
        project: where runs are collected.
        mode: "online", or "offline": nothing leaves this machine.
    """

    run_id: str
    name: str
    folder: Path
    config: Mapping[str, Mapping[str, Any]]
    project: str
    mode: Literal["online", "offline"]


class Tracker(Protocol):
    """Where metrics go.

    Attributes:
        destination: what tells one collection of metrics from another; a text.
        notice: for people: where to look.
    """

    destination: str
    notice: str

    def log(
        self, metrics: Mapping[str, float], *, step: int, unix_seconds: float, row: int
    ) -> None:
        """Takes a row of metrics.

        Args:
            metrics: by name.
            step: updates after which they were measured.
            unix_seconds: when.
            row: rows that came before it, over all segments.
        """

    def rewind(self, step: int) -> None:
        """Forgets what it was told of this step and later ones; one that only appends does not."""

    def flush(self) -> None:
        """Makes what was logged visible."""

    def finish(self) -> None:
        """Delivers all that was logged; the last call."""


class TensorBoard:
    """Event files in the run folder, written record by record without TensorFlow or torch."""

    destination = "tensorboard"

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._protos, self._summaries = event_pb2, summary_pb2
        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((run.folder / name).open("xb"))
        self._write(wall_time=now, file_version="brain.Event:2")
        hyperparameters = hparams_pb(_flat(run.config), trial_id=run.run_id, start_time_secs=now)
        self._write(wall_time=now, summary=hyperparameters)
        self.notice = f"tensorboard --logdir {run.folder}"

    def log(
        self, metrics: Mapping[str, float], *, step: int, unix_seconds: float, row: int
    ) -> None:
        values = [
            self._summaries.Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
        ]
        summary = self._summaries.Summary(value=values)
        self._write(wall_time=unix_seconds, step=step, summary=summary)

    def rewind(self, step: int) -> None:
        start = self._protos.SessionLog(status=self._protos.SessionLog.START)
        self._write(wall_time=time.time(), step=step, session_log=start)

    def flush(self) -> None:
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._protos.Event(**fields).SerializeToString())


class Trackio:
    """Hugging Face's trackio: a database on this machine, or a Space where its variables say so."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self.destination = run.project
        self._run = trackio.init(
            project=run.project,
            # A run is found again by its name, and folders' names are not unique.
            name=f"{run.name}-{run.run_id[:8]}",
            config={section: dict(fields) for section, fields in run.config.items()},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.notice = f'trackio show --project "{run.project}"'

    def log(
        self, metrics: Mapping[str, float], *, step: int, unix_seconds: float, row: int
    ) -> None:
        self._run.log(dict(metrics), step=step)

    def rewind(self, step: int) -> None:
        """It only appends."""

    def flush(self) -> None:
        """It sends by itself."""

    def finish(self) -> None:
        self._run.finish()


class Wandb:
    """Weights & Biases, online or as files for `wandb sync`."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self.destination = f"{run.mode} {run.project}"
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.run_id,
            resume="allow",
            dir=run.folder.parent,  # it adds a folder of its own name
            mode=run.mode,
            config={section: dict(fields) for section, fields in run.config.items()},
            allow_val_change=True,
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
            ),
        )
        self._end_service = wandb.teardown
        # A row that is made up for may belong to an earlier step, which its own axis refuses.
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        self.notice = self._run.url or f"wandb sync {Path(self._run.dir).parent}"

    def log(
        self, metrics: Mapping[str, float], *, step: int, unix_seconds: float, row: int
    ) -> None:
        self._run.log({**metrics, STEP: step, "_timestamp": unix_seconds}, step=row, commit=True)

    def rewind(self, step: int) -> None:
        """It only appends."""

    def flush(self) -> None:
        """It sends by itself."""

    def finish(self) -> None:
        self._run.finish()
        self._end_service()  # and waits for it, so that nothing is left behind


def check_trackers(tools: Sequence[str]) -> None:
    """Refuses trackers whose package is not installed.

    Raises:
        UsageError: names them all.
    """
    missing = [tool for tool in tools if importlib.util.find_spec(tool) is None]
    if missing:
        raise UsageError(
            f"tracking.tools: not installed: {', '.join(missing)}",
            hint="pip install 'milepost[trackers]', or train without: --tracking.tools none",
        )


def open_tracker(tool: str, run: TrackedRun) -> Tracker:
    """Opens a tracker, or opens it again for the next segment of the same run.

    Raises:
        Exception: whatever the tool's package raises; no account, no network, no room.
    """
    openers: dict[str, type[Tracker]] = {
        "tensorboard": TensorBoard,
        "trackio": Trackio,
        "wandb": Wandb,
    }
    return openers[tool](run)  # type: ignore[call-arg]


def _flat(config: Mapping[str, Mapping[str, Any]]) -> dict[str, bool | int | float | str]:
    """Dotted name to what TensorBoard takes as a hyperparameter."""
    return {
        f"{section}.{field}": value
        if isinstance(value, bool | int | float | str)
        else json.dumps(value)
        for section, fields in config.items()
        for field, value in fields.items()
    }
