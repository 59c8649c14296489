"""The losses of several points of a sweep in one walk of the base.

At each layer the base's weights and the stored delta are read once, every point's edit is made of
them, and each point's items go through its own copy of the layer. What is found is left in the
drafts of the points' measurements: a point that is built afterwards has nothing to walk for.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from artifacts.memo import DigestMemo
from artifacts.store import Draft
from crane_tasks.apply.editor import Editor, make_editor
from crane_tasks.apply.pipeline import Pipeline
from crane_tasks.calibration.sets import TokenSet, read_set
from crane_tasks.delta import DELTA
from crane_tasks.errors import RecipeError, ScoreError
from crane_tasks.evaluate.measure import MEASURE, NAME, keep_losses, measured_sets
from crane_tasks.evaluate.models import base_and_donor
from crane_tasks.evaluate.point import loaded_base, merged_rows, overlay_of, point_ref
from crane_tasks.models.files.memory import free_gpu_memory, free_memory
from crane_tasks.models.walk.losses import losses_of_models
from crane_tasks.models.walk.stream import LayerStream
from crane_tasks.session import Context
from crane_tasks.sizes import sizes_of
from crane_tasks.stage import Keys

# Of what is free: a GPU's holds the layers' copies, the host's hidden states as well.
SHARE = {"cpu": 4, "cuda": 2}


@dataclass(frozen=True)
class _Point:
    ctx: Context
    keys: Keys
    editor: Editor
    draft: Draft


def companions(points: Sequence[tuple[Context, Keys]]) -> list[list[tuple[Context, Keys]]]:
    """The points in groups that one walk can serve: of one delta, device and sets."""
    groups: dict[tuple[object, ...], list[tuple[Context, Keys]]] = {}
    for ctx, keys in points:
        sets = tuple(sorted(ref.key for ref in measured_sets(ctx, keys).values()))
        alike = (keys[DELTA].key, ctx.base_id, ctx.device, ctx.compute, sets)
        groups.setdefault(alike, []).append((ctx, keys))
    return list(groups.values())


def walk_together(points: Sequence[tuple[Context, Keys]]) -> None:
    """Measure the losses of points that are companions and whose inputs are there.

    A point whose own fault shows here is left out: it is raised when that point is built.

    Raises:
        RecipeError: an alpha is too large for the weights' dtype; no point of the walk was kept.
        CheckpointError: the base was written to meanwhile.
    """
    ctx, keys = points[0]
    with loaded_base(ctx, keys) as stream, ExitStack() as held:
        sets = {n: read_set(ctx.store.open(r)) for n, r in measured_sets(ctx, keys).items()}
        waiting = [p for ctx, keys in points if (p := _begun(ctx, keys, sets, held)) is not None]
        at_once = _at_once(ctx, stream, sets)
        proven = base_and_donor(ctx)["base"].proven
        for first in range(0, len(waiting), at_once):
            group = waiting[first : first + at_once]
            if len(group) > 1:  # alone it is measured as well by itself
                with proven(DigestMemo(ctx.store.root)):
                    _walk(ctx, stream, sets, group)


def _begun(ctx: Context, keys: Keys, sets: dict[str, TokenSet], held: ExitStack) -> _Point | None:
    """A point of which nothing is measured yet, and that is no other run's."""
    assert MEASURE.schema is not None
    draft = held.enter_context(ctx.store.drafting(point_ref(ctx, keys), MEASURE.schema))
    if draft is None or any(map(draft.done, sets)):
        return None
    try:
        return _Point(ctx, keys, make_editor(ctx, keys), draft)
    except (RecipeError, ScoreError):
        return None


def _at_once(ctx: Context, stream: LayerStream, sets: dict[str, TokenSet]) -> int:
    """So many points fit beside one another: each has a layer, and states on both sides of it."""
    device = ctx.torch_device
    tokens = sum(ids.numel() for tokens in sets.values() for ids in tokens.sequences)
    width = int(stream.checkpoint.config["hidden_size"]) * ctx.compute_dtype.itemsize
    each = sizes_of(ctx).one_layer + 2 * tokens * width
    free: int = free_memory()
    if device.type == "cuda":
        free = free_gpu_memory(device)
    return max(1, free // SHARE[device.type] // each)


def _walk(
    ctx: Context, stream: LayerStream, sets: dict[str, TokenSet], points: Sequence[_Point]
) -> None:
    editors = [point.editor for point in points]
    found = losses_of_models(
        stream,
        [tokens.items() for tokens in sets.values()],
        [overlay_of(editor) for editor in editors],
        partial(merged_rows, editors, Pipeline(*editors, on_host=False)),
        lambda step: ctx.show_step(NAME, step),
    )
    for point, losses in zip(points, found, strict=True):
        keep_losses(point.ctx, sets, losses, point.draft)
