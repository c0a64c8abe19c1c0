"""`milepost sample`, recorded samples, and the steps that --steps means."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from milepost.cli.main import run
from milepost.core.errors import CheckpointError, UsageError
from milepost.evaluation.samples import record_samples
from milepost.evaluation.text_quality import text_quality
from milepost.runs.layout import RunLayout
from milepost.runs.records import read_samples
from milepost.runs.steps import parse_steps
from tests.tiny_models import tiny_model, tiny_tokenizer, write_model_folder, write_tiny_run


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> RunLayout:
    return write_tiny_run(tmp_path_factory.mktemp("runs") / "run", 100, 200, 350, 400)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", [100, 200, 350, 400]),
        ("latest", [400]),
        ("every:200", [200, 400]),
        ("every:1", [100, 200, 350, 400]),
        ("350", [350]),
        ("400, 100,400", [100, 400]),
    ],
)
def test_steps_are_read(layout, text: str, expected: list[int]) -> None:
    assert parse_steps(text, layout=layout) == expected


@pytest.mark.parametrize("text", ["", "every:0", "every:-1", "1,", "-1", "last", "٣", "9" * 13])
def test_steps_out_of_form_are_refused(layout, text: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        parse_steps(text, layout=layout)


@pytest.mark.parametrize(
    ("text", "what"), [("100,300", "step 300"), ("every:1000", "step that 1000 divides")]
)
def test_steps_without_a_checkpoint_are_named(layout, text: str, what: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_steps(text, layout=layout)
    assert caught.value.message.endswith(f"has no checkpoint of {what}")
    assert caught.value.hint == "there are checkpoints of steps 100, 200, 350, 400"


def test_samples_are_recorded_with_all_that_made_them(tmp_path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(tmp_path)
    log = tmp_path / "samples.jsonl"
    settings = {"max_new_tokens": 4, "temperature": 0.8, "top_k": 5, "top_p": 0.9, "seed": 3}
    records = record_samples(model, tokenizer, ["The", "A"], step=7, path=log, **settings)
    lines, num_bad = read_samples(log)
    assert num_bad == 0 and lines == [record.as_line() for record in records]
    line = lines[0]
    assert (line["step"], line["prompt"], line["seed"]) == (7, "The", 3)
    assert line["completion"] == tokenizer.decode(line["token_ids"])
    assert line["decoding"] == {
        "max_new_tokens": 4,
        "temperature": 0.8,
        "top_k": 5,
        "top_p": 0.9,
        "bos": True,
        "dtype": "float32",
        "stopped": line["decoding"]["stopped"],
    }
    assert line["quality"] == asdict(text_quality(line["token_ids"]))
    again = record_samples(model, tokenizer, ["The"], step=7, path=None, **settings)
    assert again == records[:1] and len(read_samples(log)[0]) == 2


def test_the_id_of_a_sample_is_that_of_records_without_quality(tmp_path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(tmp_path)
    [record] = record_samples(
        model, tokenizer, ["The"], step=7, path=None, max_new_tokens=4, seed=3
    )
    assert record.quality is not None
    assert record.sample_id == replace(record, quality=None).sample_id
    assert record.sample_id != replace(record, seed=4).sample_id


def test_sample_shows_each_step_and_records_it(layout, capsys) -> None:
    words = ["sample", str(layout.root), "--prompt", "The state", "--prompt", "and"]
    words += ["--steps", "100,400", "--max-new-tokens", "5", "--temperature", "1", "--seed", "2"]
    assert run(words) == 0
    shown = capsys.readouterr()
    assert shown.out.count("prompt      The state\n") == 2
    assert shown.out.index("step 100") < shown.out.index("step 400")
    assert "(5 tokens, stopped: max new tokens)" in shown.out
    assert "  quality     distinct-1 " in shown.out
    table = shown.out.split("quality, the mean over the prompts\n")[1].splitlines()
    assert [row.split()[0] for row in table] == ["step", "100", "400"]
    assert table[1].count("tokens") == 1 and "%" in table[1]
    assert shown.out.isprintable() or "\x1b" not in shown.out
    assert str(layout.samples) in shown.err
    assert [line["step"] for line in read_samples(layout.samples)[0]] == [100, 100, 400, 400]


def test_samples_of_a_checkpoint_are_recorded_in_its_run(tmp_path, capsys) -> None:
    layout = write_tiny_run(tmp_path / "run", 100, 200)
    words = ["sample", str(layout.checkpoint(100)), "--prompt", "The", "--max-new-tokens", "2"]
    assert run(words) == 0
    assert [line["step"] for line in read_samples(layout.samples)[0]] == [100]
    assert f"recorded in {layout.samples}" in capsys.readouterr().err


def test_sample_of_a_foreign_model_prints_one_json_document(tmp_path, capsys) -> None:
    write_model_folder(tmp_path, tiny_model(max_position_embeddings=256))
    assert run(["sample", str(tmp_path), "--max-new-tokens", "2", "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert [sample["prompt"][:20] for sample in samples] == [
        "The Pyramids of Giza",
        "The Mona Lisa, paint",
        "The Battle of Hastin",
    ]
    assert samples[0]["step"] is None
    assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--steps", "7"], 4, "has no checkpoint of step 7"),
        (["--steps", "some"], 2, "--steps 'some' cannot be read"),
        (["--temperature", "-1"], 2, "temperature is -1.0"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens is 0"),
        (["--prompt", "z" * 60], 2, "the model's context is 48"),
    ],
)
def test_sample_refuses_with_one_line_and_a_hint(layout, capsys, words, code, message) -> None:
    assert run(["sample", str(layout.root), "--prompt", "a", *words]) == code
    talk = capsys.readouterr().err
    assert message in talk and "\nhint: " in talk and "Traceback" not in talk


def test_steps_need_a_run(layout, capsys) -> None:
    assert run(["sample", str(layout.checkpoint(100)), "--steps", "all"]) == 2
    assert "--steps needs a run" in capsys.readouterr().err
