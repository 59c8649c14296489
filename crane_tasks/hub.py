"""Checkpoints of the hub: what can be known of them is, before a weight is downloaded.

Headers come by range requests, a few KB of files of many GB. Hollow files of the true layout are
laid beside the small files, and the same checks read those that read whole checkpoints; the
hub's digests stand for the weights', so that even the keys of stages are the true ones.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from crane_tasks.errors import CheckpointError
from crane_tasks.identity import local_folder
from crane_tasks.json_file import read_json
from crane_tasks.kept import Kept
from crane_tasks.models.check import check_pair
from crane_tasks.models.files.folder import CARD, INDEX, SINGLE, is_side_file
from crane_tasks.models.files.formats import other_form
from crane_tasks.models.files.pair import Pair
from crane_tasks.recipe import Recipe

NO_FOLDER = "no such checkpoint folder"


@dataclass(frozen=True)
class Remote:
    """A checkpoint of the hub at a commit.

    Attributes:
        folder: in the hub's cache; holds the small files, and the weights that are there.
        weights: the files that its index names, with their bytes and sha256.
    """

    repo: str
    commit: str
    folder: Path
    weights: dict[str, tuple[int, str]]

    @property
    def missing(self) -> dict[str, int]:
        """The weights that are not in the cache, and their bytes."""
        sizes = {name: size for name, (size, _) in self.weights.items()}
        return {name: size for name, size in sizes.items() if not (self.folder / name).exists()}

    def fetch(self) -> None:
        """Download the weights that are missing; what was begun goes on.

        Raises:
            CheckpointError: the hub does not give them.
        """
        with hub_errors(f"{self.repo}@{self.commit}"):
            _snapshot(self.repo, self.commit, [*self.missing])

    def hollow_in(self, place: Path) -> Path:
        """Where `make_hollow` lays it in a folder."""
        return place / f"{self.repo.replace('/', '--')}-{self.commit[:8]}" / "snapshot"

    def make_hollow(self, place: Path) -> None:
        """Lay into `place` a folder that is this checkpoint but for its weights' bytes.

        Raises:
            CheckpointError: the hub does not give the headers.
        """
        folder = self.hollow_in(place)
        blobs = folder.with_name("blobs")  # whose names are digests, as in the hub's cache
        for made in (folder, blobs):
            made.mkdir(parents=True)
        for file in self.folder.iterdir():
            (folder / file.name).symlink_to(file.resolve())
        with hub_errors(f"{self.repo}@{self.commit}"):
            for name in self.missing:
                blob = blobs / self.weights[name][1]
                _write_hollow(blob, *_header(self.repo, self.commit, name))
                (folder / name).symlink_to(blob)


def _write_hollow(file: Path, header: dict[str, Any], end: int) -> None:
    """A safetensors file of which only the header has bytes on the disk."""
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def _header(repo: str, commit: str, name: str) -> tuple[dict[str, Any], int]:
    """A file's header, and how many bytes its tensors take."""
    from huggingface_hub import HfApi

    found = HfApi().parse_safetensors_file_metadata(repo, name, revision=commit)
    tensors: dict[str, Any] = {
        tensor: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": list(t.data_offsets)}
        for tensor, t in found.tensors.items()
    }
    ends = [t.data_offsets[1] for t in found.tensors.values()]
    return {"__metadata__": found.metadata, **tensors}, max(ends, default=0)


def find_remote(value: str) -> Remote:
    """Resolve `owner/name[@revision]` and fetch its small files.

    Without a network what the cache has is taken, if it is whole.

    Raises:
        CheckpointError: there is no such thing, or it cannot be had.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo, _, revision = value.partition("@")
    with hub_errors(value):
        try:
            info = HfApi().model_info(repo, revision=revision or None, files_metadata=True)
        except (HfHubHTTPError, HFValidationError):
            raise  # the hub has answered, or there is nothing to ask
        except Exception:  # no network: each of the library's own has its errors
            return _cached(repo, revision or None)
        files = {s.rfilename: s for s in info.siblings or []}
        small = [name for name, s in files.items() if _at_once(name, s.lfs)]
        # By its name, not its commit: so the cache knows it without a network.
        folder = _snapshot(repo, revision or None, small)
        commit = folder.name
    named = _named_weights(folder, files)
    if not named:
        _refuse_other_form(value, folder, files)
    weights = {}
    for name in named:
        lfs = files[name].lfs if name in files else None
        if lfs is not None:
            weights[name] = files[name].size or 0, lfs.sha256
    return Remote(repo, commit, folder, weights)


def _refuse_other_form(value: str, folder: Path, files: Iterable[str]) -> None:
    """Say what a repository without safetensors weights is, by the names of its files.

    Raises:
        CheckpointError: with what to do.
    """
    with TemporaryDirectory() as place:
        for name in files:
            known = folder / name
            target = Path(place) / Path(name).name
            target.write_bytes(known.read_bytes() if known.exists() else b"")
        told = other_form(Path(place)) or "holds no safetensors weights"
    raise CheckpointError(f"{value}: {told}")


def _cached(repo: str, revision: str | None) -> Remote:
    """What the cache has of a checkpoint, if it has all the weights of it.

    Raises:
        LocalEntryNotFoundError: it does not.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    # Of one file, for the library takes a cache for broken that lacks any file of the repository.
    folder = _snapshot(repo, revision, ["config.json"], offline=True)
    named = _named_weights(folder, {SINGLE: None})
    if not all((folder / name).exists() for name in named):
        raise LocalEntryNotFoundError(f"{folder}: weights are missing")
    return Remote(repo, folder.name, folder, {})


def _at_once(name: str, lfs: object) -> bool:
    """Whether a file is fetched before its checkpoint is looked at.

    Weights too where the hub knows no digest of them, for they are not in its large-file storage.
    """
    small_weights = "/" not in name and name.endswith(".safetensors") and lfs is None
    return is_side_file(name) or name in (INDEX, CARD) or small_weights


def _named_weights(folder: Path, files: dict[str, Any]) -> list[str]:
    """The files that the index names, or the one; none if it is no safetensors checkpoint."""
    try:
        weight_map = read_json(folder / INDEX)["weight_map"]
        return sorted({str(name) for name in weight_map.values()})
    except OSError:
        return [SINGLE] if SINGLE in files else []
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # who reads the index says what is wrong with it


def _snapshot(
    repo: str, commit: str | None, names: list[str] | None, *, offline: bool = False
) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(repo, revision=commit, allow_patterns=names, local_files_only=offline)
    )


@contextmanager
def hub_errors(
    what: str, failed: str = f"{NO_FOLDER}, and the hub did not give it"
) -> Iterator[None]:
    """The hub's refusals in one sentence each.

    Args:
        failed: what it is that has failed, where nothing better is known.

    Raises:
        CheckpointError: with what to do.
    """
    from huggingface_hub import errors

    prefix = f"{what}: {failed}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{what}: the hub gives it to those alone who have accepted its terms. Accept them "
            "on its page, then log in: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{what}: the hub has the model, and no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{prefix}: there is no model of this name. Check the spelling; if it is private, "
            "log in: hf auth login"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{prefix}: it cannot be reached, and the cache does not have it whole"
        ) from error
    except Exception as error:  # what goes wrong between here and there has many classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{prefix}: {reason}") from error


def fetch_all(remotes: list[Remote], notice: Callable[[str], None]) -> None:
    """Download what is missing, once there is room for all of it.

    Raises:
        CheckpointError: the cache's disk has no room, or the hub does not give it.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    wanted = sum(sum(remote.missing.values()) for remote in remotes)
    place = next(p for p in (cache, *cache.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if wanted > free:
        raise CheckpointError(
            f"{cache}: the hub's cache has {free / 1e9:.1f} GB free, and {wanted / 1e9:.1f} GB are "
            "to be downloaded. Free some, or set HF_HOME to another disk."
        )
    for remote in remotes:
        if missing := remote.missing:
            size = sum(missing.values()) / 1e9
            notice(f"{remote.repo}: downloading {len(missing)} files of weights, {size:.1f} GB")
            remote.fetch()


def pair_folders(
    recipe: Recipe, kept: Kept, notice: Callable[[str], None], *, whole: bool
) -> tuple[Path, Path]:
    """Where base and donor lie. What is on the hub is looked at before any of it is downloaded.

    Raises:
        CheckpointError: a side is not to be had, or the two are no pair.
    """
    found = [local_folder(recipe, v) or find_remote(v) for v in (recipe.base, recipe.donor)]
    away = [side for side in found if isinstance(side, Remote) and side.missing]
    here = [side.folder if isinstance(side, Remote) else side for side in found]
    if not away:
        return here[0], here[1]

    def hollow() -> TemporaryDirectory[str]:
        place = TemporaryDirectory(prefix="crane-headers-")
        for side in away:
            side.make_hollow(Path(place.name))
        return place

    place = kept.one("headers", tuple((s.repo, s.commit, *s.missing) for s in away), hollow)
    shown = [
        side.hollow_in(Path(place.name)) if side in away else folder
        for side, folder in zip(found, here, strict=True)
    ]
    if not whole:
        return shown[0], shown[1]
    check_pair(Pair.open(*shown), recipe.pair.allow)
    fetch_all(away, notice)
    return here[0], here[1]
