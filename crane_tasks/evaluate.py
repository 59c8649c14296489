"""Stage `evaluate`: what base, donor and merge do on held-out rows.

Each model is measured once and kept under its content, so a sweep measures base and donor
never again; the stage's own artifact puts the measurements side by side.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from artifacts.memo import DigestMemo, signature
from artifacts.ref import Ref, digest_of
from artifacts.schema import Schema
from artifacts.store import Artifact, Built, Draft
from crane_tasks.behaviour import answer_metrics, call_metrics
from crane_tasks.calibration import (
    TokenSet,
    build_targets,
    format_mask,
    offsets_of,
    read_set,
    target_ref,
)
from crane_tasks.check import load_tokenizer
from crane_tasks.context import GENERATION, Context, checkpoint_identity
from crane_tasks.data import load_rows
from crane_tasks.errors import CheckpointError
from crane_tasks.models.decoding.greedy import decode_greedily
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.losses import item_losses
from crane_tasks.models.walk.overlay import Edit
from crane_tasks.models.walk.stream import LayerStream
from crane_tasks.recipe import Endpoint, Recipe, Targets, TargetSet

STAGE = "evaluate"
VERSION = 2
MEASURE = "measure"
MEASURE_VERSION = 1
MEASURE_SCHEMA = Schema(
    arrays={
        "losses": ("float64",),
        "format_states": ("float32",),
        "token_ids": ("int64",),
        "offsets": ("int64",),
    }
)
SCHEMA = Schema(arrays={"metrics": ("float64",)})
GENERATE_BATCH = 32
POSITION_BLOCK = 64
METRICS = (
    "reasoning_loss",
    "agent_loss",
    "tool_calls",
    "exact_tool_calls",
    "right_answers",
    "answer_tokens",
    "format_divergence",
)


def measured_metrics(recipe: Recipe) -> set[str]:
    """Those of METRICS that a recipe's `evaluate` section has measured."""
    settings = recipe.evaluate
    found: set[str] = set()
    if settings.reasoning is not None:
        found |= {"reasoning_loss"}
        found |= {"right_answers", "answer_tokens"} if settings.generate else set()
    if settings.agent is not None:
        found |= {"agent_loss", "format_divergence"}
        found |= {"tool_calls", "exact_tool_calls"} if settings.generate else set()
    return found


@dataclass(frozen=True)
class Model:
    """A model that is measured: a checkpoint, or a checkpoint with an edit laid over it.

    Attributes:
        identity: what its measurements are kept under.
        folder: the checkpoint.
        content: `behaviour_identity` of what must lie in the folder.
        edit: gives the edited tensors of a slot; None leaves the checkpoint as it is.
        loaded: a walk of the checkpoint that has the edit in it already, where there is one.
    """

    identity: str
    folder: Path
    content: str
    edit: Edit | None = None
    loaded: LayerStream | None = None

    @contextmanager
    def proven(self, memo: DigestMemo) -> Iterator[None]:
        """Prove that the folder holds what is to be measured, before the block and after it.

        Raises:
            CheckpointError: it does not, or it was replaced or written to meanwhile.
        """
        before: dict[str, tuple[int, ...]] = {}
        try:
            before = _signatures(self.folder)
            if behaviour_identity(self.folder, memo) != self.content:
                raise self._replaced()
            yield
        except (OSError, CheckpointError) as error:
            # Files that vanish or do not fit each other: another run is writing there.
            if self._changed(before):
                raise self._replaced() from error
            raise
        if self._changed(before):
            raise self._replaced()

    def _changed(self, before: dict[str, tuple[int, ...]]) -> bool:
        try:
            return _signatures(self.folder) != before
        except OSError:
            return True

    def _replaced(self) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: was replaced or written to by another run while it was evaluated; "
            "nothing was kept of it. Give every merge an output of its own."
        )

    @contextmanager
    def stream(self, ctx: Context, *, resident: bool | None = None) -> Iterator[LayerStream]:
        """The model's walk; `resident` asks for one that does (not) keep the weights."""
        if self.loaded is not None and resident in (None, self.loaded.resident):
            yield self.loaded
            return
        stream = LayerStream(
            Checkpoint.open(self.folder),
            device=ctx.torch_device,
            compute=ctx.compute_dtype,
            resident=resident,
        )
        if self.edit is None:
            yield stream
            return
        with stream.edited(self.edit):
            yield stream


def _signatures(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells whether weights or configs of a folder were replaced or written to."""
    files = (file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
    return {file.name: signature(file.stat()) for file in files}


def base_and_donor(ctx: Context) -> dict[str, Model]:
    """The pair that the run was begun with, whatever lies in the two folders by now."""
    ids = {"base": ctx.base_id, "donor": ctx.donor_id}
    folders = {"base": ctx.base, "donor": ctx.donor}
    found = {}
    for side, checkpoint in ids.items():
        identity = _behaviour(checkpoint, ctx.stops[side])
        found[side] = Model(identity, folders[side], identity)
    return found


def written_merge(ctx: Context, apply: Artifact, memo: DigestMemo) -> Model:
    """What `apply` has written, by its own record of the files and not by what lies there."""
    weights = sorted(record["digest"] for record in apply.meta["files"].values())
    config = memo.digest(ctx.base / "config.json")
    identity = _behaviour(digest_of({"weights": weights, "config": config}), ctx.stops["base"])
    return Model(identity, ctx.output, identity)


@dataclass(frozen=True)
class EvaluationSets:
    """The sets that models are measured on: name -> target set reference.

    Held-out `reasoning` and `agent` where the recipe names them, and the calibration sets,
    on which the gate's prediction is made.
    """

    refs: Mapping[str, Ref]

    def heldout(self) -> list[str]:
        return [name for name in ("reasoning", "agent") if name in self.refs]


def heldout_section(ctx: Context, name: str) -> TargetSet | None:
    """The held-out set `reasoning` or `agent` as a target set, or None.

    What the recipe has decoded by a server for calibration is decoded there here as well.
    """
    settings = ctx.recipe.evaluate
    data = getattr(settings, name)
    if data is None:
        return None
    given: TargetSet = getattr(ctx.recipe.calibration, name)
    targets: Targets = "donor" if name == "reasoning" else "base"
    if isinstance(given.targets, Endpoint):
        targets = given.targets
    return TargetSet(
        data=data,
        targets=targets,
        max_new_tokens=settings.max_new_tokens,
        max_length=settings.max_length,
    )


def evaluation_sets(ctx: Context, calibration: Mapping[str, Ref]) -> EvaluationSets:
    """References of all sets that are measured; reads the held-out rows' content."""
    refs = {f"calibration_{name}": ref for name, ref in calibration.items()}
    for name in ("reasoning", "agent"):
        section = heldout_section(ctx, name)
        if section is not None:
            refs[name] = target_ref(ctx, section, load_rows(ctx.recipe, section.data))
    return EvaluationSets(refs)


def behaviour_identity(folder: Path, memo: DigestMemo) -> str:
    """A digest of what answers depend on: the weights, and where decoding stops."""
    stops = folder / GENERATION
    return _behaviour(
        checkpoint_identity(folder, memo), memo.digest(stops) if stops.exists() else ""
    )


def _behaviour(checkpoint: str, stops: str) -> str:
    return digest_of({"checkpoint": checkpoint, "stops": stops})


def measure_ref(ctx: Context, model_id: str, sets: EvaluationSets) -> Ref:
    """The key of one model's measurements."""
    settings = ctx.recipe.evaluate
    config = {
        "compute": ctx.compute,
        "generate": settings.generate,
        "max_new_tokens": settings.max_new_tokens if settings.generate else 0,
        "patterns": list(ctx.recipe.calibration.format.patterns),
    }
    keys = {name: ref.key for name, ref in sets.refs.items()}
    inputs = {"model": model_id, "tokenizer": ctx.tokenizer_id, **keys}
    return Ref(MEASURE, MEASURE_VERSION, config, inputs)


def evaluate_ref(ctx: Context, apply_key: str, sets: EvaluationSets) -> Ref:
    """The key of the comparison; `apply_key` stands for the merged model."""
    measured = measure_ref(ctx, apply_key, sets)
    inputs = dict(measured.inputs)
    merged = inputs.pop("model")
    inputs |= {"apply": merged, "base": ctx.base_id, "donor": ctx.donor_id}
    return Ref(STAGE, VERSION, measured.config, inputs)


def build_evaluate(ctx: Context, ref: Ref, apply: Ref, sets: EvaluationSets) -> Built:
    """Make or find the comparison of base, donor and merged.

    Raises:
        CheckpointError: the output folder does not hold what `apply` wrote, or not any more.
    """

    def write(draft: Draft) -> None:
        ensure_heldout(ctx, sets)
        memo = DigestMemo(ctx.store.root)
        merged = written_merge(ctx, ctx.store.open(apply), memo)
        write_comparison(compare(ctx, base_and_donor(ctx) | {"merged": merged}, sets), draft)

    return ctx.store.build(ref, SCHEMA, write)


def ensure_heldout(ctx: Context, sets: EvaluationSets) -> None:
    """Make the held-out target sets; the calibration sets are there already."""
    for name in sets.heldout():
        section = heldout_section(ctx, name)
        assert section is not None, "a held-out set has a section"
        build_targets(ctx, section, sets.refs[name])


def write_comparison(result: dict[str, Any], draft: Draft) -> None:
    """The metrics as an array [model, metric] (NaN: not measured) and as metadata."""
    models: dict[str, dict[str, float]] = result["models"]
    rows = [[m.get(k, float("nan")) for k in METRICS] for m in models.values()]
    with draft.unit("comparison") as unit:
        attributes = {"models": list(models), "metrics": list(METRICS)}
        unit.write("metrics", torch.tensor(rows, dtype=torch.float64), attributes=attributes)
        unit.meta |= result


def measured(ctx: Context, model: Model, sets: EvaluationSets) -> Artifact:
    """A model's measurements, made if they are missing."""
    ref = measure_ref(ctx, model.identity, sets)

    def write(draft: Draft) -> None:
        with model.proven(DigestMemo(ctx.store.root)):
            write_measurements(ctx, model, sets, draft)

    ctx.store.build(ref, MEASURE_SCHEMA, write)
    return ctx.store.open(ref)


def _measure_elsewhere(ctx: Context, models: Mapping[str, Model], sets: EvaluationSets) -> None:
    """Have several workers measure the checkpoints, where there are such workers."""
    there = ctx.elsewhere()
    calls = [
        (there, model, sets)
        for model in models.values()
        if model.edit is None and not ctx.store.has(measure_ref(ctx, model.identity, sets))
    ]
    if there is not ctx:
        for _ in ctx.spread(STAGE, _measure, calls):
            pass


def _measure(ctx: Context, model: Model, sets: EvaluationSets) -> None:
    measured(ctx, model, sets)


def compare(ctx: Context, models: Mapping[str, Model], sets: EvaluationSets) -> dict[str, Any]:
    """Measure every model and put the metrics side by side; "base" must be among them."""
    _measure_elsewhere(ctx, models, sets)
    opened: dict[str, Artifact] = {}
    for number, (name, model) in enumerate(models.items()):
        opened[name] = measured(ctx, model, sets)
        ctx.progress(STAGE, number + 1, len(models), "models")
    tokenizer = load_tokenizer(ctx.base)
    truths = {name: read_set(ctx.store.open(sets.refs[name])) for name in sets.heldout()}
    found = {
        name: _metrics(artifact, truths, tokenizer, ctx.recipe.evaluate.generate)
        for name, artifact in opened.items()
    }
    _add_divergence(ctx, models, opened, found)
    return {
        "models": found,
        "losses": {name: {s: _mean_loss(a, s) for s in sets.refs} for name, a in opened.items()},
        "rows": {name: len(truth.sequences) for name, truth in truths.items()},
        "generated": ctx.recipe.evaluate.generate,
    }


def gate_check(result: Mapping[str, Any], predicted: Mapping[str, float]) -> dict[str, Any]:
    """First-order predicted and realised change of loss on the calibration sets."""
    losses = result["losses"]
    realised = {
        name: losses["merged"][f"calibration_{name}"] - losses["base"][f"calibration_{name}"]
        for name in predicted
    }
    # Not stored, not known: JSON has no NaN.
    known = {k: v if v == v else None for k, v in predicted.items()}
    return {"predicted": known, "realised": realised}


def write_measurements(ctx: Context, model: Model, sets: EvaluationSets, draft: Draft) -> None:
    """Unit of work: one set's losses, one set's answers."""
    with model.stream(ctx) as stream:
        _write_losses(ctx, stream, sets, draft)
        if not ctx.recipe.evaluate.generate or stream.resident:
            _write_answers(ctx, stream, sets, draft)
            return
    # Decoding holds the whole model: in place of the walk, not beside it.
    with model.stream(ctx, resident=True) as stream:
        _write_answers(ctx, stream, sets, draft)


def _write_losses(ctx: Context, stream: LayerStream, sets: EvaluationSets, draft: Draft) -> None:
    tokenizer = load_tokenizer(ctx.base)
    for name, ref in sets.refs.items():
        if draft.done(name):
            continue
        tokens = read_set(ctx.store.open(ref))
        losses, states = item_losses(
            stream, tokens.items(), lambda step: ctx.show_step(STAGE, step)
        )
        with draft.unit(name) as unit:
            unit.write("losses", torch.tensor(losses, dtype=torch.float64))
            if name == "agent":
                chosen = format_positions(ctx, tokenizer, tokens)
                rows = [s[p] for s, p in zip(states, chosen, strict=True)]
                unit.write("format_states", torch.cat(rows).float())


def format_positions(ctx: Context, tokenizer: Any, tokens: TokenSet) -> list[Tensor]:
    """Per item the positions whose next token is a format token of the target: int64 [n]."""
    patterns = ctx.recipe.calibration.format.patterns
    found = []
    for ids, length in zip(tokens.sequences, tokens.target_lengths, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=False)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if encoded["input_ids"] == ids.tolist():
            mask = format_mask(text, encoded["offset_mapping"], patterns, radius=0)
        else:
            # A decoded target need not be how the tokenizer would cut its text; then
            # only patterns that are tokens of their own can be placed.
            singles = torch.tensor(tokenizer.convert_tokens_to_ids(list(patterns)))
            mask = torch.isin(ids, singles)
        mask[: ids.numel() - length] = False
        found.append(mask.nonzero().flatten() - 1)
    return found


def _write_answers(ctx: Context, stream: LayerStream, sets: EvaluationSets, draft: Draft) -> None:
    settings = ctx.recipe.evaluate
    missing = [name for name in sets.heldout() if not draft.done(f"answers.{name}")]
    if not (settings.generate and missing):
        return
    tokenizer = load_tokenizer(ctx.base)
    with stream.whole() as model:
        for name in missing:
            prompts = _prompts(read_set(ctx.store.open(sets.refs[name])))[: settings.generate]
            answers: list[list[int]] = []
            for first in range(0, len(prompts), GENERATE_BATCH):
                answers += decode_greedily(
                    model,
                    prompts[first : first + GENERATE_BATCH],
                    max_new_tokens=settings.max_new_tokens,
                    pad=tokenizer.pad_token_id,
                    eos=tokenizer.eos_token_id,
                )
                ctx.progress(STAGE, len(answers), len(prompts), f"{name} answers")
            with draft.unit(f"answers.{name}") as unit:
                unit.write("token_ids", torch.tensor([i for a in answers for i in a]))
                unit.write("offsets", offsets_of(answers))


def _prompts(tokens: TokenSet) -> list[list[int]]:
    return [
        ids[: ids.numel() - length].tolist()
        for ids, length in zip(tokens.sequences, tokens.target_lengths, strict=True)
    ]


def _mean_loss(artifact: Artifact, name: str) -> float:
    return float(artifact.read(name, "losses").mean())


def _metrics(
    artifact: Artifact, truths: Mapping[str, TokenSet], tokenizer: Any, generate: int
) -> dict[str, float]:
    """What one model's measurements say (keys of METRICS; only what was measured)."""
    found = {f"{name}_loss": _mean_loss(artifact, name) for name in truths}
    if not generate:
        return found
    for name, truth in truths.items():
        ids = artifact.read(f"answers.{name}", "token_ids")
        ends = artifact.read(f"answers.{name}", "offsets").tolist()
        answers = [ids[a:b].tolist() for a, b in pairwise(ends)]
        targets = [
            s[s.numel() - n :].tolist()
            for s, n in zip(truth.sequences, truth.target_lengths, strict=True)
        ]
        measure = call_metrics if name == "agent" else answer_metrics
        found |= measure(tokenizer, answers, targets[: len(answers)])
    return found


@torch.no_grad()
def _add_divergence(
    ctx: Context,
    models: Mapping[str, Model],
    opened: Mapping[str, Artifact],
    found: dict[str, dict[str, float]],
) -> None:
    """Mean KL(base ‖ model) of the next token where the agent targets have format tokens."""
    if not opened["base"].has("agent", "format_states"):
        return
    states = {name: artifact.read("agent", "format_states") for name, artifact in opened.items()}
    if not states["base"].shape[0]:
        return
    memo = DigestMemo(ctx.store.root)
    reference = _log_probabilities(ctx, models["base"], states["base"], memo)
    for name, model in models.items():
        others = _log_probabilities(ctx, model, states[name], memo)
        total = 0.0
        for ours, theirs in zip(reference, others, strict=True):
            total += float((ours.exp() * (ours - theirs)).sum(dtype=torch.float64))
        # Rounding can leave the KL of equal distributions a hair below zero.
        found[name]["format_divergence"] = max(0.0, total / states["base"].shape[0])


def _log_probabilities(
    ctx: Context, model: Model, states: Tensor, memo: DigestMemo
) -> list[Tensor]:
    """Log-probabilities of the next token from last-layer states [n, d], in blocks."""
    blocks = []
    with model.proven(memo), model.stream(ctx) as stream, stream.head():
        for block in torch.split(states, POSITION_BLOCK):
            hidden = block[None].to(device=ctx.torch_device, dtype=ctx.compute_dtype)
            positions = torch.arange(block.shape[0], device=ctx.torch_device)
            blocks.append(stream.logits(hidden, positions).float().log_softmax(-1).cpu())
    return blocks


def read_comparison(artifact: Artifact) -> dict[str, Any]:
    """The result of `build_evaluate` as JSON values."""
    return artifact.unit_meta("comparison")


def build_checkpoint_comparison(
    ctx: Context, checkpoint: Path, sets: EvaluationSets
) -> tuple[Built, dict[str, Any]]:
    """Compare any checkpoint of the base's architecture with base and donor."""
    memo = DigestMemo(ctx.store.root)
    identity = behaviour_identity(checkpoint, memo)
    ref = evaluate_ref(ctx, digest_of({"checkpoint": identity}), sets)

    def write(draft: Draft) -> None:
        ensure_heldout(ctx, sets)
        models = base_and_donor(ctx) | {"checkpoint": Model(identity, checkpoint, identity)}
        write_comparison(compare(ctx, models, sets), draft)

    built = ctx.store.build(ref, SCHEMA, write)
    return built, read_comparison(ctx.store.open(ref))
