"""What a merge would do and need, without loading a weight."""

from dataclasses import asdict, dataclass
from typing import Any

from artifacts.cleaning import differences, nearest
from artifacts.ref import Ref
from artifacts.store import Store
from crane_tasks.calibration import count_tokens
from crane_tasks.check import check_pair
from crane_tasks.context import Context, Progress, make_context, no_progress
from crane_tasks.output import holds, shard_plan
from crane_tasks.recipe import Endpoint, Recipe
from crane_tasks.room import Sizes, sizes_of
from flows.merge import Refs, all_refs, check_cheap

# Rough rates for the time column: bytes of weights a second from disk through memory, and
# multiply-adds a second. Estimates: they tell minutes from days.
DISK_RATE = 4e8
FLOPS = {"cpu": 5e10, "cuda": 1e14}


@dataclass(frozen=True)
class Step:
    """One stage: what would happen, why, and what it takes (bytes, seconds; None: nothing)."""

    name: str
    status: str
    why: str
    key: str
    disk: int | None = None
    memory: int | None = None
    device_memory: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """The steps of a merge."""

    name: str
    output: str
    store: str
    stages: list[Step]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(recipe: Recipe, store: Store, *, progress: Progress = no_progress) -> Plan:
    """Every stage's fate. Runs the same checks as a merge, so a bad pair shows here.

    Raises:
        BadInput: as `merge`.
    """
    ctx = make_context(recipe, store, progress)
    refs = all_refs(ctx)
    check_cheap(ctx, refs, force=True)
    check_pair(ctx.pair())
    sizes = sizes_of(ctx.pair().base)
    steps = [_step(ctx, refs, name, ref, sizes) for name, ref in refs.by_stage().items()]
    return Plan(recipe.name, str(ctx.output), str(store.root), steps)


def _step(ctx: Context, refs: Refs, name: str, ref: Ref, sizes: Sizes) -> Step:
    if name == "calibration":
        sets = {**refs.calibration.targets(), "format": refs.calibration.format}
        missing = {label: r for label, r in sets.items() if not ctx.store.has(r)}
        if not missing:
            return Step(name, "reused", "nothing changed", ref.key)
        why = "; ".join(f"{label}: {_why(ctx, r)}" for label, r in missing.items())
        return Step(name, "computed", why, ref.key, **_needs(ctx, name, sizes))
    if name == "apply" and ctx.store.has(ref):
        plan = shard_plan(ctx.pair().base, ctx.recipe.run.shard_size)
        if not holds(ctx.output, ref.key, plan):
            why = "the output folder does not hold it"
            return Step(name, "computed", why, ref.key, **_needs(ctx, name, sizes))
    if ctx.store.has(ref):
        return Step(name, "reused", "nothing changed", ref.key)
    status = "resumed" if ctx.store.drafted(ref) else "computed"
    return Step(name, status, _why(ctx, ref), ref.key, **_needs(ctx, name, sizes))


def _why(ctx: Context, ref: Ref) -> str:
    """Which input changed against the most alike artifact there is."""
    if ctx.store.drafted(ref):
        return "was interrupted"
    best = nearest(ctx.store, ref.stage, ref.identity()) if ctx.store.root.exists() else None
    if best is None:
        return "not in the store"
    return f"changed: {', '.join(differences(best, ref.identity()))}"


def _needs(ctx: Context, name: str, sizes: Sizes) -> dict[str, Any]:
    """Disk, memory, device memory and time of a stage that runs; rough."""
    wide = 4 if ctx.compute == "float32" else 2
    on_device = ctx.device != "cpu"
    layer = sizes.layer // 2 * wide  # one decoder layer in the compute dtype
    ends = sizes.outside // 2 * wide
    # Of a layer: one set's sums in float32, the other's rounded, and one on its way.
    gradients = 4 * sizes.layer
    rate = FLOPS["cpu" if ctx.device == "cpu" else "cuda"]
    tokens = count_tokens(ctx)
    passes = 2 * sizes.parameters * tokens
    io = sizes.total / DISK_RATE
    sets = ctx.recipe.calibration
    elsewhere = all(isinstance(s.targets, Endpoint) for s in (sets.reasoning, sets.agent))
    resident = 0 if elsewhere else sizes.parameters * wide
    boundary = tokens * ctx.pair().base.config["hidden_size"] * wide
    layers = ctx.pair().base.num_layers
    states = min(ctx.state_memory, (layers + 2) * boundary)
    # The next layer is read while one runs; the head is held only between the directions.
    walk = layer + max(gradients, ends)
    look = layer + ends
    host = sizes.layer + ends
    buffer = 16 * sizes.largest  # a few float32 copies of the largest tensor
    needs: dict[str, tuple[int, int, int, float]] = {
        "calibration": (0, buffer if on_device else resident, resident, passes / rate),
        "delta": (sizes.total, buffer, 0, 3 * io),
        "threshold": (0, buffer, 0, 3 * io),
        "scores": (
            2 * sizes.gated if ctx.recipe.gate.store_gradients else 0,
            host + states + (0 if on_device else walk),
            walk,
            3 * passes / rate + 3 * io,
        ),
        "projector": (0, host + (0 if on_device else look), look, passes / rate + io),
        "apply": (sizes.total, buffer, buffer, 4 * io),
        "evaluate": (0, host + (0 if on_device else look), look, 3 * passes / rate + 3 * io),
    }
    disk, memory, device_memory, seconds = needs[name]
    return {
        "disk": disk,
        "memory": memory,
        "device_memory": device_memory if on_device else None,
        "seconds": seconds,
    }
