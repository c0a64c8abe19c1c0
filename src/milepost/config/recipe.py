"""Recipes: TOML files, packaged or the user's, with dotted overrides, to one frozen config."""

from __future__ import annotations

import difflib
import importlib.resources
import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from milepost.config.problems import field_names, validate
from milepost.config.schema import Config
from milepost.core.errors import UsageError
from milepost.core.files import sha256_of_json

ALWAYS_FIXED = (
    "model.",
    "data.sequence_length",
    "data.document_attention",
    "lora.",
    "finetune.template",
    "finetune.held_out_fraction",
)
"""Fields of a run that never change: architecture and data."""

HARMLESS = (
    "run.name",
    "data.path",
    "train.stop_at_step",
    "checkpoint.",
    "validation.every_steps",
    "evaluation.",
    "samples.",
    "guards.resume_drift_z",
    "guards.loader_timeout_seconds",
    "guards.collective_timeout_seconds",
    "tracking.",
    "finetune.base",
    "finetune.data",
    "finetune.questions",
    "finetune.max_new_tokens",
)
"""Fields that cannot alter a run's numbers; fingerprints guard `data.path`, `finetune.data` and
`finetune.base`."""

MAX_RECIPE_BYTES = 1 << 20


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with the install."""
    folder = importlib.resources.files("milepost.recipes")
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def recipe_text(recipe: str) -> str:
    """The TOML text of a packaged recipe or of a file.

    Raises:
        UsageError: there is no such recipe; the nearest name is suggested.
    """
    if recipe.endswith(".toml") or "/" in recipe:
        return _read_recipe_file(Path(recipe))
    names = packaged_recipes()
    if recipe in names:
        folder = importlib.resources.files("milepost.recipes")
        return (folder / f"{recipe}.toml").read_text(encoding="utf-8")
    close = difflib.get_close_matches(recipe, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UsageError(
        f"there is no recipe {recipe!r}",
        hint=f"{hint}packaged: {', '.join(names)}; or the path of a .toml file",
    )


def _read_recipe_file(path: Path) -> str:
    try:
        if not path.is_file():
            hint = "give the path of a .toml file"
            raise UsageError(f"there is no recipe file {path}", hint=hint)
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise UsageError(f"{path} is larger than any recipe", hint="give a .toml recipe")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text", hint="save the recipe as UTF-8") from error
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        hint = "give the path of a .toml file that this user may read"
        raise UsageError(f"cannot read the recipe {path}: {reason}", hint=hint) from error


def load_recipe(
    recipe: str, *, overrides: Iterable[str] = (), options: Sequence[str] = ()
) -> Config:
    """A validated config from a recipe and command-line overrides.

    Args:
        recipe: a packaged name or the path of a .toml file.
        overrides: words such as '--train.lanes', '4', '--train.no-compile'.
        options: the verb's own, to suggest one where a word is nearly that.

    Raises:
        UsageError: the recipe or an override is wrong; every problem is listed.
    """
    pairs = parse_overrides(list(overrides), options=options)
    return _config(recipe_text(recipe), pairs=pairs, source=f"recipe {recipe}")


def config_from_toml(text: str, *, overrides: Iterable[str] = (), source: str) -> Config:
    """As `load_recipe`, from TOML text."""
    return _config(text, pairs=parse_overrides(list(overrides)), source=source)


def _config(text: str, *, pairs: list[tuple[str, Any]], source: str) -> Config:
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"{source} is not TOML: {error}", hint="see https://toml.io") from error
    _unset_none(raw)
    for dotted, value in pairs:
        section, _, field = dotted.partition(".")
        table = raw.setdefault(section, {})
        if isinstance(table, dict):
            table[field] = value
    return validate(raw, source=source)


def _unset_none(raw: dict[str, Any]) -> None:
    """Takes the text "none" of a field that can be unset for what TOML has no word for."""
    for section, table in raw.items():
        for field, value in table.items() if isinstance(table, dict) else ():
            if value == "none" and _can_be_unset(section, field):
                table[field] = None


def parse_overrides(words: Sequence[str], *, options: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """`--train.lanes 4 --train.no-compile` to [('train.lanes', 4), ('train.compile', False)].

    Values are read as TOML where they are TOML, else as text. A field that is a text takes the
    word as it stands; `none` unsets a field that can be unset.

    Raises:
        UsageError: a word is not of the form --section.key VALUE.
    """
    pairs: list[tuple[str, Any]] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        name, equals, inline = word.removeprefix("--").partition("=")
        section, dot, field = name.replace("-", "_").partition(".")
        if not word.startswith("--") or not dot or not field:
            raise UsageError(f"unexpected argument {word!r}", hint=_nearest(name, options=options))
        has_value = bool(equals)
        if not has_value and position < len(words) and not _is_option(words[position]):
            inline, has_value = words[position], True
            position += 1
        if has_value:
            pairs.append((f"{section}.{field}", _parse_value(inline, section=section, field=field)))
        elif field.startswith("no_"):
            pairs.append((f"{section}.{field.removeprefix('no_')}", False))
        else:
            pairs.append((f"{section}.{field}", True))
    return pairs


def as_overrides(section: str, values: BaseModel | Mapping[str, Any]) -> list[str]:
    """The words that set every field of a section as it is here."""
    plain = values.model_dump(mode="json") if isinstance(values, BaseModel) else values
    return [
        word
        for name, value in plain.items()
        # JSON of numbers, truth values and texts is TOML; paths stand as they are.
        for word in (f"--{section}.{name}", value if isinstance(value, str) else json.dumps(value))
    ]


def _nearest(name: str, *, options: Sequence[str]) -> str:
    """What was probably meant by an option without a section."""
    fields = [dotted.split(".")[1] for dotted in field_names()]
    meant = {f.split(".")[1]: f for f in field_names() if fields.count(f.split(".")[1]) == 1}
    meant |= {option: option for option in options}
    is_section = any(dotted.startswith(f"{name}.") for dotted in field_names())
    close = difflib.get_close_matches(name.replace("-", "_"), meant, n=1)
    if close and not is_section:
        return f"did you mean --{meant[close[0]]}?"
    return "overrides look like --section.key VALUE"


def _is_option(word: str) -> bool:
    return word.startswith("--") and "." in word


def _parse_value(text: str, *, section: str, field: str) -> Any:
    taken = _field_type(section, field)
    if text == "none" and _can_be_unset(section, field):
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError, RecursionError, ValueError):
        return text
    # `--run.name 2024` is a name; `--run.name '"2024"'` is the same in TOML's own quotes.
    return value if isinstance(value, str) or taken is not str else text


def _can_be_unset(section: str, field: str) -> bool:
    return type(None) in get_args(_field_type(section, field))


def _field_type(section: str, field: str) -> Any:
    """The annotation of a field in the schema; None where there is no such field."""
    table = Config.model_fields.get(section)
    fields = {} if table is None else table.annotation.model_fields  # type: ignore[union-attr]
    return fields[field].annotation if field in fields else None


def as_plain(config: Config) -> dict[str, Any]:
    """The config as plain JSON values."""
    return config.model_dump(mode="json")


def config_from_plain(values: dict[str, Any], *, source: str) -> Config:
    """A config from what `as_plain` gave."""
    return validate(values, source=source)


def config_sha256(config: Config) -> str:
    """The hash that identifies a resolved config."""
    return sha256_of_json(as_plain(config))


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of every field that differs.

    A field that the old config resolved from "auto" does not differ from "auto".
    """
    found = []
    before, after = as_plain(old), as_plain(new)
    for section, fields in before.items():
        for name, value in fields.items():
            other = after[section][name]
            if value != other and other != "auto":
                found.append((f"{section}.{name}", value, other))
    return found


def is_harmless(field: str, *, config: Config | None = None) -> bool:
    """Whether a run may take a change of this field without a word.

    Args:
        field: dotted name.
        config: of the run; where it rolls back, it does so to a multiple of the interval of its
            checkpoints, which then is part of its numbers. None: of a run that does not.
    """
    rolls_back = config is not None and config.guards.spike == "rollback"
    if rolls_back and field == "checkpoint.every_steps":
        return False
    return field.startswith(HARMLESS)


def is_fixed(field: str) -> bool:
    """Whether a run never takes a change of this field."""
    return field.startswith(ALWAYS_FIXED)
