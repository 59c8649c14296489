"""The output folder: shard plan, side files, provenance, and its appearance all at once."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.durable import sync_path
from artifacts.memo import DigestMemo, content_digest
from crane_tasks.apply.packing import announced
from crane_tasks.errors import OutputError
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.folder import CARD, INDEX, SINGLE, side_files
from crane_tasks.models.files.safetensors_io import DTYPES, Entry

PROVENANCE = "crane.json"
CONFIG = "config.json"
RECIPE_COPY = "crane_recipe.yaml"
# What loaders take beside, or before, the files of an index.
LOADED = (".safetensors", ".safetensors.index.json", "adapter_config.json")


@dataclass(frozen=True)
class Shard:
    """One file of the output and its tensors, in the order of their bytes."""

    file: str
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]


def shard_plan(base: Checkpoint, shard_size: int | None) -> list[Shard]:
    """The base's own files, or its tensors in order filled into files of at most `shard_size`.

    A tensor larger than that has a file of its own.
    """
    if shard_size is None:
        by_file: dict[Path, list[Entry]] = {file: [] for file in base.files}
        for entry in base.entries.values():
            by_file[entry.file].append(entry)
        return [Shard(f.name, tuple(own), base.metadata[f]) for f, own in by_file.items()]
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in base.entries.values():
        if groups[-1] and filled + entry.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.nbytes
    metadata = base.metadata[base.files[0]]
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]), metadata)]
    names = (f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1))
    return [Shard(name, tuple(g), metadata) for name, g in zip(names, groups, strict=True)]


def written_bytes(base: Checkpoint, *, fp8: bool) -> int:
    """Bytes of all tensors as a merge writes them."""
    tensors = announced(base.entries.values(), fp8=fp8)
    return sum(math.prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in tensors)


def write_index(base: Checkpoint, plan: list[Shard], folder: Path, *, fp8: bool) -> None:
    """The index of the plan: the base's own, byte for byte, where the plan is the base's."""
    if plan == shard_plan(base, None) and not base.packed:
        if (base.folder / INDEX).exists():
            shutil.copyfile(base.folder / INDEX, folder / INDEX)
        return
    if len(plan) > 1 or plan[0].file != SINGLE:
        weight_map = {n: s.file for s in plan for n, _, _ in announced(s.entries, fp8=fp8)}
        index = {
            "metadata": {"total_size": written_bytes(base, fp8=fp8)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_side_files(base: Checkpoint, folder: Path, *, fp8: bool) -> list[str]:
    """Copy the base's side files, byte for byte but for `output_config`; returns their names."""
    names = side_files(base.folder)
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.folder / name, target)
    (folder / CONFIG).write_bytes(output_config(base, fp8=fp8))
    return names


def output_config(base: Checkpoint, *, fp8: bool) -> bytes:
    """The base's config.json; of one in FP8 without what says so where the merge is bfloat16."""
    content = (base.folder / CONFIG).read_bytes()
    if fp8 or not base.packed:
        return content
    config = json.loads(content)
    del config["quantization_config"]
    return (json.dumps(config, indent=2) + "\n").encode()


def provenance(folder: Path) -> dict[str, Any] | None:
    """What a finished merge says of itself, or None if the folder is none."""
    try:
        record = json.loads((folder / PROVENANCE).read_text())
        known = isinstance(record["apply"], str) and all(
            isinstance(of["size"], int) and isinstance(of["digest"], str)
            for of in record["files"].values()
        )
        sound = known and all(isinstance(of, int | dict) for of in record["side_files"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return record if sound else None


def unlike_record(
    folder: Path, record: Mapping[str, Any], digest: Callable[[Path], str] | None = None
) -> Iterator[tuple[str, str]]:
    """What of a folder is not as its merge has left it: names, and what is wrong with them.

    Names, sizes, all that is small by its content, and weights that a loader would take besides.
    The card says more with every evaluation: it must be there.

    Args:
        digest: of a weight file; None: their sizes are enough.
    """
    weights, small = record["files"], record["side_files"]
    for name, of in [*weights.items(), *small.items(), (CARD, {})]:
        # Merges of older versions have noted the sizes of side files alone.
        wanted, file = {"size": of} if isinstance(of, int) else of, folder / name
        if not file.is_file():
            yield name, "is missing"
        elif (size := file.stat().st_size) != wanted.get("size", size):
            yield name, f"has {size} bytes, not {wanted['size']}"
        elif name in small and "digest" in wanted:
            if content_digest(file) != wanted["digest"]:
                yield name, "was changed"
        elif name in weights and digest is not None and digest(file) != wanted["digest"]:
            yield name, "was changed"
    for name in strangers(folder, record):
        yield name, "is none of the merge's, and a loader would take it"


def verify_output(folder: Path) -> dict[str, str]:
    """What of a merge is not as it was written, by its file's name; every byte is read.

    Raises:
        OutputError: the folder is no merge, or what it says of itself is damaged.
    """
    record = provenance(folder)
    if record is None:
        raise OutputError(f"{folder}: is no merge of CRANE: no {PROVENANCE} in it can be read")
    return dict(unlike_record(folder, record, content_digest))


def strangers(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Files beside a merge's own that a loader would take."""
    known = {*record["files"], *record["side_files"]}
    if not any(isinstance(of, dict) for of in record["side_files"].values()):
        known.add(INDEX)  # merges of older versions do not list theirs
    found = (file.name for file in folder.glob("*") if file.name.endswith(LOADED))
    return sorted(name for name in found if name not in known)


def holds(folder: Path, key: str, plan: list[Shard], memo: DigestMemo) -> bool:
    """Whether the folder is the whole merge of this key, in these shards.

    Weights that are not as they were when they were written or last read are read (`memo`).
    """
    merge = provenance(folder)
    if merge is None or merge["apply"] != key or merge["files"].keys() != {s.file for s in plan}:
        return False
    return next(unlike_record(folder, merge, memo.digest), None) is None


def check_place(folder: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse an output folder that is a file, or that is, holds or lies in an input.

    Raises:
        OutputError: with the input's role.
    """
    for role, path in inputs.items():
        if folder == path or folder in path.parents or path in folder.parents:
            raise OutputError(f"{folder}: the output would overwrite the {role} {path}")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: the output is a folder, this is a file")


def check_output(folder: Path, inputs: Mapping[str, Path], *, key: str, force: bool) -> None:
    """Refuse an output that would destroy something.

    Args:
        inputs: the folders that are read, by role.
        key: of this merge; a folder that holds it, damaged or in other shards, may go.
        force: whatever merge it holds may be replaced.

    Raises:
        OutputError: it is, holds or lies in an input; or it exists and is another thing.
    """
    check_place(folder, inputs)
    if not folder.exists() or not any(folder.iterdir()):
        check_writable(folder.parent)
        return
    merge = provenance(folder)
    if merge is None:
        raise OutputError(
            f"{folder}: exists and holds something that is no merge. Choose another --output."
        )
    if merge["apply"] != key and not force:
        raise OutputError(
            f"{folder}: exists and holds another merge. Choose another --output or give "
            "--force to replace it."
        )
    if not force and (others := strangers(folder, merge)):
        raise OutputError(
            f"{folder}: holds {', '.join(others)}, which is none of the merge's, and a loader "
            "would take it. Move it away, or give --force to remove it."
        )
    if merge["apply"] != key:
        check_writable(folder.parent)


def check_writable(folder: Path) -> None:
    """Refuse a folder in which nothing can be made, before hours of work for what goes there.

    Raises:
        OutputError: it, or the one in which it would have to be made, is a file or read-only.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"{folder}: cannot be made, {place} is a file. Choose another --output.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{place}: cannot be written to. Choose another --output.")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs from replacing an output meanwhile: a kernel lock on its parent folder."""
    handle = os.open(folder.parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def publish(draft: Path, folder: Path) -> None:
    """Make the finished draft the output, in one rename; to be called with the folder `held`."""
    for file in draft.rglob("*"):
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
    sync_path(draft)
    old = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    draft.rename(folder)
    sync_path(folder.parent)
    # Also what a kill between the two renames of an earlier run has left.
    shutil.rmtree(old, ignore_errors=True)
