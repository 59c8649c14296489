"""What the run form asks for: the types of the flows' parameters.

Prefect makes the form from the flow's signature: a `Literal` becomes a choice, a model a box of
its own, a bound a check. What is left empty is the recipe's.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from crane_tasks.session import Session
from flows.opening import open_session

# A test holds it against the files.
ShippedRecipe = Literal["tiny", "crane-30b", "crane-next-80b"]


def _titled(title: str) -> Any:
    """The name over a field; Prefect would show the parameter's own."""
    return Field(json_schema_extra={"title": title})


class _WithoutDefault(dict[str, Any]):
    """A schema that takes no default, whatever pydantic writes into it."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "default":
            super().__setitem__(key, value)


class _LeftEmpty:
    """A number whose field starts empty.

    With the default null in its schema the form would send a null back, which Prefect refuses as
    no number; without, it sends nothing. `float | None` would make a switch between two types.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return _WithoutDefault(self._schema)


_ALPHA = {"type": "number", "minimum": 0}
_TAU = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
AlphaValue = Annotated[float, Field(ge=0, allow_inf_nan=False), WithJsonSchema(_ALPHA)]
TauValue = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), WithJsonSchema(_TAU)]

RecipeChoice = Annotated[ShippedRecipe, _titled("Recipe")]
RecipeFile = Annotated[str, _titled("Recipe file")]
Alpha = Annotated[AlphaValue | None, _titled("Alpha"), _LeftEmpty(_ALPHA)]
Tau = Annotated[TauValue | None, _titled("Tau"), _LeftEmpty(_TAU)]
Alphas = Annotated[list[AlphaValue], _titled("Alphas")]
Taus = Annotated[list[TauValue], _titled("Taus")]
Requirements = Annotated[list[str], _titled("Requirements")]
WriteBest = Annotated[bool, _titled("Write the best")]
Output = Annotated[str, _titled("Output folder")]
CheckpointFolder = Annotated[str, Field(min_length=1), _titled("Checkpoint")]


Device = Literal[
    "as the recipe says", "auto", "cpu", "cuda",
    "cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:4", "cuda:5", "cuda:6", "cuda:7",
]  # fmt: skip
# Between two overrides that stand in one line.
NEXT = re.compile(r"\s*,\s*(?=\w+(?:\.\w+)*=)")


class Settings(BaseModel):
    """What hardly ever needs a change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    overrides: list[str] = Field(
        default=[],
        title="Overrides",
        description="Any recipe field: projector.rank=128, merge.rounding=stochastic",
    )
    store: str = Field(
        default="",
        title="Store",
        description="Folder of the stage store; empty: the recipe's, or crane-store",
    )
    device: Device = Field(
        default="as the recipe says", title="Device", description="auto: a GPU if there is one"
    )

    def assignments(self) -> list[str]:
        """As `--set` takes them."""
        device = [] if self.device == "as the recipe says" else [f"run.device={self.device}"]
        given = [one for line in self.overrides for one in NEXT.split(line.strip()) if one]
        return [*given, *device]


class MergeSettings(Settings):
    """What hardly ever needs a change."""

    force: bool = Field(
        default=False,
        title="Replace",
        description="Replace another merge that lies in the output folder",
    )


class SweepSettings(MergeSettings):
    """What hardly ever needs a change."""

    axes: list[str] = Field(
        default=[],
        title="Further axes",
        description="Other fields to vary, a line each: merge.rounding=nearest,stochastic",
    )


NO_SETTINGS, NO_MERGE_SETTINGS, NO_SWEEP_SETTINGS = Settings(), MergeSettings(), SweepSettings()
Advanced = Annotated[Settings, _titled("Advanced")]
SweepAdvanced = Annotated[SweepSettings, _titled("Advanced")]
MergeAdvanced = Annotated[MergeSettings, _titled("Advanced")]


def named_recipe(recipe: str, recipe_file: str) -> str:
    """The one of the two that holds: a file wins over the choice."""
    return recipe_file.strip() or recipe


def short_name(parameters: dict[str, Any]) -> str:
    """A run's recipe for its title."""
    file = str(parameters.get("recipe_file") or "").strip()
    return Path(file).stem if file else str(parameters.get("recipe", ""))


def overrides_of(parameters: dict[str, Any]) -> list[str]:
    """The recipe fields that a run changes, for its title."""
    advanced = parameters.get("advanced") or {}
    given = advanced.get("overrides") if isinstance(advanced, dict) else advanced.overrides
    return [one for line in given or () for one in NEXT.split(str(line).strip()) if one]


def opened(
    recipe: str,
    recipe_file: str,
    settings: Settings,
    *,
    alpha: float | None = None,
    tau: float | None = None,
    output: str = "",
) -> Session:
    """The session that a form asks for.

    Raises:
        RecipeError: no such recipe, or its contents or an override are wrong.
    """
    return open_session(
        named_recipe(recipe, recipe_file),
        settings.assignments(),
        alpha=alpha,
        tau=tau,
        output=output.strip() or None,
        store=settings.store.strip() or None,
        force=getattr(settings, "force", False),
    )
