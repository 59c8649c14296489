"""A point of a sweep: the merged model measured in memory, no checkpoint written.

The base is loaded once and stays for the points to come. Each lays its edit over the base's
weights, is measured as `evaluate` measures a written merge, to the same bits on a CPU, and
leaves the base as it was.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from torch import Tensor

from artifacts.ref import Ref
from artifacts.store import Draft
from crane_tasks.apply.editor import Editor, make_editor
from crane_tasks.apply.pipeline import Pipeline
from crane_tasks.apply.stage import APPLY
from crane_tasks.apply.windows import parts_of
from crane_tasks.errors import RecipeError
from crane_tasks.evaluate.measure import MEASURE, measure_ref, measured, measured_sets
from crane_tasks.evaluate.models import Model, base_and_donor
from crane_tasks.evaluate.stage import EVALUATE, build_heldout, write_comparison
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.overlay import Overlay
from crane_tasks.models.walk.stream import LayerStream
from crane_tasks.session import Context
from crane_tasks.stage import Keys

LOADED = "base"  # what it is kept as between points


def merged_rows(
    editors: Sequence[Editor], pipeline: Pipeline, name: str
) -> Iterator[tuple[int, int, list[Tensor]]]:
    """The merged tensors of a slot in the base's dtype, in pieces: (expert, first row, rows by
    each of the editors, which are the pipeline's).

    A piece is overwritten once the next one was asked for.

    Raises:
        RecipeError: alpha is so large that the dtype cannot hold the result.
    """
    first, *others = editors
    slot = first.base.slots[name]
    experts = range(len(first.base.pieces[name]))
    parts = (part for expert in experts for part in parts_of(first, slot, expert, *others))
    for window in pipeline.run(parts):
        for part, rows in window.tensors():
            yield part.expert, part.first, rows


def overlay_of(editor: Editor) -> Overlay:
    """What one editor makes of the base."""
    pipeline = Pipeline(editor, on_host=False)

    def pieces(name: str) -> Iterator[tuple[int, int, Tensor]]:
        for expert, first, (rows,) in merged_rows([editor], pipeline, name):
            yield expert, first, rows

    return Overlay(pieces, editor.moves)


def write_point(ctx: Context, keys: Keys, draft: Draft) -> None:
    """Compare base, donor and the merge that `apply` would write.

    Raises:
        RecipeError: alpha is too large for the weights' dtype.
        ScoreError: the baseline has no positive gain in some layer.
    """
    with loaded_base(ctx, keys) as stream:
        _lay_over(ctx, keys, stream, draft)


@contextmanager
def loaded_base(ctx: Context, keys: Keys) -> Iterator[LayerStream]:
    """The walk of the base, which is measured, as the donor is; it stays for the points to come."""
    kept, pair = ctx.session.kept, base_and_donor(ctx)
    build_heldout(ctx, keys)
    with kept.alone():
        if not ctx.store.has(measure_ref(ctx, keys, pair["donor"])):
            kept.let_go(LOADED)  # one model in memory at a time
        measured(ctx, keys, pair["donor"])
        try:
            stream = _base(ctx)
            measured(ctx, keys, replace(pair["base"], loaded=stream))
            yield stream
        except RecipeError:
            raise  # a point's own fault: the base is whole again
        except BaseException:
            kept.let_go(LOADED)
            raise


def point_ref(ctx: Context, keys: Keys) -> Ref:
    """The key of a point's measurements."""
    return MEASURE.ref(ctx, keys, model=keys[APPLY].key)


def _lay_over(ctx: Context, keys: Keys, stream: LayerStream, draft: Draft) -> None:
    base = base_and_donor(ctx)["base"]
    overlay = overlay_of(make_editor(ctx, keys))
    with stream.edited(overlay, layers=not _needs_the_head_alone(ctx, keys)):
        merged = Model(keys[APPLY].key, ctx.base, base.content, overlay, stream)
        write_comparison(ctx, keys, {**base_and_donor(ctx), "merged": merged}, draft)


def _needs_the_head_alone(ctx: Context, keys: Keys) -> bool:
    """Whether a walk of several points has left nothing to be done with the layers."""
    if ctx.recipe.evaluate.suites:
        return False
    ref = point_ref(ctx, keys)
    if ctx.store.has(ref):
        return True
    assert MEASURE.schema is not None
    with ctx.store.drafting(ref, MEASURE.schema) as draft:
        walked = draft is not None and all(map(draft.done, measured_sets(ctx, keys)))
    return walked and not ctx.recipe.evaluate.generate


def loaded_as(ctx: Context) -> tuple[str, ...]:
    """What tells whether the base in memory is that of a context."""
    return (str(ctx.base), ctx.base_id, *ctx.devices, ctx.compute)


def _base(ctx: Context) -> LayerStream:
    """The walk of the base, whose weights stay loaded where they fit."""
    load = partial(ctx.walk_of, Checkpoint.open(ctx.base))
    return ctx.session.kept.one(LOADED, loaded_as(ctx), load)


def _begun(ctx: Context, keys: Keys) -> bool:
    """Whether an earlier attempt has measured the merge, or was about to."""
    own = point_ref(ctx, keys)
    return ctx.store.has(own) or ctx.store.drafted(own)


# The artifact that `EVALUATE` makes of the written merge, under the same key.
POINT = replace(EVALUATE, write=write_point, begun=_begun)
