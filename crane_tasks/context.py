"""What every stage is given: the recipe, the store, and who the checkpoints are."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from artifacts.memo import DigestMemo
from artifacts.ref import digest_of
from artifacts.store import Store
from crane_tasks.check import check_pair
from crane_tasks.data import load_rows
from crane_tasks.errors import CheckpointError, RecipeError
from crane_tasks.models.files.folder import TOKENIZER_FILES, side_files, weight_files
from crane_tasks.models.files.memory import free_memory
from crane_tasks.models.files.pair import Pair
from crane_tasks.models.walk.pace import WalkStep
from crane_tasks.recipe import Recipe
from crane_tasks.spread import Spread, here

GENERATION = "generation_config.json"
# Characters that a folder's name should not have, and how long one field's part may be.
UNFIT = re.compile(r"[^A-Za-z0-9._+=]")
LONGEST = 60
NO_CHANGES: Mapping[str, Any] = MappingProxyType({})
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]


class Progress(Protocol):
    """Hears how far a stage has come."""

    def __call__(self, stage: str, done: int, total: int, what: str, bar: str = "") -> None:
        """`done` of `total` steps; `what` names the step, e.g. "layers".

        `bar` names a second bar below the stage's own, e.g. "items" within a layer.
        """


def no_progress(stage: str, done: int, total: int, what: str, bar: str = "") -> None:
    """For callers that show nothing."""


def no_notice(text: str) -> None:
    """For callers that tell nothing."""


@dataclass(frozen=True)
class Context:
    """One run's surroundings. Small and picklable: paths and digests, no tensors.

    Attributes:
        base, donor: the checkpoints' folders.
        base_id, donor_id: digests of their weights and configs, whatever their paths.
        tokenizer_id: digest of the base's tokenizer and chat template.
        side_files_id: digest of all that the output takes over from the base's folder.
        stops: digest of each side's generation config, which says where decoding ends.
        output: where the merged checkpoint goes.
        device: resolved torch device, e.g. "cpu".
        compute: resolved dtype of forward and backward passes.
        notice: hears what a person should know of, though the run goes on.
        spread: runs a stage's independent units, here or on several workers.
    """

    recipe: Recipe
    store: Store
    base: Path
    donor: Path
    base_id: str
    donor_id: str
    tokenizer_id: str
    side_files_id: str
    stops: dict[str, str]
    output: Path
    device: str
    compute: str
    progress: Progress = no_progress
    notice: Callable[[str], None] = no_notice
    spread: Spread = here

    def elsewhere(self) -> "Context":
        """This context for another process, which neither shows bars nor spreads work.

        In this process it is the context itself.
        """
        if self.spread is here:
            return self
        store = Store(self.store.root)
        return replace(self, store=store, progress=no_progress, notice=no_notice, spread=here)

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.compute)
        return dtype

    @property
    def places(self) -> dict[str, Path]:
        """The folders that no output may touch, by role."""
        return {"base": self.base, "donor": self.donor, "store": self.store.root.resolve()}

    @property
    def state_memory(self) -> int:
        """Bytes of hidden states that a walk holds in memory: the recipe's, or half the free."""
        own = self.recipe.run.state_memory
        return free_memory() // 2 if own is None else own

    def show_step(self, stage: str, step: WalkStep) -> None:
        """A walk's step as two bars: the walk, and the items within a layer."""
        self.progress(stage, step.done, step.total, str(step))
        if step.done < step.total:  # the last step ends both bars
            self.progress(stage, step.batch, step.batches, "batches of items", bar="items")

    def pair(self) -> Pair:
        """Both checkpoints' headers, read once per process."""
        return _opened_pair(self.base, self.donor)


@lru_cache(maxsize=4)
def _opened_pair(base: Path, donor: Path) -> Pair:
    return Pair.open(base, donor)


def make_context(
    recipe: Recipe,
    store: Store,
    progress: Progress = no_progress,
    notice: Callable[[str], None] = no_notice,
    spread: Spread = here,
) -> Context:
    """Find the checkpoints, compare their headers, and identify them by content.

    Raises:
        CheckpointError: a checkpoint is missing, damaged or no partner of the other.
        RecipeError: the recipe asks for a device that is not there.
    """
    device = _device(recipe.run.device)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    # The dear part of this is to hash weights that are not known yet: what is wrong with
    # data or headers must show before.
    for data in data_sources(recipe):
        load_rows(recipe, data)
    base, donor = checkpoint_folder(recipe, recipe.base), checkpoint_folder(recipe, recipe.donor)
    _opened_pair.cache_clear()  # the files may have changed since the last merge
    pair = _opened_pair(base, donor)
    memo = DigestMemo(store.root)
    if not all(memo.known(file) for side in (pair.base, pair.donor) for file in side.files):
        check_pair(pair)
    progress("identify", 0, 2, "checkpoints")
    base_id = checkpoint_identity(base, memo)
    progress("identify", 1, 2, "checkpoints")
    donor_id = checkpoint_identity(donor, memo)
    progress("identify", 2, 2, "checkpoints")
    compute = recipe.gate.compute
    if compute == "auto":
        compute = "float32" if device == "cpu" else "bfloat16"
    return Context(
        recipe=recipe,
        store=store,
        base=base,
        donor=donor,
        base_id=base_id,
        donor_id=donor_id,
        tokenizer_id=tokenizer_identity(base, memo),
        side_files_id=digest_of({name: memo.digest(base / name) for name in side_files(base)}),
        stops={
            side: memo.digest(file) if (file := folder / GENERATION).exists() else ""
            for side, folder in (("base", base), ("donor", donor))
        },
        output=output_folder(recipe),
        device=device,
        compute=compute,
        progress=progress,
        notice=notice,
        spread=spread,
    )


def with_recipe(ctx: Context, recipe: Recipe) -> Context | None:
    """The surroundings of another recipe on the same pair, or None if they are not the same."""
    here = _surroundings(ctx.recipe)
    if _surroundings(recipe) != here:
        return None
    return replace(ctx, recipe=recipe, output=output_folder(recipe))


def _surroundings(recipe: Recipe) -> list[Any]:
    """All of a recipe that decides a context besides its output."""
    run = recipe.run.model_dump(exclude={"output"})
    return [recipe.base, recipe.donor, recipe.gate.compute, data_sources(recipe), run]


def data_sources(recipe: Recipe) -> list[str]:
    """Every data file or dataset that the recipe names."""
    sets = recipe.calibration
    named = [sets.reasoning.data, sets.agent.data, sets.format.data]
    return named + [d for d in (recipe.evaluate.reasoning, recipe.evaluate.agent) if d is not None]


def output_folder(recipe: Recipe) -> Path:
    """Where the merge goes: `run.output`, or a folder that names recipe, alpha and tau."""
    if recipe.run.output is not None:
        return recipe.place(recipe.run.output).resolve()
    return _among_merges(f"{recipe.name}-{point_name(recipe.alpha, recipe.tau)}")


def sweep_folder(recipe: Recipe) -> Path:
    """Where a sweep's report goes: beside the merge that the recipe makes."""
    if recipe.run.output is not None:
        output = recipe.place(recipe.run.output).resolve()
        return output.with_name(f"{output.name}-sweep")
    return _among_merges(f"{recipe.name}-sweep")


def _among_merges(name: str) -> Path:
    return (Path.cwd() / "merged" / name).resolve()


def point_name(alpha: float, tau: float, changes: Mapping[str, Any] = NO_CHANGES) -> str:
    """Names a point of a grid; no two points alike. Fit for a folder.

    `changes` are other recipe fields by dotted path: alpha0.25-tau0.03-merge.rounding=nearest.
    """
    parts = [f"alpha{alpha:.15g}", f"tau{tau:.15g}"]
    for path, value in changes.items():
        text = f"{path}={value if isinstance(value, str) else json.dumps(value)}"
        plain = UNFIT.sub("_", text)[:LONGEST]
        parts.append(plain if plain == text else f"{plain}~{digest_of([path, value])[:8]}")
    return "-".join(parts)


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"run.device: {wanted}, but torch finds no CUDA device; use cpu")
    return wanted


def checkpoint_folder(recipe: Recipe, value: str) -> Path:
    """The folder of a checkpoint given as a folder or as a hub id with optional @revision.

    Raises:
        CheckpointError: neither is to be had.
    """
    found = recipe.locate(value)
    if found is not None:
        if not found.is_dir():
            raise CheckpointError(f"{found}: a checkpoint is a folder, this is a file")
        return found
    repo, _, revision = value.partition("@")
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise CheckpointError(f"{value}: no such checkpoint folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=HUB_FILES)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{value}: no such checkpoint folder, and the hub did not give it: {reason}"
        ) from error
    return Path(folder)


def checkpoint_identity(folder: Path, memo: DigestMemo) -> str:
    """A digest of the weights and the config, independent of where the folder lies."""
    files, _ = weight_files(folder)
    weights = sorted(memo.digest(file) for file in files)
    return digest_of({"weights": weights, "config": memo.digest(folder / "config.json")})


def tokenizer_identity(folder: Path, memo: DigestMemo) -> str:
    """A digest of the tokenizer's files and the chat template."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    return digest_of({file.name: memo.digest(file) for file in files})
