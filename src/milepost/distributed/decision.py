"""What the main rank decides and every rank acts on, its failures included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from milepost.core.errors import MilepostError
from milepost.distributed.reduce import broadcast_json
from milepost.distributed.world import World

Made = TypeVar("Made")


class MainRankFailed(MilepostError):
    """The main rank has said what went wrong; this rank leaves with the same exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


def decide(choose: Callable[[], Any], *, world: World) -> Any:
    """The main rank's choice on every rank; every rank must call.

    Args:
        choose: makes a JSON value; called on the main rank only.
        world: of this process.

    Raises:
        MilepostError: on the main rank, what `choose` raised.
        MainRankFailed: on the others, where `choose` failed; they wait for nothing.
    """
    if world.size == 1:
        return choose()
    error: MilepostError | None = None
    answer: dict[str, Any] = {}
    if world.is_main:
        try:
            answer = {"value": choose()}
        except MilepostError as failure:
            error = failure
            answer = {"exit_code": failure.exit_code}
    answer = broadcast_json(answer, world=world)
    if error is not None:
        raise error
    if "exit_code" in answer:
        raise MainRankFailed(answer["exit_code"])
    return answer["value"]


def on_main_rank(make: Callable[[], Made], *, world: World) -> Made | None:
    """What the main rank alone makes or does, None on the others; every rank must call.

    So what is wrong is said once, and no rank waits for one that has left.

    Raises:
        MilepostError: as `decide`.
    """
    made: list[Made] = []
    decide(lambda: made.append(make()), world=world)
    return made[0] if made else None


def main_rank_first(make: Callable[[], Made], *, world: World) -> Made:
    """What each rank makes for itself, the main rank before the others; every rank must call.

    The others find what the main rank has put into a cache.

    Raises:
        MilepostError: as `decide`.
    """
    made: list[Made] = []
    decide(lambda: made.append(make()), world=world)
    return made[0] if world.is_main else make()
