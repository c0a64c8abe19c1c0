"""Where everything of a run lies. Names only: nothing here reads or writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_STEP_FOLDER = re.compile(r"^step-(\d{8,})$")


@dataclass(frozen=True)
class RunLayout:
    """The paths of one run folder."""

    root: Path

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.resolve().name

    @property
    def manifest(self) -> Path:
        """Resolved config, environment, data fingerprint, lineage; written once."""
        return self.root / "manifest.json"

    @property
    def events(self) -> Path:
        """The append-only history."""
        return self.root / "events.jsonl"

    @property
    def samples(self) -> Path:
        """Recorded completions."""
        return self.root / "samples.jsonl"

    @property
    def probes(self) -> Path:
        """What small changes of a prompt did to checkpoints."""
        return self.root / "probes.jsonl"

    @property
    def answers(self) -> Path:
        """Of a fine-tuning: answers to fixed questions before and after."""
        return self.root / "compare.json"

    @property
    def exact_answers(self) -> Path:
        """Of the demo's fine-tuning: questions with one right answer, before and after."""
        return self.root / "exact_answers.json"

    @property
    def ratings(self) -> Path:
        """Scores of completions by people and by models."""
        return self.root / "ratings.jsonl"

    @property
    def judge(self) -> Path:
        """Folder of what models that rate were asked, and of their raw replies."""
        return self.root / "judge"

    @property
    def evaluations(self) -> Path:
        """Scores of checkpoints on benchmarks."""
        return self.root / "evaluations.jsonl"

    @property
    def items(self) -> Path:
        """Folder of the items files, one an evaluation record."""
        return self.root / "items"

    @property
    def certificates(self) -> Path:
        """Folder of the certificates that `milepost verify --replay` wrote."""
        return self.root / "certificates"

    @property
    def lock(self) -> Path:
        """Held by the one process that trains in this folder."""
        return self.root / ".lock"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.root / "checkpoints"

    @property
    def quarantine(self) -> Path:
        """Damaged checkpoints, set aside and never deleted."""
        return self.root / "quarantine"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.root / "report" / "index.html"

    @property
    def tracking(self) -> Path:
        """What live trackers keep here, in a folder each."""
        return self.root / "tracking"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` updates."""
        return self.checkpoints / f"step-{step:08d}"


def step_of_folder(folder: Path) -> int | None:
    """The step a checkpoint folder's name says, or None where the name is not of that form."""
    match = _STEP_FOLDER.match(folder.name)
    return int(match.group(1)) if match else None


def checkpoint_folders(layout: RunLayout) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a checkpoint, by step; links are not followed."""
    if not layout.checkpoints.is_dir():
        return []
    found = []
    for entry in layout.checkpoints.iterdir():
        step = step_of_folder(entry)
        if step is not None and entry.is_dir() and not entry.is_symlink():
            found.append((step, entry))
    return sorted(found)
