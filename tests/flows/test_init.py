"""Recipes of one's own: written, complete, and good from anywhere."""

import json
from pathlib import Path

import pytest
import yaml
from crane_process import crane

from crane_tasks.errors import RecipeError
from crane_tasks.recipe_file import load_recipe
from crane_tasks.rows import load_rows
from crane_tasks.shipped import shipped_set, shipped_sets
from flows.opening import shipped_recipes


def test_a_recipe_is_begun_from_the_published_one(tmp_path: Path) -> None:
    told = crane(tmp_path, "init", "mine", "--base", "me/instruct", "--donor", "me/thinking")
    assert told.code == 0 and told.out == "mine.yaml\n"
    data = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    published = yaml.safe_load(shipped_recipes()["crane-30b"].read_text())
    changes = {"name": "mine", "base": "me/instruct", "donor": "me/thinking"}
    assert data == published | changes
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert len(load_rows(recipe, recipe.calibration.reasoning.data).rows) == 48
    assert "# The model card names the router" in (tmp_path / "mine.yaml").read_text()
    again = crane(tmp_path, "init", "mine")
    assert again.code == 2 and "is there already" in again.err


def test_the_demo_is_found_from_where_the_recipe_lies(tmp_path: Path) -> None:
    assert crane(tmp_path, "init", "own", "--from", "tiny").code == 0
    plan = crane(tmp_path, "plan", "own.yaml", "--json").json()
    assert {s["status"] for s in plan["stages"]} == {"computed"}
    assert plan["name"] == "own"


@pytest.mark.parametrize(
    ("args", "message"),
    [(["a/b"], "letters, digits"), (["x", "--from", "crane-31b"], "crane-30b"),
     (["x", "--base", "~nosuchuser/b"], "no such user")],
)  # fmt: skip
def test_what_cannot_be_begun_is_said(args: list[str], message: str, tmp_path: Path) -> None:
    told = crane(tmp_path, "init", *args)
    assert told.code == 2 and message in told.err
    assert not list(tmp_path.glob("*.yaml"))


def test_shipped_sets_have_names() -> None:
    names = {"agent", "format", "graded_agent", "graded_reasoning", "heldout_agent",
             "heldout_reasoning", "reasoning"}  # fmt: skip
    assert shipped_sets().keys() == names
    with pytest.raises(RecipeError, match="no set of that name; there are agent"):
        shipped_set("crane:resoning")


def test_the_schema_knows_every_field(tmp_path: Path) -> None:
    schema = json.loads(crane(tmp_path, "schema").out)
    assert {"alpha", "calibration", "merge"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False
    assert "output_dtype" in schema["$defs"]["Merge"]["properties"]
