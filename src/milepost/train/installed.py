"""Whether what a recipe asks for is installed; asked by the launcher too, so without torch."""

from __future__ import annotations

import importlib.util

from milepost.config.schema import OptimizerSection
from milepost.core.errors import UsageError


def check_optimizer(config: OptimizerSection) -> None:
    """Refuses an optimizer that is not installed, before anything is made.

    Raises:
        UsageError: with the line that installs it.
    """
    if config.name == "adamw8bit" and importlib.util.find_spec("torchao") is None:
        raise UsageError(
            "optimizer.name is adamw8bit, which needs torchao, and torchao is not installed",
            hint="pip install 'milepost[lowbit]', or train with --optimizer.name adamw, whose "
            "moments take 8 bytes a trained parameter in place of 2",
        )
