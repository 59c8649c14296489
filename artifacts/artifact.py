"""A finished artifact, opened for reading."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zarr
from torch import Tensor

from artifacts.draft import DATA
from artifacts.errors import DamagedArtifact, StoreError
from artifacts.tensors import Chunk, check_chunks, metadata_digest, read_array, row_chunks


@dataclass
class Artifact:
    """A finished artifact, opened for reading; every read is checked."""

    path: Path
    manifest: dict[str, Any]
    _checked: set[str] = field(default_factory=set, repr=False)
    _opened: dict[str, Any] = field(default_factory=dict, repr=False)

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

    def dtype(self, unit: str, name: str) -> torch.dtype:
        """The dtype of an array's tensors."""
        dtype: torch.dtype = getattr(torch, str(self._array(unit, name).attrs["dtype"]))
        return dtype

    def row_chunks(self, unit: str, name: str, index: int | None = None) -> list[Chunk]:
        """Where an array's rows lie (of a stack: those of one tensor), each checked on reading.

        Raises:
            DamagedArtifact: the array's metadata is not what was written.
        """
        record = self.manifest["units"][unit]["arrays"][name]["chunks"]
        return row_chunks(self._array(unit, name), self.path / DATA / unit / name, record, index)

    def shape(self, unit: str, name: str) -> tuple[int, ...]:
        """An array's shape."""
        return tuple(self._open(unit, name)[0].shape)

    def attributes(self, unit: str, name: str) -> dict[str, Any]:
        """The attributes given when the array was written."""
        return self._open(unit, name)[1]

    def _open(self, unit: str, name: str) -> tuple[Any, dict[str, Any]]:
        path = f"{unit}/{name}"
        array = self._array(unit, name)
        if path not in self._checked:
            record = self.manifest["units"][unit]["arrays"][name]
            check_chunks(self.path / DATA / path, record["chunks"])
            self._checked.add(path)
        return array, dict(array.attrs)

    def _array(self, unit: str, name: str) -> Any:
        """The array, its metadata checked; its chunks are not."""
        path = f"{unit}/{name}"
        if path in self._opened:
            return self._opened[path]
        folder = self.path / DATA / path
        try:
            record = self.manifest["units"][unit]["arrays"][name]
        except KeyError:
            raise StoreError(f"{self.path}: holds no array {path}") from None
        if metadata_digest(folder) != record["metadata"]:
            raise DamagedArtifact(folder, "its metadata is not what was written")
        try:
            # Not by the groups above it, whose metadata says nothing that is not in the manifest.
            self._opened[path] = zarr.open_array(folder, mode="r")
        except Exception as error:  # whatever Zarr makes of it, it is not what was written
            raise DamagedArtifact(folder, "its metadata is unreadable") from error
        return self._opened[path]
