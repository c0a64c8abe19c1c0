"""Probes of a run's checkpoints as a table a prompt: a row a step, a column a variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milepost.core.files import append_json_line
from milepost.trajectory.collect import Trajectory, collect
from milepost.trajectory.report import write_report
from milepost.trajectory.sections.sensitivity import (
    MAX_PROMPTS_SHOWN,
    MAX_VARIANTS_SHOWN,
    Sensitivity,
    sensitivity_section,
)
from tests.made_finetunings import make_finetuning, tune
from tests.made_runs import MadeRun, make_killed_and_resumed_run
from tests.unit.test_trajectory_report import read_page

HOSTILE = "<script>alert(1)</script>\x1b[31m"


def probe(made: MadeRun, step: int, variant: str, divergence: Any, **fields: Any) -> None:
    """A line as `milepost probe` writes it, as far as the report reads it."""
    base = fields.get("base", "Once upon")
    prompt = base if variant == "base" else f"{base} {variant}"
    adapter = fields.get("adapter")
    line = {"v": 1, "probe_id": f"{step} {prompt} {adapter}", "step": step, "adapter": adapter}
    told = {"variant": variant, "base": base, "prompt": prompt, "kl_nats": divergence}
    append_json_line(made.layout.probes, line | told)


def shown(run: Trajectory) -> Sensitivity:
    section = sensitivity_section(run)
    assert section is not None
    content = section.content
    assert isinstance(content, Sensitivity)
    return content


def test_rows_are_steps_and_columns_variants_and_the_later_line_counts(tmp_path: Path) -> None:
    made = make_killed_and_resumed_run(tmp_path / "run")
    for step, space in ((200, 1.5), (100, 0.5), (100, 0.25)):
        probe(made, step, "base", 0.0)
        probe(made, step, "space", space)
    probe(made, 200, "no mark", 1e-5)
    [table] = shown(collect(made.layout.root)).tables
    assert table.caption == "“Once upon”"
    assert [column.name for column in table.columns] == ["Step", "space", "no mark"]
    assert table.rows == (("100", "0.2500", "–"), ("200", "1.5000", "0.0000"))


def test_adapters_of_a_fine_tuning_are_its_steps_and_foreign_ones_stand_apart(
    tmp_path: Path,
) -> None:
    tuned, plain = make_finetuning(tmp_path / "tuned"), make_killed_and_resumed_run(tmp_path / "p")
    tune(tuned)
    for made in (tuned, plain):
        for step, adapter in ((10, "a" * 64), (20, "b" * 64)):
            probe(made, step, "space", 0.5, adapter=adapter)
    assert len(shown(collect(tuned.layout.root)).tables) == 1
    assert len(shown(collect(plain.layout.root)).tables) == 2


def test_what_was_not_probed_has_no_section(tmp_path: Path) -> None:
    made = make_killed_and_resumed_run(tmp_path / "run")
    assert sensitivity_section(collect(made.layout.root)) is None
    probe(made, 100, "base", 0.0)
    probe(made, 100, "space", None)
    made.layout.probes.write_text(made.layout.probes.read_text() + "not JSON\n")
    run = collect(made.layout.root)
    assert sensitivity_section(run) is None
    assert run.num_bad_lines == {"probes.jsonl": 1}


def test_hostile_and_many_probes_stay_within_the_page(tmp_path: Path) -> None:
    made = make_killed_and_resumed_run(tmp_path / "run")
    for number in range(MAX_PROMPTS_SHOWN + 2):
        probe(made, 100, HOSTILE, 0.5, base=f"{number} {HOSTILE * 20}")
    for number in range(MAX_VARIANTS_SHOWN + 3):
        probe(made, 200, f"variant {number}", 0.5, base=f"0 {HOSTILE * 20}")
    content = shown(collect(made.layout.root))
    assert content.num_more == 2
    assert content.tables[0].caption.endswith("”, 4 variants more on record")
    assert len(content.tables[0].columns) == 1 + MAX_VARIANTS_SHOWN
    page = read_page(write_report(made.layout.root))
    assert page.num_scripts == 2
    assert "2 more prompts are in probes.jsonl." in page.words
