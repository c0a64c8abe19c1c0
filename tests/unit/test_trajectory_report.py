"""The report page and the files beside it, read back and held against the events."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from milepost.config.recipe import config_from_toml
from milepost.core.errors import CheckpointError, UsageError
from milepost.runs.events import read_history
from milepost.runs.layout import RunLayout
from milepost.runs.manifest import read_run_manifest
from milepost.runs.records import SampleRecord, append_sample
from milepost.trajectory.report import write_report
from tests import made_runs
from tests.made_runs import MadeRun, make_killed_and_resumed_run, make_run

VOID = {"meta", "br", "link", "img", "input", "hr"}
SHAPES = {"path", "use"}


class Page(HTMLParser):
    """What a reader of the page meets: text by element, ids, links; tags must nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.open.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()
        if tag in ("h1", "h2", "h3"):
            self.headings.append((tag, " ".join(self.texts[tag][-1].split())))

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self.open]
        if {"style", "script"} & set(tags) or ("svg" in tags and tags[-1] not in ("title", "desc")):
            return
        self.text += data
        for tag in set(tags):
            self.texts[tag][-1] += data

    @property
    def num_scripts(self) -> int:
        """The page's own two are its data and its script."""
        return sum(tag == "script" for tag, _ in self.tags)

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    make_killed_and_resumed_run(folder, name="Union <small>")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return read_page(run / "report" / "index.html")


def test_sections_come_in_the_order_a_reader_needs_them(page: Page) -> None:
    headings = [text for tag, text in page.headings if tag != "h3"]
    assert headings[:3] == ["Union <small>", "Curves", "Samples, step by step"]
    assert headings[-4:] == ["Segments", "Checkpoints", "Config", "Provenance"]


def test_summary_says_what_the_events_show(page: Page) -> None:
    assert "The run has done 1,000 of 1,000 steps and seen 8,192,000 tokens (8.19 M)." in page.words
    assert (
        "segment 1 (steps 1 to 437) was killed (it has no end on record);"
        " segment 2 (steps 401 to 1,000) reached its last step." in page.words
    )
    assert (
        "The resume was exact: 37 of 37 steps run again gave the same loss, gradient norm and"
        " batch as before." in page.words
    )
    assert "Validation loss went from 8.3200 nats per token at step 0 to 2.7002" in page.words
    assert "bits per byte from 3.334 to 1.082" in page.words
    # 437 killed steps of 0.25 s and what the second segment says of itself.
    assert "Training took 4 min 19 s at a median of" in page.words


def test_each_panel_has_its_numbers_as_text_alternative(page: Page) -> None:
    figures = [text for tag, text in page.headings if re.match(r"[A-F] ", text)]
    assert figures == [
        *("A Validation loss", "B HellaSwag", "C Training loss", "D Tokens per second"),
        *("E Learning rate", "F Gradient norm"),
    ]
    images = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert len(images) == 5
    for image in images:
        assert set(str(image["aria-labelledby"]).split()) <= ids
    assert "Validation loss (nats per token), 11 values: first 8.32 at step 0" in page.text
    assert "Training loss (nats per token), 1,000 values: first" in page.text
    assert page.text.count("not evaluated") == 1


def test_panels_mark_resumes_and_checkpoints(page: Page) -> None:
    drawings = re.findall(r"<svg role=\"img\".*?</svg>", page.html, re.DOTALL)
    for drawing in drawings:
        assert drawing.count(">segment 2</text>") == 1
        ticks = re.findall(r"<g id=\"\w+-ticks\">\s*<path d=\"([^\"]*)\"", drawing)
        assert [tick.count("M") for tick in ticks] == [10]
        assert not re.search(r"#[0-9a-f]{6}", drawing), "a color that is not the page's"


def test_ids_are_unique_and_nothing_is_fetched(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object"}
    assert page.num_scripts == 2
    assert "http:" not in page.html
    assert "https:" not in page.html
    assert "@import" not in page.html
    for _, attrs in page.tags:
        for name in ("href", "xlink:href"):
            target = str(attrs.get(name) or "")
            if target.startswith("#"):
                assert target[1:] in ids
            elif target:
                assert re.fullmatch(r"[a-z_]+\.(csv|toml|parquet)", target)


def test_linked_files_lie_beside_the_page(run: Path, page: Page) -> None:
    linked = {str(a["href"]) for tag, a in page.tags if tag == "a"}
    assert {path.name for path in (run / "report").iterdir()} == linked | {"index.html"}


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("training_loss", "step", ("loss_nats", "tokens_seen", "data_step")),
        ("tokens_per_second", "step", ("tokens_per_second", "step_seconds", "mfu_fraction")),
        ("learning_rate", "step", ("learning_rate",)),
        ("gradient_norm", "step", ("grad_norm", "loss_scale")),
        ("validation_loss", "validation", ("loss_nats", "bits_per_byte", "tokens", "seconds")),
    ],
)
def test_csv_holds_every_value_to_the_last_bit(
    run: Path, name: str, kind: str, fields: tuple[str, ...]
) -> None:
    events = read_history(RunLayout(run).events).latest_by_step(kind)
    rows = read_csv(run / "report" / f"{name}.csv")
    assert [int(row["step"]) for row in rows] == list(events)
    for row, event in zip(rows, events.values(), strict=True):
        assert int(row["segment"]) == event["segment"]
        for field in fields:
            value = float(row[field]) if row[field] else None
            assert value == event.get(field)


def test_segments_and_checkpoints_are_told(run: Path, page: Page) -> None:
    segments = read_csv(run / "report" / "segments.csv")
    assert [(s["segment"], s["restored_step"], s["end_reason"]) for s in segments] == [
        ("1", "", ""),
        ("2", "400", "done"),
    ]
    assert (segments[1]["compared_steps"], segments[1]["equal_steps"]) == ("37", "37")
    assert "step 400, restored: everything" in page.words
    assert "cpu, 2 ranks, 1 thread each, a plain processor" in page.words
    assert "exact: one thread a rank, deterministic kernels" in page.words
    checkpoints = read_csv(run / "report" / "checkpoints.csv")
    assert [int(c["step"]) for c in checkpoints] == list(range(100, 1001, 100))
    assert [c["state"] for c in checkpoints] == ["weights only"] * 8 + ["whole"] * 2


def test_samples_of_one_prompt_stand_together_by_step(page: Page) -> None:
    prompts = [text for tag, text in page.headings if text in made_runs.PROMPTS]
    assert prompts == list(made_runs.PROMPTS)
    steps = [int(s.replace(",", "")) for s in re.findall(r"<b>step ([\d,]+)</b>", page.html)]
    assert steps == list(range(0, 1001, 100)) * 2
    assert "obs<b>,,,\n\n of of" in page.text, "blank lines are kept as one"
    assert "obs&lt;b&gt;" in page.html
    assert "val. loss 8.320" in page.text


def test_recipe_beside_the_page_is_the_runs_config(run: Path, page: Page) -> None:
    text = (run / "report" / "recipe.toml").read_text(encoding="utf-8")
    manifest = read_run_manifest(RunLayout(run))
    assert config_from_toml(text, source="recipe") == manifest.config
    assert "milepost train first/report/recipe.toml --run first-again" in page.text
    assert manifest.data_fingerprint in page.text
    assert "[optimizer]" in page.text
    assert "packages torch" in page.text


def test_same_input_gives_same_bytes(run: Path) -> None:
    before = {p.name: p.read_bytes() for p in (run / "report").iterdir()}
    write_report(run)
    assert {p.name: p.read_bytes() for p in (run / "report").iterdir()} == before


def test_page_is_small(run: Path) -> None:
    assert (run / "report" / "index.html").stat().st_size < 400_000


@pytest.mark.parametrize("name", ["first", "run #3, 50 %? ü"])
def test_out_names_the_page_and_what_lies_beside_it(run: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "deep" / f"{name}.html"
    assert write_report(run, out=out) == out
    addresses = [urlsplit(str(a["href"])) for tag, a in read_page(out).tags if tag == "a"]
    assert not any(address.query or address.fragment for address in addresses)
    linked = {unquote(address.path) for address in addresses}
    assert {path.name for path in out.parent.iterdir()} == linked | {out.name}
    assert f"{name}-training_loss.csv" in linked


def test_out_that_is_a_folder_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        write_report(run, out=tmp_path)


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a run folder: it has no manifest\.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_run_without_events_gets_a_page_that_says_so(tmp_path: Path) -> None:
    made = make_run(tmp_path / "new")
    page = read_page(write_report(made.layout.root))
    assert "There are no events yet" in page.words
    assert page.words.count("no values yet") == 5
    assert "No segment has begun." in page.words
    assert "[optimizer]" in page.text


def test_run_of_one_step(tmp_path: Path) -> None:
    made = make_run(tmp_path / "one", total_steps=1)
    made.start()
    made.append("step", **made.step_fields(1))
    page = read_page(write_report(made.layout.root))
    assert "The run has done 1 of 1 step and" in page.words
    assert "at step 1, the only value." in page.text
    assert "has no end on record: it is running, or it was killed" in page.words


def test_torn_foreign_and_not_finite_lines(tmp_path: Path) -> None:
    made = make_run(tmp_path / "torn", total_steps=20)
    made.start()
    made.train(1, 8)
    with made.layout.events.open("a") as file:
        file.write('{"v": 1, "kind": "step", "step": 9, "lo\n[1, 2]\n\x00\x00\n{"step": 3}\n')
        file.write('{"v":1,"kind":"step","segment":1,"step":10,"loss_nats":NaN,"grad_norm":"x"}\n')
        file.write('{"v":1,"kind":"step","segment":1,"step":true,"loss_nats":' + "9" * 400 + "}\n")
    made.layout.samples.write_text("not JSON\n")
    page = read_page(write_report(made.layout.root))
    assert "4 unreadable lines of events.jsonl skipped." in page.words
    assert "1 unreadable line of samples.jsonl skipped." in page.words
    assert "1 step is missing in the history: 9." in page.words
    rows = read_csv(made.layout.report.parent / "training_loss.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6", "7", "8", "10"]
    assert rows[-1]["loss_nats"] == ""


def test_events_of_a_later_schema_are_refused(tmp_path: Path) -> None:
    made = make_run(tmp_path / "later")
    made.start()
    with made.layout.events.open("a") as file:
        file.write('{"v": 2, "kind": "step", "step": 1}\n')
    with pytest.raises(CheckpointError, match="schema version 2, this program reads 1"):
        write_report(made.layout.root)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    bad = "</title></style><script>alert(1)</script>\"'&\x00\x1b[31m\u202e"
    made = make_run(tmp_path / "hostile")
    made.start(reason=bad, device=bad, exactness="approximate", devices=[bad, 3])
    made.append("step", **made.step_fields(1))
    made.append("checkpoint_saved", step=1, sha256="<b>", bytes="many", seconds=None)
    made.append(bad)
    made.end("<i>done</i>", step=1, training_seconds=1.0)
    decoding = {"temperature": "hot", "max_new_tokens": None}
    for prompt, completion in (("<h1>", "<img src=x onerror=1>"), (" ", "")):
        append_sample(
            made.layout.samples, SampleRecord(1, None, prompt, completion, [], decoding, 0)
        )
    # A lone surrogate cannot be written as UTF-8, but a foreign writer can escape it.
    raw = {"step": 1, "prompt": "raw", "completion": "a\ud800b\x07</p>"}
    with made.layout.samples.open("a") as file:
        file.write(json.dumps(raw) + "\n")
    page = read_page(write_report(made.layout.root))
    assert not {tag for tag, _ in page.tags} & {"img", "i"}
    assert page.num_scripts == 2
    assert "<script>alert(1)</script>" in page.text
    assert "<img src=x onerror=1>" in page.text
    assert "a�b�</p>" in page.text
    assert "(no text)" in page.text
    assert len([tag for tag, _ in page.tags if tag == "h1"]) == 1


def test_many_long_samples_stay_within_the_page(tmp_path: Path) -> None:
    made = make_run(tmp_path / "long")
    made.start()
    for step in range(40):
        for prompt in range(22):
            text = f"{step} " + "&" * 4000
            record = SampleRecord(step, None, f"prompt {prompt}", text, [], {"temperature": 0}, 0)
            with made.layout.samples.open("a") as file:
                file.write(json.dumps(record.as_line()) + "\n")
    out = write_report(made.layout.root)
    page = read_page(out)
    assert out.stat().st_size < 2_000_000
    assert "24 of 40 steps shown" in page.words
    assert "2 more prompts are in samples.jsonl." in page.words
    assert "more characters" in page.words


def write_long_run(made: MadeRun, *, num_steps: int) -> None:
    """As `train`, in one write: the writer's lock and flush a line take too long here."""
    made.start()
    lines = []
    for step in range(1, num_steps + 1):
        event = {"v": 1, "kind": "step", "time": "2026-01-05T09:00:00Z", "segment": 1}
        lines.append(json.dumps(event | made.step_fields(step)))
        if step % 100 == 0:
            told = {"kind": "validation", "step": step, "loss_nats": 3.0, "segment": 1}
            lines.append(json.dumps(told))
            lines.append(json.dumps({"kind": "checkpoint_saved", "step": step, "segment": 1}))
    with made.layout.events.open("a") as file:
        file.write("\n".join(lines) + "\n")


def test_long_run_is_thinned_on_the_page_and_whole_in_the_csv(tmp_path: Path) -> None:
    made = make_run(tmp_path / "long", total_steps=45_000)
    write_long_run(made, num_steps=45_000)
    out = write_report(made.layout.root)
    assert out.stat().st_size < 1_000_000
    assert len(read_csv(out.with_name("training_loss.csv"))) == 45_000
    assert "band from lowest to highest" in read_page(out).words
    assert tomllib.loads(out.with_name("recipe.toml").read_text())["train"]["total_steps"] == 45_000
