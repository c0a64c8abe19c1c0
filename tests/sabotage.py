"""Faults planted into training processes from outside, and the same into this process.

A folder on PYTHONPATH with a `sitecustomize.py` changes a function of the program in every process
that a test starts, ranks included; the program itself knows nothing of it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_AFTER_IMPORT = """
import importlib.abc, importlib.util, os, signal, sys


class AfterImport(importlib.abc.MetaPathFinder):
    def __init__(self, name, patch):
        self.name, self.patch = name, patch

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.patch(module)

        spec.loader.exec_module = exec_module
        return spec


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def is_once(path):
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


"""


class Sabotage:
    """What is changed in the processes of one test.

    Args:
        folder: of this test, for nothing else.
        monkeypatch: of this test.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        self._file = folder / "sitecustomize.py"
        self._folder = folder
        self._num_patches = 0
        self._file.write_text(_AFTER_IMPORT)
        path = os.environ.get("PYTHONPATH")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *([path] if path else [])]))

    def patch(self, module: str, body: str) -> None:
        """Runs `body` after `module` was imported, which it knows by that name.

        It may call `die()`, which is SIGKILL to the process, and `is_once(once)`, which is true
        the first time it is asked in any process of this test.
        """
        number = self._num_patches
        self._num_patches += 1
        lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
        once = str(self._folder / f"once-{number}")
        with self._file.open("a") as file:
            file.write(f"def patch{number}(module, once={once!r}):\n{lines}\n\n")
            file.write(f"sys.meta_path.insert(0, AfterImport({module!r}, patch{number}))\n\n")

    def remove(self) -> None:
        """From here on processes are left alone."""
        self._file.write_text("")


def burst(*data_steps: int) -> str:
    """Random tokens in place of these batches."""
    return f"""
import numpy as np
really = module.Loader.batch
def batch(self, data_step):
    rows = really(self, data_step)
    if data_step in {data_steps}:
        return np.random.default_rng(data_step).integers(0, 512, rows.shape).astype(np.uint32)
    return rows
module.Loader.batch = batch
"""
