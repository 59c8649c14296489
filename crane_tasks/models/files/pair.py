"""Two checkpoints paired by tensor name."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.checkpoint import EMBEDDING, HEAD, Checkpoint, Piece
from crane_tasks.models.files.wording import listed


@dataclass(frozen=True)
class Pair:
    """Base and donor with the same slots, experts and shapes, but for rows of the vocabulary."""

    base: Checkpoint
    donor: Checkpoint

    @classmethod
    def open(cls, base: Path, donor: Path) -> "Pair":
        """Open both and compare them; headers only.

        Raises:
            CheckpointError: with every difference of names and shapes in one message.
        """
        pair = cls(Checkpoint.open(base), Checkpoint.open(donor))
        pair._require_match()
        return pair

    @property
    def rows(self) -> tuple[int, int]:
        """Rows of the base's embedding and of the donor's."""
        ours, theirs = (side.pieces[EMBEDDING][0] for side in (self.base, self.donor))
        return ours.shape[0], theirs.shape[0]

    def donor_tensor(self, slot: str, expert: int = 0) -> Tensor:
        """The donor's tensor in the base's shape.

        Where either side's head is its embedding, the donor's embedding stands for its head.
        Rows that the donor lacks are the base's, rows that the base lacks are left out. In its
        stored dtype; float32 where rows of another dtype are put below it.
        """
        ours, theirs = self._pieces(slot, expert)
        if theirs.shape == ours.shape:
            return theirs.read()
        common, dtype = min(theirs.shape[0], ours.shape[0]), self.donor_dtype(slot)
        return torch.cat([theirs.read(0, common).to(dtype), ours.read(common).to(dtype)])

    def donor_dtype(self, slot: str) -> torch.dtype:
        """The dtype of the donor's tensors of a slot, as `donor_tensor` gives them."""
        ours, theirs = self._pieces(slot, 0)
        alike = theirs.shape == ours.shape or theirs.dtype == ours.dtype
        return theirs.dtype if alike else torch.float32

    def _pieces(self, slot: str, expert: int) -> tuple[Piece, Piece]:
        head = slot == HEAD
        theirs = EMBEDDING if head and (self.base.tied or self.donor.tied) else slot
        ours = EMBEDDING if head and self.base.tied else slot
        return self.base.pieces[ours][expert], self.donor.pieces[theirs][expert]

    def _require_match(self) -> None:
        base, donor = self.base, self.donor
        if base.layout.model_type != donor.layout.model_type:
            raise CheckpointError(
                f"unlike models: the base is {base.layout.model_type}, the donor "
                f"{donor.layout.model_type}"
            )
        missing = [n for n in base.pieces if n not in donor.pieces]
        surplus = [n for n in donor.pieces if n not in base.pieces]
        if base.tied or donor.tied:
            # A tied head may be stored or not: either way it is the embedding.
            missing = [n for n in missing if n != HEAD]
            surplus = [n for n in surplus if n != HEAD]
        problems = [f"{n} is only in the base" for n in missing]
        problems += [f"{n} is only in the donor" for n in surplus]
        for name in base.pieces.keys() & donor.pieces.keys():
            left, right = base.pieces[name], donor.pieces[name]
            by_rows = name in (EMBEDDING, HEAD)  # of which each side may have more
            if len(left) != len(right):
                problems.append(f"{name}: {len(left)} experts against {len(right)}")
            elif left[0].shape[by_rows:] != right[0].shape[by_rows:]:
                problems.append(f"{name}: {list(left[0].shape)} against {list(right[0].shape)}")
        if problems:
            raise CheckpointError(
                f"base {base.folder} and donor {donor.folder} do not pair: "
                f"{listed(sorted(problems))}"
            )
