"""A search: what it finds, that it can be stopped and repeated, and what it never sees."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TinyPair
from tiny_merge import asked

from artifacts.store import Store
from crane_tasks.errors import BadInput, DataError, RecipeError
from crane_tasks.recipe_file import load_recipe
from crane_tasks.rows import Row
from crane_tasks.session import Session
from flows.merge import merge
from flows.space import STARTS
from flows.split import FEWEST, split_rows
from flows.tune import tune
from flows.tune_result import Tuned

Pairs = Callable[[str], TinyPair]
ANSWERS = ("evaluate.generate=2", "evaluate.max_new_tokens=4")
# About half of the points of the random pair stay so near to the base; none calls a tool.
REQUIRED = ("format_divergence<=0.02",)
BUDGET = 9


def rows_of(count: int, kind: str = "any") -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"{kind} {i}?"}], "completion": f"answer {i}"}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def pair(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """The random pair with as few held-out rows as a search takes."""
    pair = pairs("qwen3_moe").copy(tmp_path_factory.mktemp("tune") / "pair")
    for kind in ("reasoning", "agent"):
        text = "\n".join(map(json.dumps, rows_of(FEWEST, kind)))
        (pair.folder / f"heldout_{kind}.jsonl").write_text(text + "\n")
    return pair


def search(pair: TinyPair, folder: Path, *assignments: str, **more: Any) -> Tuned:
    """A search of a pair into `folder`/found."""
    heard = {name: more.pop(name) for name in ("notice", "progress") if name in more}
    more = {"require": REQUIRED, "budget": BUDGET, "folder": folder / "found"} | more
    return tune(asked(pair, folder / "store", *ANSWERS, *assignments, **heard), **more)


@pytest.fixture(scope="module")
def found(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A search that nobody stopped."""
    return search(pair, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def warm(found: Tuned, tmp_path: Path) -> None:
    """A store that has whatever the points of a search share, and has measured none of them."""
    store = found.trials.output.parent / "store"
    shutil.copytree(store, tmp_path / "store", ignore=shutil.ignore_patterns("evaluate", "tune"))


def told(tuned: Tuned) -> list[tuple[Any, ...]]:
    """The trials without what depends on the run."""
    return [(p.alpha, p.tau, p.changes, p.metrics, p.key, p.status == "pruned", p.error)
            for p in tuned.trials.points]  # fmt: skip


def lines_of(file: Path) -> list[str]:
    return file.read_text().splitlines()


def test_the_best_is_the_lowest_loss_that_keeps_what_is_required(found: Tuned) -> None:
    points, best = found.trials.points, found.best
    assert len(points) == BUDGET and best is not None and found.problem is None
    keeps = [p for p in points if p.metrics["format_divergence"] <= 0.02]
    assert 0 < len(keeps) < BUDGET
    assert best.metrics["reasoning_loss"] == min(p.metrics["reasoning_loss"] for p in keeps)
    assert "tool_calls" in best.metrics
    assert len({p.key for p in points}) == BUDGET


def test_the_first_trial_is_the_recipe_itself(found: Tuned, pair: TinyPair) -> None:
    first = found.trials.points[0]
    assert (first.alpha, first.tau, first.changes) == (0.5, 0.03, {})


def test_what_cannot_become_the_best_gets_no_answers(found: Tuned) -> None:
    cut = {place for place, p in enumerate(found.trials.points) if p.status == "pruned"}
    assert cut and cut == found.reasons.keys()
    for place in cut:
        assert "tool_calls" not in found.trials.points[place].metrics
        assert found.reasons[place] == "format_divergence <= 0.02 is not kept"
    best = found.trials.choice.best
    assert best not in cut


def test_best_yaml_merges_to_the_metrics_that_were_said(found: Tuned, tmp_path: Path) -> None:
    assert found.recipe is not None
    recipe = load_recipe(found.recipe, assignments=[f"run.output={tmp_path / 'out'}"])
    data = yaml.safe_load(found.recipe.read_text())
    assert Path(data["base"]).is_absolute() and recipe.name == "tiny-random-tuned"
    merged = merge(Session(recipe, Store(tmp_path / "store")), report=False)
    models = merged_models(merged.ctx.store, merged.keys)
    assert models == {n: found.unseen[w] for n, w in
                      (("base", "base"), ("donor", "donor"), ("merged", "best"))}  # fmt: skip


def merged_models(store: Store, keys: Any) -> dict[str, Any]:
    from crane_tasks.evaluate.stage import EVALUATE, read_comparison

    models: dict[str, Any] = read_comparison(store.open(keys[EVALUATE]))["models"]
    return models


def test_the_rivals_are_plain_methods_at_their_best_alpha(found: Tuned) -> None:
    linear, arithmetic = found.rivals["linear"], found.rivals["task_arithmetic"]
    assert linear is not None and arithmetic is not None
    assert linear.alpha == arithmetic.alpha and 0 < linear.alpha < 1
    assert linear.metrics == arithmetic.metrics and linear.metrics["format_divergence"] <= 0.02
    assert found.unseen.keys() == {"base", "donor", "best", "linear", "task_arithmetic"}


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_the_same_seed_finds_the_same_and_another_one_does_not(
    found: Tuned, pair: TinyPair, tmp_path: Path
) -> None:
    again = search(pair, tmp_path)
    assert told(again) == told(found) and again.unseen == found.unseen
    # The first trials are the same for every search; what is drawn after them is the seed's.
    known = 1 + len(STARTS)
    other = search(pair, tmp_path, seed=1, budget=known + 1)
    assert told(other)[:known] == told(found)[:known]
    assert told(other)[known] != told(found)[known]


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    "place",
    [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(BUDGET // 2, marks=pytest.mark.slow)],
)
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(
    place: int, found: Tuned, pair: TinyPair, tmp_path: Path
) -> None:
    current: list[int] = []

    def stop(stage: str, done: int, total: int, what: str, bar: str = "") -> None:
        if stage == "trials":
            current.append(done)
        elif stage == "evaluate" and current and current[-1] == place:
            raise KeyboardInterrupt  # in the middle of a trial that was asked for

    with pytest.raises(KeyboardInterrupt):
        search(pair, tmp_path, progress=stop)
    notices: list[str] = []
    later = search(pair, tmp_path, notice=notices.append)
    assert told(later) == told(found) and later.unseen == found.unseen
    assert later.known == place and len(notices) == (1 if place else 0)


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_half_a_line_in_the_journal_and_a_stale_lock_are_mended(
    found: Tuned, pair: TinyPair, tmp_path: Path
) -> None:
    search(pair, tmp_path, budget=2)
    (journal,) = (tmp_path / "store" / "tune").glob("*.journal")
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    Path(f"{journal}.lock").symlink_to(journal)
    assert told(search(pair, tmp_path, budget=3)) == told(found)[:3]


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_a_finished_search_says_so_and_measures_nothing(pair: TinyPair, tmp_path: Path) -> None:
    first = search(pair, tmp_path, budget=2)
    calls, notices = [], []

    def call(stage: Any, ctx: Any, keys: Any) -> Any:
        built = stage.build(ctx, keys)
        calls.append(built.status)
        return built

    again = search(pair, tmp_path, budget=2, notice=notices.append, call=call)
    assert told(again) == told(first) and again.unseen == first.unseen
    assert set(calls) <= {"reused"}
    assert len(notices) == 1 and "finished" in notices[0]


def test_the_two_parts_never_overlap(found: Tuned, pair: TinyPair) -> None:
    rows = found.trials.output / "rows"
    for kind in ("reasoning", "agent"):
        seen, unseen = (lines_of(rows / f"{p}_{kind}.jsonl") for p in ("seen", "unseen"))
        assert not set(seen) & set(unseen)
        whole = map(json.loads, lines_of(pair.folder / f"heldout_{kind}.jsonl"))
        assert list(map(json.loads, seen + unseen)) == list(whole)
        assert found.counts["seen"][kind] == len(seen) == FEWEST // 2
        assert found.counts["unseen"][kind] == len(unseen)


@pytest.mark.parametrize("count", [20, 21, 57])
def test_nor_do_they_where_rows_have_copies(count: int) -> None:
    draw = random.Random(count)
    texts = [f"row {draw.randrange(count)}" for _ in range(count)]
    rows = tuple(Row("here", [{"role": "user", "content": t}], None, None) for t in texts)
    seen, unseen = split_rows(rows, "here")
    assert not {r.messages[0]["content"] for r in seen} & {r.messages[0]["content"] for r in unseen}
    assert len(seen) == (count + 1) // 2


def test_too_few_rows_are_refused(pair: TinyPair, tmp_path: Path) -> None:
    few = pair.copy(tmp_path / "few")
    file = few.folder / "heldout_agent.jsonl"
    file.write_text("\n".join(lines_of(file)[: FEWEST - 1]) + "\n")
    with pytest.raises(DataError, match=r"heldout_agent.jsonl: 19 rows.*takes 20"):
        search(few, tmp_path)
    alike = tuple(Row("here", [{"role": "user", "content": "x"}], None, None) for _ in range(40))
    with pytest.raises(DataError, match="no rows that its first half does not have"):
        split_rows(alike, "alike")


@pytest.mark.usefixtures("warm")
def test_a_requirement_that_nothing_keeps_is_told_with_what_is_missing(
    pair: TinyPair, tmp_path: Path
) -> None:
    none = search(pair, tmp_path, require=("tool_calls>=0.99",), budget=2)
    assert none.best is None and none.recipe is None and none.unseen == {}
    assert none.problem is not None and "tool_calls 0 (0.99 short)" in none.problem
    record = json.loads((tmp_path / "found" / "tune.json").read_text())
    assert record["best"] is None and record["problem"] == none.problem


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ((), {"budget": 0}, "--budget 0"),
        ((), {"seed": -1}, "--seed -1"),
        ((), {"require": ["speed>=1"]}, "no metric 'speed'"),
        (("evaluate.generate=0",), {"require": ["tool_calls>=0.9"]}, "tool_calls is not measured"),
        (("evaluate.reasoning=null", "evaluate.agent=null"), {"require": ()}, "no held-out rows"),
        (("evaluate.reasoning=null",), {"require": ()}, "evaluate.reasoning"),
    ],
)
def test_bad_input_is_one_message(
    changes: tuple[str, ...],
    more: dict[str, Any],
    message: str,
    pair: TinyPair,
    tmp_path: Path,
) -> None:
    with pytest.raises(RecipeError, match=message):
        search(pair, tmp_path, *changes, **more)
    assert not (tmp_path / "found").exists()


def test_a_folder_of_something_else_is_left_alone(pair: TinyPair, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        tune(asked(pair, tmp_path / "store"), budget=1, folder=pair.base)
    assert not (pair.base / "rows").exists()
    mine = tmp_path / "found" / "best.yaml"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(BadInput, match=r"holds a best\.yaml that is of no search"):
        search(pair, tmp_path)
    assert mine.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_without_requirements_and_answers_the_least_loss_wins(
    pair: TinyPair, tmp_path: Path
) -> None:
    free = search(pair, tmp_path, "evaluate.generate=0", require=(), budget=BUDGET)
    losses = [p.metrics["reasoning_loss"] for p in free.trials.points]
    assert free.best is not None and free.best.metrics["reasoning_loss"] == min(losses)
    assert free.reasons == {}


@pytest.mark.usefixtures("warm")
def test_a_point_that_cannot_be_measured_costs_the_search_nothing_else(
    pair: TinyPair, tmp_path: Path
) -> None:
    """The recipe's own alpha is too large for the dtype: it is the first trial."""
    found = search(pair, tmp_path, "alpha=1e38", "evaluate.generate=0", budget=2, seed=3)
    assert "too large" in str(found.trials.points[0].error)
    assert found.trials.points[0].metrics == {} and found.known == 0
    notices: list[str] = []
    again = search(pair, tmp_path, "alpha=1e38", "evaluate.generate=0", budget=2, seed=3,
                   notice=notices.append)  # fmt: skip
    assert told(again) == told(found) and "finished" in notices[0]
