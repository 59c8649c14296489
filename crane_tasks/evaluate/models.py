"""The models that are measured, and the proof that a folder holds what is to be measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from artifacts.memo import DigestMemo, signature
from artifacts.store import Artifact
from crane_tasks.apply.output import output_config
from crane_tasks.errors import CheckpointError
from crane_tasks.identity import behaviour_identity, behaviour_of, checkpoint_of
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.overlay import Overlay
from crane_tasks.models.walk.stream import LayerStream
from crane_tasks.session import Context


@dataclass(frozen=True)
class Model:
    """A model that is measured: a checkpoint, or a checkpoint with an edit laid over it.

    Attributes:
        identity: what its measurements are kept under.
        folder: the checkpoint.
        content: `behaviour_identity` of what must lie in the folder.
        edit: gives the edited tensors of a slot; None leaves the checkpoint as it is.
        loaded: a walk of the checkpoint that has the edit in it already, where there is one.
    """

    identity: str
    folder: Path
    content: str
    edit: Overlay | None = None
    loaded: LayerStream | None = None

    @contextmanager
    def proven(self, memo: DigestMemo) -> Iterator[None]:
        """Prove that the folder holds what is to be measured, before the block and after it.

        Raises:
            CheckpointError: it does not, or it was replaced or written to meanwhile.
        """
        before: dict[str, tuple[int, ...]] = {}
        try:
            before = _signatures(self.folder)
            if behaviour_identity(self.folder, memo) != self.content:
                raise self._replaced()
            yield
        except (OSError, CheckpointError) as error:
            # Files that vanish or do not fit each other: another run is writing there.
            if self._changed(before):
                raise self._replaced() from error
            raise
        if self._changed(before):
            raise self._replaced()

    def _changed(self, before: dict[str, tuple[int, ...]]) -> bool:
        try:
            return _signatures(self.folder) != before
        except OSError:
            return True

    def _replaced(self) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: was replaced or written to by another run while it was evaluated; "
            "nothing was kept of it. Give every merge an output of its own."
        )

    @contextmanager
    def stream(self, ctx: Context, *, resident: bool | None = None) -> Iterator[LayerStream]:
        """The model's walk; `resident` asks for one that does (not) keep the weights."""
        if self.loaded is not None and resident in (None, self.loaded.resident):
            yield self.loaded
            return
        stream = ctx.walk_of(Checkpoint.open(self.folder), resident=resident)
        if self.edit is None:
            yield stream
            return
        with stream.edited(self.edit):
            yield stream


def _signatures(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells whether weights or configs of a folder were replaced or written to."""
    files = (file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
    return {file.name: signature(file.stat()) for file in files}


def base_and_donor(ctx: Context) -> dict[str, Model]:
    """The pair that the run was begun with, whatever lies in the two folders by now."""
    base = behaviour_of(ctx.base_id, ctx.stops["base"])
    donor = behaviour_of(ctx.donor_id, ctx.stops["donor"])
    return {"base": Model(base, ctx.base, base), "donor": Model(donor, ctx.donor, donor)}


def written_merge(ctx: Context, apply: Artifact) -> Model:
    """What `apply` has written, by its own record of the files and not by what lies there."""
    weights = (record["digest"] for record in apply.meta["files"].values())
    config = blake3(output_config(ctx.pair().base, fp8=ctx.recipe.merge.in_fp8)).hexdigest()
    checkpoint = checkpoint_of(weights, config)
    identity = behaviour_of(checkpoint, ctx.stops["base"])
    return Model(identity, ctx.output, identity)
