"""Make a published merge again from what it says of itself, and compare every file."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from artifacts.store import Store
from crane_tasks.apply.folder import device_name
from crane_tasks.apply.output import PROVENANCE, provenance
from crane_tasks.apply.stage import APPLY, check_destination
from crane_tasks.errors import CheckpointError, DataError, RecipeError
from crane_tasks.hub import hub_errors
from crane_tasks.method import Call, build_before, in_this_process, keys_of, made_from
from crane_tasks.models.files.folder import INDEX, is_side_file
from crane_tasks.places import output_folder
from crane_tasks.recipe import Recipe
from crane_tasks.recipe_file import recipe_from
from crane_tasks.rows import load_rows
from crane_tasks.session import Context, Session, open_context
from crane_tasks.sizes import check_disk_space
from crane_tasks.user_paths import user_path
from flows.checks import check_stages, disk_needs
from flows.faults import healing, naming_full_disk

Digest = tuple[str, str]  # algorithm and hexadecimal digits
BLOCK = 1 << 22


def _is_compared(name: str) -> bool:
    """Whether a loader would take a file. Cards and records tell of one run, and may be edited."""
    return (
        name == INDEX or is_side_file(name) or ("/" not in name and name.endswith(".safetensors"))
    )


def digest_of_file(file: Path, algorithm: str) -> str:
    """A file's sha256, or the sha1 that git and the hub give to a small file."""
    hasher = hashlib.sha256() if algorithm == "sha256" else hashlib.sha1()
    if algorithm == "git-sha1":
        hasher.update(f"blob {file.stat().st_size}\0".encode())
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            hasher.update(block)
    return hasher.hexdigest()


@dataclass(frozen=True)
class Published:
    """A merge as it is published.

    Attributes:
        what: its folder or id.
        record: what crane.json says.
        digests: of every file that is compared; of a folder's they are taken only when asked for.
        folders: where its calibration rows may lie.
    """

    what: str
    record: Mapping[str, Any]
    digests: Callable[[], Mapping[str, Digest]]
    folders: tuple[Path, ...] = ()


def find_published(source: str) -> Published:
    """A merge in a folder or on the hub, of which nothing but the record is fetched.

    Raises:
        CheckpointError: there is none, or it has no crane.json that could be followed.
    """
    folder = user_path(source)
    if folder.is_dir():
        place = folder.absolute()
        return Published(source, _record(place, source), lambda: _digests(place), (place,))
    if source.partition("@")[0].count("/") != 1:
        raise CheckpointError(f"{source}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import HfApi, snapshot_download

    repo, _, revision = source.partition("@")
    with hub_errors(source):
        info = HfApi().model_info(repo, revision=revision or None, files_metadata=True)
        place = Path(snapshot_download(repo, revision=info.sha, allow_patterns=[PROVENANCE]))
    on_hub: dict[str, Digest] = {
        s.rfilename: ("sha256", s.lfs.sha256) if s.lfs else ("git-sha1", str(s.blob_id))
        for s in info.siblings or []
        if _is_compared(s.rfilename)
    }
    return Published(source, _record(place, source), lambda: on_hub)


def _digests(folder: Path) -> dict[str, Digest]:
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    return {n: ("sha256", digest_of_file(folder / n, "sha256")) for n in names if _is_compared(n)}


def _record(folder: Path, source: str) -> dict[str, Any]:
    record = provenance(folder)
    needed = {"recipe", "rows", "shard_size", "base", "donor", "made_on", "versions"}
    if record is None or not needed <= record.keys():
        raise CheckpointError(
            f"{source}: has no {PROVENANCE} that a merge could be made from: it is no merge of "
            "CRANE, or one of an older version"
        )
    return record


@dataclass(frozen=True)
class Rebuilt:
    """What came of it.

    Attributes:
        files: "same", "differs", "not published" or "not made", by the file's name.
        notes: in what this run was none like the published one.
    """

    source: str
    output: Path
    files: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return all(found == "same" for found in self.files.values())

    def as_json(self) -> dict[str, Any]:
        """What `crane rebuild --json` prints."""
        return {
            "source": self.source,
            "output": str(self.output),
            "same": self.same,
            "files": dict(self.files),
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Places:
    """Where a person has what the record cannot name: all are optional.

    Attributes:
        base: a folder, if the base is not on the hub.
        data: the folder of calibration rows that are neither shipped nor on the hub.
    """

    base: str | None = None
    donor: str | None = None
    data: Path | None = None
    output: Path | None = None
    store: Path | None = None


def rebuild(
    source: str,
    places: Places,
    *,
    call: Call = in_this_process,
    **heard: Any,
) -> Rebuilt:
    """Make a published merge again and compare every file that a loader takes.

    Args:
        heard: fields of the session: progress, notice.

    Raises:
        CheckpointError: it says not enough of itself, or a side is not to be had.
        DataError: the calibration rows are not here, or are others.
        RecipeError: the output is the published folder.
    """
    published = find_published(source)
    recipe = _recipe(published, places)
    output = output_folder(recipe).resolve()
    if any(output == folder.resolve() for folder in published.folders):
        raise RecipeError(
            f"{output}: is the published merge itself; give the rebuilt one another folder with "
            "--output"
        )
    store = Store(user_path(places.store or "crane-store").absolute(), recipe.name)
    session = Session(recipe, store, **heard)
    _check_rows(recipe, published.record["rows"])
    store.prepare()
    ctx = open_context(session)
    keys = keys_of(ctx)
    check_destination(ctx, keys)
    stages = [*made_from(APPLY, recipe), APPLY]
    check_disk_space(disk_needs(ctx, keys, stages))
    check_stages(ctx, keys, stages)
    notes = _unlike(ctx, keys[APPLY].key, published.record)
    for note in notes:
        session.notice(note)

    def work() -> None:
        build_before(APPLY, ctx, keys, call)
        call(APPLY, ctx, keys)

    with naming_full_disk(store.root, ctx.output):
        healing(session, work)
    return Rebuilt(source, ctx.output, _compared(published.digests(), ctx.output), notes)


def _recipe(published: Published, places: Places) -> Recipe:
    """The published recipe on this machine."""
    record = published.record
    data = dict(record["recipe"])
    for side, own in (("base", places.base), ("donor", places.donor)):
        commit = record[side].get("commit")
        data[side] = own or (f"{record[side]['name']}@{commit}" if commit else data[side])
    # Nothing is evaluated: the rows for that need not be here.
    data["evaluate"] = {"generate": 0}
    data["gate"] = {**data["gate"], "compute": record["made_on"]["compute"]}
    output = places.output or Path("merged") / f"{data['name']}-rebuilt"
    data["run"] = {
        "output": str(user_path(output).absolute()),
        "shard_size": record["shard_size"],
    }
    if record["made_on"]["device"] == "cpu":
        data["run"] |= {"device": "cpu", "threads": record["made_on"]["threads"]}
    shipped = Path(str(resources.files("flows"))) / "recipes"
    own_rows = (user_path(places.data).absolute(),) if places.data else ()
    return recipe_from(data, (*own_rows, Path.cwd(), *published.folders, shipped), published.what)


def _check_rows(recipe: Recipe, wanted: Mapping[str, Any]) -> None:
    """Refuse other rows than those that the merge was made with.

    Raises:
        DataError: with the set's name, and what to do.
    """
    for name, said in wanted.items():
        source = getattr(recipe.calibration, name).data
        hint = "Give their folder: --data FOLDER."
        try:
            found = load_rows(recipe, source)
        except DataError as error:
            raise DataError(
                f"the {name} rows it was made with are not here: {error}. {hint}"
            ) from error
        if found.digest != said["digest"]:
            raise DataError(
                f"{source}: these are not the {name} rows that it was made with: {len(found.rows)} "
                f"rows of another content, it had {said['rows']}. {hint}"
            )


def _unlike(ctx: Context, key: str, record: Mapping[str, Any]) -> list[str]:
    """In what this run is none like the published one: where unlike bits may come from."""
    notes = []
    here = device_name(ctx)
    if here != record["made_on"]["device"]:
        notes.append(
            f"made on {record['made_on']['device']}, rebuilt on {here}: sums may round unlike"
        )
    for name, version in record["versions"].items():
        if metadata.version(name) != version:
            notes.append(f"made with {name} {version}, rebuilt with {metadata.version(name)}")
    if key != record["apply"]:
        notes.append("its inputs or this version's method are none like those that it was made by")
    return notes


def _compared(published: Mapping[str, Digest], output: Path) -> dict[str, str]:
    """Each file of either place."""
    made = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
    found = {}
    for name in sorted(published.keys() | {n for n in made if _is_compared(n)}):
        if name not in made:
            found[name] = "not made"
        elif name not in published:
            found[name] = "not published"
        else:
            algorithm, digest = published[name]
            same = digest_of_file(output / name, algorithm) == digest
            found[name] = "same" if same else "differs"
    return found
