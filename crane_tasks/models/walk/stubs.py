"""What stands where the decoder layers were, and records what each of them is called with."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.wording import listed


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> "LayerCall":
        """The same on a device."""
        kwargs = {name: _moved(value, device) for name, value in self.kwargs.items()}
        return LayerCall(tuple(_moved(value, device) for value in self.args), kwargs)


class Stub(nn.Module):
    """Stands where a decoder layer was: records its arguments, passes the state on."""

    def __init__(self) -> None:
        super().__init__()
        self.call: LayerCall | None = None
        self.inject: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call = LayerCall(args, kwargs)
        return hidden_states if self.inject is None else self.inject


def require_plain(calls: Iterable[LayerCall], folder: Path) -> None:
    """Refuse arguments whose gradient would be lost between layers that run apart.

    Raises:
        CheckpointError: the model of this folder hands a mutable object from layer to layer.
    """
    for index, call in enumerate(calls):
        odd = [type(a).__name__ for a in call.args if not _plain(a)]
        odd += [k for k, v in call.kwargs.items() if not _plain(v)]
        if odd:
            raise CheckpointError(
                f"{folder}: layer {index} is given {listed(odd)}, which "
                "cannot cross layers that run apart; this model is not supported"
            )


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _plain(value: Any) -> bool:
    """Whether an argument can be given to a layer run apart from its neighbours."""
    if isinstance(value, tuple):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, Tensor | bool | int | float | torch.dtype)
