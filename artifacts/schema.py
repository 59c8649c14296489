"""What an artifact must contain, checked when it is written and when it is opened."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schema:
    """The contents a stage promises.

    Attributes:
        arrays: allowed arrays: a pattern of the name after the unit -> allowed dtypes.
        meta: keys that every unit's metadata must have.
    """

    arrays: Mapping[str, tuple[str, ...]]
    meta: tuple[str, ...] = ()

    def problems(
        self, unit: str, arrays: Iterable[tuple[str, str]], meta: Mapping[str, Any]
    ) -> list[str]:
        """What is wrong with a unit's (array name, dtype) pairs and metadata."""
        wrong = [f"{unit}: no '{key}' in its metadata" for key in self.meta if key not in meta]
        for name, dtype in arrays:
            rule = next((d for p, d in self.arrays.items() if re.fullmatch(p, name)), None)
            if rule is None:
                wrong.append(f"{unit}: unexpected array {name}")
            elif dtype not in rule:
                wrong.append(f"{unit}: {name} is {dtype}, not {' or '.join(rule)}")
        return wrong
