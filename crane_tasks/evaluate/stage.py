"""Stage `evaluate`: what base, donor and merge do on held-out rows, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from artifacts.memo import DigestMemo
from artifacts.ref import digest_of
from artifacts.schema import Schema
from artifacts.store import Artifact, Draft
from crane_tasks.apply.stage import APPLY
from crane_tasks.calibration.sets import read_set
from crane_tasks.calls import HERMES, SYNTAXES
from crane_tasks.errors import RecipeError
from crane_tasks.evaluate.divergence import divergences
from crane_tasks.evaluate.engine import check_engine
from crane_tasks.evaluate.measure import (
    FIELDS,
    HELDOUT,
    NAME,
    SETS,
    heldout_sets,
    mean_loss,
    measure_config,
    measure_ref,
    measured,
    measured_sets,
    read_answers,
    samples_of,
    unmeasured,
)
from crane_tasks.evaluate.metrics import (
    METRICS,
    OBJECTIVE,
    Measured,
    rows_of,
    table_identity,
)
from crane_tasks.evaluate.models import Model, base_and_donor, written_merge
from crane_tasks.evaluate.rows import Row, answered_rows, answers_of
from crane_tasks.evaluate.suites import check_suites, suite_results, suites_identity
from crane_tasks.evaluate.uncertainty import against, intervals_of, mean
from crane_tasks.grades import needs_code
from crane_tasks.identity import behaviour_identity
from crane_tasks.models.walk.skeleton import generation_config
from crane_tasks.rows import load_rows
from crane_tasks.sandbox import require_sandbox
from crane_tasks.session import Context
from crane_tasks.sizes import sizes_of
from crane_tasks.stage import BASE, DONOR, TOKENIZER, Keys, Needs, Stage


def write_evaluate(ctx: Context, keys: Keys, draft: Draft) -> None:
    """Compare base, donor and the merge that lies in the output folder.

    Raises:
        CheckpointError: the folder does not hold what `apply` wrote, or not any more.
    """
    write_comparison(ctx, keys, compared(ctx, keys), draft)


def compared(ctx: Context, keys: Keys) -> dict[str, Model]:
    """What a merge is compared with, and itself as `apply` has written it."""
    return {**base_and_donor(ctx), "merged": written_merge(ctx, ctx.store.open(keys[APPLY]))}


def answered_by_merge(ctx: Context, keys: Keys) -> list[Row]:
    """The held-out rows with the answers of base, donor and the merge, however it was measured."""
    models = compared(ctx, keys)
    if not ctx.store.has(measure_ref(ctx, keys, models["merged"])):
        # It was measured as a sweep's point, before it was written.
        models["merged"] = replace(models["merged"], identity=keys[APPLY].key)
    return list(answered_rows(ctx, keys, models))


def write_comparison(ctx: Context, keys: Keys, models: Mapping[str, Model], draft: Draft) -> None:
    """Measure base, donor and others; their metrics as an array [model, metric] (NaN: not
    measured) and as metadata, and what they are the means of as arrays [model, row]."""
    build_heldout(ctx, keys)
    result, known = compare(ctx, keys, models)
    found: dict[str, dict[str, float]] = result["models"]
    names = [m.name for m in METRICS]
    rows = [[values.get(name, float("nan")) for name in names] for values in found.values()]
    with draft.unit("comparison") as unit:
        attributes = {"models": list(found), "metrics": names}
        unit.write("metrics", torch.tensor(rows, dtype=torch.float64), attributes=attributes)
        for metric in set.intersection(*map(set, known.values())):
            each = torch.tensor([known[name][metric] for name in found], dtype=torch.float64)
            unit.write(f"rows.{metric}", each, attributes={"models": list(found)})
        unit.meta |= result


def build_heldout(ctx: Context, keys: Keys) -> None:
    """Make the held-out sets; the calibration sets are there already."""
    for stage in HELDOUT.values():
        if stage in keys:
            stage.build(ctx, keys)


def _config(ctx: Context) -> dict[str, Any]:
    config = {**measure_config(ctx), "metrics": table_identity()}
    heldout = [d for d in (ctx.recipe.evaluate.reasoning, ctx.recipe.evaluate.agent) if d]
    grades = [load_rows(ctx.recipe, data).grades for data in heldout]
    if ctx.recipe.evaluate.generate and any(grades):
        config["grades"] = digest_of(grades)
    syntax = ctx.syntax()
    if syntax is not None and syntax != HERMES:  # keys are older than other syntaxes
        config["calls"] = syntax.name
    if suites := suites_identity(ctx):
        config["suites"] = suites
    # What ends an answer is either side's word.
    return config | ({"stops": ctx.stops} if ctx.recipe.evaluate.generate else {})


def _needs(ctx: Context, keys: Keys) -> Needs:
    sizes = sizes_of(ctx)
    walk = sizes.one_layer + sizes.ends
    return Needs(
        memory=sizes.on_host + (walk if ctx.device == "cpu" else 0),
        device_memory=walk,
        seconds=3 * sizes.passes + 3 * sizes.reading,
    )


def _check(ctx: Context, keys: Keys) -> None:
    """Whoever answers can be decoded, and calls that are measured can be read.

    Raises:
        CheckpointError: a side's generation config says what transformers does not take.
        RecipeError: nothing says in which syntax calls are written.
    """
    settings = ctx.recipe.evaluate
    _check_code(ctx)
    if settings.generate and settings.engine is not None:
        check_engine(settings.engine)
        if settings.sampling is not None:
            raise RecipeError("evaluate.sampling: a server's answers are greedy so far")
    if not ctx.store.has(keys[EVALUATE]):  # to load a task's data takes seconds
        check_suites(ctx)
    if settings.generate:
        for side in (ctx.pair().base, ctx.pair().donor):
            generation_config(side)
    if settings.generate and settings.agent is not None and ctx.syntax() is None:
        raise RecipeError(
            f"evaluate.calls: neither the completions in {settings.agent} nor the base's chat "
            "template show tool calls in a syntax that is known, so none could be counted. Name "
            f"one of {', '.join(SYNTAXES)}, or set evaluate.generate to 0."
        )


def _check_code(ctx: Context) -> None:
    """Code that models write is run only where the recipe says so, and where it is kept in."""
    settings = ctx.recipe.evaluate
    for data in (settings.reasoning, settings.agent):
        rows = load_rows(ctx.recipe, data).rows if data is not None and settings.generate else ()
        asking = [row.place for row in rows if needs_code(row.answer)]
        if asking and not settings.run_code:
            raise RecipeError(
                f"{asking[0]}: `python-tests` run code that a model wrote; set evaluate.run_code "
                "to true if they may, in bubblewrap"
            )
        if asking:
            require_sandbox()


EVALUATE = Stage(
    name=NAME,
    version=4,
    schema=Schema(arrays={r"metrics|rows\.\w+": ("float64",)}),
    inputs={"apply": APPLY, "base": BASE, "donor": DONOR, "tokenizer": TOKENIZER, **SETS},
    fields=(*FIELDS, "evaluate.calls", "evaluate.suites"),
    config=_config,
    check=_check,
    without=unmeasured,
    write=write_evaluate,
    needs=_needs,
)


def compare(
    ctx: Context, keys: Keys, models: Mapping[str, Model]
) -> tuple[dict[str, Any], dict[str, dict[str, Sequence[float]]]]:
    """Measure every model and put the metrics side by side; "base" must be among them.

    Returns:
        the comparison as JSON values, and by model and metric a number per row.
    """
    _measure_elsewhere(ctx, keys, models)
    opened: dict[str, Artifact] = {}
    for number, (name, model) in enumerate(models.items()):
        opened[name] = measured(ctx, keys, model)
        ctx.progress(NAME, number + 1, len(models), "models")
    diverged = divergences(ctx, models, opened)
    recipe, sets = ctx.recipe, measured_sets(ctx, keys)
    heldout = {n: read_set(ctx.store.open(r)) for n, r in heldout_sets(ctx, keys).items()}
    known = {
        name: Measured(
            {n: artifact.read(n, "losses").tolist() for n in heldout},
            {
                n: answers_of(ctx, n, read_answers(artifact, n), wanted)
                for n, wanted in heldout.items()
                if recipe.evaluate.generate
            },
            diverged[name],
            samples_of(recipe),
        )
        for name, artifact in opened.items()
    }
    rows = {name: rows_of(one, recipe) for name, one in known.items()}
    means = {name: {m: mean(each) for m, each in own.items()} for name, own in rows.items()}
    result = {
        "models": {n: {m: v for m, v in own.items() if v == v} for n, own in means.items()},
        "intervals": {name: intervals_of(own) for name, own in rows.items()},
        "against_base": {
            name: against(rows["base"], own) for name, own in rows.items() if name != "base"
        },
        "losses": {name: {s: mean_loss(a, s) for s in sets} for name, a in opened.items()},
        "rows": {name: len(wanted.sequences) for name, wanted in heldout.items()},
        "suites": {
            name: suite_results(ctx, keys, model)
            for name, model in models.items()
            if recipe.evaluate.suites
        },
        "generated": recipe.evaluate.generate,
        "unended": {
            name: {n: len(a.unended) for n, a in one.answers.items() if a.unended}
            for name, one in known.items()
        },
    }
    return result, rows


def _measure_elsewhere(ctx: Context, keys: Keys, models: Mapping[str, Model]) -> None:
    """Have several workers measure the checkpoints, where there are such workers."""
    if not ctx.spreads:
        return
    missing = [
        model
        for model in models.values()
        if model.edit is None and not ctx.store.has(measure_ref(ctx, keys, model))
    ]
    calls = [(ctx.elsewhere(number), keys, model) for number, model in enumerate(missing)]
    for _ in ctx.session.spread(NAME, _measure, calls):
        pass


def _measure(ctx: Context, keys: Keys, model: Model) -> None:
    measured(ctx, keys, model)


def read_comparison(artifact: Artifact) -> dict[str, Any]:
    """The result of a comparison as JSON values."""
    return artifact.unit_meta("comparison")


def row_losses(artifact: Artifact, model: str) -> list[float]:
    """What a model's reasoning loss is the mean of; empty if it was not measured."""
    name = f"rows.{OBJECTIVE.name}"
    if not artifact.has("comparison", name):
        return []
    place = list(read_comparison(artifact)["models"]).index(model)
    losses: list[float] = artifact.read("comparison", name)[place].tolist()
    return losses


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


def build_checkpoint_comparison(
    ctx: Context, keys: Keys, checkpoint: Path
) -> tuple[dict[str, Any], list[Row]]:
    """Compare any checkpoint of the base's architecture with base and donor, row by row.

    Raises:
        CheckpointError: it was written to meanwhile.
    """
    identity = behaviour_identity(checkpoint, DigestMemo(ctx.store.root))
    ref = EVALUATE.ref(ctx, keys, apply=digest_of({"checkpoint": identity}))
    model = Model(identity, checkpoint, identity)
    assert EVALUATE.schema is not None

    models = {**base_and_donor(ctx), "checkpoint": model}

    def write(draft: Draft) -> None:
        write_comparison(ctx, keys, models, draft)

    ctx.store.build(ref, EVALUATE.schema, write, waiting=ctx.notice)
    rows = list(answered_rows(ctx, keys, models))
    return read_comparison(ctx.store.open(ref)), rows
