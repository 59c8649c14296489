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
from dataclasses import dataclass
from pathlib import Path

from artifacts.artifact import Artifact
from artifacts.draft import DATA, OUTSIDE, SCRATCH, Draft, Unit, write_atomically
from artifacts.durable import sync_path
from artifacts.errors import DamagedArtifact, MissingArtifact, StoreError, UnusableStore
from artifacts.ref import Ref, digest_of
from artifacts.running import note_use
from artifacts.schema import Schema
from artifacts.tensors import is_plain_group

__all__ = [
    "DATA",
    "MANIFEST",
    "OUTSIDE",
    "Artifact",
    "Built",
    "Draft",
    "Store",
    "Unit",
    "write_atomically",
]
FORMAT = 1
MANIFEST = "manifest.json"
# What reading JSON that is none, or none of ours, ends with.
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Built:
    """What `Store.build` did: computed, resumed or reused, in how many seconds."""

    ref: Ref
    status: str
    seconds: float
    path: Path


def quiet(text: str) -> None:
    """For callers that need not know that they wait."""


class Store:
    """A folder of artifacts. Many processes may use it at once.

    Attributes:
        made_for: the recipe that what is made here is noted to be made for. It is in no key:
            another recipe may use it as well.
    """

    def __init__(self, root: Path, made_for: str = "") -> None:
        self.root = root
        self.made_for = made_for

    def prepare(self) -> None:
        """Create the store's folder.

        Raises:
            UnusableStore: it cannot be created or written, or has another format.
        """
        marker = self.root / "crane-store.json"
        if self.root.exists() and not self.root.is_dir():
            raise UnusableStore(f"{self.root}: the store is a folder, this is a file")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                write_atomically(marker, json.dumps({"format": FORMAT}) + "\n")
            written = json.loads(marker.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UnusableStore(
                f"{self.root}: cannot be used as a store: {marker.name}: {error}"
            ) from error
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise UnusableStore(f"{self.root}: cannot be written to. Name another with --store.")
        found = written.get("format") if isinstance(written, dict) else written
        if found != FORMAT:
            raise UnusableStore(f"{self.root}: store format {found}, not {FORMAT}")
        note_use(self.root)

    def path(self, ref: Ref) -> Path:
        return self.root / ref.stage / ref.key

    def has(self, ref: Ref) -> bool:
        """Whether the artifact is finished."""
        return (self.path(ref) / MANIFEST).exists()

    def drafted(self, ref: Ref) -> bool:
        """Whether an earlier attempt left finished units."""
        log = self._draft(ref) / "units.jsonl"
        return log.exists() and log.stat().st_size > 0

    def drafted_bytes(self, ref: Ref) -> int:
        """Bytes that an interrupted attempt has written."""
        return sum(p.stat().st_size for p in self._draft(ref).rglob("*") if p.is_file())

    def open(self, ref: Ref) -> Artifact:
        """A finished artifact.

        Raises:
            MissingArtifact: there is none.
            DamagedArtifact: its manifest cannot be read.
        """
        return self.open_path(self.path(ref))

    def open_path(self, path: Path) -> Artifact:
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            written = manifest.pop("digest")
            named = manifest["stage"], manifest["key"]
        except (FileNotFoundError, NotADirectoryError):
            raise MissingArtifact(f"{path}: no such artifact") from None
        except DAMAGED as error:
            raise DamagedArtifact(path, "its manifest is unreadable") from error
        if digest_of(manifest) != written:
            raise DamagedArtifact(path, "its manifest is not what was written")
        if named != (path.parent.name, path.name):
            raise DamagedArtifact(path, f"its manifest is that of {'/'.join(map(str, named))}")
        return Artifact(path, manifest)

    @contextmanager
    def locked(self, ref: Ref, waiting: Callable[[str], None] = quiet) -> Iterator[None]:
        """Hold the artifact's lock; `waiting` hears of it if another run has it.

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
                waiting(f"Another run computes {ref.stage} {ref.key}: waiting for it.")
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @contextmanager
    def drafting(self, ref: Ref, schema: Schema) -> Iterator[Draft | None]:
        """The artifact's draft, to add units to that `build` will find; None if it is finished
        or another run makes it."""
        folder = self.root / ref.stage
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".lock-{ref.key}").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            yield None if self.has(ref) else Draft(self._draft(ref), schema)

    def _draft(self, ref: Ref) -> Path:
        return self.root / ref.stage / f".draft-{ref.key}"

    def build(
        self,
        ref: Ref,
        schema: Schema,
        write: Callable[[Draft], None],
        complete: Callable[[], bool] = lambda: True,
        waiting: Callable[[str], None] = quiet,
    ) -> Built:
        """The artifact of `ref`, made by `write` unless it is there already.

        Two runs that want the same one: the second waits and reuses. After a kill the
        next run keeps the finished units of the draft. `complete` tells whether what
        `write` makes outside the store is there too; if not, it is called again. `waiting`
        hears when another run must be waited for.
        """
        start = time.monotonic()
        final = self.path(ref)
        if not (self.has(ref) and complete()):
            with self.locked(ref, waiting):
                if not (self.has(ref) and complete()):
                    kept = self._make(ref, schema, write)
                    status = "resumed" if kept else "computed"
                    return Built(ref, status, time.monotonic() - start, final)
        os.utime(final / MANIFEST)  # last use, for `gc --older-than`
        return Built(ref, "reused", time.monotonic() - start, final)

    def _make(self, ref: Ref, schema: Schema, write: Callable[[Draft], None]) -> int:
        final = self.path(ref)
        draft = Draft(self._draft(ref), schema)
        write(draft)
        manifest = {
            "format": FORMAT,
            **ref.identity(),
            "key": ref.key,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "made_for": self.made_for,
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
        sync_path(final.parent)
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
        for group in ("", *artifact.units()):
            if not is_plain_group(folder := path / DATA / group):
                problems.append(str(DamagedArtifact(folder, "its metadata is not that of a group")))
        for unit in artifact.units():
            for name in artifact.arrays(unit):
                try:
                    artifact.read(unit, name)
                except DamagedArtifact as error:
                    problems.append(str(error))
        return problems
