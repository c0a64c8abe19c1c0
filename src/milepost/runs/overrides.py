"""Changes of a run's config after it was made: recorded as events, applied in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from milepost.config.recipe import as_plain, config_from_plain
from milepost.config.schema import Config
from milepost.runs.events import History

Change = tuple[str, Any, Any]
"""(dotted field, old value, new value)"""


def config_with_overrides(
    config: Config, *, history: History, until_segment: int | None = None
) -> Config:
    """The manifest's config with the overrides that segments took.

    Args:
        config: of the run's manifest.
        history: of the run.
        until_segment: the last segment whose overrides count; None: all.
    """
    taken = [
        (event["field"], event["old"], event["new"])
        for event in history.of_kind("override")
        if until_segment is None or event["segment"] <= until_segment
    ]
    return apply_changes(config, taken)


def apply_changes(config: Config, changes: Sequence[Change]) -> Config:
    """A config with the new value of every change.

    Raises:
        UsageError: the values do not go together; every problem is listed.
    """
    if not changes:
        return config
    plain = as_plain(config)
    for field, _, new in changes:
        section, name = field.split(".")
        plain[section][name] = new
    return config_from_plain(plain, source="the changed recipe")
