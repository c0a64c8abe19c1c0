"""Whether what a recipe asks for is installed; asked by the launcher too, so without torch."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator

from milepost.config.schema import Config, OptimizerSection
from milepost.core.errors import UsageError


def check_installed(config: Config) -> None:
    """Refuses what is not installed, before anything is made.

    Raises:
        UsageError: with the line that installs it.
    """
    check_optimizer(config.optimizer)
    if config.train.float8 != "none" and not _has_torchao():
        raise UsageError(
            f'train.float8 is "{config.train.float8}", which needs torchao, and torchao is not '
            "installed",
            hint="pip install 'milepost[lowbit]', or train with --train.float8 none",
        )


def check_optimizer(config: OptimizerSection) -> None:
    """Refuses an optimizer that is not installed, before anything is made.

    Raises:
        UsageError: with the line that installs it.
    """
    if config.name == "adamw8bit" and not _has_torchao():
        raise UsageError(
            "optimizer.name is adamw8bit, which needs torchao, and torchao is not installed",
            hint="pip install 'milepost[lowbit]', or train with --optimizer.name adamw, whose "
            "moments take 8 bytes a trained parameter in place of 2",
        )


@contextlib.contextmanager
def quiet_torchao() -> Iterator[None]:
    """Keeps torchao's talk of kernels that it does not find, and does not need here, to itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _has_torchao() -> bool:
    return importlib.util.find_spec("torchao") is not None
