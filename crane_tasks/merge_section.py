"""The section `merge` of a recipe: the edit, its parts, and what is outside of it."""

from importlib import resources
from typing import Literal

from pydantic import Field, field_validator

from crane_tasks.section import Count, Number, Section


class TokenRows(Section):
    """Embedding or lm_head: not gated, moved by a plain fraction of the delta."""

    scale: Number = Field(default=0.0, ge=0, description="fraction of the delta, every row")
    rows: dict[str, Number] = Field(default={}, description="token -> fraction for its row")
    keep_special: bool = Field(default=True, description="added tokens' rows stay at base")


class LmHead(TokenRows):
    scale: Number = Field(default=0.03, ge=0, description="fraction of the delta, every row")


def known_methods() -> list[str]:
    """The edits that a recipe can name: the modules of `crane_tasks/edits`."""
    folder = resources.files("crane_tasks") / "edits"
    names = (p.name for p in folder.iterdir())
    return sorted(n.removesuffix(".py") for n in names if n.endswith(".py") and n[0] != "_")


class Merge(Section):
    method: str = Field(default="crane", description="the edit: a file of crane_tasks/edits")
    threshold: Literal["median", "top", "drop", "agreed", "none"] | None = Field(
        default=None, description="T in place of the method's; none: the whole delta"
    )
    gate: Literal["taylor", "flat"] | None = Field(
        default=None, description="S in place of the method's; flat: the factor 1"
    )
    projection: Literal["sigmoid", "hard", "ridge", "regression", "aim", "none"] | None = Field(
        default=None, description="P in place of the method's; none: nothing is removed"
    )
    protect: Number = Field(
        default=1.0,
        gt=0,
        description="of P by regression: what a change of the agent set's outputs weighs against "
        "the reasoning set's",
    )
    omega: Number = Field(
        default=0.4, ge=0, le=1, description="of P by AIM: what is left at the strongest channel"
    )
    density: Number | None = Field(
        default=None, gt=0, le=1, description="share that T keeps; the half above the median"
    )
    scales: dict[str, Number] = Field(
        default={},
        description="further factors: a component, `layers 16-`, `layers 0-7`, or a tensor's name "
        "with *; all that match are multiplied",
    )
    router: Literal["gated", "slerp", "gated-projected", "slerp-projected"] = Field(
        default="gated",
        description="as all weights, or by slerp with t = alpha / 3; projected at the "
        "feed-forward input",
    )
    embedding: TokenRows = Field(default=TokenRows())
    lm_head: LmHead = Field(default=LmHead())
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest", description="of the merged weights to the base's dtype"
    )
    seed: Count = Field(default=0, ge=0, description="of the stochastic rounding")
    output_dtype: Literal["fp8"] | None = Field(
        default=None,
        description="fp8: of a base that is stored so, in its own form; default: bfloat16 for it, "
        "and any other base's own dtypes",
    )

    @property
    def in_fp8(self) -> bool:
        """Whether weights that the base has in FP8 are written so."""
        return self.output_dtype == "fp8"

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in known_methods():
            raise ValueError(f"one of {', '.join(known_methods())}")
        return value
