"""What a person asked for, and the pair that it comes to: made once, passed to every stage."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from artifacts.memo import DigestMemo
from artifacts.ref import digest_of
from artifacts.store import Store
from crane_tasks.calls import SYNTAXES, Syntax
from crane_tasks.devices import prepare
from crane_tasks.hub import pair_folders
from crane_tasks.identity import (
    checkpoint_identity,
    files_identity,
    stops_identity,
    tokenizer_identity,
)
from crane_tasks.kept import Kept
from crane_tasks.models.check import check_pair, refuse_equal
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.configs import UnlikeConfigs, unlike_configs
from crane_tasks.models.files.folder import side_files
from crane_tasks.models.files.memory import free_memory
from crane_tasks.models.files.pair import Pair
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.models.files.vocabularies import Unlike, unlike_tokens
from crane_tasks.models.walk.pace import WalkStep
from crane_tasks.models.walk.stream import LayerStream
from crane_tasks.places import output_folder
from crane_tasks.protocol import format_marks, syntax_of_texts, template_syntax
from crane_tasks.recipe import Recipe, data_sources
from crane_tasks.rows import check_sources, load_rows
from crane_tasks.section import Data

Result = TypeVar("Result")
CHECKED = "checked"  # folder of the store: a mark for each pair that was checked


class Progress(Protocol):
    """Hears how far a stage has come."""

    def __call__(self, stage: str, done: int, total: int, what: str, bar: str = "") -> None:
        """`done` of `total` steps; `what` names the step, e.g. "layers".

        `bar` names a second bar below the stage's own, e.g. "items" within a layer.
        """


class Spread(Protocol):
    """Runs one function on several tuples of arguments, side by side if it can."""

    def __call__(
        self, what: str, work: Callable[..., Result], calls: Sequence[tuple[Any, ...]]
    ) -> Iterator[Result]:
        """The results in the order of `calls`; the first error is raised in its turn.

        `work` is a function of a module, its arguments and results can be pickled.
        """


def no_progress(stage: str, done: int, total: int, what: str, bar: str = "") -> None:
    """For callers that show nothing."""


def no_notice(text: str) -> None:
    """For callers that tell nothing."""


def one_by_one(
    what: str, work: Callable[..., Result], calls: Sequence[tuple[Any, ...]]
) -> Iterator[Result]:
    """One after the other, in this process."""
    return (work(*call) for call in calls)


@dataclass(frozen=True)
class Session:
    """What was asked for, and who hears of it.

    Attributes:
        notice: hears what a person should know of, though the run goes on.
        spread: runs a stage's independent units, in this process or on several workers.
        force: whatever merge lies in the output folder may be replaced.
        kept: what one stage leaves in memory for the next call, e.g. a model that is loaded.
    """

    recipe: Recipe
    store: Store
    progress: Progress = no_progress
    notice: Callable[[str], None] = no_notice
    spread: Spread = one_by_one
    force: bool = False
    kept: Kept = field(default_factory=Kept)


@dataclass(frozen=True)
class Context:
    """A session whose checkpoints were found. Small and picklable: paths and digests.

    Attributes:
        base, donor: the checkpoints' folders.
        base_id, donor_id: digests of their weights and configs, whatever their paths.
        tokenizer_id: digest of the base's tokenizer and chat template.
        side_files_id: digest of all that the output takes over from the base's folder.
        stops: digest of each side's generation config, which says where decoding ends.
        output: where the merged checkpoint goes.
        devices: resolved torch devices, e.g. "cpu"; walks are spread over them, the rest is done
            on the first.
        compute: resolved dtype of forward and backward passes.
    """

    session: Session
    base: Path
    donor: Path
    base_id: str
    donor_id: str
    tokenizer_id: str
    side_files_id: str
    stops: dict[str, str]
    output: Path
    devices: tuple[str, ...]
    compute: str

    @property
    def recipe(self) -> Recipe:
        return self.session.recipe

    @property
    def store(self) -> Store:
        return self.session.store

    @property
    def notice(self) -> Callable[[str], None]:
        return self.session.notice

    @property
    def progress(self) -> Progress:
        return self.session.progress

    @cached_property
    def settled(self) -> Recipe:
        """The recipe with what "auto" came to: what keys are made of."""
        recipe, syntax = self.recipe, self.syntax()
        gate = recipe.gate.model_copy(update={"compute": self.compute})
        patterns = recipe.calibration.format.patterns
        if patterns is None:
            written = self._written(recipe.calibration.agent.data)
            patterns = format_marks(load_tokenizer(self.base), written)
        marked = recipe.calibration.format.model_copy(update={"patterns": patterns})
        calibration = recipe.calibration.model_copy(update={"format": marked})
        calls = {"calls": "auto" if syntax is None else syntax.name}
        evaluate = recipe.evaluate.model_copy(update=calls)
        found = {"gate": gate, "calibration": calibration, "evaluate": evaluate}
        return recipe.model_copy(update=found)

    def syntax(self) -> Syntax | None:
        """How tool calls are written: as the recipe says, as the given targets do, or as the
        chat template does; None if none of them says it."""
        settings = self.recipe.evaluate
        if settings.calls != "auto":
            return SYNTAXES[settings.calls]
        return self._written(settings.agent or self.recipe.calibration.agent.data)

    def _written(self, data: Data) -> Syntax | None:
        rows = load_rows(self.recipe, data)

        def find() -> Syntax | None:
            given = [row.completion for row in rows.rows if row.completion is not None]
            return syntax_of_texts(given) or template_syntax(load_tokenizer(self.base))

        return self.session.kept.one(f"calls of {data}", (self.tokenizer_id, rows.digest), find)

    @property
    def device(self) -> str:
        return self.devices[0]

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    def walk_of(self, checkpoint: Checkpoint, *, resident: bool | None = None) -> LayerStream:
        """A checkpoint to be walked layer by layer on the devices."""
        first, *others = map(torch.device, self.devices)
        return LayerStream(
            checkpoint, device=first, compute=self.compute_dtype, resident=resident, others=others
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.compute)
        return dtype

    @property
    def inputs(self) -> dict[str, Path]:
        """The folders that no output may touch, by role."""
        return {"base": self.base, "donor": self.donor, "store": self.store.root.resolve()}

    @property
    def state_memory(self) -> int:
        """Bytes of hidden states that a walk holds in memory: the recipe's, or half the free."""
        own = self.recipe.run.state_memory
        return free_memory() // 2 if own is None else own

    @property
    def spreads(self) -> bool:
        """Whether there are workers besides this process."""
        return self.session.spread is not one_by_one

    def pair(self) -> Pair:
        """Both checkpoints' headers, read once per process."""
        key = (self.base, self.donor, self.base_id, self.donor_id)
        return self.session.kept.one("pair", key, lambda: Pair.open(self.base, self.donor))

    def unlike(self) -> Unlike:
        """The tokens that only one side's tokenizer has, found once per process."""
        key = (self.base, self.donor, self.tokenizer_id)
        return self.session.kept.one("unlike", key, lambda: unlike_tokens(self.base, self.donor))

    def unlike_configs(self) -> UnlikeConfigs:
        """Where the two configs differ, found once per process."""
        key = (self.base, self.donor, self.base_id, self.donor_id)
        found = self.session.kept
        return found.one("configs", key, lambda: unlike_configs(self.base, self.donor))

    def show_step(self, stage: str, step: WalkStep) -> None:
        """A walk's step as two bars: the walk, and the items within a layer."""
        self.progress(stage, step.done, step.total, str(step))
        if step.done < step.total:  # the last step ends both bars
            self.progress(stage, step.batch, step.batches, "batches of items", bar="items")

    def heard_by(self, progress: Progress) -> "Context":
        """The same, with progress told to another."""
        return replace(self, session=replace(self.session, progress=progress))

    def elsewhere(self, number: int) -> "Context":
        """This context for the piece of work of this number in another process, which neither
        shows bars nor spreads work, and has one of the devices.

        In this process it is the context itself.
        """
        if not self.spreads:
            return self
        own = replace(self.session, progress=no_progress, notice=no_notice, spread=one_by_one)
        device = self.devices[number % len(self.devices)]
        return replace(self, session=own, devices=(device,))

    def with_recipe(self, recipe: Recipe) -> "Context | None":
        """The context of another recipe on the same pair, or None if more than that differs."""
        if _surroundings(recipe) != _surroundings(self.recipe):
            return None
        own = replace(self.session, recipe=recipe)
        return replace(self, session=own, output=output_folder(recipe))


def open_context(session: Session, *, whole: bool = True) -> Context:
    """Find the checkpoints, compare their headers, and identify them by content.

    Not `whole`: weights that are on the hub stay there, and the context is for what reads none.

    Raises:
        CheckpointError: a checkpoint is missing, damaged or no partner of the other.
        RecipeError: the recipe asks for a device that is not there.
        DataError: a data file is missing or broken.
    """
    recipe, store, progress = session.recipe, session.store, session.progress
    devices = prepare(recipe.run)
    # The dear part of this is to hash weights that are not known yet: what is wrong with
    # data or headers must show before.
    check_sources(recipe)
    base, donor = pair_folders(recipe, session.kept, session.notice, whole=whole)
    pair = Pair.open(base, donor)
    memo = DigestMemo(store.root)
    known = all(memo.known(file) for side in (pair.base, pair.donor) for file in side.files)
    if not known:
        check_pair(pair, recipe.pair.allow)
    progress("identify", 0, 2, "checkpoints")
    base_id = checkpoint_identity(base, memo)
    progress("identify", 1, 2, "checkpoints")
    donor_id = checkpoint_identity(donor, memo)
    progress("identify", 2, 2, "checkpoints")
    if base_id == donor_id:
        refuse_equal(base, donor)
    # What was found right once is right for the same content, and the same checks.
    tokenizers = [tokenizer_identity(side, memo) for side in (base, donor)]
    stops = {"base": stops_identity(base, memo), "donor": stops_identity(donor, memo)}
    claim = digest_of([base_id, donor_id, tokenizers, stops, sorted(recipe.pair.allow), _checker()])
    checked = store.root / CHECKED / claim
    if known and not checked.exists():
        check_pair(pair, recipe.pair.allow)
    _remember(checked)
    compute = recipe.gate.compute
    if compute == "auto":
        compute = "float32" if devices == ("cpu",) else "bfloat16"
    return Context(
        session=session,
        base=base,
        donor=donor,
        base_id=base_id,
        donor_id=donor_id,
        tokenizer_id=tokenizers[0],
        side_files_id=files_identity(base, side_files(base), memo),
        stops=stops,
        output=output_folder(recipe),
        devices=devices,
        compute=compute,
    )


def _checker() -> list[str]:
    """The versions of what checks a pair."""
    try:
        return [metadata.version(name) for name in ("crane-merge", "transformers")]
    except metadata.PackageNotFoundError:
        return [str(time.time_ns())]  # nothing is known of it: check each time


def _remember(mark: Path) -> None:
    """Note that a pair was checked, in a store that is there and may be written to."""
    with suppress(OSError):
        if mark.parent.parent.is_dir():
            mark.parent.mkdir(exist_ok=True)
            mark.touch()


def _surroundings(recipe: Recipe) -> list[Any]:
    """All of a recipe that decides a context besides its output."""
    run = recipe.run.model_dump(exclude={"output"})
    return [recipe.base, recipe.donor, recipe.gate.compute, data_sources(recipe), run]
