"""Hidden states on disk between the layers of a walk, so that a killed walk resumes.

They live in the artifact's draft; the page cache keeps them in memory while there is room.
"""

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class States:
    """Named lists of tensors, each written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def within(self, name: str) -> "States":
        """The states of one plan, apart from those of others."""
        return States(self._folder / name)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        return self._file(name).exists()

    def save(self, name: str, states: list[Tensor]) -> None:
        """Write the list under a temporary name, then rename."""
        part = self._file(name).with_suffix(".part")
        tensors = {str(i): t.detach().cpu().contiguous() for i, t in enumerate(states)}
        try:
            save_file(tensors, part)
        except SafetensorError as error:
            raise OSError(f"{part}: hidden states cannot be written: {error}") from error
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        part.replace(self._file(name))

    def load(self, name: str) -> list[Tensor]:
        found = load_file(self._file(name))
        return [found[str(i)] for i in range(len(found))]

    def drop(self, name: str) -> None:
        self._file(name).unlink(missing_ok=True)
