"""What a search may change in a recipe, and how a trial's choices become one."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from crane_tasks.edit import edit_of
from crane_tasks.known_parts import THRESHOLDS
from crane_tasks.parts import Part
from crane_tasks.projections import PROJECTIONS
from crane_tasks.recipe import Recipe, field_of

if TYPE_CHECKING:
    from optuna import Trial

# Without task_arithmetic: with one donor it is the formula of `linear`.
METHODS = ("crane", "regmean", "elementwise", "ties", "dare", "aim", "slerp", "linear")
FREE = "crane"  # whose parts are chosen one by one; the other methods are what they are
PARTS = {
    "threshold": ("median", "top", "drop", "agreed", "none"),
    "gate": ("taylor", "flat"),
    "projection": ("sigmoid", "hard", "ridge", "regression", "aim", "none"),
}
WITH_DENSITY = ("median", "top", "drop")  # the thresholds that read `merge.density`
OWN = {"threshold": "median", "gate": "taylor", "projection": "sigmoid"}  # of FREE
SITES = ("published", "all")
# Beyond alpha 1 a linear edit leaves the donor behind, and one that a projection shrank makes up
# for it; T doubles, so the published alphas are 0.15 and 0.25. Tau runs a decade to either side
# of the published 0.03.
ALPHA, TAU, DENSITY, FACTOR = (0.05, 1.5), (0.003, 0.3), (0.05, 0.95), (0.5, 1.5)
PROTECT, OMEGA = (0.03, 30.0), (0.0, 1.0)
# What one factor of `merge.scales` is chosen for.
GROUPS = {"attention": ("attention", "linear_attn"), "feed_forward": ("ffn", "expert",
          "shared_expert")}  # fmt: skip
PER = ("component", "tensor", "expert")
# Where a search begins: settings that did well on other pairs (docs/method.md), one per kind of
# edit, so that a small budget compares the methods before it refines one.
STARTS: tuple[dict[str, Any], ...] = (
    {"method": "regmean", "alpha": 1.2, "protect": 1.0},
    {"method": "regmean", "alpha": 1.0, "protect": 0.3},
    {"method": "linear", "alpha": 0.5},
    {"method": "ties", "alpha": 1.0, "density": 0.2},
    {"method": "aim", "alpha": 0.8, "omega": 0.4},
    {"method": "crane", "alpha": 0.5, "projection": "ridge"},
)
DIGITS = 4  # that a number is rounded to: names of points stay readable


class Space:
    """The space around a recipe, whose own values always lie within.

    Args:
        components: the pair's own; a group that has none of them is not searched.
    """

    def __init__(self, recipe: Recipe, components: Iterable[str]) -> None:
        self.recipe = recipe
        there = set(components)
        self.groups = {
            group: own
            for group, names in GROUPS.items()
            if (own := [n for n in names if n in there])
        }
        # Without kept gradients no coordinate can be said to be agreed on.
        self.agreed = recipe.gate.store_gradients
        self.methods = [m for m in METHODS if m != "elementwise" or self.agreed]
        self.thresholds = [t for t in PARTS["threshold"] if t != "agreed" or self.agreed]

    def as_json(self) -> dict[str, Any]:
        """All that decides what a trial may choose."""
        return {
            "methods": self.methods,
            "parts": {**PARTS, "threshold": self.thresholds},
            "sites": SITES,
            "per": PER,
            "alpha": self._around(ALPHA, self.recipe.alpha),
            "tau": self._around(TAU, self.recipe.tau),
            "density": self._around(DENSITY, self.recipe.merge.density),
            "protect": self._around(PROTECT, self.recipe.merge.protect),
            "omega": OMEGA,
            "factor": FACTOR,
            "groups": self.groups,
            "starts": STARTS,
        }

    def starts(self) -> list[dict[str, Any]]:
        """The choices of the first trials: the recipe's own, then what did well elsewhere."""
        own = self.own()
        usual = {**own, **OWN, "density": 0.5}
        return [own, *({**usual, **start} for start in STARTS)]

    def own(self) -> dict[str, Any]:
        """The choices that come to the recipe itself, or to what is nearest to it."""
        merge = self.recipe.merge
        method = "linear" if merge.method == "task_arithmetic" else merge.method
        parts = {p: getattr(merge, p) or OWN[p] for p in PARTS} if method == FREE else {}
        return {
            "alpha": self.recipe.alpha,
            "tau": self.recipe.tau,
            "method": method,
            "sites": self.recipe.projector.sites,
            "density": 0.5 if merge.density is None else merge.density,
            "protect": merge.protect,
            "per": self.recipe.gate.per,
            "omega": merge.omega,
            **parts,
            **{f"scale_{group}": 1.0 for group in self.groups},
        }

    def suggest(self, trial: "Trial") -> tuple[float, float, dict[str, Any]]:
        """A trial's alpha, tau and other changes; what its edit does not read is not asked."""
        alpha = _short(trial.suggest_float("alpha", *self._around(ALPHA, self.recipe.alpha)))
        method = trial.suggest_categorical("method", self.methods)
        changes: dict[str, Any] = {"merge.method": method}
        for part in PARTS:
            choice = self._part(trial, part) if method == FREE else None
            changes[f"merge.{part}"] = choice
        merge = {"method": method, **{p: changes[f"merge.{p}"] for p in PARTS}}
        edit = edit_of(self.recipe.model_copy(update={"merge": self.recipe.merge.model_copy(
            update=merge)}))  # fmt: skip
        tau = self.recipe.tau
        if edit.projection is PROJECTIONS["regression"]:
            bounds = self._around(PROTECT, self.recipe.merge.protect)
            changes["merge.protect"] = _short(trial.suggest_float("protect", *bounds, log=True))
        elif edit.projection is PROJECTIONS["aim"]:
            changes["merge.omega"] = _short(trial.suggest_float("omega", *OMEGA))
        elif edit.projection is not None:
            tau = _short(trial.suggest_float("tau", *self._around(TAU, tau), log=True))
            changes["projector.sites"] = trial.suggest_categorical("sites", SITES)
        if edit.gate is not None:
            changes["gate.per"] = trial.suggest_categorical("per", PER)
        changes["merge.density"] = self._density(trial, edit.threshold)
        if not edit.spherical:
            changes["merge.scales"] = self._scales(trial)
        known = {path: field_of(self.recipe, path) for path in changes}
        return alpha, tau, {p: v for p, v in changes.items() if v != known[p]}

    def _part(self, trial: "Trial", part: str) -> str | None:
        names = self.thresholds if part == "threshold" else PARTS[part]
        choice = trial.suggest_categorical(part, names)
        # The method's own is left to it: then the point is the one that a plain merge makes.
        return None if choice == OWN[part] else choice

    def _density(self, trial: "Trial", part: Part | None) -> float | None:
        if part not in [THRESHOLDS[name] for name in WITH_DENSITY]:
            return None
        own = self.recipe.merge.density
        density = _short(trial.suggest_float("density", *self._around(DENSITY, own)))
        return None if density == 0.5 and own is None else density

    def _scales(self, trial: "Trial") -> dict[str, float]:
        scales = dict(self.recipe.merge.scales)
        for group, components in self.groups.items():
            factor = _short(trial.suggest_float(f"scale_{group}", *FACTOR))
            if factor != 1:
                scales |= {name: scales.get(name, 1.0) * factor for name in components}
        return scales

    def _around(self, bounds: tuple[float, float], own: float | None) -> tuple[float, float]:
        """The bounds, widened to hold the recipe's own value."""
        if own is None:
            return bounds
        return min(bounds[0], own), max(bounds[1], own)


def plain(recipe: Recipe, method: str) -> dict[str, Any]:
    """The changes that make a method as it is published: no other parts, no factors."""
    return {"merge.method": method, **{f"merge.{p}": None for p in (*PARTS, "density")},
            "merge.scales": {}}  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
