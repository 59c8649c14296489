"""Tensor name -> component, layer and input site, by one table per architecture.

The tables are `layouts/*.toml`; a new architecture is a new file there. A tensor that no
row names is refused, never guessed from its shape.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from crane_tasks.errors import CheckpointError

_OUTSIDE = "outside"  # the unit of what lies in no decoder layer


@dataclass(frozen=True)
class Site:
    """Where a layer's activations are read. `extended` sites belong to `sites: all`."""

    name: str
    module: str
    side: str
    extended: bool


@dataclass(frozen=True)
class Slot:
    """One weight of the model: a tensor, or the same tensor of every expert of a layer.

    Attributes:
        name: the canonical (per-expert) checkpoint name, with `*` for the expert.
        layer: decoder layer, or None outside the layers.
        component: the method's component (docs/method.md, "Components").
        site: the site that feeds its input, or None when it has none.
        borrows: the site whose basis the official script uses where `site` is not
            captured and the widths are equal (see layouts/llama.toml).
    """

    name: str
    layer: int | None
    component: str
    site: Site | None = None
    borrows: Site | None = None

    @property
    def stacked(self) -> bool:
        """Whether the slot stands for one tensor per expert."""
        return "*" in self.name

    def tensor_name(self, expert: int) -> str:
        """The canonical name of one tensor of the slot; `expert` is 0 if it is no stack."""
        return self.name.replace("*", str(expert))

    @property
    def array_name(self) -> str:
        """The slot's name within its unit of an artifact: after the layer, without `*`."""
        name = self.name
        if self.layer is not None:
            name = name.split(f"layers.{self.layer}.", 1)[1]
        return name.replace(".*", "")

    @property
    def unit(self) -> str:
        """The unit of work that holds the slot: its decoder layer, or `outside`."""
        return unit_name(self.layer)


@dataclass(frozen=True)
class Fused:
    """A tensor that stacks the experts of a layer: `parts` concatenated along rows."""

    pattern: re.Pattern[str]
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Carried:
    """Tensors that are copied from the base: names with `{extra}` for the layer only in the
    layers behind the last decoder layer, as many as the config says under a key of `count`."""

    pattern: re.Pattern[str]
    count: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """One row of the table, its names as patterns."""

    pattern: re.Pattern[str]
    component: str
    site: Site | None
    borrows: Site | None


def unit_name(layer: int | None) -> str:
    """`layer.7`, or `outside` for what lies in no decoder layer."""
    return _OUTSIDE if layer is None else f"layer.{layer}"


def layer_of_unit(unit: str) -> int | None:
    """The layer that a unit is named after: the inverse of `unit_name`."""
    return None if unit == _OUTSIDE else int(unit.removeprefix("layer."))


_IN_LAYER = re.compile(r"\blayers\.(\d+)\.")


def layer_of_tensor(name: str) -> int | None:
    """The decoder layer that a canonical tensor name lies in; None outside of them."""
    found = _IN_LAYER.search(name)
    return int(found[1]) if found else None


# What a placeholder of a template stands for.
PLACES = {"layer": r"\d+", "extra": r"\d+", "expert": r"\d+", "rest": r".+"}


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    for field, expression in PLACES.items():
        escaped = escaped.replace(re.escape("{" + field + "}"), f"(?P<{field}>{expression})")
    return re.compile(escaped)


@dataclass(frozen=True)
class Layout:
    """The table of one architecture.

    Attributes:
        baseline: the components that may divide the scores, the first that there is.
        tied: whether head and embedding are one where the config does not say it.
        experts: the config's keys of the number of experts, whichever it has.
    """

    model_type: str
    baseline: tuple[str, ...]
    tied: bool
    experts: tuple[str, ...]
    sites: tuple[Site, ...]
    rules: tuple[Rule, ...]
    fused: tuple[Fused, ...]
    carried: tuple[Carried, ...]

    def number_of_experts(self, config: Mapping[str, Any]) -> int:
        """How many experts a sparse layer has by the config; 0 in a dense model."""
        return _first(config, self.experts)

    def is_carried(self, name: str, config: Mapping[str, Any]) -> bool:
        """Whether the tensor is copied from the base untouched, e.g. `mtp.*`."""
        for carried in self.carried:
            if match := carried.pattern.fullmatch(name):
                extra = match.groupdict().get("extra")
                layers = int(config["num_hidden_layers"])
                last = layers + _first(config, carried.count)
                if extra is None or layers <= int(extra) < last:
                    return True
        return False

    def fused_match(self, name: str) -> tuple[str, ...] | None:
        """The part templates (with `*` for the expert) of a fused tensor, or None."""
        for fused in self.fused:
            if match := fused.pattern.fullmatch(name):
                layer = match.group("layer")
                return tuple(
                    p.replace("{layer}", layer).replace("{expert}", "*") for p in fused.parts
                )
        return None

    def classify(self, name: str) -> tuple[Slot, int] | None:
        """The slot of a canonical tensor name and its expert (0 if none), or None."""
        for rule in self.rules:
            if match := rule.pattern.fullmatch(name):
                groups = match.groupdict()
                layer = int(groups["layer"]) if "layer" in groups else None
                expert = groups.get("expert")
                if expert is not None:
                    start, end = match.span("expert")
                    name = name[:start] + "*" + name[end:]
                slot = Slot(name, layer, rule.component, rule.site, rule.borrows)
                return slot, int(expert) if expert is not None else 0
        return None

    def classify_slot(self, slot_name: str) -> Slot:
        """The slot of a name that already has `*` for the expert."""
        classified = self.classify(slot_name.replace("*", "0"))
        if classified is None:
            raise CheckpointError(f"layout {self.model_type} names no slot {slot_name}")
        return classified[0]


def _first(config: Mapping[str, Any], keys: Iterable[str]) -> int:
    """The first of the keys that the config has, or 0."""
    return next((int(config[key]) for key in keys if config.get(key)), 0)


def _merged_table(model_type: str) -> dict[str, Any]:
    """The table's own rows before those of the table that it extends."""
    folder = resources.files("crane_tasks.models.files") / "layouts"
    table = tomllib.loads((folder / f"{model_type}.toml").read_text())
    if parent_name := table.pop("extends", None):
        parent = _merged_table(parent_name)
        table["sites"] = {**parent.get("sites", {}), **table.get("sites", {})}
        for key in ("tensor", "fused", "carried"):
            table[key] = table.get(key, []) + parent.get(key, [])
        table.setdefault("experts", parent.get("experts", []))
    return table


def known_architectures() -> list[str]:
    """The model types that have a table."""
    folder = resources.files("crane_tasks.models.files") / "layouts"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir())


@cache
def layout_of(model_type: str) -> Layout:
    """The table of an architecture.

    Raises:
        CheckpointError: there is none.
    """
    if model_type not in known_architectures():
        raise CheckpointError(
            f"architecture '{model_type}' has no layout table. Known: "
            f"{', '.join(known_architectures())}. A new one is a file in "
            "crane_tasks/models/files/layouts."
        )
    table = _merged_table(model_type)
    sites = {
        name: Site(name, s["module"], s["side"], s.get("extended", False))
        for name, s in table["sites"].items()
    }
    rules = [
        Rule(
            _pattern(name),
            row["component"],
            sites[row["site"]] if "site" in row else None,
            sites[row["borrows"]] if "borrows" in row else None,
        )
        for row in table["tensor"]
        for name in row["names"]
    ]
    return Layout(
        model_type=table["model_type"],
        baseline=tuple(table["baseline"]),
        tied=table.get("tied", False),
        experts=tuple(table.get("experts", ())),
        sites=tuple(sites.values()),
        rules=tuple(rules),
        fused=tuple(Fused(_pattern(f["name"]), tuple(f["parts"])) for f in table.get("fused", [])),
        carried=tuple(
            Carried(_pattern(c["name"]), tuple(c.get("count", ())))
            for c in table.get("carried", [])
        ),
    )
