"""What a search may change: only what the edit reads, and never past the recipe's own values."""

from typing import Any

from conftest import TinyPair

from crane_tasks.evaluate.choice import Point
from crane_tasks.recipe import Recipe
from flows.space import Space


class Fixed:
    """A trial with choices made before, the first option for the rest."""

    def __init__(self, **chosen: Any) -> None:
        self.chosen, self.asked = chosen, set[str]()

    def suggest_float(self, name: str, low: float, high: float, log: bool = False) -> float:
        self.asked.add(name)
        value: float = self.chosen.get(name, low)
        assert low <= value <= high
        return value

    def suggest_categorical(self, name: str, options: Any) -> Any:
        self.asked.add(name)
        return self.chosen.get(name, options[0])


def suggested(recipe: Recipe, **chosen: Any) -> tuple[Point, set[str]]:
    trial = Fixed(**chosen)
    alpha, tau, changes = Space(recipe, ("attention", "expert")).suggest(trial)  # type: ignore[arg-type]
    return Point(alpha, tau, "", 0.0, "", changes), trial.asked


def test_only_what_the_edit_reads_is_asked_for(moe_pair: TinyPair) -> None:
    recipe = moe_pair.recipe()
    own = Space(recipe, ("attention", "expert")).own()
    point, _ = suggested(recipe, **own)
    assert (point.alpha, point.tau, point.changes) == (recipe.alpha, recipe.tau, {})
    linear, asked_for = suggested(recipe, method="linear", scale_attention=0.5)
    assert asked_for == {"alpha", "method", "scale_attention", "scale_feed_forward"}
    assert linear.changes["merge.scales"] == {"attention": 0.5, "expert": 0.5}
    _, asked_for = suggested(recipe, method="slerp")
    assert asked_for == {"alpha", "method"}
    _, asked_for = suggested(recipe, method="ties")
    assert "density" in asked_for and "tau" not in asked_for
    ridge, asked_for = suggested(recipe, projection="ridge", sites="all", density=0.25)
    assert {"tau", "sites", "density"} <= asked_for
    assert ridge.changes["merge.projection"] == "ridge"
    assert ridge.changes["projector.sites"] == "all" and ridge.changes["merge.density"] == 0.25


def test_a_search_begins_with_the_recipe_and_then_with_each_kind_of_edit(
    moe_pair: TinyPair,
) -> None:
    recipe = moe_pair.recipe("alpha=0.31", "merge.density=0.4")
    starts = Space(recipe, ("attention", "expert")).starts()
    points = [suggested(recipe, **start)[0] for start in starts]
    assert (points[0].alpha, points[0].changes) == (0.31, {})
    methods = [p.changes.get("merge.method", "crane") for p in points[1:]]
    assert methods == ["regmean", "regmean", "linear", "ties", "aim", "crane"]
    assert points[1].alpha == 1.2 and "merge.protect" not in points[1].changes
    assert points[2].changes["merge.protect"] == 0.3
    assert points[4].changes["merge.density"] == 0.2
    assert points[6].changes["merge.projection"] == "ridge"


def test_the_recipes_own_values_and_factors_stay_within(moe_pair: TinyPair) -> None:
    recipe = moe_pair.recipe("alpha=2.5", "tau=0.9", "merge.scales={attention: 0.5, norm: 0}")
    own = Space(recipe, ("attention", "expert")).own()
    point, _ = suggested(recipe, **own)
    assert (point.alpha, point.tau, point.changes) == (2.5, 0.9, {})
    scaled, _ = suggested(recipe, **own | {"scale_attention": 1.5})
    assert scaled.changes["merge.scales"] == {"attention": 0.75, "norm": 0}
    assert Space(recipe, ("attention", "norm")).groups == {"attention": ["attention"]}
