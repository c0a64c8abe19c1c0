"""Results of lm-evaluation-harness, one JSON file a checkpoint and run of the harness.

The step stands in the file's name (pythia-1b_step1000.json), in a folder's
(checkpoint-1000/results_2024-01-01.json), or in the revision that was scored. Old files say
{"acc": ..., "acc_stderr": ...} of a task, new ones {"acc,none": ..., "acc_stderr,none": ...}.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milepost.core.errors import UsageError
from milepost.core.files import storage_errors
from milepost.runs.metric_names import benchmark_metric
from milepost.trajectory.course import Course
from milepost.trajectory.fields import finite, text, whole
from milepost.trajectory.imports.points import Points, enumerate_some, left_out
from milepost.trajectory.imports.sniff import files_in, refuse
from milepost.trajectory.sections.wording import enumerate_words, plural

EXPECTED = (
    "results files of lm-evaluation-harness with the step in the name of the file or of a folder"
    " (NAME_step1000.json, checkpoint-1000/results_DATE.json) or in the model's revision"
)

MAX_FILE_BYTES = 64 << 20
"""Results are some 100 KiB; a larger file is something else."""

MAX_TRAJECTORIES_TOLD = 4

MIN_FAMILY_TASKS = 10
"""As many tasks whose names begin alike are parts of one, such as the 57 subjects of MMLU; a page
of them would bury the others."""

_STEP = re.compile(
    r"(?<![A-Za-z])(?:global_?step|step|checkpoint|ckpt|iteration|iter)[-_=]?(\d{1,15})(?!\d)", re.I
)
_TOKENS = re.compile(r"tokens[-_=]?(\d+(?:\.\d+)?)([KMBT])(?![A-Za-z])", re.I)
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass
class _Found:
    """What was gathered from the files so far.

    Attributes:
        scores: task to (metric, step, value) in the order of the files.
        tokens: step to tokens seen, where a name says them.
    """

    scores: dict[str, list[tuple[str, int, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    tokens: dict[int, float] = field(default_factory=dict)
    models: Counter[str] = field(default_factory=Counter)
    shots: set[int] = field(default_factory=set)
    limits: set[float] = field(default_factory=set)
    num_files: int = 0
    num_foreign: int = 0


def read(path: Path, *, name: str | None, tokens_per_step: int | None) -> Course:
    """See `formats.import_course`. A path with * is the files that it matches."""
    files = _json_files(path)
    by_trajectory: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for file in files:
        named = _step_in(file, root=path) or _step_said_by(file)
        if named is not None:
            by_trajectory[named[0]].append((named[1], file))
    found = {pattern: _read_files(steps) for pattern, steps in by_trajectory.items()}
    with_scores = {pattern: one for pattern, one in found.items() if one.num_files}
    if len(with_scores) > 1:
        raise _several(path, with_scores)
    if not with_scores:
        raise _nothing(path, files, num_named=sum(map(len, by_trajectory.values())))
    pattern, one = next(iter(with_scores.items()))
    num_foreign = sum(each.num_foreign for each in found.values())
    families = _families(one.scores)
    return _points(one, without=families).course(
        name or _name(one, path),
        source=f"{plural(one.num_files, 'file')} of lm-evaluation-harness, {_short(pattern)}",
        notes=[
            *_notes(one, num_foreign, len(files) - one.num_files - num_foreign),
            *(_family_note(prefix, tasks) for prefix, tasks in families.items()),
        ],
        tokens_per_step=tokens_per_step,
    )


def _json_files(path: Path) -> list[Path]:
    if _is_pattern(path):
        start = Path(path.anchor)
        try:
            found = list(start.glob(str(path.relative_to(start))))
        except ValueError as bad:
            raise UsageError(f"{path} is no pattern: {bad}", hint=f"expected {EXPECTED}") from bad
        return sorted(file for file in found if file.is_file())
    if path.is_file() and path.suffix != ".json":
        raise refuse(path, expected=EXPECTED)
    return files_in(path, pattern="*.json")


def _is_pattern(path: Path) -> bool:
    return "*" in str(path) and not path.exists()


def _step_in(file: Path, *, root: Path) -> tuple[str, int] | None:
    """The step that a file's path says, and the path with * in its place; None without a step.

    The name closest to the file counts. Under a folder that says it, files differ in name only
    by when or on what they were made.
    """
    parts = file.parts
    if _is_pattern(root):
        start = next(place for place, part in enumerate(root.parts) if "*" in part)
    else:
        start = len(root.parts) - (1 if root.is_dir() else 2)
    for place in range(len(parts) - 1, max(start, 0) - 1, -1):
        matches = list(_STEP.finditer(parts[place]))
        if matches:
            said = matches[-1]
            starred = parts[place][: said.start(1)] + "*" + parts[place][said.end(1) :]
            starred = _TOKENS.sub("tokens*", starred)
            below = len(parts) - 1 - place
            rest = ["**"] * (below > 1) + ["*.json"] * (below > 0)
            return str(Path(*parts[:place], starred, *rest)), int(said.group(1))
    return None


def _step_said_by(file: Path) -> tuple[str, int] | None:
    """The step of the revision that was scored, as the hub names those of Pythia and others."""
    document = _results_in(file)
    said = _STEP.search(_arguments(document)) if document else None
    return (str(file.with_name("*.json")), int(said.group(1))) if said else None


def _read_files(files: Sequence[tuple[int, Path]]) -> _Found:
    """Takes the results of one trajectory; of two files for a step the later by name counts."""
    found = _Found()
    for step, file in sorted(files):
        results = _results_in(file)
        if results is None or not _add(found, results, step=step):
            found.num_foreign += 1
            continue
        found.num_files += 1
        said = _TOKENS.search(str(file))
        if said:
            found.tokens[step] = float(said.group(1)) * _UNITS[said.group(2).upper()]
    return found


def _results_in(file: Path) -> dict[str, Any] | None:
    with storage_errors(file, verb="read"):
        if file.stat().st_size > MAX_FILE_BYTES:
            return None
        content = file.read_bytes()
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    is_result = isinstance(document, dict) and isinstance(document.get("results"), dict)
    return document if is_result else None


def _add(found: _Found, document: dict[str, Any], *, step: int) -> bool:
    """Adds the scores of one file; False where it has none."""
    num_scores = 0
    for task, entry in document["results"].items():
        for key, score in entry.items() if isinstance(entry, dict) else ():
            value = finite(score)
            if value is not None:
                found.scores[task].append((_metric(task, key), step, float(value)))
                num_scores += 1
    if not num_scores:
        return False
    given, shots = document.get("config"), document.get("n-shot")
    config = given if isinstance(given, dict) else {}
    counts = shots.values() if isinstance(shots, dict) else [config.get("num_fewshot")]
    found.shots.update(n for n in map(whole, counts) if n is not None)
    found.limits.update(n for n in [finite(config.get("limit"))] if n is not None)
    found.models[_model(document)] += 1
    return True


def _families(tasks: Iterable[str]) -> dict[str, list[str]]:
    """The tasks that are parts of one, by what their names begin with; none if all tasks are."""
    by_prefix: dict[str, list[str]] = defaultdict(list)
    for task in tasks:
        prefix = re.match(r"[^-_]+[-_]", task)
        by_prefix[prefix.group() if prefix else ""].append(task)
    large = {p: many for p, many in by_prefix.items() if p and len(many) >= MIN_FAMILY_TASKS}
    return large if len(large) < len(by_prefix) else {}


def _family_note(prefix: str, tasks: Sequence[str]) -> str:
    return f"{plural(len(tasks), 'task')} {prefix}* are left out, as parts of one."


def _points(found: _Found, *, without: dict[str, list[str]]) -> Points:
    points, left = Points(), {task for tasks in without.values() for task in tasks}
    for task, scores in found.scores.items():
        for metric, step, value in scores if task not in left else ():
            points.add(metric, step=step, value=value)
    for step, tokens in found.tokens.items():
        points.add_tokens(tokens, step=step)
    return points


def _metric(task: str, key: str) -> str:
    """'acc_stderr,none' of piqa -> 'eval/piqa/acc_stderr'; other filters stay in the name."""
    metric, _, filter_name = key.partition(",")
    if filter_name in ("", "none"):
        return benchmark_metric(task, metric)
    if metric.endswith("_stderr"):
        return benchmark_metric(task, f"{metric.removesuffix('_stderr')},{filter_name}_stderr")
    return benchmark_metric(task, key)


def _arguments(document: dict[str, Any]) -> str:
    """What the harness was given of the model: 'pretrained=owner/name,revision=step1000'."""
    config = document.get("config")
    given = config.get("model_args") if isinstance(config, dict) else None
    if isinstance(given, dict):
        return ",".join(f"{key}={value}" for key, value in given.items())
    return text(given) or ""


def _model(document: dict[str, Any]) -> str:
    pretrained = re.search(r"(?:^|,)pretrained=([^,]+)", _arguments(document))
    said = pretrained.group(1) if pretrained else text(document.get("model_name")) or ""
    return said.rstrip("/").rpartition("/")[2]


def _name(found: _Found, path: Path) -> str:
    """The model's name where all files say one that is not a step's, else the path's."""
    model = next(iter(found.models))
    is_one = len(found.models) == 1 and model and not _STEP.search(model)
    return model if is_one else path.stem.replace("*", "")


def _short(pattern: str) -> str:
    """The end of a pattern: where it lay on somebody's machine is nobody's business."""
    return "/".join(Path(pattern).parts[-2:])


def _notes(found: _Found, num_foreign: int, num_unnamed: int) -> list[str]:
    notes = ["Scored by lm-evaluation-harness, by whoever published the files."]
    if found.shots:
        counts = enumerate_words([f"{n}-shot" for n in sorted(found.shots)])
        notes.append(f"The scores are {counts}.")
    if found.limits:
        limits = enumerate_words([f"{n:g}" for n in sorted(found.limits)])
        notes.append(f"Scored on a part of the items (limit {limits}).")
    if num_foreign:
        notes.append(left_out(num_foreign, "JSON file", why="without readable results"))
    if num_unnamed:
        notes.append(left_out(num_unnamed, "JSON file", why="without a step"))
    return notes


def _several(path: Path, found: dict[str, _Found]) -> UsageError:
    told = [f"{pattern} ({plural(one.num_files, 'file')})" for pattern, one in found.items()]
    shown = told[:MAX_TRAJECTORIES_TOLD]
    more = f" and {len(told) - len(shown):,} more" if len(told) > len(shown) else ""
    return UsageError(
        f"{path} holds {len(found):,} trajectories: {', '.join(shown)}{more}",
        hint="an import is one trajectory: give one of these, in quotes because of the *",
    )


def _nothing(path: Path, files: list[Path], *, num_named: int) -> UsageError:
    if not files:
        return (
            refuse(path, expected=EXPECTED)
            if path.exists()
            else UsageError(f"nothing matches {path}", hint=f"expected {EXPECTED}")
        )
    looked = f"of {plural(len(files), 'JSON file')} in {path}, "
    if not num_named:
        some = enumerate_some(file.name for file in files[:3])
        return UsageError(f"{looked}none names a step: {some}", hint=f"expected {EXPECTED}")
    return UsageError(
        f"{looked}{num_named:,} name a step and none of those has results",
        hint=f"expected {EXPECTED}",
    )
