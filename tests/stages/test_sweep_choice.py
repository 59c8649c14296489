"""What is required of a point, which points no other beats, and which is the best."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crane_tasks.errors import RecipeError
from crane_tasks.evaluate.choice import Point, Requirement, choose, read_requirement, shortfall
from crane_tasks.places import point_name
from crane_tasks.report.sweep import point_rows, sweep_csv
from crane_tasks.report.sweep_picture import sweep_picture


def at(alpha: float, loss: float, calls: float | None = None, **more: float) -> Point:
    """A point that was measured."""
    metrics = {"reasoning_loss": loss, **({} if calls is None else {"tool_calls": calls}), **more}
    return Point(alpha, 0.03, "computed", 1.0, "key", metrics=metrics)


FAILED = Point(9.0, 0.03, "failed", 0.0, "key", error="alpha 9 is too large")


@pytest.mark.parametrize(
    ("text", "value", "met"),
    [
        ("tool_calls>=0.99", 0.99, True),
        ("tool_calls > 0.99", 0.99, False),
        ("agent_loss<=1e-2", 0.01, True),
        ("agent_loss<0.01", 0.01, False),
        ("format_divergence <= 0.5", math.nan, False),
    ],
)
def test_a_requirement_is_read_and_kept_or_not(text: str, value: float, met: bool) -> None:
    requirement = read_requirement(text)
    assert requirement.met({requirement.metric: value}) is met
    assert not requirement.met({})
    assert requirement == read_requirement(str(requirement))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tool_calls", "METRIC>=NUMBER"),
        ("tool_calls=0.9", "METRIC>=NUMBER"),
        ("tool_calls==0.9", "METRIC>=NUMBER"),
        ("tool_calls>=", "METRIC>=NUMBER"),
        ("tool_calls>=many", "METRIC>=NUMBER"),
        ("tool_calls>=nan", "METRIC>=NUMBER"),
        ("", "METRIC>=NUMBER"),
        ("calls>=0.9", "no metric 'calls'.*tool_calls"),
    ],
)
def test_what_is_no_requirement_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_requirement(text)


def test_the_best_has_the_lowest_loss_of_those_that_may_be_chosen() -> None:
    points = [at(0.1, 0.5, 1.0), at(0.2, 0.3, 0.99), at(0.3, 0.1, 0.7), FAILED]
    choice = choose(points, [Requirement("tool_calls", ">=", 0.9)])
    assert choice.best == 1
    assert choice.meets == [True, True, False, False]
    assert choice.front == [0, 1, 2]
    assert choose(points, []).best == 2
    assert choose(points, [Requirement("tool_calls", ">", 1.0)]).best is None


def test_ties_go_to_more_tool_calls_and_then_to_the_smaller_alpha() -> None:
    points = [at(0.4, 0.1, 0.9), at(0.3, 0.1, 1.0), at(0.2, 0.1, 1.0), at(0.1, 0.1, 0.8)]
    assert choose(points, []).best == 2
    assert choose(points, []).front == [1, 2]


def test_without_answers_the_front_is_of_the_two_losses() -> None:
    points = [at(0.1, 0.5, agent_loss=0.1), at(0.2, 0.4, agent_loss=0.2),
              at(0.3, 0.45, agent_loss=0.3), at(0.4, math.nan, agent_loss=0.0)]  # fmt: skip
    choice = choose(points, [])
    assert choice.axes == ("reasoning_loss", "agent_loss")
    assert (choice.front, choice.best) == ([0, 1], 1)


def test_the_message_says_how_near_the_nearest_came() -> None:
    points = [at(0.1, 0.5, 0.9, agent_loss=0.1), at(0.2, 0.3, 0.95, agent_loss=0.1), FAILED]
    said = shortfall(points, [Requirement("tool_calls", ">=", 0.99),
                              Requirement("agent_loss", "<=", 0.2)])  # fmt: skip
    assert "No point meets tool_calls >= 0.99, agent_loss <= 0.2." in said
    assert "Nearest: alpha 0.2, tau 0.03 with tool_calls 0.95 (0.04 short)." in said
    assert "too large" in shortfall([FAILED], [])


def test_points_that_the_rows_cannot_tell_apart_are_named() -> None:
    rows = [0.1, 0.5, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4]
    noise = [0.02, -0.03, 0.01, 0.02, -0.01, -0.02, 0.03, -0.01]
    of = {
        "best": rows,
        "as good": [a + b for a, b in zip(rows, noise, strict=True)],
        "worse on every row": [a + 0.001 for a in rows],
        "not allowed": rows,
    }
    points = [
        replace(at(n, sum(losses) / 8, 0.5 if name == "not allowed" else 1.0), losses=losses)
        for n, (name, losses) in enumerate(of.items())
    ]
    choice = choose(points, [Requirement("tool_calls", ">=", 0.9)])
    assert (choice.best, choice.alike) == (0, [1])


def test_an_interval_can_be_required() -> None:
    point = replace(at(0.1, 0.5, 1.0), ends={"tool_calls.low": 0.94, "tool_calls.high": 1.0})
    for text, met in (("tool_calls.low>=0.9", True), ("tool_calls.low>=0.97", False)):
        assert choose([point], [read_requirement(text)]).meets == [met]
    assert "tool_calls.low 0.94 (0.03 short)" in shortfall(
        [point], [read_requirement("tool_calls.low>=0.97")]
    )
    with pytest.raises(RecipeError, match="format_divergence has no interval"):
        read_requirement("format_divergence.high<=1")


Places = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(places=Places)
def test_the_front_is_what_no_other_point_beats(places: list[tuple[int, int]]) -> None:
    points = [at(i, loss, calls) for i, (loss, calls) in enumerate(places)]

    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    front = choose(points, []).front
    assert set(front) == {
        i for i, p in enumerate(places) if not any(beats(other, p) for other in places)
    }
    assert choose(points, []).best in front


def test_names_are_folders_and_no_two_are_alike() -> None:
    values = ["nearest", True, 0.5, 1, "a/b", "a_b", "x" * 200, "x" * 201, [1, 2], {"a": 1}]
    names = {point_name(0.1, 0.2, {"merge.rounding": value}) for value in values}
    assert len(names) == len(values)
    assert all("/" not in name and len(name) < 120 for name in names)
    assert point_name(0.1, 0.2) == "alpha0.1-tau0.2"


def test_a_report_of_points_that_failed_or_were_not_measured_can_be_made() -> None:
    points = [at(0.1, math.nan, 0.5), FAILED, at(0.2, 0.0, 1.0)]
    choice = choose(points, [])
    head, rows = point_rows(points, choice, {})
    assert head[1:3] == ["alpha", "tau"] and [row[0] for row in rows] == ["", "", "★"]
    lines = sweep_csv(points, choice).splitlines()
    assert len(lines) == 4 and all(line.count(",") == lines[0].count(",") for line in lines)
    picture = sweep_picture(points, choice, [Requirement("tool_calls", ">=", 0.5)], {})
    assert picture.startswith(b"\x89PNG")


def test_a_picture_of_a_search_with_many_fields_stays_of_a_size() -> None:
    import io

    from PIL import Image

    def one(number: int) -> Point:
        fields = range(12)
        changes = {f"merge.field_{f}": f"{'value' * f}-{number % (f + 1)}" for f in fields}
        point = at(0.1 * number, 1.0 / (1 + number), 1.0)
        return replace(point, changes=changes)

    points = [one(number) for number in range(40)]
    whole = Image.open(io.BytesIO(sweep_picture(points, choose(points, []), [], {})))
    assert whole.width < 1600 and whole.height < 3200
