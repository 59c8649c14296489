"""The page of all answers in a real browser: its filters, and that nothing becomes markup."""

from pathlib import Path
from typing import Any

import pytest
from crane_process import DEADLINE
from real_browser import browser_page, needs_chromium

from crane_tasks.evaluate.rows import Answered, Row
from crane_tasks.report.answers import answers_page

pytestmark = needs_chromium
EVIL = "</script><script>document.title = 'owned'</script><img src=x onerror=alert(1)> \u2028 &amp;"


def row(place: str, base: bool, merged: bool, kind: str = "reasoning", text: str = "four") -> Row:
    answers = {
        name: Answered(text, 7, True, right, "last number 4")
        for name, right in (("base", base), ("donor", True), ("merged", merged))
    }
    return Row(kind, place, 0, f"What is {place}?", "4", answers)


ROWS = [
    row("kept", True, True),
    row("gained", False, True),
    row("lost", True, False, "agent"),
    row("evil", False, False, text=EVIL),
]


@pytest.fixture
def places(tmp_path: Path) -> Any:
    """What the page shows, in its order, once it was asked."""
    file = tmp_path / "answers.html"
    file.write_text(answers_page("my <merge>", ROWS, "merged"))
    with browser_page(DEADLINE) as page:
        page.goto(file.as_uri())

        def shown(**chosen: str) -> list[str]:
            for name, value in chosen.items():
                field = page.locator(f"#{name}")
                if name == "text":
                    field.fill(value)
                else:
                    field.select_option(value)
            assert page.locator("#count").text_content() == (
                f"{page.locator('article').count()} of {len(ROWS)}"
            )
            found: list[str] = page.locator("article > code").all_text_contents()
            return found

        shown.page = page  # type: ignore[attr-defined]
        yield shown


def test_lost_rows_come_first_and_filters_keep_what_they_say(places: Any) -> None:
    assert places()[:2] == ["lost", "gained"] and len(places()) == 4
    assert places(which="lost") == ["lost"]
    assert places(which="gained") == ["gained"]
    assert places(which="wrong") == ["lost", "evil"]
    assert places(which="all", set="agent") == ["lost"]
    assert places(set="", text="what is KEPT") == ["kept"]
    assert places(text="nowhere") == []


def test_no_answer_becomes_markup(places: Any) -> None:
    assert places(text="evil") == ["evil"]
    page = places.page
    assert page.title() == "my <merge>: answers" and page.locator("img").count() == 0
    assert page.locator(".answers pre").last.text_content() == EVIL
    assert page.locator(".answers .yes").all_text_contents() == ["right, last number 4"]
