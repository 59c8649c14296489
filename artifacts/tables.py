"""Per-tensor tables in artifacts: one row per checkpoint tensor, named columns, float64."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

from artifacts.store import Artifact, Unit

Sums = TypeVar("Sums")


@dataclass(frozen=True)
class Table:
    """Rows by tensor name; `components[i]` is the component of `names[i]`."""

    names: list[str]
    components: list[str]
    columns: list[str]
    values: list[list[float]]

    def rows(self, kind: type[Sums]) -> list[tuple[str, str, Sums]]:
        """(name, component, record) with the columns as fields of a dataclass."""
        wanted = [f.name for f in fields(kind)]  # type: ignore[arg-type]
        order = [self.columns.index(name) for name in wanted]
        return [
            (name, component, kind(*(row[i] for i in order)))
            for name, component, row in zip(self.names, self.components, self.values, strict=True)
        ]


def write_table(
    unit: Unit, name: str, columns: Sequence[str], rows: Sequence[tuple[str, str, Sequence[float]]]
) -> None:
    """Write (tensor name, component, values) rows as one array."""
    values = torch.tensor([list(v) for _, _, v in rows], dtype=torch.float64)
    unit.write(
        name,
        values.reshape(len(rows), len(columns)),
        attributes={
            "columns": list(columns),
            "names": [n for n, _, _ in rows],
            "components": [c for _, c, _ in rows],
        },
    )


def read_table(artifact: Artifact, unit: str, name: str) -> Table:
    """A table written by `write_table`."""
    attributes: dict[str, Any] = artifact.attributes(unit, name)
    return Table(
        attributes["names"],
        attributes["components"],
        attributes["columns"],
        artifact.read(unit, name).tolist(),
    )
