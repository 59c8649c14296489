"""Looking at a store and cleaning it."""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from artifacts.errors import DamagedArtifact, StoreError
from artifacts.running import used_since
from artifacts.store import DAMAGED, MANIFEST, OUTSIDE, Store

DAY = 86_400.0


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def listing(store: Store) -> list[dict[str, Any]]:
    """One record per finished artifact, by stage and age."""
    records = []
    for path in store.artifacts():
        record = {"stage": path.parent.name, "key": path.name, "bytes": size_of(path)}
        try:
            manifest = store.open_path(path).manifest
            record |= {name: manifest[name] for name in ("created", "version")}
            record["made_for"] = manifest.get("made_for", "")  # earlier artifacts have no such note
        except (DamagedArtifact, KeyError):
            record |= {"created": None, "version": None, "made_for": ""}
        record["used"] = (path / MANIFEST).stat().st_mtime
        records.append(record)
    return sorted(records, key=lambda r: (r["stage"], r["created"] or ""))


def described(store: Store, key: str) -> dict[str, Any]:
    """What an artifact is: its manifest without the checksums.

    Raises:
        StoreError: no artifact, or more than one, has a key that begins so.
    """
    matches = [p for p in store.artifacts() if p.name.startswith(key)]
    if len(matches) != 1:
        which = ", ".join(f"{p.parent.name}/{p.name}" for p in matches)
        raise StoreError(
            f"{key}: {'ambiguous: ' + which if matches else 'no artifact has such a key'}"
        )
    artifact = store.open_path(matches[0])
    manifest = {k: v for k, v in artifact.manifest.items() if k not in ("units",)}
    units = {
        unit: {"arrays": artifact.arrays(unit), "meta": artifact.unit_meta(unit)}
        for unit in artifact.units()
    }
    return {**manifest, "path": str(artifact.path), "bytes": size_of(artifact.path), "units": units}


def verify_all(
    store: Store, *, set_aside: bool, progress: Callable[[str, int, int, str], None]
) -> dict[str, Any]:
    """Decode every chunk of every artifact."""
    damaged: dict[str, list[str]] = {}
    paths = store.artifacts()
    for number, path in enumerate(paths, start=1):
        problems = store.verify(path)
        if problems:
            damaged[f"{path.parent.name}/{path.name}"] = problems
            if set_aside:
                store.set_aside(path)
        progress("verify", number, len(paths), "artifacts")
    return {"checked": len(paths), "damaged": damaged, "set_aside": set_aside and bool(damaged)}


@contextmanager
def _unowned(draft: Path) -> Iterator[bool]:
    """Whether no living process makes the draft; none can begin to within the block."""
    lock = draft.with_name(draft.name.replace(".draft-", ".lock-"))
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def _remove_outside(draft: Path, *, dry_run: bool) -> None:
    """Remove the folder outside the store that a draft has noted as its own."""
    note = draft / OUTSIDE
    folder = Path(note.read_text()) if note.exists() else None
    # Its name must end as the draft's does: nothing else is ever removed.
    if folder and folder.name.endswith(draft.name.removeprefix(".")) and not dry_run:
        shutil.rmtree(folder, ignore_errors=True)


def collect_garbage(
    store: Store, *, older_than_days: float | None, dry_run: bool
) -> dict[str, Any]:
    """Remove abandoned drafts and damaged artifacts; with an age, artifacts unused so long."""
    removed: list[str] = []
    freed = 0

    def remove(path: Path) -> None:
        nonlocal freed
        removed.append(f"{path.parent.name}/{path.name}")
        freed += size_of(path)
        if not dry_run:
            shutil.rmtree(path)

    for draft in sorted(store.root.glob("*/.draft-*")):
        with _unowned(draft) as free:
            if free:
                _remove_outside(draft, dry_run=dry_run)
                remove(draft)
    for damaged in sorted(store.root.glob("*/.damaged-*")):
        remove(damaged)
    if older_than_days is not None:
        limit = time.time() - older_than_days * DAY
        # What a run has used it may use again before it ends.
        limit = min(limit, used_since(store.root) or limit)
        for path in store.artifacts():
            if (path / MANIFEST).stat().st_mtime < limit:
                remove(path)
    return {"removed": removed, "bytes": freed, "dry_run": dry_run}


def nearest(store: Store, stage: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The finished artifact of a stage that has most in common with an identity."""
    best: tuple[int, float, dict[str, Any]] | None = None
    for path in store.artifacts(stage):
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            alike = len(differences(manifest, identity))
        except DAMAGED:
            continue
        candidate = (-alike, (path / MANIFEST).stat().st_mtime, manifest)
        if best is None or candidate[:2] > best[:2]:
            best = candidate
    return best[2] if best else None


def differences(have: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """The fields of config and inputs, and the version, in which two identities differ."""
    fields = ["version"] if have["version"] != want["version"] else []
    for section in ("config", "inputs"):
        left, right = have[section], want[section]
        fields += [
            key for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)
        ]
    return fields
