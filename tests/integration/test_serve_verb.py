"""`milepost serve` as a person starts and ends it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from milepost.cli.main import run
from tests.tiny_models import write_tiny_run

GOOD_KEY = "k" * 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "tiny"
    return write_tiny_run(root, 100, 200, max_position_embeddings=20_000).root


def test_it_says_where_and_what_and_ends_at_ctrl_c_in_the_middle_of_a_stream(root) -> None:
    command = [sys.executable, "-m", "milepost.cli.main", "serve", str(root), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said: list[str] = []
        while not said or "Ctrl-C" not in said[-1]:
            said.append(process.stderr.readline())
            assert said[-1], said
        address = re.fullmatch(r"API: (http://127\.0\.0\.1:\d+/v1)\n", said[0])
        assert address, said
        assert said[1] == "model: tiny, now tiny:200\n"
        assert said[3] == "       and 2 checkpoints by name, tiny:100 to tiny:200\n"
        client = openai.OpenAI(base_url=address.group(1), api_key="none", max_retries=0)
        stream = client.completions.create(
            # Drawn tokens would soon be an end of text.
            model="tiny",
            prompt="The",
            max_tokens=19_000,
            temperature=0,
            stream=True,
        )
        assert next(iter(stream)).model == "tiny:200"
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        out, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert rest.startswith("ended; 1 request was answered: "), rest
    answered = json.loads(out)["answered"]
    assert answered["requests"] == 1 and answered["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "error: --host 0.0.0.0 can be reached from other machines"),
        (["--host", "::"], "error: --host :: can be reached from other machines"),
        (["--api-key-env", "NO_SUCH"], "error: the environment variable NO_SUCH is not set"),
        (["--api-key-env", "SHORT"], "error: the key in SHORT has to be 16 or more plain"),
        (["--api-key-env", "SPACED"], "error: the key in SPACED has to be 16 or more plain"),
        (["--concurrency", "0"], "error: --concurrency is 0\nhint: give 1 or more"),
        (["--queue", "-1"], "error: --queue is -1\nhint: give 0 or more"),
        (["--max-tokens", "0"], "error: --max-tokens is 0\nhint: give 1 or more"),
        (["--port", "70000"], "error: port 70000 of 127.0.0.1 cannot be had"),
        (["--dtype", "int8"], "error:"),
    ],
)
def test_settings_that_cannot_be_are_refused(root, capsys, monkeypatch, words, message) -> None:
    monkeypatch.setenv("SHORT", "k" * 15)
    monkeypatch.setenv("SPACED", GOOD_KEY + " k")
    assert run(["serve", str(root), *words]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_what_is_no_model_is_refused(tmp_path, capsys) -> None:
    assert run(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "is neither a run nor a model" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{}")
    assert run(["serve", str(tmp_path), "--port", "0"]) == 4
    assert "has no checkpoint yet" in capsys.readouterr().err
