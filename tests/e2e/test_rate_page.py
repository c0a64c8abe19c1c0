"""A person rates a run in a real browser, by keyboard; then ratings.jsonl is read back."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from milepost.evaluation.rating_plan import rating_plan
from milepost.runs.layout import RunLayout
from milepost.runs.ratings import CRITERIA, read_ratings
from milepost.runs.records import read_samples
from tests.e2e.conftest import Served, serving
from tests.made_runs import make_run

if TYPE_CHECKING:
    from playwright.sync_api import Page

TOTAL = 7


def press(page: Page, keys: str) -> None:
    """Presses letters and digits one by one; a + is Enter, a < is Backspace."""
    for key in keys:
        page.keyboard.press({"+": "Enter", "<": "Backspace"}.get(key, key))


def is_at(page: Page, number: int) -> None:
    """Waits for a presentation, by its position."""
    page.locator("#where", has_text=f"Completion {number} of {TOTAL}").wait_for()


def says(page: Page, text: str) -> None:
    """Waits for a message."""
    page.locator("#scores .message", has_text=text).wait_for()


def chosen(page: Page) -> list[int | None]:
    """The scores that the form shows, in the order of the criteria."""
    fields = page.locator("fieldset")
    values = []
    for number in range(fields.count()):
        checked = fields.nth(number).locator("input:checked")
        values.append(int(checked.input_value()) if checked.count() else None)
    return values


def begin(page: Page, served: Served, name: str = "Ada") -> None:
    page.goto(served.address)
    page.get_by_label("Your name or initials").fill(name)
    page.keyboard.press("Enter")
    is_at(page, 1)


def on_record(run: Path) -> dict[tuple[str, int], list[int]]:
    """Sample and repeat to the six scores."""
    records, num_bad = read_ratings(RunLayout(run).ratings)
    assert num_bad == 0
    found: dict[tuple[str, int], dict[str, int]] = {}
    for record in records:
        assert (record.rater, record.rater_kind) == ("Ada", "person")
        found.setdefault((record.sample_id, record.repeat), {})[record.criterion] = record.score
    return {place: [scores[name] for name in CRITERIA] for place, scores in found.items()}


def test_a_whole_round_by_keyboard_with_a_reload_and_a_change(served: Served, page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    begin(page, served)
    press(page, "01234t+")  # 0 1 2 3 4 10
    is_at(page, 2)
    press(page, "555")
    page.reload()
    is_at(page, 2)
    says(page, "The scores you had not saved are back.")
    assert chosen(page) == [5, 5, 5, None, None, None]
    press(page, "+")
    says(page, "Still open: Factual accuracy, Depth, Creativity.")
    press(page, "66-+")  # 5 5 5 6 6 10
    is_at(page, 3)
    press(page, "777777<")  # left behind unsaved, not lost
    is_at(page, 2)
    assert chosen(page) == [5, 5, 5, 6, 6, 10]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    press(page, "9")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert chosen(page) == [5, 5, 8, 6, 6, 10]
    press(page, "+")
    is_at(page, 3)
    assert chosen(page) == [7] * 6
    for number in range(3, TOTAL):
        is_at(page, number)
        press(page, f"{number}" * 6 + "+")
    is_at(page, TOTAL)
    press(page, "<")
    is_at(page, TOTAL - 1)
    press(page, "<")
    is_at(page, TOTAL - 2)
    page.keyboard.press("End")
    is_at(page, TOTAL)
    press(page, "888889+")
    page.get_by_role("heading", name="Thank you, Ada").wait_for()
    page.reload()
    page.get_by_role("heading", name="Thank you, Ada").wait_for()
    assert all(url.startswith((served.address, "data:")) for url in asked)

    samples, _ = read_samples(RunLayout(served.run).samples)
    plan = rating_plan(samples, seed="Ada", fraction_repeated=0.1)
    given = [[0, 1, 2, 3, 4, 10], [5, 5, 8, 6, 6, 10], *([n] * 6 for n in range(3, TOTAL))]
    given.append([8, 8, 8, 8, 8, 9])
    places = [(shown.sample_id, shown.repeat) for shown in plan]
    assert on_record(served.run) == dict(zip(places, given, strict=True))

    code, out, err = served.stop()
    assert (code, out) == (0, "")
    assert f"Ada rated {TOTAL} completions, {TOTAL} of {TOTAL} in all" in err
    assert "Traceback" not in err


def test_a_save_that_fails_is_said_and_can_be_tried_again(served: Served, page: Page) -> None:
    begin(page, served)
    log = RunLayout(served.run).ratings
    log.mkdir()
    press(page, "123456+")
    says(page, "Not saved. The scores cannot be read or written: it is not a regular file.")
    assert page.locator("#rated").inner_text() == f"0 of {TOTAL} rated"
    log.rmdir()
    press(page, "+")
    is_at(page, 2)
    assert list(on_record(served.run).values()) == [[1, 2, 3, 4, 5, 6]]


def test_a_server_that_ended_loses_no_scores(run_folder: Path, page: Page) -> None:
    with serving(run_folder) as served:
        begin(page, served)
        port = served.address.rstrip("/").rpartition(":")[2]
        code, _, err = served.stop(signal.SIGTERM)
        assert code == 0
        assert "nothing was rated" in err
        press(page, "123456+")
        says(page, "Not saved. The server does not answer.")
    with serving(run_folder, "--json", port=port) as again:
        press(page, "+")
        is_at(page, 2)
        code, out, _ = again.stop()
    assert code == 0
    told = json.loads(out)
    assert told["raters"] == [{"rater": "Ada", "now": 1, "rated": 1, "total": TOTAL}]
    assert list(on_record(run_folder).values()) == [[1, 2, 3, 4, 5, 6]]


@pytest.mark.long
def test_a_page_of_an_earlier_start_goes_on_with_what_is_there_now(
    run_folder: Path, page: Page
) -> None:
    with serving(run_folder) as served:
        begin(page, served)
        port = served.address.rstrip("/").rpartition(":")[2]
        shown = page.locator("#prompt, #completion").all_inner_texts()
        served.stop()
    samples, _ = read_samples(RunLayout(run_folder).samples)
    first = rating_plan(samples, seed="Ada", fraction_repeated=0.1)[0]
    others = {str(s["step"]) for s in samples if s["step"] != step_of(first.sample_id, samples)}
    press(page, "123456")
    with serving(run_folder, "--steps", ",".join(others), port=port):
        press(page, "+")
        says(page, "The completions of this round have changed; this is the first that is open.")
        assert page.locator("#prompt, #completion").all_inner_texts() != shown
        assert chosen(page) == [None] * 6
    assert on_record(run_folder) == {}


def step_of(sample_id: str, samples: list[dict[str, Any]]) -> int:
    """The step of a sample."""
    return next(sample["step"] for sample in samples if sample["sample_id"] == sample_id)


def test_two_windows_of_one_rater_see_each_others_scores(served: Served, page: Page) -> None:
    begin(page, served)
    other = page.context.new_page()
    begin(other, served)
    press(page, "333333+")
    is_at(page, 2)
    # What a browser says to a window that comes to the front.
    other.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
    says(other, "Rated in another window meanwhile.")
    assert chosen(other) == [3] * 6
    press(other, "+")
    is_at(other, 2)
    press(page, "444444+")
    is_at(page, 3)
    press(other, "999999+")
    says(other, "This completion was rated in another window meanwhile")
    assert chosen(other) == [4] * 6
    assert list(on_record(served.run).values()) == [[3] * 6, [4] * 6]
    press(other, "5+")
    is_at(other, 3)
    assert list(on_record(served.run).values()) == [[3] * 6, [4, 4, 4, 4, 4, 5]]


def test_the_page_works_by_hand_and_on_a_phone(served: Served, page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    begin(page, served)
    for field in page.locator("fieldset").all():
        field.get_by_label("7", exact=True).click()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    page.get_by_role("button", name="Save and next").click()
    is_at(page, 2)
    page.get_by_role("button", name="Back").click()
    is_at(page, 1)
    assert chosen(page) == [7] * 6
    page.get_by_role("button", name="someone else").click()
    assert page.get_by_label("Your name or initials").input_value() == "Ada"


def test_text_with_html_is_shown_as_it_stands(tmp_path: Path, page: Page) -> None:
    made = make_run(tmp_path / "run")
    made.sample(0)
    with serving(made.layout.root, "--rater", "Ada", "--repeat-fraction", "0") as served:
        page.goto(served.address)
        page.locator("#where", has_text="Completion 1 of 2").wait_for()
        assert "obs<b>,,," in page.locator("#completion").inner_text()
        assert page.locator("#completion b").count() == 0
