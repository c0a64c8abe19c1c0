"""Validation that reports every problem of a recipe at once, each with a hint."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from milepost.config.rules import Problem, broken_rules
from milepost.config.schema import Config
from milepost.core.errors import UsageError


class ConfigError(UsageError):
    """One or more problems of a recipe."""

    def __init__(self, problems: list[Problem], *, source: str) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"{count} in {source}"]
        lines += [f"  {p.where}: {p.what}\n    hint: {p.hint}" for p in problems]
        super().__init__("\n".join(lines))
        self.problems = problems


def validate(raw: dict[str, Any], *, source: str) -> Config:
    """A config from plain values.

    Args:
        raw: section name to field name to value, as TOML gives it.
        source: what to call it in messages.

    Raises:
        ConfigError: lists everything that is wrong.
    """
    problems: list[Problem] = []
    bad: set[str] = set()
    config: Config | None = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        for details in error.errors():
            problem = _describe(details)
            if problem.where not in bad:
                problems.append(problem)
            bad.add(problem.where)
    problems += broken_rules(_usable_values(raw, bad))
    if problems or config is None:
        raise ConfigError(problems, source=source)
    return config


def field_names() -> list[str]:
    """Every dotted field name, such as 'train.lanes'."""
    return [f"{section}.{name}" for section, model in _sections() for name in model.model_fields]


def _sections() -> list[tuple[str, type[BaseModel]]]:
    return [(name, info.annotation) for name, info in Config.model_fields.items()]  # type: ignore[misc]


def _usable_values(raw: dict[str, Any], bad: set[str]) -> dict[str, Any]:
    """Values that passed on their own, defaults included, by dotted name."""
    values: dict[str, Any] = {}
    for section, model in _sections():
        given = raw.get(section, {})
        if not isinstance(given, dict):
            continue
        for name, info in model.model_fields.items():
            dotted = f"{section}.{name}"
            if any(dotted == b or dotted.startswith(b + ".") for b in bad):
                continue
            if name in given:
                values[dotted] = given[name]
            elif not info.is_required():
                values[dotted] = info.default
    return values


def _describe(details: ErrorDetails) -> Problem:
    location = [str(part) for part in details["loc"]]
    where = ".".join(location[:2])
    kind, seen = details["type"], details["input"]
    if kind == "extra_forbidden":
        return Problem(where, "unknown key", _suggest(location))
    if kind == "missing":
        return Problem(where, "is required but not set", _allowed(location))
    reason = details["msg"][:1].lower() + details["msg"][1:]
    return Problem(where, f"{_shorten(seen)}: {reason}", _allowed(location))


def _suggest(location: list[str]) -> str:
    if len(location) == 1:
        names = [name for name, _ in _sections()]
    else:
        names = list(dict(_sections())[location[0]].model_fields)
    close = difflib.get_close_matches(location[-1], names, n=1)
    if close:
        return f"did you mean {'.'.join([*location[:-1], close[0]])}?"
    elsewhere = [n for n in field_names() if n.split(".")[1] == location[-1]]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"known here: {', '.join(names)}"


def _allowed(location: list[str]) -> str:
    """What the field takes: its type, range and meaning."""
    if len(location) < 2:
        return "a section: [name] and keys below it"
    info = dict(_sections())[location[0]].model_fields.get(location[1])
    if info is None:
        return "see the recipes that come with Milepost"
    bounds = [str(m) for m in _bounds(info)]
    form = _type_name(info.annotation)
    limits = f" ({', '.join(bounds)})" if bounds else ""
    return f"{form}{limits}. {info.description or ''}".rstrip()


def _bounds(info: Any) -> list[str]:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    sources = list(info.metadata)
    for argument in get_args(info.annotation):
        sources += list(getattr(argument, "__metadata__", ()))
        for nested in getattr(argument, "__metadata__", ()):
            sources += list(getattr(nested, "metadata", ()))
    found: dict[str, str] = {}
    for constraint in sources:
        for name, word in words.items():
            value = getattr(constraint, name, None)
            if value is not None:
                found[name] = f"{word} {value:g}" if isinstance(value, float) else f"{word} {value}"
    return list(found.values())


def _type_name(annotation: Any) -> str:
    plain = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    if annotation in plain:
        return plain[annotation]
    arguments = get_args(annotation)
    if arguments and all(isinstance(a, str | bool | float) for a in arguments):
        return "one of " + ", ".join(str(a).lower() if a is False else str(a) for a in arguments)
    named = [_type_name(a) for a in arguments if a not in (type(None), ...)]
    return " or ".join(dict.fromkeys(n for n in named if n)) or "a value"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
