"""The commands of a chat, what they take, and their help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from milepost.core.errors import UsageError


@dataclass(frozen=True)
class Command:
    """What stands behind a slash.

    Attributes:
        argument: what it takes, for people; "" where it takes nothing.
        does: one line.
        field: of `SamplingOptions`, which it sets; None where it does something else.
        number: type of that field.
        has_off: whether `off` is a value of that field.
    """

    argument: str
    does: str
    field: str | None = None
    number: type[int] | type[float] = int
    has_off: bool = False


COMMANDS = {
    "help": Command("", "shows these lines"),
    "reset": Command("", "forgets the conversation"),
    "system": Command("TEXT", "tells the model TEXT before the conversation; without one, the "
                      "template's own sentence"),
    "step": Command("N", "goes on with another checkpoint; without N, shows which there are"),
    "temperature": Command("X", "0: the likeliest token each time", "temperature", float),
    "top-k": Command("N", "draw from the N likeliest tokens only; or off", "top_k", int, True),
    "top-p": Command("X", "draw from the likeliest tokens that together have probability X; or "
                     "off", "top_p", float, True),
    "seed": Command("N", "of the random draws", "seed"),
    "max-new-tokens": Command("N", "most tokens of an answer", "max_new_tokens"),
    "settings": Command("", "shows what the five above are set to"),
    "quit": Command("", "ends, as Ctrl-D does"),
}  # fmt: skip


def help_lines() -> list[str]:
    """All commands, one a line."""
    names = {name: f"/{name} {command.argument}".rstrip() for name, command in COMMANDS.items()}
    width = max(map(len, names.values()))
    lines = [f"  {names[name]:<{width}}  {command.does}" for name, command in COMMANDS.items()]
    return [*lines, "A question that begins with / is asked with a space before it."]


def parse_value(name: str, argument: str) -> tuple[str, Any]:
    """The field that a command sets, and the value.

    Raises:
        UsageError: the argument is no number.
    """
    command = COMMANDS[name]
    assert command.field is not None
    if command.has_off and argument.lower() == "off":
        return command.field, None
    try:
        return command.field, command.number(argument)
    except ValueError:
        allowed = "a whole number" if command.number is int else "a number"
        raise UsageError(
            f"/{name} is given {argument!r}",
            hint=f"give {allowed}" + (" or off" if command.has_off else ""),
        ) from None
