"""What a run is made of: its config, environment and data, and the commands to make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from milepost.config.recipe import as_plain
from milepost.config.schema import Config
from milepost.runs.manifest import RunManifest
from milepost.trajectory.collect import Trajectory
from milepost.trajectory.course import Course
from milepost.trajectory.subject import Subject

MAX_VALUE_CHARACTERS = 400
"""Longer values are cut; the run's manifest and the recipe have them whole."""

Rows = list[tuple[str, str]]


def config_sections(config: Config) -> list[tuple[str, Rows]]:
    """(section, (field, value) rows) of a resolved config, as a recipe writes them."""
    return [
        (section, [(name, _cut(_toml_value(value))) for name, value in fields.items()])
        for section, fields in as_plain(config).items()
    ]


def recipe_toml(config: Config) -> str:
    """The resolved config as a recipe: `milepost train` takes it as it is."""
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
    rows = [
        ("run id", manifest.run_id),
        ("made", manifest.created),
        ("recipe", manifest.recipe),
        ("data fingerprint", manifest.data_fingerprint),
        ("validation fingerprint", manifest.validation_fingerprint or "none"),
        ("tokenizer SHA-256", manifest.tokenizer_sha256),
    ]
    return rows + [(f"lineage: {name}", value) for name, value in _flat(manifest.lineage)]


def environment(manifest: RunManifest) -> Rows:
    """The machine and the versions the run was made on."""
    return list(_flat(manifest.environment))


def commands(trajectory: Trajectory, *, recipe: str) -> list[str]:
    """Commands that make the run again.

    Args:
        trajectory: of the run.
        recipe: path of the file that holds `recipe_toml`, as seen from the run folder's parent.
    """
    manifest, folder = trajectory.manifest, trajectory.layout.name
    path = manifest.config.data.path
    inspect = [f"milepost data inspect {shlex.quote(path)}"] if path else []
    again = shlex.quote(f"{folder}-again")
    return [*inspect, f"milepost train {shlex.quote(recipe)} --run {again}"]


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
