"""A point of a sweep: the merged model measured in memory, no checkpoint written.

The base is loaded once and stays for the points to come. Each lays its edit over the base's
weights, is measured as `evaluate` measures a written merge, to the same bits on a CPU, and
leaves the base as it was.
"""

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from artifacts.ref import Ref
from artifacts.store import Built, Draft
from crane_tasks.apply import Inputs, make_editor
from crane_tasks.context import Context
from crane_tasks.edit import Editor
from crane_tasks.errors import RecipeError
from crane_tasks.evaluate import (
    SCHEMA,
    EvaluationSets,
    Model,
    base_and_donor,
    compare,
    ensure_heldout,
    measure_ref,
    measured,
    write_comparison,
)
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.stream import LayerStream
from crane_tasks.pipeline import Pipeline, parts_of

# The base of the sweep that this process works on, by what it was loaded as: one at most.
_loaded: dict[tuple[str, ...], LayerStream] = {}
_busy = threading.RLock()  # its weights are one point's at a time


def merged_rows(editor: Editor, pipeline: Pipeline, name: str) -> Iterator[tuple[int, int, Tensor]]:
    """The merged tensors of a slot in the base's dtype, in pieces: (expert, first row, rows).

    A piece is overwritten once the next one was asked for.

    Raises:
        RecipeError: alpha is so large that the dtype cannot hold the result.
    """
    slot = editor.base.slots[name]
    experts = range(len(editor.base.pieces[name]))
    parts = (part for expert in experts for part in parts_of(editor, slot, expert))
    for window in pipeline.run(parts):
        for part, rows in window.tensors():
            yield part.expert, part.first, rows


def build_point(ctx: Context, ref: Ref, apply: Ref, inputs: Inputs, sets: EvaluationSets) -> Built:
    """Make or find the comparison of base, donor and the merge that `apply` would write.

    It is the artifact that `build_evaluate` makes of the written merge, under the same key.

    Raises:
        RecipeError: alpha is too large for the weights' dtype.
        ScoreError: the baseline has no positive gain in some layer.
    """

    def write(draft: Draft) -> None:
        ensure_heldout(ctx, sets)
        with _busy:
            _write_point(ctx, apply, inputs, sets, draft)

    own = measure_ref(ctx, apply.key, sets)
    begun = ctx.store.has(own) or ctx.store.drafted(own)
    built = ctx.store.build(ref, SCHEMA, write)
    return replace(built, status="resumed") if begun and built.status == "computed" else built


def _write_point(
    ctx: Context, apply: Ref, inputs: Inputs, sets: EvaluationSets, draft: Draft
) -> None:
    base, donor = base_and_donor(ctx).values()
    if not ctx.store.has(measure_ref(ctx, donor.identity, sets)):
        release_base()  # one model in memory at a time
    measured(ctx, donor, sets)
    stream = _base(ctx)
    measured(ctx, replace(base, loaded=stream), sets)
    editor = make_editor(ctx, inputs)
    edit = partial(merged_rows, editor, Pipeline(editor))
    try:
        with stream.edited(edit):
            merged = Model(apply.key, ctx.base, base.content, edit, stream)
            models = {"base": base, "donor": donor, "merged": merged}
            write_comparison(compare(ctx, models, sets), draft)
    except RecipeError:
        raise  # the point's own fault: the base is whole again
    except BaseException:
        release_base()
        raise


def _base(ctx: Context) -> LayerStream:
    """The walk of the base, whose weights stay loaded where they fit."""
    key = (str(ctx.base), ctx.base_id, ctx.device, ctx.compute)
    if key not in _loaded:
        release_base()
        _loaded[key] = LayerStream(
            Checkpoint.open(ctx.base), device=ctx.torch_device, compute=ctx.compute_dtype
        )
    return _loaded[key]


def release_base() -> None:
    """Let the base go that `build_point` keeps in memory."""
    with _busy:
        _loaded.clear()
