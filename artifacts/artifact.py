"""A finished artifact, opened for reading."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zarr
from torch import Tensor

from artifacts.draft import DATA
from artifacts.errors import DamagedArtifact, StoreError
from artifacts.tensors import check_chunks, metadata_digest, read_array


@dataclass
class Artifact:
    """A finished artifact, opened for reading; every read is checked."""

    path: Path
    manifest: dict[str, Any]
    _root: Any = field(default=None, repr=False)
    _checked: set[str] = field(default_factory=set, repr=False)

    @property
    def meta(self) -> dict[str, Any]:
        """The artifact's own metadata."""
        meta: dict[str, Any] = self.manifest["meta"]
        return meta

    def units(self) -> list[str]:
        return list(self.manifest["units"])

    def unit_meta(self, unit: str) -> dict[str, Any]:
        meta: dict[str, Any] = self.manifest["units"][unit]["meta"]
        return meta

    def arrays(self, unit: str) -> list[str]:
        return list(self.manifest["units"][unit]["arrays"])

    def has(self, unit: str, name: str) -> bool:
        return unit in self.manifest["units"] and name in self.manifest["units"][unit]["arrays"]

    def read(self, unit: str, name: str, index: Any = ...) -> Tensor:
        """An array, or the part at `index`, as it was written.

        Raises:
            DamagedArtifact: a chunk is missing, swapped, cut or changed.
        """
        folder = self.path / DATA / unit / name
        array, _ = self._open(unit, name)
        if array.size == 0:
            shape = array.shape
            return torch.empty(shape, dtype=getattr(torch, str(array.attrs["dtype"])))
        return read_array(array, folder, index)

    def shape(self, unit: str, name: str) -> tuple[int, ...]:
        """An array's shape."""
        return tuple(self._open(unit, name)[0].shape)

    def attributes(self, unit: str, name: str) -> dict[str, Any]:
        """The attributes given when the array was written."""
        return self._open(unit, name)[1]

    def _open(self, unit: str, name: str) -> tuple[Any, dict[str, Any]]:
        path = f"{unit}/{name}"
        try:
            record = self.manifest["units"][unit]["arrays"][name]
        except KeyError:
            raise StoreError(f"{self.path}: holds no array {path}") from None
        if path not in self._checked:
            folder = self.path / DATA / path
            if metadata_digest(folder) != record["metadata"]:
                raise DamagedArtifact(folder, "its metadata is not what was written")
            check_chunks(folder, record["chunks"])
            self._checked.add(path)
        try:
            if self._root is None:
                self._root = zarr.open_group(self.path / DATA, mode="r")
            array = self._root[path]
        except (KeyError, ValueError, FileNotFoundError) as error:
            raise DamagedArtifact(self.path / DATA / path, "its metadata is unreadable") from error
        return array, dict(array.attrs)
