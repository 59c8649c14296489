"""What became of an edit, as the artifact of `apply` tells it."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TypeVar

from artifacts.store import Artifact
from artifacts.tables import read_table
from crane_tasks.models.files.layout import layer_of_tensor
from crane_tasks.numerics.edit import EditSums

Place = tuple[int | None, str]
Key = TypeVar("Key")


def read_edit(artifact: Artifact) -> dict[Place, EditSums]:
    """The edit's sums per layer (None outside of them) and component, over all shards."""
    found: dict[Place, EditSums] = defaultdict(EditSums)
    for unit in artifact.meta["units"]:
        for name, component, sums in read_table(artifact, unit, "tensors").rows(EditSums):
            found[layer_of_tensor(name), component] += sums
    return dict(found)


def added(edit: Mapping[Place, EditSums], key: Callable[[Place], Key]) -> dict[Key, EditSums]:
    """The sums of all places of one key."""
    found: dict[Key, EditSums] = defaultdict(EditSums)
    for place, sums in edit.items():
        found[key(place)] += sums
    return dict(found)


def per_component(edit: Mapping[Place, EditSums]) -> dict[str, EditSums]:
    """The sums over all layers."""
    return added(edit, lambda place: place[1])


def per_layer(edit: Mapping[Place, EditSums]) -> dict[int, EditSums]:
    """The sums of each decoder layer, in order."""
    found = added(edit, lambda place: place[0])
    return {layer: found[layer] for layer in sorted(k for k in found if k is not None)}
