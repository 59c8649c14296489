"""The recipe: one frozen schema, the only home of defaults.

A stage's key digests the stage's own section alone, so an unrelated edit rebuilds nothing;
`run` is part of no key.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    ByteSize,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
)

from crane_tasks.evaluate_section import Evaluate
from crane_tasks.merge_section import Merge
from crane_tasks.section import (
    LONGEST,
    LONGEST_PROMPT,
    Count,
    Data,
    Endpoint,
    Number,
    Section,
)
from crane_tasks.shipped import shipped_set
from crane_tasks.user_paths import user_path


def _kind_of_targets(value: Any) -> str:
    return "server" if isinstance(value, Mapping | Endpoint) else "side"


TARGET_KINDS = ("side", "server")
# Told apart before they are read, so that a message is about the one that was meant.
Targets = Annotated[
    Annotated[Literal["donor", "base"], Tag("side")] | Annotated[Endpoint, Tag("server")],
    Discriminator(_kind_of_targets),
]


WHO_CONTINUES = (
    "who continues the rows that have no `completion`: donor, base, or "
    "{endpoint: URL, model: NAME}, a running server"
)
ROWS = (
    "JSONL, JSON or Parquet file, the id of a hub dataset, or crane:NAME of a shipped set; or "
    "{path: ..., subset: ..., split: ..., limit: ..., seed: ...}"
)
ON_LOST = (
    "a row of which the chat template does not show a turn, tool or call: refuse it, or notice"
)
OPTIONS = "given to the chat template, e.g. {enable_thinking: false}; a row's own come first"


class PairRules(Section):
    """In what base and donor need not be alike."""

    allow: tuple[str, ...] = Field(
        default=(),
        description="config fields that may differ, e.g. rope_theta: the base's value stands",
    )


class RowsSection(Section):
    """A set of conversations that the chat template writes."""

    data: Data = Field(description=ROWS)
    chat_template_kwargs: dict[str, Any] = Field(default={}, description=OPTIONS)
    on_lost: Literal["refuse", "notice"] = Field(default="refuse", description=ON_LOST)


class TargetSet(RowsSection):
    """A set of prompts whose continuations are the targets."""

    targets: Targets = Field(description=WHO_CONTINUES)
    max_new_tokens: Count = Field(default=2048, gt=0, description=LONGEST)
    max_prompt_length: Count = Field(default=2048, gt=0, description=LONGEST_PROMPT)


class ReasoningSet(TargetSet):
    targets: Targets = Field(default="donor", description=WHO_CONTINUES)
    max_new_tokens: Count = Field(default=8192, gt=0, description=LONGEST)


class AgentSet(TargetSet):
    targets: Targets = Field(default="base", description=WHO_CONTINUES)


Patterns = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    Field(min_length=1),
]


class FormatSet(RowsSection):
    """Complete conversations whose format tokens are protected."""

    radius: Count = Field(default=3, ge=0, description="neighbours taken on either side")
    max_length: Count = Field(default=4096, gt=0, description="a row's first tokens")
    patterns: Patterns | None = Field(
        default=None,
        description="texts whose tokens hold the format; default: what the chat template sets",
    )


class Calibration(Section):
    reasoning: ReasoningSet
    agent: AgentSet
    format: FormatSet


class Gate(Section):
    baseline: Literal[
        "auto", "attention", "linear_attn", "expert", "shared_expert", "ffn", "router", "norm"
    ] = Field(default="auto", description="component whose score is 1 in every layer")
    unify: bool = Field(
        default=False, description="shared experts scored with experts, linear with attention"
    )
    per: Literal["component", "tensor", "expert"] = Field(
        default="component",
        description="what has a score of its own in a layer: a component; each of its weights; or "
        "each expert, with its three",
    )
    store_gradients: bool = Field(default=True, description="keep g_R and g_A in bf16")
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: float32 on CPU, bfloat16 on a GPU"
    )


class Projector(Section):
    rank: Count = Field(default=256, gt=0, description="directions per site, at most")
    cutoff: Number = Field(default=1.0e-5, ge=0, lt=1, description="smallest σ/σ₁ kept")
    sites: Literal["published", "all"] = Field(
        default="published", description="all: the inputs of o_proj and down_proj, too"
    )


Workers = (
    Annotated[int, Field(gt=0, strict=True)]
    | Annotated[str, Field(pattern=r"^(tcp|tls)://.+:\d+$")]
)


class Run(Section):
    """How and where to run; part of no key."""

    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda|cuda:\d+(,cuda:\d+)*)$",
        description="auto: a GPU if there is one; cuda: all of them; cuda:0,cuda:2: some",
    )
    store: str | None = Field(default=None, description="folder; default ./crane-store")
    output: str | None = Field(default=None, description="folder; default ./merged/NAME-...")
    shard_size: ByteSize | None = Field(default=None, gt=0, description='bytes, or "5GB"')
    state_memory: ByteSize | None = Field(
        default=None,
        ge=0,
        description="hidden states of a walk held in memory (half of what is free); the rest "
        "is read back from disk",
    )
    gpu_memory: ByteSize | None = Field(
        default=None, gt=0, description="that a process may take of a GPU; default what is free"
    )
    threads: Count | None = Field(default=None, gt=0, description="of this process; default all")
    workers: Workers | None = Field(
        default=None,
        description="as a Prefect flow: processes here that share the work, or the address of a "
        "Dask scheduler (tcp://host:8786) whose workers share the store",
    )
    tracker: Literal["trackio", "wandb", "mlflow"] | None = Field(
        default=None, description="told of every point that a sweep or a search measures"
    )


class Recipe(Section):
    """Everything that decides the merged checkpoint, and how to run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the merge")
    base: str = Field(description="the Instruct checkpoint: folder, or hub id[@revision]")
    donor: str = Field(description="the Thinking checkpoint, likewise")
    alpha: Number = Field(ge=0, description="strength of the edit")
    tau: Number = Field(default=0.03, gt=0, le=1, description="σ/σ₁ at which protection is ½")
    pair: PairRules = Field(default=PairRules())
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
        if shipped := shipped_set(value):
            return shipped
        path = user_path(value)
        candidates = [path] if path.is_absolute() else [f / path for f in self._folders]
        return next((c.resolve() for c in candidates if c.exists()), None)

    def published(self, *, defaults: bool = False) -> dict[str, Any]:
        """What was set, without what tells of a machine: `run`, and where a server is.

        Args:
            defaults: also what was not set.
        """
        place = {"targets": {"endpoint"}}
        hidden: Any = {"run": True, "calibration": {"reasoning": place, "agent": place}}
        return self.model_dump(mode="json", exclude=hidden, exclude_unset=not defaults)

    def place(self, value: str) -> Path:
        """A path to be made: relative ones lie beside the recipe."""
        path = user_path(value)
        return path if path.is_absolute() else self._folders[0] / path


# Fields that are in no stage's key, and why that is right. A test holds the schema against this
# and against the fields that stages declare.
KEYLESS = {
    "name": "names folders and reports, decides no number",
    "run": "how and where, never what",
    "pair.allow": "refuses pairs, changes none",
    "gate.store_gradients": "kept or not, the scores are the same",
    "calibration.reasoning.targets.endpoint": "a server that moves has the same model",
    "calibration.agent.targets.endpoint": "a server that moves has the same model",
    "calibration.reasoning.on_lost": "refuses rows, changes none",
    "calibration.agent.on_lost": "refuses rows, changes none",
    "calibration.format.on_lost": "refuses rows, changes none",
    "calibration.reasoning.max_prompt_length": "refuses rows, changes none",
    "calibration.agent.max_prompt_length": "refuses rows, changes none",
    "evaluate.max_prompt_length": "refuses rows, changes none",
    "evaluate.run_code": "refuses rows, changes no grade",
}


def data_sources(recipe: Recipe) -> list[Data]:
    """Every data file or dataset that the recipe names."""
    sets, heldout = recipe.calibration, recipe.evaluate
    named = [sets.reasoning.data, sets.agent.data, sets.format.data]
    return named + [d for d in (heldout.reasoning, heldout.agent) if d is not None]


def field_of(recipe: Recipe, path: str) -> Any:
    """A field by its dotted path, as JSON values; a section as a mapping."""
    value: Any = recipe
    for name in path.split("."):
        value = getattr(value, name)
    return value.model_dump(mode="json") if isinstance(value, Section) else _as_json(value)


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
