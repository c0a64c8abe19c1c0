"""The report in a real browser: values under pointer, finger and keys, and the width of a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from milepost.trajectory.report import write_report
from tests.made_runs import make_killed_and_resumed_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page


@pytest.fixture(scope="module")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_killed_and_resumed_run(tmp_path_factory.mktemp("runs") / "run")
    for step in (100, 500, 1000):
        made.evaluate(step, "hellaswag", acc=0.25 + step / 10_000)
    return write_report(made.layout.root)


@pytest.fixture
def phone(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    yield context.new_page()
    context.close()


def drawing(page: Page, key: str) -> Locator:
    return page.locator(f"#panel-{key} svg[role=img]")


def test_pointer_shows_the_nearest_point_and_hides_it_when_it_leaves(
    page: Page, report_page: Path
) -> None:
    page.goto(report_page.as_uri())
    tip = page.locator("#panel-validation_loss .tip")
    assert tip.is_hidden()
    figure = drawing(page, "validation_loss")
    figure.hover()
    assert tip.inner_text() == "step 400 · 3.28 M tokens\n2.7834"
    page.mouse.move(2, 2)
    assert tip.is_hidden()


def test_arrow_keys_walk_along_the_points_and_are_read_out(page: Page, report_page: Path) -> None:
    page.goto(report_page.as_uri())
    drawing(page, "hellaswag").focus()
    page.keyboard.press("End")
    tip = page.locator("#panel-hellaswag .tip")
    assert tip.inner_text() == "step 1,000 · 8.19 M tokens\n38.5 ± 1.5 %"
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("status").inner_text() == "step 500 · 4.1 M tokens 33.0 ± 1.5 %"
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_phone_shows_values_at_a_touch_and_needs_no_sideways_scrolling(
    phone: Page, report_page: Path
) -> None:
    phone.goto(report_page.as_uri())
    assert phone.evaluate("document.documentElement.scrollWidth") == 390
    drawing(phone, "training_loss").tap()
    assert phone.locator("#panel-training_loss .tip").inner_text().startswith("step 4")
    box = phone.locator("#panel-training_loss .tip").bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_without_a_script_the_page_is_whole(browser: Browser, report_page: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report_page.as_uri())
    assert drawing(page, "training_loss").is_visible()
    assert page.locator(".tip").count() == 0
    context.close()
