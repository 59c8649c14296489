"""An artifact while it is made: units of work, each there whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import zarr
from torch import Tensor

from artifacts.durable import sync_path
from artifacts.errors import StoreError
from artifacts.ref import digest_of
from artifacts.schema import Schema
from artifacts.tensors import (
    METADATA,
    ArrayWriter,
    create_array,
    is_plain_group,
    make_durable,
    metadata_digest,
    record_chunks,
)

DATA = "data.zarr"
SCRATCH = "scratch"
OUTSIDE = "outside.txt"


def write_atomically(file: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all, also after a power cut."""
    # A name of its own: two processes may write the same file at once.
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    with part.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)
    sync_path(file.parent)


class Unit:
    """One unit of work being written."""

    def __init__(self, draft: Path, name: str) -> None:
        self.name = name
        self.meta: dict[str, Any] = {}
        self._folder = draft / DATA / name
        shutil.rmtree(self._folder, ignore_errors=True)  # what an unfinished attempt has left
        self._group = zarr.open_group(self._folder, mode="w")
        self._arrays: dict[str, str] = {}

    def create(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        stacked: bool = False,
        attributes: dict[str, Any] | None = None,
    ) -> ArrayWriter:
        """A new array, to be filled by index."""
        self._arrays[name] = str(dtype).removeprefix("torch.")
        return create_array(
            self._group,
            self._folder,
            name,
            shape,
            dtype,
            stacked=stacked,
            attributes=attributes or {},
        )

    def write(
        self,
        name: str,
        tensor: Tensor,
        *,
        stacked: bool = False,
        attributes: dict[str, Any] | None = None,
    ) -> None:
        """A whole array at once."""
        shape = tuple(tensor.shape)
        writer = self.create(name, shape, tensor.dtype, stacked=stacked, attributes=attributes)
        if tensor.numel():
            writer[...] = tensor

    def record(self, schema: Schema) -> dict[str, Any]:
        """The unit's line in `units.jsonl`: its arrays' chunks, now durable, and its metadata.

        Raises:
            StoreError: the unit is not what the schema says.
        """
        if problems := schema.problems(self.name, list(self._arrays.items()), self.meta):
            raise StoreError(f"{self._folder}: {'; '.join(problems)}")
        record = {
            "unit": self.name,
            "arrays": {
                name: {
                    "dtype": dtype,
                    "metadata": metadata_digest(self._folder / name),
                    "chunks": record_chunks(self._folder / name),
                }
                for name, dtype in self._arrays.items()
            },
            "meta": self.meta,
        }
        make_durable(self._folder)
        sync_path(self._folder.parent)
        return record


def write_unit(
    draft: Path, schema: Schema, name: str, write: Callable[[Unit], None]
) -> dict[str, Any]:
    """Write a unit's data into the folder of a draft, and make it durable; returns its record.

    Any process that shares the folder may do so. The unit exists only when the one that has
    the artifact's lock has adopted the record: data first, metadata last.

    Raises:
        StoreError: the unit is not what the schema says.
    """
    unit = Unit(draft, name)
    write(unit)
    return unit.record(schema)


class Draft:
    """An artifact being made; finished units of an earlier, killed attempt are kept."""

    def __init__(self, path: Path, schema: Schema) -> None:
        self.path = path
        self.meta: dict[str, Any] = {}
        self.schema = schema
        path.mkdir(parents=True, exist_ok=True)
        if not is_plain_group(path / DATA):
            (path / DATA / METADATA).unlink(missing_ok=True)  # units are not in it
            zarr.open_group(path / DATA, mode="a")
            make_durable(path / DATA)
        self._log = path / "units.jsonl"
        self._chain = ""
        self.units: dict[str, dict[str, Any]] = {}
        self._read_log()
        self.kept = len(self.units)

    def _read_log(self) -> None:
        if not self._log.exists():
            return
        whole = 0
        with self._log.open("rb") as stream:
            for line in stream:
                if (record := self._read_line(line)) is None:
                    break  # torn by a kill, or not what was written: from here on nothing is done
                if record.get("void"):
                    self.units.pop(record["unit"], None)
                else:
                    self.units[record["unit"]] = record
                whole += len(line)
        os.truncate(self._log, whole)

    def _read_line(self, line: bytes) -> dict[str, Any] | None:
        """The record of a line that is whole and follows the one before it, or None."""
        try:
            written = json.loads(line)
            record, chain = written["record"], written["chain"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if not line.endswith(b"\n") or chain != digest_of([self._chain, record]):
            return None
        self._chain = chain
        found: dict[str, Any] = record
        return found

    def done(self, unit: str) -> bool:
        """Whether the unit was finished, now or by an earlier attempt."""
        return unit in self.units

    @property
    def scratch(self) -> Path:
        """A folder for what a resumed attempt needs; gone when the artifact is done."""
        folder = self.path / SCRATCH
        folder.mkdir(exist_ok=True)
        return folder

    def belongs(self, folder: Path) -> None:
        """Note a folder outside the store that is of no use without this draft."""
        write_atomically(self.path / OUTSIDE, str(folder))

    @contextmanager
    def unit(self, name: str) -> Iterator[Unit]:
        """Write a unit; it exists once the block has ended without an error.

        One that is there already ceases to exist when it is begun anew.
        """
        self.forget(name)
        unit = Unit(self.path, name)
        yield unit
        self.adopt(unit.record(self.schema))

    def forget(self, name: str) -> None:
        """A unit that is to be made anew does not exist any longer."""
        if name in self.units:
            del self.units[name]
            self._append({"unit": name, "void": True})

    def adopt(self, record: dict[str, Any]) -> None:
        """Take in a unit that `write_unit` has written; from now on it exists."""
        self._append(record)
        self.units[record["unit"]] = record

    def _append(self, record: dict[str, Any]) -> None:
        # Each line vouches for itself and for all before it: none can be changed, lost or moved.
        record = json.loads(json.dumps(record))
        self._chain = digest_of([self._chain, record])
        with self._log.open("a") as stream:
            stream.write(json.dumps({"record": record, "chain": self._chain}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
