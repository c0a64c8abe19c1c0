"""A real browser, and `milepost rate` as a person starts it."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.made_runs import make_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

STEPS = (0, 200, 1000)
"""Two prompts at each: six samples."""

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium without a window; of a module, as its event loop would be in the way."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on this machine (Debian: apt install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=[*QUIET])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A window with a memory of its own; an error in the page's script fails the test."""
    errors: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(10_000)
    window = context.new_page()
    window.on("pageerror", lambda error: errors.append(str(error)))
    yield window
    context.close()
    assert not errors


@dataclass
class Served:
    """A running `milepost rate`."""

    run: Path
    process: subprocess.Popen[str]
    address: str

    def stop(self, which: signal.Signals = signal.SIGINT) -> tuple[int, str, str]:
        """Ends it as a person does; exit code, stdout and stderr."""
        self.process.send_signal(which)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with six samples."""
    made = make_run(tmp_path / "run")
    for step in STEPS:
        made.sample(step)
    return made.layout.root


@contextlib.contextmanager
def serving(run: Path, *words: str, port: str = "0") -> Iterator[Served]:
    """`milepost rate RUN` until the block ends."""
    command = [sys.executable, "-m", "milepost.cli.main", "rate", str(run), "--no-browser"]
    process = subprocess.Popen(
        [*command, "--port", port, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        found = re.search(r"http://\S+", first)
        assert found, first + process.stderr.read()
        yield Served(run, process, found.group())
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def served(run_folder: Path) -> Iterator[Served]:
    """The page of the run with one of the six samples shown twice."""
    with serving(run_folder) as started:
        yield started
