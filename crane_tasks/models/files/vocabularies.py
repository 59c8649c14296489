"""Two sides' tokenizers: which tokens are not the same in both.

The donor's tokenizer is used for nothing else: texts are cut by the base's. So it may lack, or
differ in what concerns few rows, if all ordinary tokens are the same.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crane_tasks.errors import CheckpointError
from crane_tasks.json_file import read_json
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.models.files.wording import listed

# Any of these, or there is no tokenizer.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
# Of the larger vocabulary, in both: below it is another tokenizer that happens to agree somewhere.
COMMON = 0.9


@dataclass(frozen=True)
class Unlike:
    """The tokens that only one side has, and their ids there."""

    base: dict[str, int]
    donor: dict[str, int]

    @property
    def ids(self) -> set[int]:
        """The rows that do not mean the same token on both sides."""
        return {*self.base.values(), *self.donor.values()}

    @property
    def tokens(self) -> dict[str, int]:
        """All of them, by id."""
        both = self.base | self.donor
        return dict(sorted(both.items(), key=lambda item: item[1]))

    def __bool__(self) -> bool:
        return bool(self.base or self.donor)

    def __str__(self) -> str:
        sides = (("base", self.base), ("donor", self.donor))
        return "; ".join(f"only in the {n}: {listed(map(repr, t))}" for n, t in sides if t)


def unlike_tokens(base: Path, donor: Path) -> Unlike:
    """The tokens that one side alone has; none if the donor has no tokenizer.

    Other special flags and another chat template are no difference.

    Raises:
        CheckpointError: a token that both have has another id, or they have little in common.
    """
    if not any((donor / name).exists() for name in VOCABULARY_FILES) or _same(base, donor):
        return Unlike({}, {})
    ours, theirs = load_tokenizer(base).get_vocab(), load_tokenizer(donor).get_vocab()
    shared = ours.keys() & theirs.keys()
    moved = sorted((t for t in shared if ours[t] != theirs[t]), key=lambda t: ours[t])
    if moved:
        named = listed(f"{t!r} ({ours[t]} against {theirs[t]})" for t in moved)
        raise CheckpointError(
            f"the tokenizers of {base} and {donor} differ: {len(moved)} tokens that both have "
            f"are other rows: {named}. CRANE merges two checkpoints of one vocabulary."
        )
    largest = max(len(ours), len(theirs))
    if len(shared) < COMMON * largest:
        raise CheckpointError(
            f"the tokenizers of {base} and {donor} differ: of {largest:,} tokens they have "
            f"{len(shared):,} in common. CRANE merges two checkpoints of one vocabulary."
        )
    single = (_only(ours, theirs), _only(theirs, ours))
    return Unlike(*single)


def _only(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    names = sorted(one.keys() - other.keys(), key=lambda t: one[t])
    return {name: one[name] for name in names}


def _same(base: Path, donor: Path) -> bool:
    """Whether both have the same files, as most pairs do: then none need be loaded."""
    files = [(side / "tokenizer.json") for side in (base, donor)]
    if not all(file.exists() for file in files):
        return False
    alike = files[0].read_bytes() == files[1].read_bytes()
    return alike and _added(base) == _added(donor)


def _added(folder: Path) -> Any:
    """What a tokenizer's config adds to its vocabulary."""
    file = folder / "tokenizer_config.json"
    try:
        config = read_json(file) if file.exists() else {}
    except (OSError, ValueError):  # said by whoever loads it
        return file
    if not isinstance(config, dict):
        return file
    names = [k for k in config if k.endswith("_token") or k.endswith("_tokens")]
    return {k: config.get(k) for k in ("added_tokens_decoder", *sorted(names))}
