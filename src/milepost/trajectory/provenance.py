"""What a run is made of: its config, environment and data, and the commands to make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from milepost.config.recipe import as_plain
from milepost.config.schema import Config
from milepost.runs.lineage import lineage_of, restore_text
from milepost.runs.manifest import RunManifest
from milepost.trajectory.collect import Trajectory
from milepost.trajectory.course import Course
from milepost.trajectory.subject import Subject

MAX_VALUE_CHARACTERS = 400
"""Longer values are cut; the run's manifest and the recipe have them whole."""

Rows = list[tuple[str, str]]


def config_sections(config: Config) -> list[tuple[str, Rows]]:
    """(section, (field, value) rows) of a resolved config, as a recipe writes them.

    Sections that are not of this kind of run are left out; nothing reads them.
    """
    foreign = ("samples",) if config.is_finetuning else ("lora", "finetune")
    return [
        (section, [(name, _cut(_toml_value(value))) for name, value in fields.items()])
        for section, fields in as_plain(config).items()
        if section not in foreign
    ]


def recipe_toml(config: Config) -> str:
    """The resolved config as a recipe: the run's own verb takes it as it is."""
    sections = []
    for section, fields in as_plain(config).items():
        lines = [f"{name} = {_toml_value(value)}" for name, value in fields.items()]
        sections.append("\n".join([f"[{section}]", *lines]))
    return "\n\n".join(sections) + "\n"


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    # JSON writes numbers, texts and truth values as TOML does, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def identity(manifest: RunManifest) -> Rows:
    """What the run and its data are called."""
    data, scored = "data", "validation"
    if manifest.config.is_finetuning:
        data, scored = "conversations'", "held-out conversations'"
    rows = [
        ("run id", manifest.run_id),
        ("made", manifest.created),
        ("recipe", manifest.recipe),
        (f"{data} fingerprint", manifest.data_fingerprint),
        (f"{scored} fingerprint", manifest.validation_fingerprint or "none"),
        ("tokenizer SHA-256", manifest.tokenizer_sha256),
    ]
    return rows + [(f"lineage: {name}", value) for name, value in _lineage(manifest)]


def _lineage(manifest: RunManifest) -> Iterator[tuple[str, str]]:
    """Without the conversations that were left out one by one, which the manifest has."""
    lineage = dict(manifest.lineage)
    account = lineage.get("conversations")
    if isinstance(account, dict):
        lineage["conversations"] = {k: v for k, v in account.items() if k != "listed"}
    yield from _flat(lineage)


def environment(manifest: RunManifest) -> Rows:
    """The machine and the versions the run was made on."""
    return list(_flat(manifest.environment))


def commands(trajectory: Trajectory, *, recipe: str) -> list[str]:
    """Commands that make the run again.

    Args:
        trajectory: of the run.
        recipe: path of the file that holds `recipe_toml`, as seen from the run folder's parent.
    """
    config, folder = trajectory.manifest.config, trajectory.layout.name
    path = config.data.path
    inspect = [f"milepost data inspect {shlex.quote(path)}"] if path else []
    again = shlex.quote(f"{folder}-again")
    if config.is_finetuning:
        base, data = shlex.quote(config.finetune.base), shlex.quote(config.finetune.data)
        return [f"milepost finetune {base} {shlex.quote(recipe)} --data {data} --run {again}"]
    train = f"milepost train {shlex.quote(recipe)} --run {again}"
    if "imported_from" in trajectory.manifest.lineage:
        made = _import_command(trajectory, run=again)
        return [*inspect, made, *([train] if any(s.number for s in trajectory.segments) else [])]
    if (lineage := lineage_of(trajectory.manifest.lineage)) is not None:
        parent = shlex.quote(f"{lineage.run}:{lineage.step}")
        train += f" --from {parent} --restore {restore_text(lineage.parts)}"
    return [*inspect, train]


def _import_command(trajectory: Trajectory, *, run: str) -> str:
    manifest = trajectory.manifest
    words = [f"milepost import {shlex.quote(str(manifest.lineage['imported_from']))} --run {run}"]
    if path := manifest.config.data.path:
        words.append(f"--data {shlex.quote(path)}")
    if step := min((saved.step for saved in trajectory.checkpoints), default=0):
        words.append(f"--step {step}")
    return " ".join(words)


def same_where(config: Config) -> str:
    """How a reader tells that what those commands read is what this run read."""
    if config.is_finetuning:
        return (
            "Base and conversations are the same where the base's SHA-256 and the fingerprints are."
        )
    return "The data are the same where their fingerprint is."


@dataclass(frozen=True)
class Source:
    """Where the numbers of one course come from.

    Attributes:
        facts: (name, words) of what is known of it.
        notes: what a reader of its numbers has to know, a sentence each.
    """

    name: str
    words: str
    facts: Rows
    notes: tuple[str, ...]


def sources(subject: Subject, *, baselines: Sequence[Course]) -> list[Source]:
    """Of all that the page shows and the run did not measure itself.

    Args:
        subject: of the page.
        baselines: those of it that are drawn.
    """
    own = [] if subject.run else [subject.course]
    facts = subject.example.facts if subject.example else []
    shown = [*own, *subject.others, *baselines]
    return [Source(c.name, c.source, facts if c is subject.course else [], c.notes) for c in shown]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        elif value is None:
            yield f"{prefix}{name}", "unknown"
        else:
            plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{name}", _cut(plain)


def _cut(value: str) -> str:
    return value if len(value) <= MAX_VALUE_CHARACTERS else value[:MAX_VALUE_CHARACTERS] + "…"
