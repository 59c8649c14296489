"""The recipe: one frozen schema, the only home of defaults.

A stage's key digests the stage's own section alone, so an unrelated edit rebuilds nothing;
`run` is part of no key.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    field_validator,
)

from crane_tasks.errors import RecipeError

FORMAT_PATTERNS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<|im_start|>",
    "<|im_end|>",
)
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all sections: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Endpoint(Section):
    """A running OpenAI-compatible server (vLLM, SGLang, llama.cpp, ...) that decodes targets.

    Its key, where it asks for one, is read from the environment: OPENAI_API_KEY.
    """

    endpoint: str = Field(description="where /completions lies, e.g. http://localhost:8000/v1")
    model: str = Field(min_length=1, description="the name the server gives it; part of the key")

    @field_validator("endpoint")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        parts = urlsplit(value)
        _ = parts.port  # a ValueError if it is no number
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an http or https URL, such as http://localhost:8000/v1")
        # The recipe is written into the output, the report and the store.
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("a URL without user, password or query: keys go in OPENAI_API_KEY")
        return value


def _kind_of_targets(value: Any) -> str:
    return "server" if isinstance(value, Mapping | Endpoint) else "side"


TARGET_KINDS = ("side", "server")
# Told apart before they are read, so that a message is about the one that was meant.
Targets = Annotated[
    Annotated[Literal["donor", "base"], Tag("side")] | Annotated[Endpoint, Tag("server")],
    Discriminator(_kind_of_targets),
]


class TargetSet(Section):
    """A set of prompts whose continuations are the targets."""

    data: str = Field(description="JSONL or Parquet file, or the id of a hub dataset")
    targets: Targets = Field(
        description="who continues the rows that have no `completion`: donor, base, or "
        "{endpoint: URL, model: NAME}, a running server"
    )
    max_new_tokens: int = Field(default=2048, gt=0)
    max_length: int = Field(default=2048, gt=1, description="prompt and target, in tokens")


class ReasoningSet(TargetSet):
    targets: Targets = "donor"
    max_new_tokens: int = Field(default=8192, gt=0)


class AgentSet(TargetSet):
    targets: Targets = "base"


class FormatSet(Section):
    """Complete conversations whose format tokens are protected."""

    data: str
    radius: int = Field(default=3, ge=0, description="neighbours taken on either side")
    max_length: int = Field(default=4096, gt=0)
    patterns: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=FORMAT_PATTERNS, min_length=1
    )


class Calibration(Section):
    reasoning: ReasoningSet
    agent: AgentSet
    format: FormatSet


class Gate(Section):
    baseline: Literal[
        "auto", "attention", "linear_attn", "expert", "shared_expert", "ffn", "router", "norm"
    ] = Field(default="auto", description="component whose score is 1 in every layer")
    store_gradients: bool = Field(default=True, description="keep g_R and g_A in bf16")
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: float32 on CPU, bfloat16 on a GPU"
    )


class Projector(Section):
    rank: int = Field(default=256, gt=0)
    cutoff: float = Field(default=1.0e-5, ge=0, lt=1, description="smallest σ/σ₁ kept")
    sites: Literal["published", "all"] = "published"


class Rows(Section):
    """Embedding or lm_head: not gated, moved by a plain fraction of the delta."""

    scale: Finite = Field(default=0.0, ge=0, description="fraction of the delta, every row")
    rows: dict[str, Finite] = Field(default={}, description="token -> fraction for its row")
    keep_special: bool = Field(default=True, description="special tokens' rows stay at base")


class LmHead(Rows):
    scale: Finite = Field(default=0.03, ge=0, description="fraction of the delta, every row")


class Merge(Section):
    router: Literal["gated", "slerp"] = "gated"
    embedding: Rows = Field(default=Rows())
    lm_head: LmHead = Field(default=LmHead())
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: int = Field(default=0, ge=0, description="of the stochastic rounding")


class Evaluate(Section):
    reasoning: str | None = Field(default=None, description="held-out rows, as `calibration`")
    agent: str | None = None
    generate: int = Field(default=0, ge=0, description="answer this many held-out prompts")
    max_new_tokens: int = Field(default=2048, gt=0)
    max_length: int = Field(default=2048, gt=1)


Workers = (
    Annotated[int, Field(gt=0, strict=True)]
    | Annotated[str, Field(pattern=r"^(tcp|tls)://.+:\d+$")]
)


class Run(Section):
    """How and where to run; part of no key."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    store: str | None = Field(default=None, description="folder; default ./crane-store")
    output: str | None = Field(default=None, description="folder; default ./merged/NAME-...")
    shard_size: ByteSize | None = Field(default=None, gt=0, description='bytes, or "5GB"')
    state_memory: ByteSize | None = Field(
        default=None,
        ge=0,
        description="hidden states of a walk held in memory (half of what is free); the rest "
        "is read back from disk",
    )
    threads: int | None = Field(default=None, gt=0)
    workers: Workers | None = Field(
        default=None,
        description="as a Prefect flow: processes here that share the work, or the address of a "
        "Dask scheduler (tcp://host:8786) whose workers share the store",
    )


class Recipe(Section):
    """Everything that decides the merged checkpoint, and how to run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: str
    donor: str
    alpha: float = Field(ge=0, allow_inf_nan=False)
    tau: float = Field(default=0.03, gt=0, le=1, allow_inf_nan=False)
    calibration: Calibration
    gate: Gate = Field(default=Gate())
    projector: Projector = Field(default=Projector())
    merge: Merge = Field(default=Merge())
    evaluate: Evaluate = Field(default=Evaluate())
    run: Run = Field(default=Run())

    # Where relative paths are looked for, in this order.
    _folders: tuple[Path, ...] = PrivateAttr(default=())

    def locate(self, value: str) -> Path | None:
        """The existing file or folder that a value names, or None (a hub id, or a typo)."""
        path = Path(value).expanduser()
        candidates = [path] if path.is_absolute() else [f / path for f in self._folders]
        return next((c.resolve() for c in candidates if c.exists()), None)

    def published(self) -> dict[str, Any]:
        """What was set, without what tells of a machine: `run`, and where a server is."""
        place = {"targets": {"endpoint"}}
        hidden: Any = {"run": True, "calibration": {"reasoning": place, "agent": place}}
        return self.model_dump(mode="json", exclude=hidden, exclude_unset=True)

    def place(self, value: str) -> Path:
        """A path to be made: relative ones lie beside the recipe."""
        path = Path(value).expanduser()
        return path if path.is_absolute() else self._folders[0] / path


def _set_dotted(data: dict[str, Any], assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {assignment}: write dotted.path=VALUE")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {assignment}: the value is not YAML: {error}") from error
    _put(data, path, value, f"--set {assignment}")


def _put(data: dict[str, Any], path: str, value: Any, what: str) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        child = data.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(f"{what}: {parent} is no section")
        data = child
    data[last] = value


def _message(error: ValidationError, what: str) -> str:
    lines = []
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"]]
        # pydantic names the kind it took the targets for: no key of the recipe.
        place = ".".join(
            part
            for before, part in zip(["", *parts], parts, strict=False)
            if not (before == "targets" and part in TARGET_KINDS)
        )
        text = problem["msg"]
        if problem["type"] == "extra_forbidden":
            text = "unknown key (misspelt?)"
        elif problem["type"] not in ("missing",) and not isinstance(problem["input"], dict):
            text = f"{text}, not {problem['input']!r}"
        lines.append(f"  {place or 'recipe'}: {text}")
    return f"{what}:\n" + "\n".join(lines)


def recipe_from(data: Mapping[str, Any], folders: tuple[Path, ...], what: str) -> Recipe:
    """Validate recipe data whose relative paths are looked for in `folders`.

    Raises:
        RecipeError: with every problem, a line each.
    """
    try:
        recipe = Recipe.model_validate(dict(data))
    except ValidationError as error:
        raise RecipeError(_message(error, what)) from error
    recipe._folders = folders
    return recipe


def changed(recipe: Recipe, changes: Mapping[str, Any], what: str) -> Recipe:
    """The recipe with other values for some fields, given by dotted path.

    Raises:
        RecipeError: a path leads through no section, a key is unknown, a value out of range;
            the message names `what`.
    """
    data = recipe.model_dump(mode="json", exclude_unset=True)
    for path, value in changes.items():
        _put(data, path, value, what)
    return recipe_from(data, recipe._folders, what)


def load_recipe(
    path: Path,
    *,
    assignments: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe file, with changes on top.

    Args:
        path: a YAML file.
        assignments: `dotted.path=VALUE` each, the value in YAML.
        overrides: top-level keys that win over the file; None values are ignored.

    Raises:
        RecipeError: no such recipe, not YAML, unknown keys, values out of range.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    for assignment in assignments:
        _set_dotted(data, assignment)
    data |= {k: v for k, v in (overrides or {}).items() if v is not None}
    folders = (path.resolve().parent, Path(os.getcwd()))
    return recipe_from(data, folders, str(path))
