"""How alike S of complementary halves of the items is, from what `stability` has stored."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from artifacts.store import Artifact
from crane_tasks.models.files.layout import Layout, layer_of_unit
from crane_tasks.numerics.scores import GainSums
from crane_tasks.numerics.stability import spearman
from crane_tasks.scores.reading import Scores, scores_from

LOW = 0.05  # the quantile that is told beside the mean


@dataclass(frozen=True)
class Correlation:
    """Spearman's over the draws: mean and 5th percentile; NaN where nothing can be ranked."""

    mean: float
    low: float


@dataclass(frozen=True)
class Agreement:
    """How steady S is.

    Attributes:
        scores: S of all items.
        overall: between halves, over all pairs of layer and component.
        per_component: the same, per component over the layers.
        per_layer: the same, per layer over its components.
        variation: per component the standard deviation of S(c, l) over the halves by its
            mean, averaged over the layers.
    """

    scores: Scores
    overall: Correlation
    per_component: dict[str, Correlation]
    per_layer: dict[int, Correlation]
    variation: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """The object that `crane stability --json` prints."""
        return {
            "all": asdict(self.overall),
            "per_component": {
                c: {**asdict(found), "variation": self.variation[c]}
                for c, found in self.per_component.items()
            },
            "per_layer": {str(layer): asdict(c) for layer, c in self.per_layer.items()},
            "scores": self.scores.as_json(),
        }


def read_unions(
    artifact: Artifact,
    layout: Layout,
    baseline: str,
    *,
    unify: bool = False,
    frozen: Collection[int] = (),
) -> list[Scores]:
    """S of every union of groups: of all items, then per draw of a half and of the other.

    In `frozen` layers donor and base are equal.

    Raises:
        ScoreError: in some union a layer's baseline has no positive gain.
    """
    layers = {}
    for unit in artifact.units():
        if (layer := layer_of_unit(unit)) is not None:
            names = artifact.attributes(unit, "gains")["components"]
            arrays = (artifact.read(unit, name).tolist() for name in ("gains", "base2"))
            layers[layer] = list(zip(names, *arrays, strict=True))
    count = len(next(iter(layers.values()))[0][1])
    return [
        scores_from(
            {
                layer: {name: GainSums(p=gains[i], base2=base2) for name, gains, base2 in rows}
                for layer, rows in layers.items()
            },
            layout,
            baseline,
            unify=unify,
            frozen=frozen,
        )
        for i in range(count)
    ]


def agreement(unions: Sequence[Scores]) -> Agreement:
    """Of the unions of `read_unions`; layers without any delta have no part in it."""
    whole, drawn = unions[0], unions[1:]
    places = [(layer, c) for layer in whole.baseline for c in whole.per_layer[layer]]
    components, layers = list(whole.per_component), list(whole.baseline)
    table = torch.tensor(
        [[one.per_layer[layer][c] for layer, c in places] for one in drawn], dtype=torch.float64
    )

    def over(chosen: Iterable[bool]) -> Correlation:
        part = table[:, torch.tensor(list(chosen))]
        pairs = zip(part[0::2], part[1::2], strict=True)
        return _told([spearman(one, other) for one, other in pairs])

    spread = table.std(0, correction=0) / table.mean(0)
    return Agreement(
        scores=whole,
        overall=over(True for _ in places),
        per_component={c: over(name == c for _, name in places) for c in components},
        per_layer={i: over(layer == i for layer, _ in places) for i in layers},
        variation={
            c: float(spread[torch.tensor([n == c for _, n in places])].nanmean())
            for c in components
        },
    )


def _told(values: Sequence[float]) -> Correlation:
    """Of the draws whose halves could be ranked."""
    known = torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64)
    if not known.numel():
        return Correlation(math.nan, math.nan)
    return Correlation(float(known.mean()), float(known.quantile(LOW)))
