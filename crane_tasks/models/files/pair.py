"""Two checkpoints paired by tensor name."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.wording import listed


@dataclass(frozen=True)
class Pair:
    """Base and donor with the same slots, experts and shapes."""

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

    def donor_tensor(self, slot: str, expert: int = 0) -> Tensor:
        """The donor's tensor in its stored dtype; a tied head is its embedding."""
        if slot not in self.donor.pieces and slot == "lm_head.weight" and self.donor.tied:
            return self.donor.read("model.embed_tokens.weight")
        return self.donor.read(slot, expert)

    def _require_match(self) -> None:
        base, donor = self.base, self.donor
        if base.layout.model_type != donor.layout.model_type:
            raise CheckpointError(
                f"unlike models: the base is {base.layout.model_type}, the donor "
                f"{donor.layout.model_type}"
            )
        missing = [n for n in base.pieces if n not in donor.pieces]
        surplus = [n for n in donor.pieces if n not in base.pieces]
        if base.tied and donor.tied:
            # A tied head may be stored or not: either way it is the embedding.
            missing = [n for n in missing if n != "lm_head.weight"]
            surplus = [n for n in surplus if n != "lm_head.weight"]
        problems = [f"{n} is only in the base" for n in missing]
        problems += [f"{n} is only in the donor" for n in surplus]
        for name in base.pieces.keys() & donor.pieces.keys():
            left, right = base.pieces[name], donor.pieces[name]
            if len(left) != len(right):
                problems.append(f"{name}: {len(left)} experts against {len(right)}")
            elif left[0].shape != right[0].shape:
                problems.append(f"{name}: {list(left[0].shape)} against {list(right[0].shape)}")
        if problems:
            raise CheckpointError(
                f"base {base.folder} and donor {donor.folder} do not pair: "
                f"{listed(sorted(problems))}"
            )
