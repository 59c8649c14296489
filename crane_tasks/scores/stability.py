"""Stage `stability`: the gate's gains of many halves of the calibration items, from one walk.

It is no stage of a merge: `crane stability` builds it beside one. What is stored does not
depend on the baseline: S is aggregated when it is read (`scores/agreement.py`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor

from artifacts.schema import Schema
from artifacts.store import Artifact, Draft
from crane_tasks.calibration.sets import TokenSet, read_set
from crane_tasks.calibration.stages import AGENT, REASONING
from crane_tasks.delta import DELTA, read_stacks
from crane_tasks.errors import RecipeError
from crane_tasks.models.files.layout import Slot, unit_name
from crane_tasks.models.walk.gradients import Gradients, GradientWalk
from crane_tasks.models.walk.losses import Item
from crane_tasks.models.walk.states import States
from crane_tasks.numerics.stability import dealt, halves, union_gains, union_weights
from crane_tasks.rows import load_rows
from crane_tasks.scores.gradients import KEPT, SETS
from crane_tasks.scores.stage import by_slot, check_baseline, portions, refuse_bad_losses
from crane_tasks.session import Context
from crane_tasks.sizes import gated, sizes_of
from crane_tasks.stage import BASE, Keys, Needs, Stage


@dataclass(frozen=True)
class Draws:
    """What is asked for: `draws` times half of the `groups` of each set, dealt by `seed`.

    Raises:
        RecipeError: there is no such half, or no draw.
    """

    groups: int = 8
    draws: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.groups < 2 or self.groups % 2:
            raise RecipeError(f"--groups: {self.groups}, but half of them are drawn; give 2, 4, ..")
        if self.draws < 1:
            raise RecipeError(f"--draws: {self.draws}, but at least one is needed")


@dataclass(frozen=True)
class Dealt:
    """A set in groups: the items of each, and which groups each union has [unions, groups]."""

    groups: list[list[int]]
    masks: Bool[Tensor, "unions groups"]

    def items(self, tokens: TokenSet) -> list[list[Item]]:
        """Each group as a set of its own, whose objective is the mean over its items."""
        items = tokens.items()
        return [[replace(items[i], weight=1 / len(g)) for i in g] for g in self.groups]

    def weights(self) -> Tensor:
        """Each group's share in the mean over a union's items, float32 [unions, groups]."""
        return union_weights(self.masks, [len(group) for group in self.groups])


def deal(asked: Draws, count: int, name: str) -> Dealt:
    """A set of `count` items; its name keeps the two sets' draws independent."""
    return Dealt(
        dealt(count, asked.groups, asked.seed, name),
        halves(asked.groups, asked.draws, asked.seed, name),
    )


def _write(asked: Draws, ctx: Context, keys: Keys, draft: Draft) -> None:
    store = ctx.store
    tokens = {
        "reasoning": read_set(store.open(keys[REASONING])),
        "agent": read_set(store.open(keys[AGENT])),
    }
    hands = {name: deal(asked, len(one.sequences), name) for name, one in tokens.items()}
    walk_unions(ctx, store.open(keys[DELTA]), tokens, hands, draft)


def walk_unions(
    ctx: Context,
    delta: Artifact,
    tokens: Mapping[str, TokenSet],
    hands: Mapping[str, Dealt],
    draft: Draft,
) -> None:
    """Take the groups' gradients and the gains of all unions; one layer in memory at a time.

    Unit of work: a decoder layer, all groups of both sets.

    Raises:
        BadInput: the base's loss on a row is not finite.
    """
    base = ctx.pair().base
    stream = ctx.walk_of(base)
    items = {name: hands[name].items(tokens[name]) for name in SETS}
    sets = {_group(n, k): group for n in SETS for k, group in enumerate(items[n])}
    walk = GradientWalk(stream, sets, States(draft.scratch, ctx.state_memory), kept=KEPT)
    slots = dict(base.layers())

    def visit(layer: int | None, gradients: dict[str, Gradients]) -> None:
        if layer is None:
            _write_losses(draft, walk.losses, tokens, hands)
            return
        of_group = {name: by_slot(base, layer, gradients[name]) for name in sets}
        of_set = {n: [of_group[_group(n, k)] for k in range(len(items[n]))] for n in SETS}
        _write_layer(ctx, delta, draft, layer, gated(slots[layer]), of_set, hands)

    done = {layer for layer in slots if draft.done(unit_name(layer))}
    walk.run(visit, done, lambda step: ctx.show_step(NAME, step))


def _group(name: str, number: int) -> str:
    """What a group of a set is called in the walk."""
    return f"{name}.{number}"


def _write_losses(
    draft: Draft,
    losses: Mapping[str, list[float]],
    tokens: Mapping[str, TokenSet],
    hands: Mapping[str, Dealt],
) -> None:
    """The items' losses in the order of their sets: they show whether a row can be scored."""
    found = {}
    for name, hand in hands.items():
        found[name] = [0.0] * len(tokens[name].sequences)
        for number, group in enumerate(hand.groups):
            for item, loss in zip(group, losses[_group(name, number)], strict=True):
                found[name][item] = loss
    refuse_bad_losses(found, {name: one.places for name, one in tokens.items()})
    with draft.unit(unit_name(None)) as unit:
        for name, values in found.items():
            unit.write(f"{name}.losses", torch.tensor(values, dtype=torch.float64))


def _write_layer(
    ctx: Context,
    delta: Artifact,
    draft: Draft,
    layer: int,
    slots: list[Slot],
    gradients: Mapping[str, list[dict[str, Tensor]]],
    hands: Mapping[str, Dealt],
) -> None:
    """Per component the gains of all unions, and Σ θ_base²; computed on the device."""
    base, device = ctx.pair().base, ctx.torch_device
    weights = [hands[name].weights().to(device) for name in SETS]
    gains: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    wanted = ((slot, experts) for slot in slots for experts in portions(base, slot))
    for slot, experts, weight, step in read_stacks(delta, base, wanted, device):
        chosen = experts if slot.stacked else slice(None)
        g_r, g_a = ([g[slot.name][chosen].to(device).flatten() for g in gradients[n]] for n in SETS)
        found = union_gains(step.flatten(), g_r, g_a, *weights)
        square = weight.float().square().sum(dtype=torch.float64)
        gains[slot.component] = gains.get(slot.component, 0) + found
        squares[slot.component] = squares.get(slot.component, 0) + square
    with draft.unit(unit_name(layer)) as unit:
        names = {"components": list(gains)}
        unit.write("gains", torch.stack(list(gains.values())).cpu(), attributes=names)
        unit.write("base2", torch.stack(list(squares.values())).cpu(), attributes=names)


def _check(asked: Draws, ctx: Context, keys: Keys) -> None:
    """Every group has an item.

    Raises:
        RecipeError: a set has fewer rows than groups, or the baseline is not there.
    """
    check_baseline(ctx, keys)
    sets = ctx.recipe.calibration
    counts = {
        f"calibration.{name}.data: {one.data}": len(load_rows(ctx.recipe, one.data).rows)
        for name, one in (("reasoning", sets.reasoning), ("agent", sets.agent))
    }
    place, count = min(counts.items(), key=lambda item: item[1])
    if count < asked.groups:
        fewer = f", or give --groups {count // 2 * 2}" if count > 1 else ""
        raise RecipeError(
            f"{place} has {count} rows, too few for {asked.groups} groups. Add rows{fewer}."
        )


def _needs(asked: Draws, ctx: Context, keys: Keys) -> Needs:
    """As the scores', with the gradients of all groups in the place of those of both sets."""
    sizes = sizes_of(ctx)
    held = 2 * asked.groups * KEPT.itemsize // 2
    walk = sizes.one_layer + max(held * sizes.layer, held * sizes.outside) + 2 * sizes.layer
    states = min(ctx.state_memory, sizes.kept_states)
    return Needs(
        store=sizes.kept_states,
        memory=sizes.on_host + states + (walk if ctx.device == "cpu" else 0),
        device_memory=walk,
        seconds=3 * sizes.passes + 3 * sizes.reading,
    )


NAME = "stability"


def stability(asked: Draws) -> Stage:
    """The stage for what is asked: its numbers come with the command, not with the recipe."""
    return Stage(
        name=NAME,
        version=1,
        schema=Schema(
            arrays={
                "gains": ("float64",),
                "base2": ("float64",),
                r"(reasoning|agent)\.losses": ("float64",),
            },
        ),
        inputs={"base": BASE, "delta": DELTA, "reasoning": REASONING, "agent": AGENT},
        fields=("gate.compute",),
        config=lambda ctx: {"compute": ctx.compute, **asdict(asked)},
        check=partial(_check, asked),
        write=partial(_write, asked),
        needs=partial(_needs, asked),
    )


STABILITY = stability(Draws())
