"""The run forms and the deployments' schedules, held against what the flows take."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from crane_tasks.errors import RecipeError

# Prefect's imports warn of much that is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")
DEPLOYMENTS = Path(__file__).parents[2] / "prefect.yaml"


def flows_by_entrypoint() -> dict[str, Any]:
    from flows.prefect import flows as module

    names = ("merge_flow", "sweep_flow", "evaluate_flow")
    return {f"flows.prefect.flows.{name}": getattr(module, name) for name in names}


def deployments() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]
    return found


def test_every_flow_is_deployed_into_the_one_pool_and_its_form_is_enforced() -> None:
    assert {d["entrypoint"] for d in deployments()} == flows_by_entrypoint().keys()
    assert {d["work_pool"]["name"] for d in deployments()} == {"crane"}
    assert all(d["enforce_parameter_schema"] for d in deployments())


def test_schedules_are_paused_and_their_parameters_are_what_the_flow_and_its_recipe_take() -> None:
    from crane_tasks.evaluate.choice import read_requirement
    from flows.grid import spots
    from flows.opening import open_session

    schedules = [(d, s) for d in deployments() for s in d.get("schedules", [])]
    assert len({s["slug"] for _, s in schedules}) == len(schedules) >= 2
    for deployment, schedule in schedules:
        assert schedule["active"] is False
        flow = flows_by_entrypoint()[deployment["entrypoint"]]
        assert "parameters" not in schedule  # Prefect would lose them
        taken = flow.validate_parameters(deployment["parameters"])
        recipe = open_session(taken["recipe"]).recipe
        assert spots(recipe, taken["alphas"], taken["taus"], [], Path("sweep"))
        assert [read_requirement(text) for text in taken["require"]]


def test_the_form_offers_every_shipped_recipe() -> None:
    from flows.opening import open_session, shipped_recipes
    from flows.prefect.flows import merge_flow
    from flows.prefect.forms import ShippedRecipe

    assert sorted(get_args(ShippedRecipe)) == sorted(shipped_recipes())
    help_of_alpha = merge_flow.parameters.properties["alpha"]["description"]
    for name in shipped_recipes():
        assert f"{name} {open_session(name).recipe.alpha:g}" in " ".join(help_of_alpha.split())


def test_a_runs_name_tells_what_was_changed() -> None:
    from flows.prefect.forms import overrides_of

    assert overrides_of({"advanced": {"overrides": ["a.b=1, c=2"]}}) == ["a.b=1", "c=2"]
    assert overrides_of({"advanced": {}}) == overrides_of({}) == []


def test_every_field_has_a_title_and_help_and_no_number_starts_as_null() -> None:
    for flow in flows_by_entrypoint().values():
        schema = flow.parameters.model_dump()
        boxes = [d["properties"] for d in schema["definitions"].values() if "properties" in d]
        for fields in (schema["properties"], *boxes):
            for name, field in fields.items():
                assert field["title"] != name and field["description"], name
                assert field.get("type") != "number" or "default" not in field, name


def test_what_is_left_empty_is_the_recipes() -> None:
    from flows.prefect.flows import merge_flow
    from flows.prefect.forms import Settings, opened

    taken = merge_flow.validate_parameters({})
    recipe = opened(taken["recipe"], taken["recipe_file"], taken["advanced"]).recipe
    assert (recipe.name, recipe.alpha, recipe.run.device) == ("tiny", 0.65, "auto")
    both = ["projector.rank=7, merge.rounding=stochastic", "merge.lm_head.rows={a: 0.1, b: 0.2}"]
    changed = {"advanced": {"overrides": both, "device": "cpu"}, "alpha": 0.2}
    taken = merge_flow.validate_parameters(changed)
    recipe = opened("tiny", " ", taken["advanced"], alpha=taken["alpha"]).recipe
    assert (recipe.alpha, recipe.projector.rank, recipe.run.device) == (0.2, 7, "cpu")
    assert recipe.merge.rounding == "stochastic"
    assert recipe.merge.lm_head.rows == {"a": 0.1, "b": 0.2}
    with pytest.raises(RecipeError, match=r"with projector\.rnk=7"):
        opened("tiny", "", Settings(overrides=["projector.rnk=7"]))
    assert opened("tiny", "", Settings(device="cuda:1")).recipe.run.device == "cuda:1"
    with pytest.raises(RecipeError, match="no such recipe"):
        opened("tiny", "nowhere.yaml", taken["advanced"])


@pytest.mark.parametrize(
    "wrong", [{"alpha": -1}, {"tau": 0}, {"tau": 2}, {"recipe": "x"}, {"advanced": {"stor": "x"}}]
)
def test_a_wrong_value_is_refused(wrong: dict[str, Any]) -> None:
    from prefect.exceptions import ParameterTypeError

    from flows.prefect.flows import merge_flow

    with pytest.raises(ParameterTypeError, match=next(iter(wrong))):
        merge_flow.validate_parameters(wrong)


def test_what_replaces_another_merge_is_asked_for_in_the_form() -> None:
    from flows.prefect.flows import merge_flow
    from flows.prefect.forms import opened

    for force in (False, True):
        taken = merge_flow.validate_parameters({"advanced": {"force": force}})
        assert opened("tiny", "", taken["advanced"]).force is force
