"""Lines of progress in logs: one for each ten percent, none too soon, with the time left."""

from flows.progress_lines import PERIOD, ProgressLines


def lines_of(seconds_per_step: float, steps: int) -> list[str]:
    said: list[str] = []
    now = [0.0]
    lines = ProgressLines(said.append, lambda: now[0])
    for done in range(steps + 1):
        lines("scores", done, steps, f"layer {done}")
        lines("scores", done, steps, "items", bar="items")
        now[0] += seconds_per_step
    return said


def test_a_long_stage_says_each_ten_percent_and_what_is_left() -> None:
    said = lines_of(60.0, 100)
    assert len(said) == 9
    assert said[0] == "scores: 10 %, layer 10, about 90 min left"
    assert said[-1] == "scores: 90 %, layer 90, about 10 min left"


def test_a_stage_of_seconds_says_nothing_and_a_quick_one_little() -> None:
    assert lines_of(PERIOD / 1000, 100) == []
    assert len(lines_of(PERIOD / 20, 100)) == 4


def test_a_stage_that_begins_again_is_reckoned_anew() -> None:
    said: list[str] = []
    now = [0.0]
    lines = ProgressLines(said.append, lambda: now[0])
    for done in (0, 50, 100, 0, 50, 100):
        lines("evaluate", done, 100, "items")
        now[0] += 60.0
    assert said == ["evaluate: 50 %, items, about 1 min left"] * 2
