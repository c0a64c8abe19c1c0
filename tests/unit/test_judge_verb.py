"""What `milepost judge` refuses before it asks anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from milepost.cli.main import run as run_command
from milepost.runs.layout import RunLayout
from tests.made_runs import make_run


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_fsync: None) -> RunLayout:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = make_run(tmp_path / "run")
    made.sample(100)
    return made.layout


def judge(layout: RunLayout, *words: str) -> int:
    """One command; returns its exit code."""
    return run_command(["judge", str(layout.root), "--model", "judge-1", *words])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "no server is given"),
        (["--base-url", "localhost:8000"], 2, "'localhost:8000' is no address"),
        (["--base-url", "http://[::1"], 2, "'http://[::1' is no address"),
        (["--base-url", "http://a:99999/v1"], 2, "'http://a:99999/v1' is no address"),
        (["--base-url", "http://a b/v1"], 2, "'http://a b/v1' is no address"),
        (["--base-url", "http://h/v1/chat/completions"], 2, "path of a single request"),
        (["--base-url", "https://api.openai.com/v1"], 2, "OPENAI_API_KEY is not set"),
        (["--base-url", "http://h/v1", "--api-key-env", "MY_KEY"], 2, "MY_KEY is not set"),
        (["--base-url", "http://h/v1", "--replay", "x"], 2, "do not go together"),
        (["--replay", "x"], 3, "x is not a file of recorded replies"),
        (["--base-url", "http://h/v1", "--max-cost", "1"], 2, "--max-cost needs prices"),
        (["--base-url", "http://h/v1", "--prices", "1"], 2, "--prices '1' is not two prices"),
        (["--base-url", "http://h/v1", "--limit", "0"], 2, "--limit 0 leaves nothing to rate"),
        (["--base-url", "http://h/v1", "--steps", "7"], 2, "there is no sample of step 7"),
        (["--base-url", "http://h/v1", "--concurrency", "0"], 2, "--concurrency 0 is not 1 to 256"),
        (["--base-url", "http://h/v1", "--timeout-seconds", "0"], 2, "is not above 0"),
        (["--base-url", "http://h/v1", "--max-reply-tokens", "9"], 2, "too few for six scores"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked(
    layout: RunLayout,
    words: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert judge(layout, *words) == code
    assert message in capsys.readouterr().err
    assert not layout.ratings.exists()


def test_without_the_client_the_way_to_get_it_is_said(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    assert judge(layout, "--base-url", "http://h/v1") == 1
    assert 'hint: pip install "milepost[judge]"' in capsys.readouterr().err


def test_a_run_without_samples_says_how_to_make_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = make_run(tmp_path / "run").layout
    assert judge(empty, "--base-url", "http://h/v1", "--steps", "all") == 3
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: {empty.root} has no samples to rate"
    assert hint == f"hint: milepost sample {empty.root} --steps all records some"
