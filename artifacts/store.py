"""The stage store: build an artifact once, find it for ever after.

    STORE/STAGE/KEY/manifest.json   what it is, made from what, and every chunk's checksum
    STORE/STAGE/KEY/data.zarr       its arrays, one group per unit of work
    STORE/STAGE/.draft-KEY          the same while it is being made
    STORE/STAGE/.lock-KEY           held (flock) by the process that makes it

A unit is recorded in the draft's `units.jsonl` only after its arrays are on disk: one
without its line does not exist. The manifest is written last, then the draft is renamed.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zarr
from torch import Tensor

from artifacts.errors import DamagedArtifact, StoreError, UnusableStore
from artifacts.ref import Ref, digest_of
from artifacts.schema import Schema
from artifacts.tensors import (
    ArrayWriter,
    check_chunks,
    create_array,
    metadata_digest,
    read_array,
    record_chunks,
)

FORMAT = 1
MANIFEST = "manifest.json"
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
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Unit:
    """One unit of work being written."""

    def __init__(self, draft: "Draft", name: str) -> None:
        self.name = name
        self.meta: dict[str, Any] = {}
        self._draft = draft
        self._group = draft.root.require_group(name)
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
            self._group, name, shape, dtype, stacked=stacked, attributes=attributes or {}
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

    def record(self) -> dict[str, Any]:
        """The unit's line in `units.jsonl`: its arrays' chunks and its metadata."""
        folder = self._draft.path / DATA / self.name
        return {
            "unit": self.name,
            "arrays": {
                name: {
                    "dtype": dtype,
                    "metadata": metadata_digest(folder / name),
                    "chunks": record_chunks(folder / name),
                }
                for name, dtype in self._arrays.items()
            },
            "meta": self.meta,
        }


class Draft:
    """An artifact being made; finished units of an earlier, killed attempt are kept."""

    def __init__(self, path: Path, schema: Schema) -> None:
        self.path = path
        self.meta: dict[str, Any] = {}
        self._schema = schema
        path.mkdir(parents=True, exist_ok=True)
        self.root = zarr.open_group(path / DATA, mode="a")
        self._log = path / "units.jsonl"
        self.units: dict[str, dict[str, Any]] = {}
        self._read_log()
        self.kept = len(self.units)

    def _read_log(self) -> None:
        if not self._log.exists():
            return
        whole = 0
        with self._log.open("rb") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # torn by a kill: that unit does not exist
                record = json.loads(line)
                self.units[record["unit"]] = record
                whole += len(line)
        os.truncate(self._log, whole)

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
        """Write a unit; it exists once the block has ended without an error."""
        unit = Unit(self, name)
        yield unit
        record = unit.record()
        arrays = [(n, a["dtype"]) for n, a in record["arrays"].items()]
        if problems := self._schema.problems(name, arrays, unit.meta):
            raise StoreError(f"{self.path}: {'; '.join(problems)}")
        with self._log.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.units[name] = record


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


@dataclass(frozen=True)
class Built:
    """What `Store.build` did: computed, resumed or reused, in how many seconds."""

    ref: Ref
    status: str
    seconds: float
    path: Path


class Store:
    """A folder of artifacts. Many processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # Hears when a run must wait for another; a command puts its own notice here.
        self.waiting: Callable[[str], None] = lambda text: None

    def prepare(self) -> None:
        """Create the store's folder.

        Raises:
            UnusableStore: it cannot be created or written, or has another format.
        """
        marker = self.root / "crane-store.json"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                write_atomically(marker, json.dumps({"format": FORMAT}) + "\n")
            found = json.loads(marker.read_text())
        except (OSError, ValueError) as error:
            raise UnusableStore(f"{self.root}: cannot be used as a store: {error}") from error
        if found.get("format") != FORMAT:
            raise UnusableStore(f"{self.root}: store format {found.get('format')}, not {FORMAT}")

    def path(self, ref: Ref) -> Path:
        return self.root / ref.stage / ref.key

    def has(self, ref: Ref) -> bool:
        """Whether the artifact is finished."""
        return (self.path(ref) / MANIFEST).exists()

    def drafted(self, ref: Ref) -> bool:
        """Whether an earlier attempt left finished units."""
        log = self.root / ref.stage / f".draft-{ref.key}" / "units.jsonl"
        return log.exists() and log.stat().st_size > 0

    def drafted_bytes(self, ref: Ref) -> int:
        """Bytes that an interrupted attempt has written."""
        draft = self.root / ref.stage / f".draft-{ref.key}"
        return sum(p.stat().st_size for p in draft.rglob("*") if p.is_file())

    def open(self, ref: Ref) -> Artifact:
        """A finished artifact.

        Raises:
            StoreError: there is none.
            DamagedArtifact: its manifest cannot be read.
        """
        return self.open_path(self.path(ref))

    def open_path(self, path: Path) -> Artifact:
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            written = manifest.pop("digest")
        except FileNotFoundError:
            raise StoreError(f"{path}: no such artifact") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedArtifact(path, "its manifest is unreadable") from error
        if digest_of(manifest) != written:
            raise DamagedArtifact(path, "its manifest is not what was written")
        return Artifact(path, manifest)

    @contextmanager
    def locked(self, ref: Ref) -> Iterator[None]:
        """Hold the artifact's lock; `self.waiting` hears of it if another run has it.

        A kernel lock: it ends with its owner, however that died.
        """
        folder = self.root / ref.stage
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".lock-{ref.key}").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                self.waiting(f"Another run computes {ref.stage} {ref.key}: waiting for it.")
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def build(
        self,
        ref: Ref,
        schema: Schema,
        write: Callable[[Draft], None],
        complete: Callable[[], bool] = lambda: True,
    ) -> Built:
        """The artifact of `ref`, made by `write` unless it is there already.

        Two runs that want the same one: the second waits and reuses. After a kill the
        next run keeps the finished units of the draft. `complete` tells whether what
        `write` makes outside the store is there too; if not, it is called again.
        """
        start = time.monotonic()
        final = self.path(ref)
        if not (self.has(ref) and complete()):
            with self.locked(ref):
                if not (self.has(ref) and complete()):
                    kept = self._make(ref, schema, write)
                    status = "resumed" if kept else "computed"
                    return Built(ref, status, time.monotonic() - start, final)
        os.utime(final / MANIFEST)  # last use, for `gc --older-than`
        return Built(ref, "reused", time.monotonic() - start, final)

    def _make(self, ref: Ref, schema: Schema, write: Callable[[Draft], None]) -> int:
        final = self.path(ref)
        draft = Draft(final.with_name(f".draft-{ref.key}"), schema)
        write(draft)
        manifest = {
            "format": FORMAT,
            **ref.identity(),
            "key": ref.key,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "meta": draft.meta,
            "units": {
                name: {"arrays": record["arrays"], "meta": record["meta"]}
                for name, record in draft.units.items()
            },
        }
        # Through JSON and back: the digest is that of what a reader will see.
        manifest = json.loads(json.dumps(manifest))
        manifest["digest"] = digest_of(manifest)
        write_atomically(draft.path / MANIFEST, json.dumps(manifest))
        if self.has(ref):
            # Only what lies outside the store was missing; others may be reading this one.
            shutil.rmtree(draft.path)
            return draft.kept
        if final.exists():
            self.set_aside(final)  # without a manifest: what an interrupted removal left
        os.rename(draft.path, final)
        sync_folder(final.parent)
        # Last: a kill before the rename must leave a draft that can be resumed.
        (final / "units.jsonl").unlink(missing_ok=True)
        shutil.rmtree(final / SCRATCH, ignore_errors=True)
        return draft.kept

    def set_aside(self, path: Path) -> Path:
        """Move a damaged artifact out of the way, keeping it for a look.

        Raises:
            StoreError: the path is in no artifact of this store.
        """
        relative = path.relative_to(self.root).parts[:2]
        if len(relative) != 2:
            raise StoreError(f"{path}: lies in no artifact of {self.root}")
        artifact = self.root.joinpath(*relative)
        aside = artifact.with_name(f".damaged-{relative[1]}-{time.time_ns()}")
        with contextlib.suppress(FileNotFoundError):  # another run has set it aside
            os.rename(artifact, aside)
        return aside

    def artifacts(self, stage: str | None = None) -> list[Path]:
        """The folders of all finished artifacts, or those of one stage."""
        pattern = f"{stage or '*'}/[!.]*/{MANIFEST}"
        return sorted(p.parent for p in self.root.glob(pattern))

    def verify(self, path: Path) -> list[str]:
        """Decode every chunk of an artifact; the problems found, empty if it is sound."""
        problems: list[str] = []
        try:
            artifact = self.open_path(path)
        except (DamagedArtifact, StoreError) as error:
            return [str(error)]
        for unit in artifact.units():
            for name in artifact.arrays(unit):
                try:
                    artifact.read(unit, name)
                except DamagedArtifact as error:
                    problems.append(str(error))
        return problems
