"""A point of a sweep: the merged model measured in memory, no checkpoint written.

The base is loaded once and stays for the points to come. Each lays its edit over the base's
weights, is measured as `evaluate` measures a written merge, to the same bits on a CPU, and
leaves the base as it was.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from artifacts.store import Draft
from crane_tasks.apply.editor import Editor, make_editor
from crane_tasks.apply.pipeline import Pipeline
from crane_tasks.apply.stage import APPLY
from crane_tasks.apply.windows import parts_of
from crane_tasks.errors import RecipeError
from crane_tasks.evaluate.measure import MEASURE, measure_ref, measured
from crane_tasks.evaluate.models import Model, base_and_donor
from crane_tasks.evaluate.stage import EVALUATE, build_heldout, write_comparison
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.stream import LayerStream
from crane_tasks.session import Context
from crane_tasks.stage import Keys

LOADED = "base"  # what it is kept as between points


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


def write_point(ctx: Context, keys: Keys, draft: Draft) -> None:
    """Compare base, donor and the merge that `apply` would write.

    Raises:
        RecipeError: alpha is too large for the weights' dtype.
        ScoreError: the baseline has no positive gain in some layer.
    """
    kept, pair = ctx.session.kept, base_and_donor(ctx)
    build_heldout(ctx, keys)
    with kept.alone():
        if not ctx.store.has(measure_ref(ctx, keys, pair["donor"])):
            kept.let_go(LOADED)  # one model in memory at a time
        measured(ctx, keys, pair["donor"])
        try:
            _lay_over(ctx, keys, pair["base"], draft)
        except RecipeError:
            raise  # the point's own fault: the base is whole again
        except BaseException:
            kept.let_go(LOADED)
            raise


def _lay_over(ctx: Context, keys: Keys, base: Model, draft: Draft) -> None:
    stream = _base(ctx)
    measured(ctx, keys, replace(base, loaded=stream))
    editor = make_editor(ctx, keys)
    overlay = partial(merged_rows, editor, Pipeline(editor))
    with stream.edited(overlay):
        merged = Model(keys[APPLY].key, ctx.base, base.content, overlay, stream)
        write_comparison(ctx, keys, {**base_and_donor(ctx), "merged": merged}, draft)


def loaded_as(ctx: Context) -> tuple[str, ...]:
    """What tells whether the base in memory is that of a context."""
    return (str(ctx.base), ctx.base_id, ctx.device, ctx.compute)


def _base(ctx: Context) -> LayerStream:
    """The walk of the base, whose weights stay loaded where they fit."""

    def load() -> LayerStream:
        return LayerStream(
            Checkpoint.open(ctx.base), device=ctx.torch_device, compute=ctx.compute_dtype
        )

    return ctx.session.kept.one(LOADED, loaded_as(ctx), load)


def _begun(ctx: Context, keys: Keys) -> bool:
    """Whether an earlier attempt has measured the merge, or was about to."""
    own = MEASURE.ref(ctx, keys, model=keys[APPLY].key)
    return ctx.store.has(own) or ctx.store.drafted(own)


# The artifact that `EVALUATE` makes of the written merge, under the same key.
POINT = replace(EVALUATE, write=write_point, begun=_begun)
